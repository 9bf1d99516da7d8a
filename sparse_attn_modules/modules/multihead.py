"""``nn.MultiheadAttention`` with block-sparse attention: same parameters, same call, same returns.

What blocks can express (a pattern, padded keys) is computed by blocks. What they cannot (masks of single token pairs,
biases, attention weights as a result) is computed densely under the same pattern, so that a call means the same on
either way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..notices import log_once
from ..patterns import Dense, Pattern
from ..token_grid import TokenGrid
from .base import SparseAttention
from .masked import masked_attention
from .multihead_checks import check_inputs

_NAME = "SparseMultiheadAttention"
_SIZES = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn")
_PARAMETERS = (
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
)


class SparseMultiheadAttention(nn.MultiheadAttention, SparseAttention):
    """Drop-in for :class:`torch.nn.MultiheadAttention`, for self- and cross-attention.

    Tokens are a plain sequence in blocks of 128 unless grids are given. If a grid is given and the number of tokens is
    another, attention is dense and says so once in the log: a mask is never misplaced. The keys added by
    ``add_bias_kv`` and ``add_zero_attn`` count as extra tokens, which every query sees.

    Computed densely, under the pattern all the same: ``need_weights=True`` (the default, as in the original: pass
    False for speed), an ``attn_mask``, and a floating-point ``key_padding_mask`` with values other than 0 and −inf.
    Looking at its values waits for an accelerator, and cannot be done under ``torch.compile``, where any floating-point
    one is taken for such: a boolean mask is better. A query with no key to attend to yields the output projection of 0,
    where the original yields NaN.

    Apply peft's LoRA to the ``nn.MultiheadAttention`` before it is replaced: peft refuses this layer, whose
    ``_qkv_same_embed_dim`` is False. An adapter on ``out_proj`` acts here, though ``nn.MultiheadAttention`` ignores it.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as for
            :class:`torch.nn.MultiheadAttention`.
        grid: geometry of the queries, and of the keys too if there are as many.
        key_grid: geometry of the keys, for cross-attention.
        pattern, backend, compute_dtype: as for :class:`SparseAttention`.

    Raises:
        ValueError, TypeError: if an argument is not as described.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | str | None = None,
        backend: str | None = None,
        compute_dtype: torch.dtype | None = None,
        grid: TokenGrid | None = None,
        key_grid: TokenGrid | None = None,
    ) -> None:
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"{_NAME}: embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        layer = nn.MultiheadAttention(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        SparseAttention.__init__(self, pattern, backend, compute_dtype)
        self._set_parts(layer, grid, key_grid)

    @classmethod
    def from_module(
        cls,
        layer: nn.MultiheadAttention,
        pattern: Pattern | str | None = None,
        backend: str | None = None,
        compute_dtype: torch.dtype | None = None,
        *,
        grid: TokenGrid | None = None,
        key_grid: TokenGrid | None = None,
    ) -> SparseMultiheadAttention:
        """The replacement of a layer, made of the very parameters and output projection of that layer.

        Raises:
            TypeError: if the layer is not exactly an ``nn.MultiheadAttention``; subclasses may compute something else.
        """
        if type(layer) is not nn.MultiheadAttention:
            raise TypeError(
                f"{_NAME}.from_module: layer must be a torch.nn.MultiheadAttention, "
                f"got {type(layer).__module__}.{type(layer).__qualname__}"
            )
        new = cls.__new__(cls)
        SparseAttention.__init__(new, pattern, backend, compute_dtype)
        new._set_parts(layer, grid, key_grid)
        return new

    def _set_parts(self, layer: nn.MultiheadAttention, grid: TokenGrid | None, key_grid: TokenGrid | None) -> None:
        for name, given in (("grid", grid), ("key_grid", key_grid)):
            if given is not None and not isinstance(given, TokenGrid):
                raise TypeError(f"{_NAME}: {name} must be a TokenGrid or None, got {type(given).__name__}")
        if key_grid is not None and grid is None:
            raise ValueError(f"{_NAME}: grid must be given with key_grid, got None")
        for name in _SIZES:
            setattr(self, name, getattr(layer, name))
        for name in _PARAMETERS:
            self.register_parameter(name, getattr(layer, name))
        self.out_proj = layer.out_proj
        self.grid = grid
        self.key_grid = key_grid
        self.training = layer.training
        # nn.TransformerEncoderLayer and nn.TransformerEncoder read the parameters of a layer with this attribute and
        # compute dense attention from them, without calling the layer. It lies in the instance because
        # nn.MultiheadAttention adds it, as True, to a pickled state that lacks it.
        self._qkv_same_embed_dim = False
        self._set_heads(self.num_heads, self.head_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention, as :meth:`torch.nn.MultiheadAttention.forward`; the arguments mean the same.

        Args:
            query: ``[L, B, E]``, ``[B, L, E]`` if ``batch_first``, or ``[L, E]``.
            key, value: likewise with ``S`` tokens and ``kdim``, ``vdim`` channels.
            key_padding_mask: bool ``[B, S]`` or ``[S]``, true for keys to ignore; or a float to add to the logits.
            need_weights: also return the attention weights.
            attn_mask: bool ``[L, S]`` or ``[B · heads, L, S]``, true where attention is forbidden; or a float to add.
            average_attn_weights: average the weights over the heads.
            is_causal: a hint that ``attn_mask`` is causal. The mask itself is used, so it changes nothing.

        Returns:
            The output in the shape of ``query``, and the weights ``[B, L, S]``, ``[B, heads, L, S]``, without ``B``
            for unbatched input, or None.

        Raises:
            ValueError, TypeError: if an argument is not as described.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, need_weights, attn_mask)
        check_inputs(self, query, key, value, key_padding_mask, attn_mask, is_causal)
        is_batched = query.dim() == 3
        if not is_batched:
            is_self = query is key and key is value
            query = query[None]
            key, value = (query, query) if is_self else (key[None], value[None])
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        is_batch_first = self.batch_first or not is_batched

        q, k, v = (
            projected.unflatten(-1, (self.num_heads, self.head_dim)).permute(
                (0, 2, 1, 3) if is_batch_first else (1, 2, 0, 3)
            )
            for projected in self._project(query, key, value)
        )  # [B, heads, L | S, D]
        out, weights = self._attend(q, k, v, key_padding_mask, attn_mask, need_weights)
        out = out.transpose(1, 2).flatten(2)  # [B, heads, L, D] -> [B, L, E]
        out = self.out_proj(out if is_batch_first else out.transpose(0, 1))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return out[0], None if weights is None else weights[0]
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The input projections; for self-attention three views of one product."""
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, -1)).unbind(-2)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``[B, heads, N, D]`` by blocks where they can express the call, else densely."""
        grids = self._grids(query.shape[2], key.shape[2])
        key, value, extra = self._with_extra_keys(key, value)
        if extra:
            # Masks say nothing of the added keys, so they are allowed and get no bias.
            key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, (0, extra))
            attn_mask = None if attn_mask is None else F.pad(attn_mask, (0, extra))
        ignored, key_bias = _ignored_or_bias(key_padding_mask)
        dropout_p = self.dropout if self.training else 0.0
        if grids is not None:
            query_grid, key_grid = grids
            if extra:
                key_grid = TokenGrid(
                    key_grid.height, key_grid.width, key_grid.prefix, key_grid.suffix + extra, key_grid.tile
                )
            if attn_mask is None and key_bias is None and not need_weights:
                out = self.attend(
                    query, key, value, query_grid, key_grid, key_padding_mask=ignored, dropout_p=dropout_p
                )
                return out, None
            mask = self.mask_for(query, key, query_grid, key_grid, key_padding_mask=ignored)
            allowed = None if mask.is_dense else mask.token_mask()  # [1, heads | 1, L, S]
        else:
            allowed = None

        if ignored is not None:
            allowed = _both(allowed, ~ignored[:, None, None])
        bias = None if key_bias is None else key_bias[:, None, None]
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))  # [B, heads, L, S]
            if attn_mask.dtype == torch.bool:
                allowed = _both(allowed, ~attn_mask)
            else:
                bias = attn_mask if bias is None else bias + attn_mask
        dtype = query.dtype
        if self.compute_dtype is not None:
            query, key, value = (tensor.to(self.compute_dtype) for tensor in (query, key, value))
        out, weights = masked_attention(
            query, key, value, allowed, bias, dropout_p=dropout_p, need_weights=need_weights
        )
        return out.to(dtype), None if weights is None else weights.to(dtype)

    def _grids(self, queries: int, keys: int) -> tuple[TokenGrid, TokenGrid] | None:
        """The geometry of a call, or None if the tokens do not fit the grids that were given."""
        if self.grid is None:
            return TokenGrid.sequence(queries), TokenGrid.sequence(keys)
        key_grid = self.grid if self.key_grid is None else self.key_grid
        if (queries, keys) == (self.grid.num_tokens, key_grid.num_tokens):
            return self.grid, key_grid
        if not isinstance(self.pattern, Dense):
            log_once(
                f"{_NAME}: attention is dense where query and key tokens do not fit the grids of {self.grid} and "
                f"{key_grid}"
            )
        return None

    def _with_extra_keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with those of ``add_bias_kv`` and ``add_zero_attn`` appended, and their number."""
        batch, heads, _, head_dim = key.shape
        keys, values = [key], [value]
        if self.bias_k is not None and self.bias_v is not None:
            for tensors, extra in ((keys, self.bias_k), (values, self.bias_v)):
                tensors.append(extra.to(key.dtype).view(1, heads, 1, head_dim).expand(batch, -1, -1, -1))
        if self.add_zero_attn:
            for tensors in (keys, values):
                tensors.append(key.new_zeros(batch, heads, 1, head_dim))
        if len(keys) == 1:
            return key, value, 0
        return torch.cat(keys, dim=2), torch.cat(values, dim=2), len(keys) - 1

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Nested self-attention: ``nn.TransformerEncoder`` in eval mode makes such a tensor of a padding mask."""
        is_plain = key_padding_mask is None and attn_mask is None and not need_weights
        if not (query is key and key is value and is_plain and self.batch_first and query.layout == torch.strided):
            raise ValueError(
                f"{_NAME}: query must not be nested but for self-attention with batch_first, the strided layout, "
                "need_weights=False and no masks, got a nested tensor"
            )
        lengths = query._nested_tensor_size()[:, 0]
        longest = int(lengths.max())
        tokens = longest if self.grid is None else max(longest, self.grid.num_tokens)
        padded = query.to_padded_tensor(0.0, (len(lengths), tokens, self.embed_dim))
        ignored = torch.arange(tokens, device=padded.device) >= lengths.to(padded.device)[:, None]
        out, _ = self.forward(padded, padded, padded, key_padding_mask=ignored, need_weights=False)
        return torch._nested_tensor_from_mask(out, ~ignored, mask_check=False), None

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, {SparseAttention.extra_repr(self)}"


def _ignored_or_bias(key_padding_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A key padding mask as keys to ignore or, if it does more than that, as a bias of the logits."""
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
        return key_padding_mask, None
    # nn.TransformerEncoderLayer turns boolean masks into 0 and −inf before it calls its attention.
    if not torch.compiler.is_compiling() and not key_padding_mask.requires_grad:
        ignored = key_padding_mask == -torch.inf
        if not bool(key_padding_mask.masked_fill(ignored, 0).any()):
            return ignored, None
    return None, key_padding_mask


def _both(allowed: Tensor | None, also: Tensor) -> Tensor:
    return also if allowed is None else allowed & also
