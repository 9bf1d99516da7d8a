"""The command ``choose``: calibrates a model on photographs, prints the trade, writes the mask file and pictures.

    python -m sparse_attn_modules choose --model vit_base_patch16_dinov3 --image-size 1024 --images photographs/

Every fourth photograph is kept from calibration, and the trade is measured on those.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ..patterns import CalibratedPattern
from .attention_mass import check_target
from .calibrated_layers import canonical_name
from .calibration import measure_attention_mass
from .choose_inputs import Subject, check_installed, check_takes, find_model, images_in, read_images
from .observing import AttentionCall, observing_attention, replaceable_slots
from .trade import TradeRow, table, trade

_DENSITIES = (0.5, 0.25, 0.125)
_HELD_OUT = 4  # every so many-th photograph


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--model",
        required=True,
        help="a model of timm by name; sam_vit_b, sam_vit_l or sam_vit_h; or path.py:function, which returns a model",
    )
    parser.add_argument("--images", required=True, type=Path, help="folder of photographs, searched to the bottom")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--density", type=float, help="fraction of attention blocks to compute; default 0.25")
    target.add_argument("--min-mass", type=float, help="fraction of the attention weight that every head keeps")
    parser.add_argument("--image-size", type=int, help="side in pixels; default: what the model was made for")
    parser.add_argument("--checkpoint", type=Path, help="weights to load; default: timm's pretrained ones")
    parser.add_argument("--random-weights", action="store_true", help="load no weights, to try the command out")
    parser.add_argument("--out", type=Path, default=Path("chosen"), help="folder to write to; default: chosen")
    parser.add_argument("--max-images", type=int, default=32, help="photographs to look at; default 32")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each density; 0 measures no times")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def choose(options: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        ValueError: if an argument is not as described, before anything is measured.
    """
    check_installed("PIL", "viz")
    check_installed("matplotlib", "viz")
    density = 0.25 if options.density is None and options.min_mass is None else options.density
    check_target("choose", density, options.min_mass)
    for name, value, least in (("max-images", options.max_images, 1), ("rounds", options.rounds, 0)):
        if value < least:
            raise ValueError(f"choose: {name} must be at least {least}, got {value}")
    paths = images_in(options.images)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"choose: out must be a folder, got {options.out}")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device).cpu()  # which the meta device cannot
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch is built without the device
        raise ValueError(f"choose: device must be one that is here, got {options.device}: {error}") from None
    load = find_model(options.model, options.image_size, options.checkpoint, options.random_weights)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        raise ValueError(f"choose: out must be a folder that can be written, got {options.out}: {error}") from None
    subject = load()
    images, unreadable = read_images(paths, subject, options.max_images)
    # The compiled kernels take half precision.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = subject.model.to(device, dtype)
    batch = torch.stack(images).to(dtype)
    check_takes(options.model, model, batch[:1].to(device))
    seen, held_out = _split(batch)

    weights = "random weights" if options.random_weights else "its weights"
    print(f"{options.model} with {weights}, images of {subject.size} × {subject.size}, {device}")
    mass = measure_attention_mass(model, seen.split(1))
    pattern = mass.choose(density=density, min_mass=options.min_mass)
    # Densities too low for the blocks that are always kept come out the same.
    distinct = dict.fromkeys([pattern, *(mass.choose(density=wanted) for wanted in _DENSITIES)])
    patterns = sorted(distinct, key=lambda found: -found.density)
    is_held_out = len(batch) >= _HELD_OUT
    held_mass = measure_attention_mass(model, held_out.split(1)) if is_held_out else mass
    rows = trade(model, held_out.to(device), patterns, held_mass, options.rounds)

    where = f"{len(held_out)} of them kept back" if is_held_out else "the same ones, for want of others"
    print(f"{len(batch)} photographs; measured on {where}\n")
    print(table(rows))
    pattern.save(options.out / "mask.safetensors")
    facts = {
        "model": options.model,
        "image_size": subject.size,
        "device": str(device),
        "rows": [r.as_dict() for r in rows],
    }
    (options.out / "trade.json").write_text(json.dumps(facts, indent=1) + "\n")
    _draw(options.out, subject, model, held_out[:1], pattern, rows)
    print(f"\nchosen: {pattern}")
    print(f"written to {options.out}: mask.safetensors, trade.json, density.png, trade.png, attention.png")
    print(f'use it: patch_model(model, CalibratedPattern.load("{options.out / "mask.safetensors"}"))')
    for path in unreadable:
        print(f"could not be read: {path}")


def _split(batch: Tensor) -> tuple[Tensor, Tensor]:
    """What to calibrate on and what to measure on: the same if there are but a few."""
    if len(batch) < _HELD_OUT:
        return batch, batch
    is_held_out = torch.arange(len(batch)) % _HELD_OUT == _HELD_OUT - 1
    return batch[~is_held_out], batch[is_held_out]


def _draw(
    out: Path, subject: Subject, model: nn.Module, image: Tensor, pattern: CalibratedPattern, rows: list[TradeRow]
) -> None:
    from ..viz import plot_head_density, plot_query_attention, plot_trade

    heads = [
        (layer.name, None if layer.is_dense else layer.chosen_blocks().double().mean((1, 2)).tolist())
        for layer in pattern.layers
    ]
    plot_head_density(heads).savefig(out / "density.png")
    points = [(row.density, row.mass, row.cosine) for row in rows]
    plot_trade(points, chosen=pattern.density).savefig(out / "trade.png")
    name = pattern.sparse_layers[-1].name
    layer = pattern.layer(name)
    assert layer.grid is not None
    query = (layer.grid.height // 2, layer.grid.width // 2)
    weights = attention_of_query(model, image, name, query)
    mask = layer.block_mask()
    figure = plot_query_attention(subject.photograph(image[0]), weights, mask, query, title=name)
    figure.savefig(out / "attention.png")


def attention_of_query(model: nn.Module, image: Tensor, name: str, query: tuple[int, int]) -> Tensor:
    """The attention weights of one patch of an image in one layer, dense: ``[heads, keys]`` on the CPU."""
    wanted = {id(slot.original) for slot in replaceable_slots(model) if canonical_name(slot.name) == name}
    found: list[Tensor] = []

    def observe(layer: nn.Module, call: AttentionCall) -> None:
        if id(layer) in wanted:
            grid = call.query_grid
            token = torch.tensor([grid.prefix + query[0] * grid.width + query[1]], device=call.query.device)
            keys = torch.arange(call.key_grid.num_tokens, device=call.query.device)
            found.append(call.weights(0, token, keys)[:, 0].float().cpu())

    device = next((parameter.device for parameter in model.parameters()), image.device)
    with observing_attention(model, observe):
        model(image.to(device))
    return found[0]
