"""FlexAttention, PyTorch's compiled block-sparse attention, on CUDA.

Its blocks are runs of consecutive tokens, so tokens are permuted into block order first, ragged blocks padded, and the
output permuted back. Compiled once per geometry; a new mask of the same geometry is another input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask
from ..token_grid import TokenGrid
from . import gathered
from .interface import AttentionGradients, AttentionInputs, Request, tokens_before_heads

name = "flex"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(request: Request) -> str | None:
    if request.device.type != "cuda":
        return f"it needs CUDA tensors, got {request.device.type}"
    if request.dtype not in _DTYPES:
        return f"it has no {request.dtype}"
    if request.dropout:
        return "it has no dropout"
    for grid in (request.query_grid, request.key_grid):
        if grid.block_size % 16 or grid.block_size & (grid.block_size - 1):
            return f"its blocks must be a power of two ≥ 16 tokens, got {grid.block_size}"
    return why_not_here()


def why_slower(request: Request) -> str | None:
    # Measured on an H200, milliseconds: see the benchmarks' README.
    if request.relative_position:
        return "with a relative position it is slower than gathered"
    if request.is_dense:
        return "dense attention is at least as fast in scaled_dot_product_attention, without compiling"
    return None


def why_not_here() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton, which compiles it, is not installed"
    return None


def fit_mask(mask: BlockMask) -> BlockMask:
    return mask


def forward(inputs: AttentionInputs, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    out, lse = attend(inputs, _compiled())
    return out, lse if with_lse else None


def backward(
    inputs: AttentionInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> AttentionGradients:
    # FlexAttention's own backward is reachable only through its autograd, which an operator's implementation is below.
    return gathered.backward(inputs, grad_out, grad_lse, out, lse)


def attend(inputs: AttentionInputs, flex_attention: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by a given ``flex_attention``, compiled or not."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

    query_slots, key_slots = (_Slots(grid, inputs.query.device) for grid in (inputs.query_grid, inputs.key_grid))
    query = inputs.query[:, :, query_slots.tokens]  # [B, H, query blocks × block size, D]
    key, value = inputs.key[:, :, key_slots.tokens], inputs.value[:, :, key_slots.tokens]
    exists = key_slots.exists
    padding = inputs.key_padding_mask
    ignored = None if padding is None else padding[:, key_slots.tokens]

    blocks = inputs.blocks.expand(*inputs.query.shape[:2], -1, -1)
    query_size, key_size = inputs.query_grid.block_size, inputs.key_grid.block_size

    def is_attended(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # The compiled kernel asks only inside the blocks it visits; uncompiled, this is the whole mask.
        attended = blocks[b, h, q // query_size, k // key_size] & exists[k]
        return attended if ignored is None else attended & ~ignored[b, k]

    has_ragged_blocks = not key_slots.is_full or ignored is not None
    counts, indices = inputs.key_counts, inputs.key_indices
    none = torch.zeros_like(counts)
    mask = BlockMask.from_kv_blocks(
        counts if has_ragged_blocks else none,
        indices,
        none if has_ragged_blocks else counts,
        indices,
        BLOCK_SIZE=(query_size, key_size),
        mask_mod=is_attended,
        seq_lengths=(query.shape[2], key.shape[2]),
    )
    score_mod = None
    if inputs.rel_h is not None and inputs.rel_w is not None:
        # The column appended last is 0 and belongs to extra tokens.
        rel_h, rel_w = (F.pad(rel[:, :, query_slots.tokens], (0, 1)) for rel in (inputs.rel_h, inputs.rel_w))
        rows = inputs.key_grid.patch_rows(query.device)[key_slots.tokens] % rel_h.shape[-1]
        columns = inputs.key_grid.patch_columns(query.device)[key_slots.tokens] % rel_w.shape[-1]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + rel_h[b, h, q, rows[k]] + rel_w[b, h, q, columns[k]]

    out, auxiliary = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=mask,
        scale=inputs.scale,
        enable_gqa=inputs.heads_per_key_head > 1,
        return_aux=AuxRequest(lse=True),
    )
    out, lse = out[:, :, query_slots.of_token], auxiliary.lse[:, :, query_slots.of_token]
    return tokens_before_heads(out), lse.to(inputs.statistics_dtype)


class _Slots:
    """Where tokens lie once every block is padded to its full size."""

    def __init__(self, grid: TokenGrid, device: torch.device) -> None:
        table = grid.block_tokens(device).flatten()
        self.exists = table >= 0
        self.tokens = table.clamp(min=0)
        self.is_full = grid.num_tokens == table.numel()
        self.of_token = torch.argsort(torch.where(self.exists, table, table.numel()), stable=True)[: grid.num_tokens]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
