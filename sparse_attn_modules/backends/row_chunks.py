"""Work plan of the gathered backend: query blocks with about as many keys each, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import AttentionInputs

# Rows whose key counts differ by more than this fraction are not padded to one length.
_MAX_PADDING = 0.125


@dataclass(frozen=True)
class RowChunk:
    """Some rows of query tokens and the keys they attend to: R rows of M queries and L keys."""

    query_tokens: Tensor  # int64 [R, M]; absent queries repeat the first
    query_exists: Tensor | None  # bool [R, M], or None if all do
    key_tokens: Tensor | None  # int64 [R, L]; absent keys repeat the first. None: all keys in token order, R = 1
    key_exists: Tensor | None  # bool [R, L], or None if all do
    key_blocks: Tensor | None = None  # int64 [R, K'], the blocks that the keys are from; None with key_tokens
    key_slots: Tensor | None = None  # int64 [R, L], place of each key among the slots of its blocks; None if all


def dense_chunks(inputs: AttentionInputs, slots: int) -> list[RowChunk]:
    """Runs of queries that see every key, about ``slots`` × block size logits each."""
    num_queries, num_keys = inputs.query.shape[2], inputs.key.shape[2]
    length = max(slots * inputs.query_grid.block_size // max(num_keys, 1), 1)
    tokens = torch.arange(num_queries, device=inputs.query.device)
    return [RowChunk(run[None], None, None, None) for run in tokens.split(length)]


def sparse_chunks(inputs: AttentionInputs, mask_batch: int, mask_head: int, slots: int) -> list[RowChunk]:
    """Chunks of at most ``slots`` gathered keys (or of one row). Rows without a key are left out."""
    counts = inputs.key_counts[mask_batch, mask_head].cpu()
    blocks = inputs.key_indices[mask_batch, mask_head].cpu().long()
    active = torch.arange(blocks.shape[1]) < counts[:, None]
    lengths = (inputs.key_grid.block_sizes()[blocks] * active).sum(-1)
    query_table, key_table = inputs.query_grid.block_tokens(), inputs.key_grid.block_tokens()
    device = inputs.query.device

    chunks = []
    for rows in _group(lengths, slots):
        widest = int(counts[rows].max())
        key_blocks = blocks[rows, :widest]
        tokens = key_table[key_blocks].masked_fill(~active[rows, :widest, None], -1)  # [R, K', block size]
        key_tokens, key_exists, key_slots = _pack_left(tokens.flatten(1), lengths[rows])
        query_tokens = query_table[rows]
        query_exists = query_tokens >= 0
        chunks.append(
            RowChunk(
                torch.where(query_exists, query_tokens, query_tokens[:, :1]).to(device),
                None if query_exists.all() else query_exists.to(device),
                key_tokens.to(device),
                None if key_exists is None else key_exists.to(device),
                key_blocks.to(device),
                None if key_slots is None else key_slots.to(device),
            )
        )
    return chunks


def _group(lengths: Tensor, slots: int) -> Iterator[Tensor]:
    """Row indices by falling length, so that the rows of a group have nearly one length."""
    order = torch.argsort(lengths, descending=True, stable=True)
    ordered = lengths[order].tolist()
    first = 0
    while first < len(ordered) and ordered[first] > 0:
        longest = ordered[first]
        limit = min(len(ordered), first + max(slots // longest, 1))
        last = first + 1
        while last < limit and ordered[last] >= longest * (1 - _MAX_PADDING):
            last += 1
        yield order[first:last]
        first = last


def _pack_left(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Drops the absent (negative) tokens of each row: ``[R, L]``; which of these exist, and where they were.

    Either is None if there is nothing to say.
    """
    longest = int(lengths.max())
    rows_are_even = bool((lengths == longest).all())
    if rows_are_even and longest == tokens.shape[1]:
        return tokens, None, None
    exists = tokens >= 0
    slots = torch.argsort((~exists).to(torch.uint8), dim=-1, stable=True)[:, :longest]
    packed = tokens.gather(1, slots)
    if rows_are_even:
        return packed, None, slots
    present = exists.gather(1, slots)
    # Repeating a key that the row does attend to keeps what lies in skipped ones, NaN say, out of the products.
    return torch.where(present, packed, packed[:, :1]), present, torch.where(present, slots, slots[:, :1])
