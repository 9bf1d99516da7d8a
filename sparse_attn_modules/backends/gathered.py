"""Any device, forward and backward: gathers the active keys of a few query blocks and attends to them densely.

The keys of a handful of query blocks stay in cache on a CPU, which is where the speed over dense attention comes from;
on an accelerator whole heads are taken together to keep the number of launches low. Nothing of size N² exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask
from .chunk_bias import chunk_bias, sums_over_keys
from .dropout import dropout_factors, row_hashes
from .interface import AttentionGradients, AttentionInputs, Request, tokens_before_heads
from .row_chunks import RowChunk, dense_chunks, sparse_chunks

name = "gathered"

# Gathered keys per chunk. On a CPU 8192 keys of 64 float32 values are 2 MiB, which two cores' caches hold; a half and
# four times as many measured slower.
_CPU_SLOTS = 8192
_ACCELERATOR_SLOTS = 2**20


def why_not(request: Request) -> str | None:
    return None


def why_not_here() -> str | None:
    return None


def why_slower(request: Request) -> str | None:
    return None


def fit_mask(mask: BlockMask) -> BlockMask:
    return mask


def forward(inputs: AttentionInputs, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    plain = not with_lse and inputs.key_padding_mask is None and inputs.dropout_p == 0
    if plain and inputs.is_dense and inputs.rel_h is None:
        return dense_attention(inputs.query, inputs.key, inputs.value, inputs.scale), None
    statistics = inputs.statistics_dtype
    out = _zeros(inputs.query)
    lse = out.new_full(inputs.query.shape[:-1], -torch.inf, dtype=statistics) if with_lse else None
    for unit in _units(inputs):
        unit_out = unit.take(out)
        for chunk in unit.chunks:
            query, key, value = unit.gather(chunk)
            if plain:
                bias = _logit_bias(inputs, unit, chunk, query.dtype)
                result = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=inputs.scale)
            else:
                logits = _logits(inputs, unit, chunk, query.to(statistics).mul_(inputs.scale), key.to(statistics))
                # A query whose keys are all ignored is measured against a finite maximum, as −inf − −inf is NaN.
                maximum = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(statistics).min)
                weights = logits.sub_(maximum).exp_()
                total = weights.sum(-1, keepdim=True)
                if lse is not None:
                    _scatter_rows(unit.take(lse)[..., None], chunk, maximum + total.log())
                if inputs.dropout_p > 0:
                    weights = weights * _dropout_factors(unit, chunk, weights.dtype)
                result = unit.workspace.matmul("result", weights, value.to(statistics))
                result.div_(total.masked_fill_(total == 0, 1))
            _scatter_rows(unit_out, chunk, result)
    return tokens_before_heads(out), lse


def backward(
    inputs: AttentionInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> AttentionGradients:
    statistics = inputs.statistics_dtype
    grad_query, grad_key, grad_value = (
        _zeros(tensor, statistics) for tensor in (inputs.query, inputs.key, inputs.value)
    )
    grads_rel = [
        None if rel is None else torch.zeros_like(rel, memory_format=torch.contiguous_format)
        for rel in (inputs.rel_h, inputs.rel_w)
    ]
    # What every logit's gradient of a query loses: delta of FlashAttention-2 (arXiv:2307.08691). An output that was
    # rounded to a lower precision would spoil it, so then it is summed from the weights instead.
    delta = (grad_out * out).sum(-1, keepdim=True) if out.dtype == statistics else None
    for unit in _units(inputs):
        # Contiguous, as adding to scattered rows of a strided tensor takes several times as long.
        unit_grad_key, unit_grad_value = (
            unit.workspace.take(name, tuple(unit.key.shape), lse).zero_() for name in ("grad_key", "grad_value")
        )
        unit_grad_out = unit.workspace.copy("head_grad_out", unit.take(grad_out))
        for chunk in unit.chunks:
            query, key, value = (tensor.to(statistics) for tensor in unit.gather(chunk))
            query.mul_(inputs.scale)
            chunk_grad_out = unit.workspace.gather("grad_out", unit_grad_out, chunk.query_tokens).to(statistics)
            chunk_lse = _gather_rows(unit.take(lse)[..., None], chunk)
            if chunk.query_exists is not None:
                # Absent queries repeat the first: without weights they give nothing to the keys.
                chunk_lse = chunk_lse.masked_fill(~chunk.query_exists[..., None], torch.inf)
            # Without any key lse is −inf; measured against 0 such a query's weights are 0, not NaN.
            chunk_lse = chunk_lse.masked_fill(chunk_lse == -torch.inf, 0)
            weights = _logits(inputs, unit, chunk, query, key).sub_(chunk_lse).exp_()  # [U, R, M, L]
            grad_weights = unit.workspace.matmul("grad_weights", chunk_grad_out, value.mT)
            dropped = weights
            if inputs.dropout_p > 0:
                factors = _dropout_factors(unit, chunk, weights.dtype)
                grad_weights.mul_(factors)
                dropped = weights * factors
            _add_to_keys(unit_grad_value, chunk, unit.workspace.matmul("grad_kv", dropped.mT, chunk_grad_out))
            if delta is None:
                chunk_delta = (weights * grad_weights).sum(-1, keepdim=True)
            else:
                chunk_delta = _gather_rows(unit.take(delta), chunk)
            if grad_lse is not None:
                chunk_delta = chunk_delta - _gather_rows(unit.take(grad_lse)[..., None], chunk)
            grad_logits = grad_weights.sub_(chunk_delta).mul_(weights)
            chunk_grad_query = unit.workspace.matmul("result", grad_logits, key).mul_(inputs.scale)
            _scatter_rows(unit.take(grad_query), chunk, chunk_grad_query)
            _add_to_keys(unit_grad_key, chunk, unit.workspace.matmul("grad_kv", grad_logits.mT, query))
            if inputs.rel_h is not None:
                sums = sums_over_keys(grad_logits, inputs.key_grid, chunk)
                for grad_rel, chunk_sum in zip(grads_rel, sums):
                    assert grad_rel is not None
                    _scatter_rows(unit.take(grad_rel), chunk, chunk_sum)
        unit.add_to_key_heads(grad_key, unit_grad_key)
        unit.add_to_key_heads(grad_value, unit_grad_value)
    return AttentionGradients(
        grad_query.to(inputs.query.dtype), grad_key.to(inputs.key.dtype), grad_value.to(inputs.value.dtype), *grads_rel
    )


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention without anything to skip: PyTorch's own kernels, which are differentiable."""
    grouped = bool(query.shape[1] != key.shape[1])  # a tensor under torch.jit.trace
    out = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
    return tokens_before_heads(out)


