"""A timm ViT that marks digits: patches of 8 pixels, 4096 tokens, and no class token that could carry news around.

Each patch has a row of logits: whether it is marked; what digit it belongs to, in which colour, and what the card of
that colour asks for, with which it learns better; and how many patches it has, with which marked digits are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from scene_parts import NUM_CLASSES
from torch import Tensor, nn

from .scenes import COLOURS, MARKED, NOTHING, OTHER

WEIGHTS = Path(__file__).with_name("testbed.safetensors")
WIDTH, DEPTH, HEADS = 192, 8, 3
_LABELS = len((NOTHING, OTHER, MARKED))
_PARTS = (_LABELS, NUM_CLASSES, NUM_CLASSES, len(COLOURS), 1)
_LONGEST_WAVE = 64.0  # of the position embedding, over the shortest


@dataclass(frozen=True)
class Answers:
    """The model's logits by what they say: ``[B, N, channels]`` each."""

    labels: Tensor  # NOTHING, OTHER or MARKED
    classes: Tensor  # of the digit here
    asked: Tensor  # class that the card of this colour shows
    colours: Tensor  # of the digit here
    extent: Tensor  # logarithm of the number of patches of the digit

    @classmethod
    def of(cls, logits: Tensor) -> Answers:
        """Splits the output of the model."""
        return cls(*logits.float().split(_PARTS, -1))

    @property
    def decisions(self) -> Tensor:
        """``NOTHING``, ``OTHER`` or ``MARKED`` for each patch, ``[B, N]``."""
        return self.labels.argmax(-1)

    @property
    def margin(self) -> Tensor:
        """How much rather a patch of a digit is marked than not, ``[B, N]``."""
        return self.labels[..., MARKED] - self.labels[..., OTHER]

    @property
    def count(self) -> Tensor:
        """The number of marked digits, each the sum of its patches, not rounded: ``[B]``."""
        return (self.labels.softmax(-1)[..., MARKED] * (-self.extent[..., 0]).exp()).sum(-1)


def create(size: int = 512, width: int = WIDTH, depth: int = DEPTH, heads: int = HEADS) -> nn.Module:
    """The model with random weights, for square images of ``size`` pixels. Its output is ``[B, N, channels]``."""
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=size,
        patch_size=8,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        class_token=False,
        global_pool="",
        weight_init="moco",
        num_classes=sum(_PARTS),
    )
    model.patch_embed.proj = _stem(width)
    with torch.no_grad():
        side = size // 8
        model.pos_embed.copy_(position_embedding(side, side, width))
    return model


def load(device: torch.device | str = "cpu", weights: Path = WEIGHTS) -> nn.Module:
    """The trained model in float32, ready to be evaluated."""
    from safetensors.torch import load_file

    state = {name: tensor.float() for name, tensor in load_file(weights).items()}
    model = create()
    model.load_state_dict(state)
    return model.to(device).eval()


def save(model: nn.Module, weights: Path) -> None:
    """Writes the weights in half precision."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, weights)


def position_embedding(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of the row and of the column, ``[1, height · width, channels]`` (arXiv:1706.03762)."""
    frequencies = _LONGEST_WAVE ** -torch.linspace(0, 1, channels // 4)
    rows, columns = (torch.arange(count)[:, None] * frequencies for count in (height, width))
    rows, columns = (torch.cat([axis.sin(), axis.cos()], -1) for axis in (rows, columns))  # [side, channels / 2]
    table = torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], -1)
    return 0.5 * table.flatten(0, 1)[None]


def _stem(width: int) -> nn.Sequential:
    """Convolutions in place of one large one, with which a ViT learns faster (arXiv:2106.14881)."""
    widths = (3, 32, 64, 128)
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.GELU()]
    for layer in (*layers, last := nn.Conv2d(widths[-1], width, 3, padding=1)):
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if layer is not last else "linear")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers, last)
