"""Self-attention of vision transformers, block-sparse: timm's ``Attention``, ``AttentionRope`` and ``EvaAttention``.

The three differ in how query, key and value are projected, biased and rotated; what follows is the same. The output of
a fused projection is read in place: query, key and value are views of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..notices import log_once
from ..patterns import Dense, Pattern
from ..token_grid import TokenGrid
from .base import SparseAttention, head_dim_of
from .masked import masked_attention
from .plain_linear import is_plain_linear
from .rotary import rotate

_NAME = "ViTSparseAttention"
_REPLACED = (
    ("timm.layers.attention", "Attention"),
    ("timm.layers.attention", "AttentionRope"),
    ("timm.models.eva", "EvaAttention"),
)


class ViTSparseAttention(SparseAttention):
    """Drop-in for the attention of timm's vision transformers, with the same parameters under the same names.

    Where an attention mask is given, or the tokens do not fit the grid, attention is computed densely (under the
    pattern's mask in the first case, without it in the second), so nothing is ever misplaced.

    Args:
        dim: number of channels.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads (grouped-query attention), ``num_heads`` if None; needs
            ``qkv_fused=False``.
        attn_head_dim: channels per head; ``dim // num_heads`` if None.
        dim_out: number of output channels; ``dim`` if None.
        qkv_bias: whether the projections of query, key, value (and of the gate) have a bias.
        k_bias: whether the key projection takes part in that; EVA's does not.
        qkv_fused: one projection ``qkv`` rather than ``q_proj``, ``k_proj``, ``v_proj``.
        qk_norm, scale_norm: normalise query and key per head; normalise the output before its projection.
        gated: multiply the output with the sigmoid of a projection of the input.
        attn_drop, proj_drop: dropout of attention weights and of the output.
        norm_layer: makes a norm from a number of channels.
        num_prefix_tokens: leading tokens that a rotary position embedding leaves as they are; None if the layer takes
            no such embedding.
        rotate_half: layout of the rotary embedding: halves instead of interleaved pairs.
        grid: where the patches lie: a TokenGrid; a function from the number of tokens to a TokenGrid, or to None if
            it is not known; or None for a plain sequence.
        pattern, backend, compute_dtype: as for :class:`SparseAttention`.

    Raises:
        ValueError: if heads and channels do not fit together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        k_bias: bool = True,
        qkv_fused: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        num_prefix_tokens: int | None = None,
        rotate_half: bool = False,
        pattern: Pattern | str | None = None,
        grid: TokenGrid | Callable[[int], TokenGrid | None] | None = None,
        backend: str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1:
            raise ValueError(f"{_NAME}: num_heads must be at least 1, got {num_heads}")
        if grid is not None and not isinstance(grid, TokenGrid) and not callable(grid):
            raise TypeError(f"{_NAME}: grid must be a TokenGrid, a function or None, got {type(grid).__name__}")
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"{_NAME}: dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"{_NAME}: num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        if qkv_fused and num_kv_heads != num_heads:
            raise ValueError(f"{_NAME}: qkv_fused must be False with num_kv_heads, got {num_kv_heads} of {num_heads}")
        super().__init__(pattern, backend, compute_dtype)
        self.grid = grid
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        self.scale = self.head_dim**-0.5
        self.num_prefix_tokens = num_prefix_tokens
        self.rotate_half = rotate_half
        attn_dim, kv_dim = num_heads * self.head_dim, num_kv_heads * self.head_dim

        self.qkv = self.q_proj = self.k_proj = self.v_proj = None
        self.q_bias = self.k_bias = self.v_bias = None
        if not qkv_fused:
            self.q_proj = nn.Linear(dim, attn_dim, bias=qkv_bias)
            self.k_proj = nn.Linear(dim, kv_dim, bias=qkv_bias and k_bias)
            self.v_proj = nn.Linear(dim, kv_dim, bias=qkv_bias)
        else:
            self.qkv = nn.Linear(dim, 3 * attn_dim, bias=qkv_bias and k_bias)
            if qkv_bias and not k_bias:
                self.q_bias = nn.Parameter(torch.zeros(attn_dim))
                del self.k_bias
                self.register_buffer("k_bias", torch.zeros(attn_dim), persistent=False)
                self.v_bias = nn.Parameter(torch.zeros(attn_dim))
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(attn_dim) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, attn_dim, bias=qkv_bias) if gated else None
        self.proj = nn.Linear(attn_dim, dim if dim_out is None else dim_out, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self._set_heads(num_heads, self.head_dim)

    @classmethod
    def from_module(
        cls,
        layer: nn.Module,
        pattern: Pattern | str | None = None,
        grid: TokenGrid | Callable[[int], TokenGrid | None] | None = None,
        backend: str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> ViTSparseAttention:
        """The replacement of a layer, made of the very submodules and parameters of that layer.

        Attributes that other code reads, such as ``fused_attn`` and ``head_dim``, are kept.

        Raises:
            TypeError: if the layer is none of the three classes; their subclasses may compute something else.
        """
        if not any(type(layer) is getattr(sys.modules.get(module), name, None) for module, name in _REPLACED):
            names = ", ".join(f"{module}.{name}" for module, name in _REPLACED)
            raise TypeError(
                f"{_NAME}.from_module: layer must be one of {names}, "
                f"got {type(layer).__module__}.{type(layer).__qualname__}"
            )
        new = cls.__new__(cls)
        SparseAttention.__init__(new, pattern, backend, compute_dtype)
        for name, value in vars(layer).items():
            if not name.startswith("_"):
                setattr(new, name, value)
        new._parameters.update(layer._parameters)
        new._buffers.update(layer._buffers)
        new._non_persistent_buffers_set.update(layer._non_persistent_buffers_set)
        new._modules.update(layer._modules)
        absent = {**_ABSENT, "num_kv_heads": new.num_heads, "head_dim": head_dim_of(layer)}
        for name, value in absent.items():
            if not hasattr(new, name):
                setattr(new, name, value)
        new.grid = grid
        new._set_heads(new.num_heads, new.head_dim)
        return new

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Self-attention.

        Args:
            x: ``[B, N, dim]``.
            rope: sine and cosine of the rotary position, concatenated: broadcasts to ``[B, heads, patches, 2 D]``.
            attn_mask: boolean (true = attend) or additive, broadcasts to ``[B, heads, N, N]``; holds besides the
                pattern.
            is_causal: a token attends to itself and those before it only.

        Returns:
            ``[B, N, dim_out]``.

        Raises:
            ValueError, TypeError: if ``attn_mask`` does not fit, or comes with ``is_causal``, or ``rope`` is given to a
                layer without rotary position.
        """
        if x.dim() != 3:
            raise ValueError(f"{_NAME}: x must have shape [B, N, dim], got {list(x.shape)}")
        _check_mask(attn_mask, is_causal, (x.shape[0], self.num_heads, x.shape[1], x.shape[1]))
        if rope is not None and self.num_prefix_tokens is None:
            raise ValueError(
                f"{_NAME}: rope must be None for a layer without rotary position (attn_mask comes by name)"
            )
        gate = None if self.gate is None else self.gate(x).sigmoid()
        query, key, value = self._project(x)
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = self._rotate(query, key, rope)
            query, key = query.type_as(value), key.type_as(value)
        dropout_p = self.attn_drop.p if self.training else 0.0
        grid = self._token_grid(x.shape[1])
        if grid is None or attn_mask is not None or is_causal:
            out = self._attend_densely(query, key, value, grid, attn_mask, is_causal, dropout_p)
        else:
            out = self.attend(query, key, value, grid, scale=self.scale, dropout_p=dropout_p)
        out = self.norm(rearrange(out, "b heads n d -> b n (heads d)"))
        if gate is not None:
            out = out * gate
        return self.proj_drop(self.proj(out))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``[B, heads, N, D]``, key and value ``[B, kv heads, N, D]``: transposed views, never copies."""
        if self.qkv is None:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
            projected = (projection(x) for projection in projections if projection is not None)
            query, key, value = (part.unflatten(-1, (n, -1)).transpose(1, 2) for part, n in zip(projected, heads))
            return query, key, value
        if self.q_bias is None or self.k_bias is None or self.v_bias is None:
            qkv = self.qkv(x)
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            if is_plain_linear(self.qkv) and self.qkv.bias is None:
                qkv = F.linear(x, self.qkv.weight, bias)
            else:
                qkv = self.qkv(x)
                qkv = qkv + bias.to(qkv.dtype)
        query, key, value = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        return query, key, value

    def _rotate(self, query: Tensor, key: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        prefix = self.num_prefix_tokens or 0
        # What a hook has seen, or a module of its own made, must stay as it was.
        overwrite = self.qkv is not None and is_plain_linear(self.qkv)
        return (
            rotate(query, rope, prefix, self.rotate_half, overwrite=overwrite),
            rotate(key, rope, prefix, self.rotate_half, overwrite=overwrite),
        )

    def _token_grid(self, num_tokens: int) -> TokenGrid | None:
        """The grid of these tokens; None, said once, if they do not fit the one that is known."""
        if self.grid is None:
            return TokenGrid.sequence(num_tokens)
        grid = self.grid if isinstance(self.grid, TokenGrid) else self.grid(num_tokens)
        if grid is not None and grid.num_tokens == num_tokens:
            return grid
        # A layer that a backward pass runs again has said so in the forward pass, where it knew more.
        is_first_run = torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1
        if is_first_run and not isinstance(self.pattern, Dense):
            reason = "no grid of patches is known" if grid is None else "the tokens do not fit the grid of patches"
            log_once(f"{_NAME}: attention is dense where {reason}")
        return None

    def _attend_densely(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: TokenGrid | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        dropout_p: float,
    ) -> Tensor:
        """Every token pair, under the mask given and, where there is a grid, the pattern's."""
        dtype = query.dtype
        if self.compute_dtype is not None:
            query, key, value = (tensor.to(self.compute_dtype) for tensor in (query, key, value))
        if self.num_kv_heads != self.num_heads:
            groups = self.num_heads // self.num_kv_heads
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        allowed = bias = None
        if is_causal:
            allowed = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            allowed = torch.atleast_2d(attn_mask)
        elif attn_mask is not None:
            bias = torch.atleast_2d(attn_mask)
        if grid is not None and not isinstance(self.pattern, Dense):
            pattern_allows = self.mask_for(query, key, grid, scale=self.scale).token_mask()
            allowed = pattern_allows if allowed is None else allowed & pattern_allows
        out, _ = masked_attention(query, key, value, allowed, bias, scale=self.scale, dropout_p=dropout_p)
        return out.to(dtype)

    def reset_parameters(self) -> None:
        """Zeroes the biases that belong to no submodule, as ``EvaAttention`` does."""
        for bias in (self.q_bias, self.k_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def init_non_persistent_buffers(self) -> None:
        """Fills buffers that no checkpoint holds; timm calls this after leaving the meta device."""
        if self.k_bias is not None:
            self.k_bias.zero_()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, {super().extra_repr()}"


# What the replaced classes may lack, from one to the other and over the versions of timm.
_ABSENT: dict[str, Any] = {
    **dict.fromkeys(("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias", "gate")),
    "num_prefix_tokens": None,
    "rotate_half": False,
}


def _check_mask(attn_mask: Tensor | None, is_causal: bool, shape: tuple[int, ...]) -> None:
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"{_NAME}: attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"{_NAME}: attn_mask must be boolean or floating-point, got {attn_mask.dtype}")
    fits = (size in (1, whole) for size, whole in zip(reversed(attn_mask.shape), reversed(shape)))
    if attn_mask.dim() > len(shape) or not all(fits):
        raise ValueError(f"{_NAME}: attn_mask must broadcast to {list(shape)}, got shape {list(attn_mask.shape)}")
    if is_causal:
        raise ValueError(f"{_NAME}: attn_mask must be None with is_causal, got both")
