"""Work plan of the gathered backend: query blocks with about as many keys each, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..token_grid import TokenGrid
from .interface import AttentionInputs

# Rows whose key counts differ by more than this fraction are not padded to one length.
_MAX_PADDING = 0.125


@dataclass(frozen=True)
class RowChunk:
    """Some rows of query tokens and the keys they attend to: R rows of M queries and L keys."""

    query_tokens: Tensor  # int64 [R, M]; absent queries repeat token 0
    query_exists: Tensor | None  # bool [R, M], or None if all do
    key_tokens: Tensor | None  # int64 [R, L]; absent keys repeat token 0. None: all keys in token order, R = 1
    key_exists: Tensor | None  # bool [R, L], or None if all do


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
        tokens = key_table[blocks[rows, :widest]].masked_fill(~active[rows, :widest, None], -1)  # [R, K', block]
        key_tokens, key_exists = _pack_left(tokens.flatten(1), lengths[rows])
        query_tokens = query_table[rows]
        query_exists = query_tokens >= 0
        chunks.append(
            RowChunk(
                query_tokens.clamp(min=0).to(device),
                None if query_exists.all() else query_exists.to(device),
                key_tokens.to(device),
                None if key_exists is None else key_exists.to(device),
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


def _pack_left(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
    """Drops the absent (negative) tokens of each row: ``[R, L]``, and which entries exist unless all do."""
    exists = tokens >= 0
    longest = int(lengths.max())
    if longest == tokens.shape[1] and bool((lengths == longest).all()):
        return tokens, None
    if bool((lengths == longest).all()):
        return tokens[exists].view(-1, longest), None
    slots = torch.argsort((~exists).to(torch.uint8), dim=-1, stable=True)[:, :longest]
    return tokens.gather(1, slots).clamp(min=0), exists.gather(1, slots)


def key_positions(grid: TokenGrid, chunk: RowChunk, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each key of a chunk on the image, extra tokens −1: int64 ``[R, L]`` each."""
    rows, columns = grid.patch_rows(device), grid.patch_columns(device)
    if chunk.key_tokens is None:
        return rows[None], columns[None]
    return rows[chunk.key_tokens], columns[chunk.key_tokens]