def _zeros(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros ``[B, H, N, D]`` in the layout in which :meth:`_Unit.take` gives views of all units on the device."""
    batch, heads, tokens, width = tensor.shape
    if tensor.device.type == "cpu":
        return tensor.new_zeros(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)
    return tensor.new_zeros(batch, heads, tokens, width, dtype=dtype)


class _Workspace:
    """Buffers that every chunk of a call reuses: fresh ones of this size would cost page faults at each chunk."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised tensor of a shape, with the dtype and device of another; valid until taken again."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype:
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)

    def gather(self, name: str, tensor: Tensor, tokens: Tensor) -> Tensor:
        """``[U, N, X]`` at tokens ``[R, L]``, in a reused buffer: ``[U, R, L, X]``."""
        rows = self.take(name, (tensor.shape[0], tokens.numel(), tensor.shape[2]), tensor)
        return torch.index_select(tensor, 1, tokens.flatten(), out=rows).unflatten(1, tokens.shape)

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, contiguous: index_select would copy a strided one again at every chunk."""
        return tensor if tensor.is_contiguous() else self.take(name, tuple(tensor.shape), tensor).copy_(tensor)

    def matmul(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right`` in a reused buffer; both have four dimensions and the same leading two."""
        shape = (*left.shape[:3], right.shape[3])
        product = self.take(name, (shape[0] * shape[1], *shape[2:]), left)
        torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=product)
        return product.view(shape)


