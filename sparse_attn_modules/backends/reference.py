"""The specification of block-sparse attention: every token pair is written out and the inactive ones are masked.

Products run over masked pairs too, so all inputs must be finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_mask import BlockMask
from .dropout import dropout_factors, row_hashes
from .interface import AttentionGradients, AttentionInputs, Request

name = "reference"


def why_not(request: Request) -> str | None:
    return None


def why_slower(request: Request) -> str | None:
    return None


def why_not_here() -> str | None:
    return None


def fit_mask(mask: BlockMask) -> BlockMask:
    return mask


def forward(inputs: AttentionInputs, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    weights, lse = _weights(inputs)
    if inputs.dropout_p > 0:
        weights = weights * _dropout_factors(inputs, weights)
    value = _per_query_head(inputs.value, inputs).to(weights.dtype)
    out = inputs.new_output()
    out.copy_(weights @ value)
    return out, lse if with_lse else None


def backward(
    inputs: AttentionInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> AttentionGradients:
    weights, _ = _weights(inputs)
    query = inputs.query.to(weights.dtype)
    key = _per_query_head(inputs.key, inputs).to(weights.dtype)
    value = _per_query_head(inputs.value, inputs).to(weights.dtype)
    grad_out = grad_out.to(weights.dtype)

    grad_weights = grad_out @ value.mT  # [B, Hq, Nq, Nk]
    dropped = weights
    if inputs.dropout_p > 0:
        factors = _dropout_factors(inputs, weights)
        grad_weights = grad_weights * factors
        dropped = weights * factors
    row_sum = (weights * grad_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        row_sum = row_sum - grad_lse[..., None]
    grad_logits = weights * (grad_weights - row_sum)

    grad_query = grad_logits @ key * inputs.scale
    grad_key = grad_logits.mT @ query * inputs.scale
    grad_value = dropped.mT @ grad_out
    grad_rel_h = grad_rel_w = None
    if inputs.rel_h is not None and inputs.rel_w is not None:
        grid = inputs.key_grid
        image = grad_logits[..., grid.prefix : grid.prefix + grid.num_patches].unflatten(-1, (grid.height, grid.width))
        grad_rel_h = image.sum(-1).to(inputs.rel_h.dtype)
        grad_rel_w = image.sum(-2).to(inputs.rel_w.dtype)
    return AttentionGradients(
        grad_query.to(inputs.query.dtype),
        _sum_over_query_heads(grad_key, inputs).to(inputs.key.dtype),
        _sum_over_query_heads(grad_value, inputs).to(inputs.value.dtype),
        grad_rel_h,
        grad_rel_w,
    )


def _weights(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Softmax over the active keys, zero where there is none, and log-sum-exp, −inf where there is none."""
    dtype = inputs.statistics_dtype
    key = _per_query_head(inputs.key, inputs).to(dtype)
    logits = inputs.query.to(dtype) @ key.mT * inputs.scale  # [B, Hq, Nq, Nk]
    if inputs.rel_h is not None and inputs.rel_w is not None:
        grid = inputs.key_grid
        bias = inputs.rel_h[..., :, None].to(dtype) + inputs.rel_w[..., None, :].to(dtype)  # [B, Hq, Nq, Kh, Kw]
        logits[..., grid.prefix : grid.prefix + grid.num_patches] += bias.flatten(-2)
    logits = logits.masked_fill(~_token_mask(inputs), -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    # exp(−inf − −inf) is NaN, so a query without keys is measured against 0.
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return weights, lse


def _token_mask(inputs: AttentionInputs) -> Tensor:
    device = inputs.query.device
    rows = inputs.blocks[:, :, inputs.query_grid.block_of_token(device)]
    mask = rows[..., inputs.key_grid.block_of_token(device)]
    if inputs.key_padding_mask is not None:
        mask = mask & ~inputs.key_padding_mask[:, None, None, :]
    return mask


def _dropout_factors(inputs: AttentionInputs, weights: Tensor) -> Tensor:
    """Of all weights ``[B, Hq, Nq, Nk]``."""
    assert inputs.dropout_seed is not None
    batch, heads, queries, keys = (torch.arange(size, device=weights.device) for size in weights.shape)
    rows = row_hashes(inputs.dropout_seed, (batch[:, None] * len(heads) + heads)[..., None], queries)  # [B, Hq, Nq]
    return dropout_factors(rows[..., None], keys, inputs.dropout_p, weights.dtype)


def _per_query_head(tensor: Tensor, inputs: AttentionInputs) -> Tensor:
    return tensor.repeat_interleave(inputs.heads_per_key_head, dim=1)


def _sum_over_query_heads(tensor: Tensor, inputs: AttentionInputs) -> Tensor:
    return tensor.unflatten(1, (-1, inputs.heads_per_key_head)).sum(2)
