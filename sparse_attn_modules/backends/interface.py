"""What a backend is given and what it must offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..token_grid import TokenGrid


@dataclass  # not frozen: that would take 2 µs more to make, of a launch's 20
class AttentionInputs:
    """One call of the operator, already checked; read-only.

    Sizes: B batch, Hq / Hkv heads, Nq / Nk tokens, Q / K blocks. The index lists mean what the properties of the same
    name of :class:`BlockMask` mean.
    """

    query: Tensor  # [B, Hq, Nq, D], last dimension contiguous, any other strides
    key: Tensor  # [B, Hkv, Nk, D], likewise
    value: Tensor  # [B, Hkv, Nk, D], likewise
    blocks: Tensor  # bool [B | 1, Hq | 1, Q, K]
    key_counts: Tensor  # int32 [B | 1, Hq | 1, Q]
    key_indices: Tensor  # int32 [B | 1, Hq | 1, Q, K]
    row_order: Tensor  # int32 [B | 1, Hq | 1, Q]
    query_counts: Tensor | None  # int32 [B | 1, Hq | 1, K]; given when gradients are needed
    query_indices: Tensor | None  # int32 [B | 1, Hq | 1, K, Q]; likewise
    rel_h: Tensor | None  # [B, Hq, Nq, key height], added to the logits of image keys, or None
    rel_w: Tensor | None  # [B, Hq, Nq, key width]; given exactly when rel_h is
    key_padding_mask: Tensor | None  # bool [B, Nk], true = ignore the key
    dropout_seed: Tensor | None  # int64 [1], on the device of the query; given when dropout_p > 0: see dropout.py
    query_grid: TokenGrid
    key_grid: TokenGrid
    scale: float
    dropout_p: float
    is_dense: bool  # every block pair is active
    density: float | None = None  # of the mask, where it is known without looking at the device

    @property
    def heads_per_key_head(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def statistics_dtype(self) -> torch.dtype:
        """dtype of softmax statistics: float32, and float64 for float64 inputs."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def new_output(self) -> Tensor:
        """Uninitialised ``[B, Hq, Nq, D]``, a transposed view of ``[B, Nq, Hq, D]``."""
        return empty_tokens_before_heads(self.query)


@dataclass(frozen=True)
class AttentionGradients:
    """Gradients of the differentiable inputs; those of the relative position exactly when it was given."""

    query: Tensor
    key: Tensor
    value: Tensor
    rel_h: Tensor | None = None
    rel_w: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """What is known of a call before it runs: enough to say whether a backend can run it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    query_grid: TokenGrid
    key_grid: TokenGrid
    relative_position: bool = False
    key_padding_mask: bool = False
    dropout: bool = False
    is_dense: bool = False
    batch: int = 1
    heads: int = 1


class Backend(Protocol):
    """A way to compute block-sparse attention. All agree within rounding; none changes the meaning of a call."""

    name: str

    def why_not(self, request: Request) -> str | None:
        """The reason why this backend cannot run the request, or None. Cheap: asked at every call."""

    def why_slower(self, request: Request) -> str | None:
        """The reason why a backend further down the list is preferred for the request, or None."""

    def why_not_here(self) -> str | None:
        """The reason why this backend cannot run at all on this machine, or None."""

    def fit_mask(self, mask: BlockMask) -> BlockMask:
        """The mask in the blocks that this backend computes in; itself where it takes any."""

    def forward(self, inputs: AttentionInputs, with_lse: bool) -> tuple[Tensor, Tensor | None]:
        """Output as :meth:`AttentionInputs.new_output`, and log-sum-exp ``[B, Hq, Nq]`` if asked for."""

    def backward(
        self, inputs: AttentionInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> AttentionGradients:
        """Gradients; ``grad_lse`` is that of the log-sum-exp, where it was used."""


def empty_tokens_before_heads(like: Tensor) -> Tensor:
    """Uninitialised, in the shape of ``[B, H, N, D]`` and the layout of :func:`tokens_before_heads`."""
    batch, heads, tokens, width = like.shape
    return like.new_empty_strided((batch, heads, tokens, width), (tokens * heads * width, width, heads * width, 1))


def tokens_before_heads(tensor: Tensor) -> Tensor:
    """``[B, H, N, D]`` as a transposed view of contiguous ``[B, N, H, D]``, the layout of projections."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)