@dataclass(frozen=True)
class _Unit:
    """Heads that share the rows of the mask and are computed together: U of them."""

    inputs: AttentionInputs
    batches: int | slice
    heads: int | slice
    chunks: list[RowChunk]
    query: Tensor  # [U, Nq, D]
    key: Tensor  # [U, Nk, D], one per query head
    value: Tensor  # [U, Nk, D], likewise
    workspace: _Workspace

    def take(self, tensor: Tensor) -> Tensor:
        """This unit's part of ``[B, Hq, …]`` as ``[U, …]``: a view where the layout allows one."""
        return tensor[self.batches, self.heads].reshape(-1, *tensor.shape[2:])

    def add_to_key_heads(self, target: Tensor, rows: Tensor) -> None:
        """Adds ``[U, Nk, D]``, one part per query head, to this unit's part of ``[B, Hkv, Nk, D]``."""
        group = self.inputs.heads_per_key_head
        if isinstance(self.heads, int):
            part = target[self.batches, self.heads // group]
        else:
            part = target[self.batches]
            rows = rows.unflatten(0, (-1, group)).sum(1)
        part.add_(rows.view(part.shape))

    def gather(self, chunk: RowChunk) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[U, R, M, D]``, keys and values ``[U, R, L, D]`` of a chunk."""
        query = self.workspace.gather("query", self.query, chunk.query_tokens)
        if chunk.key_tokens is None:
            return query, self.key[:, None], self.value[:, None]
        key = self.workspace.gather("key", self.key, chunk.key_tokens)
        return query, key, self.workspace.gather("value", self.value, chunk.key_tokens)


def _units(inputs: AttentionInputs) -> Iterator[_Unit]:
    batch, heads = inputs.query.shape[:2]
    mask_batch, mask_heads = inputs.key_counts.shape[:2]
    on_cpu = inputs.query.device.type == "cpu"
    together: list[int | slice] = [slice(None)]
    batches = range(batch) if on_cpu or mask_batch > 1 else together
    head_groups = range(heads) if on_cpu or mask_heads > 1 else together
    plans: dict[tuple[int, int], list[RowChunk]] = {}
    workspace = _Workspace()
    for b in batches:
        for h in head_groups:
            mask_index = (
                b if isinstance(b, int) and mask_batch > 1 else 0,
                h if isinstance(h, int) and mask_heads > 1 else 0,
            )
            query = workspace.copy("head_query", inputs.query[b, h].reshape(-1, *inputs.query.shape[2:]))
            if mask_index not in plans:
                slots = _CPU_SLOTS if on_cpu else max(_ACCELERATOR_SLOTS // query.shape[0], 1)
                plans[mask_index] = (
                    dense_chunks(inputs, slots) if inputs.is_dense else sparse_chunks(inputs, *mask_index, slots)
                )
            group = inputs.heads_per_key_head
            key, value = (
                tensor[b, h // group] if isinstance(h, int) else tensor[b].repeat_interleave(group, -3)
                for tensor in (inputs.key, inputs.value)
            )
            key = workspace.copy("head_key", key.reshape(-1, *inputs.key.shape[2:]))
            value = workspace.copy("head_value", value.reshape(-1, *inputs.value.shape[2:]))
            yield _Unit(inputs, b, h, plans[mask_index], query, key, value, workspace)


def _gather_rows(tensor: Tensor, chunk: RowChunk) -> Tensor:
    """``[U, Nq, X]`` → ``[U, R, M, X]``."""
    rows = tensor.index_select(1, chunk.query_tokens.flatten())
    return rows.unflatten(1, chunk.query_tokens.shape)


def _scatter_rows(target: Tensor, chunk: RowChunk, rows: Tensor) -> None:
    """Writes ``[U, R, M, X]`` to the chunk's queries of ``[U, Nq, X]``."""
    tokens, rows = chunk.query_tokens.flatten(), rows.flatten(1, 2).to(target.dtype)
    if chunk.query_exists is not None:
        exists = chunk.query_exists.flatten()
        tokens, rows = tokens[exists], rows[:, exists]
    target.index_copy_(1, tokens, rows)


def _add_to_keys(target: Tensor, chunk: RowChunk, rows: Tensor) -> None:
    """Adds ``[U, R, L, D]`` to the chunk's keys of ``[U, Nk, D]``."""
    if chunk.key_tokens is None:
        target.add_(rows[:, 0])
    else:
        # Absent keys repeat the first and carry zeros.
        target.index_add_(1, chunk.key_tokens.flatten(), rows.flatten(1, 2))


def _logit_bias(inputs: AttentionInputs, unit: _Unit, chunk: RowChunk, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scaled logits, −inf for keys to ignore: broadcasts to ``[U, R, M, L]``; None if nothing."""
    bias: Tensor | None = None
    if inputs.rel_h is not None and inputs.rel_w is not None:
        rel_h, rel_w = (_gather_rows(unit.take(rel), chunk).to(dtype) for rel in (inputs.rel_h, inputs.rel_w))
        bias = chunk_bias(rel_h, rel_w, inputs.key_grid, chunk)
    ignored = None if chunk.key_exists is None else ~chunk.key_exists[None]
    if inputs.key_padding_mask is not None:
        padding = inputs.key_padding_mask[unit.batches].reshape(-1, inputs.key.shape[2])  # [B', Nk]
        padding = padding.repeat_interleave(unit.query.shape[0] // padding.shape[0], 0)[:, None]  # [U, 1, Nk]
        if chunk.key_tokens is not None:
            padding = padding[:, 0, chunk.key_tokens]  # [U, R, L]
        ignored = padding if ignored is None else ignored | padding
    if ignored is not None:
        ignored = ignored[:, :, None]
        base = torch.zeros(ignored.shape, dtype=dtype, device=ignored.device) if bias is None else bias
        bias = base.masked_fill(ignored, -torch.inf)
    return bias


def _logits(inputs: AttentionInputs, unit: _Unit, chunk: RowChunk, query: Tensor, key: Tensor) -> Tensor:
    """Logits ``[U, R, M, L]`` of scaled queries with the bias, in a reused buffer."""
    logits = unit.workspace.matmul("logits", query, key.mT)
    bias = _logit_bias(inputs, unit, chunk, logits.dtype)
    return logits if bias is None else logits.add_(bias)


def _dropout_factors(unit: _Unit, chunk: RowChunk, dtype: torch.dtype) -> Tensor:
    """Of the chunk's weights ``[U, R, M, L]``."""
    inputs, device = unit.inputs, unit.query.device
    assert inputs.dropout_seed is not None
    batch, heads = inputs.query.shape[:2]
    numbers = torch.arange(batch * heads, device=device).view(batch, heads)[unit.batches, unit.heads].reshape(-1)
    rows = row_hashes(inputs.dropout_seed, numbers[:, None, None], chunk.query_tokens)  # [U, R, M]
    keys = chunk.key_tokens
    if keys is None:
        keys = torch.arange(inputs.key.shape[2], device=device)[None]
    return dropout_factors(rows[..., None], keys[:, None], inputs.dropout_p, dtype)
