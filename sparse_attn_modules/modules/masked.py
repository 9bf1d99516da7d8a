"""Attention under a mask of single token pairs, which blocks cannot express.

Every pair is computed and the forbidden ones are masked: no faster than dense attention, but exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention in which a query with no key yields 0, as in :func:`block_sparse_attention`.

    Args:
        query: ``[B, H, Nq, D]``.
        key, value: ``[B, H, Nk, D]``.
        allowed: bool, broadcastable to ``[B, H, Nq, Nk]``, true where attention is allowed; everywhere if None.
        bias: added to the scaled logits, broadcastable likewise; −inf forbids. Differentiable.
        scale: factor on ``query · key``; ``D ** -0.5`` if None.
        dropout_p: probability of dropping an attention weight.
        need_weights: also return the attention weights, after dropout.

    Returns:
        ``[B, H, Nq, D]``, and ``[B, H, Nq, Nk]`` or None.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        forbidden = bias == -torch.inf
        allowed = ~forbidden if allowed is None else allowed & ~forbidden
        # Masks of the most negative number of a wider dtype would overflow to −inf here, and a row of them to NaN.
        bias = bias.to(query.dtype).clamp(min=torch.finfo(query.dtype).min / 2).masked_fill(forbidden, 0)
    has_key = None
    if allowed is not None:
        has_key = allowed.any(-1, keepdim=True)  # [B, H, Nq, 1]
        # Softmax over nothing is NaN, also in the gradient, so a query without keys attends to all and is then erased.
        allowed = allowed | ~has_key
    if need_weights:
        weights = _weights(query * scale, key, allowed, bias)
        if has_key is not None:
            weights = weights.masked_fill(~has_key, 0)
        weights = F.dropout(weights, dropout_p)
        return weights @ value, weights
    mask = allowed if bias is None or allowed is None else bias.masked_fill(~allowed, -torch.inf)
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)
    return out if has_key is None else out.masked_fill(~has_key, 0), None


def _weights(query: Tensor, key: Tensor, allowed: Tensor | None, bias: Tensor | None) -> Tensor:
    logits = query @ key.mT  # [B, H, Nq, Nk]
    if bias is not None:
        logits = logits + bias
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    statistics = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.softmax(logits, dim=-1, dtype=statistics).to(logits.dtype)
