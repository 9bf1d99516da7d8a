"""Rotary position (arXiv:2104.09864) of the patches of a sequence; the tokens before them have none."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tracing import is_watched


def rotate(tensor: Tensor, rope: Tensor, prefix: int, half: bool, *, overwrite: bool = False) -> Tensor:
    """Queries or keys turned by their positions, computed in the wider of the two dtypes and rounded once.

    Where autograd or a compiler watches, this is one expression, which a compiler makes one pass of. Else the products
    that cross over are formed first, so that the rest can be written where the tensor lies, without copying the prefix.

    Args:
        tensor: ``[B, H, N, D]``.
        rope: sine and cosine, concatenated: broadcasts to ``[B, H, N − prefix, 2 D]``.
        prefix: number of leading tokens that are left as they are.
        half: pairs are the halves of a head's channels rather than neighbours.
        overwrite: ``tensor`` may be written to, as nobody else will read it.

    Returns:
        The shape and dtype of ``tensor``.
    """
    sine, cosine = rope.chunk(2, dim=-1)
    patches = tensor[:, :, prefix:]
    if is_watched() or (torch.is_grad_enabled() and (tensor.requires_grad or rope.requires_grad)):
        first, second = _pairs(patches, half)
        turned = torch.cat([-second, first], -1) if half else torch.stack([-second, first], -1).flatten(-2)
        return torch.cat([tensor[:, :, :prefix], (patches * cosine + turned * sine).to(tensor.dtype)], dim=2)
    out = tensor
    if not overwrite:
        out = torch.empty_like(tensor)
        out[:, :, :prefix] = tensor[:, :, :prefix]
    pairs = zip(_pairs(patches, half), _pairs(sine, half), _pairs(cosine, half), _pairs(out[:, :, prefix:], half))
    (first, first_sine, first_cosine, first_out), (second, second_sine, second_cosine, second_out) = pairs
    to_first, to_second = second * -first_sine, first * second_sine
    torch.addcmul(to_first, first, first_cosine, out=first_out)
    torch.addcmul(to_second, second, second_cosine, out=second_out)
    return out


def _pairs(tensor: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second channel of each pair."""
    if half:
        first, second = tensor.chunk(2, dim=-1)
        return first, second
    return tensor[..., ::2], tensor[..., 1::2]
