"""How to call other block-sparse attention kernels, with the same masks and inputs.

Each function prepares its index lists once and returns a call. What is missing raises ``ImportError`` when called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[int], Tensor]
_BLOCK = 128


def _index_lists(active: Tensor) -> tuple[Tensor, Tensor]:
    """bool ``[B, H, rows, columns]`` -> int32 counts ``[B, H, rows]`` and indices, active ones first."""
    order = torch.argsort(active.int(), dim=-1, descending=True, stable=True)
    return active.sum(-1).int().contiguous(), order.int().contiguous()


def fa4_dense(sets: list[list[Tensor]]) -> Call:
    """FlashAttention-4 over every pair. Tensors ``[B, N, H, D]``."""

    def call(i: int) -> Tensor:
        from flash_attn.cute.interface import flash_attn_func

        out = flash_attn_func(*sets[i % len(sets)])
        return out[0] if isinstance(out, tuple) else out

    return call


def flash_attention_4(sets: list[list[Tensor]], active: Tensor) -> Call:
    """FlashAttention-4's block-sparse kernel, differentiable. Tensors ``[B, N, H, D]``."""
    of_queries, of_keys = _fa4_lists(active), _fa4_lists(active.mT)

    def call(i: int) -> Tensor:
        from flash_attn.cute.interface import flash_attn_func

        out = flash_attn_func(
            *sets[i % len(sets)],
            block_sparse_tensors=of_queries(),
            block_sparse_tensors_bwd=of_keys(),
        )
        return out[0] if isinstance(out, tuple) else out

    return call


def _fa4_lists(active: Tensor) -> Callable[[], Any]:
    """Every block is whole: the lists of blocks with a mask of their own stay empty."""
    counts, indices = _index_lists(active)
    none, nothing = torch.zeros_like(counts), torch.zeros_like(indices)

    def lists() -> Any:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        return BlockSparseTensorsTorch(
            mask_block_cnt=none,
            mask_block_idx=nothing,
            full_block_cnt=counts,
            full_block_idx=indices,
            block_size=(_BLOCK, _BLOCK),
        )

    return lists


def cudnn_block_sparse(sets: list[list[Tensor]], active: Tensor) -> Call:
    """cuDNN's block-sparse attention, for rows of equal length. Tensors ``[B, H, N, D]``."""
    counts, indices = _index_lists(active)
    per_row = int(counts.max())
    listed = indices[..., :per_row].contiguous()

    def call(i: int) -> Tensor:
        from cudnn.block_sparse_attention import block_sparse_attention_forward

        return block_sparse_attention_forward(*sets[i % len(sets)], listed, per_row, sparse_block_size=_BLOCK)[
            "o_tensor"
        ]

    return call


def cudnn_block_sparse_backward(sets: list[list[Tensor]], grads: list[Tensor], active: Tensor) -> Call:
    """The backward pass of the same, which takes its forward pass's results; head_dim 128. Tensors ``[B, H, N, D]``."""
    counts, indices = _index_lists(active)
    per_row = int(counts.max())
    listed = indices[..., :per_row].contiguous()
    results: dict[int, Any] = {}

    def call(i: int) -> Any:
        from cudnn.block_sparse_attention import block_sparse_attention_backward, block_sparse_attention_forward

        which = i % len(sets)
        tensors, lists = sets[which], (listed, per_row)
        if which not in results:
            results[which] = block_sparse_attention_forward(*tensors, *lists, sparse_block_size=_BLOCK)
        out = results[which]
        return block_sparse_attention_backward(
            grads[which], *tensors, out["o_tensor"], out["lse_tensor"], *lists, sparse_block_size=_BLOCK
        )

    return call


def flex(sets: list[list[Tensor]], active: Tensor) -> Call:
    """Compiled FlexAttention with whole blocks. Tensors ``[B, H, N, D]``."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts, indices = _index_lists(active)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(indices), counts, indices, BLOCK_SIZE=(_BLOCK, _BLOCK)
    )
    compiled = torch.compile(flex_attention)
    return lambda i: compiled(*sets[i % len(sets)], block_mask=mask)
