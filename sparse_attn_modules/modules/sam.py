"""Attention of the Segment Anything image encoder, with its decomposed relative position, block-sparse.

The bias of a query is kept as its two factors, one value per key row and one per key column; the operator adds them
where it computes a block. Nothing of the size of all token pairs is ever made.

Windows are read from the image itself. The encoder pads the image with zeros before the projection to query, key and
value, so a window that hangs over it holds keys and values that equal their biases, and attends to them. A bias of the
keys shifts all logits of a query alike, which its softmax does not see; a bias of the values passes through the average
unchanged. So the same comes out if keys and values are projected without bias, those beyond the image are zero, and the
bias of the values joins that of the output projection. Where there is no such average, or a projection is more than
that, the image is padded and cut as the encoder does it.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patterns import Dense, Pattern
from ..relative_position import relative_position
from ..token_grid import TokenGrid
from ..window_attention import why_not_in_place, window_attention
from ..windows import partition, unpartition
from .base import SparseAttention, head_dim_of
from .plain_linear import is_plain, is_plain_linear

_NAME = "SAMAttentionSparse"
_REPLACED = (
    ("segment_anything.modeling.image_encoder", "Attention"),
    ("timm.models.vision_transformer_sam", "Attention"),
)


class SAMAttentionSparse(SparseAttention):
    """Drop-in for the attention of ``segment_anything``'s image encoder and of timm's ``samvit`` models.

    Args:
        embed_dim: number of channels.
        num_heads: number of heads; must divide ``embed_dim``.
        qkv_bias: whether the fused projection has a bias.
        use_rel_pos: whether there is a decomposed relative position (MViTv2, arXiv:2112.01526).
        input_size: (height, width) in patches for which the relative-position tables are made; needed with
            ``use_rel_pos``. On other grids the tables are interpolated.
        pattern, backend, compute_dtype: as for :class:`SparseAttention`.

    Raises:
        ValueError: if a size is not as described.
    """

    attn_drop: nn.Dropout
    rel_pos_h: nn.Parameter
    rel_pos_w: nn.Parameter

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        use_rel_pos: bool = False,
        input_size: tuple[int, int] | None = None,
        *,
        pattern: Pattern | str | None = None,
        backend: str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"{_NAME}: embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        is_pair = isinstance(input_size, (tuple, list)) and len(input_size) == 2
        if use_rel_pos and (input_size is None or not is_pair or min(input_size) < 1):
            raise ValueError(f"{_NAME}: input_size must be (height, width) with use_rel_pos, got {input_size}")
        super().__init__(pattern, backend, compute_dtype)
        head_dim = embed_dim // num_heads
        rel_pos_h = rel_pos_w = None
        if use_rel_pos and input_size is not None:
            rel_pos_h, rel_pos_w = (nn.Parameter(torch.zeros(2 * size - 1, head_dim)) for size in input_size)
        self._set_parts(
            num_heads,
            head_dim**-0.5,
            nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias),
            nn.Linear(embed_dim, embed_dim),
            rel_pos_h,
            rel_pos_w,
        )

    @classmethod
    def from_module(
        cls,
        layer: nn.Module,
        pattern: Pattern | str | None = None,
        backend: str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> SAMAttentionSparse:
        """The replacement of a layer, made of the very submodules and parameters of that layer.

        Raises:
            TypeError: if the layer is neither of the two classes; their subclasses may compute something else.
        """
        if not any(type(layer) is getattr(sys.modules.get(module), name, None) for module, name in _REPLACED):
            raise TypeError(
                f"{_NAME}.from_module: layer must be the Attention of segment_anything's image encoder or of "
                f"timm's vision_transformer_sam, got {type(layer).__module__}.{type(layer).__qualname__}"
            )
        parts: Any = layer
        new = cls.__new__(cls)
        SparseAttention.__init__(new, pattern, backend, compute_dtype)
        new._set_parts(
            parts.num_heads,
            parts.scale,
            parts.qkv,
            parts.proj,
            parts.rel_pos_h if parts.use_rel_pos else None,
            parts.rel_pos_w if parts.use_rel_pos else None,
            **{name: getattr(parts, name, None) for name in ("q_norm", "k_norm", "attn_drop", "proj_drop", "rope")},
        )
        new.training = layer.training
        return new

    def _set_parts(
        self,
        num_heads: int,
        scale: float,
        qkv: nn.Module,
        proj: nn.Module,
        rel_pos_h: nn.Parameter | None,
        rel_pos_w: nn.Parameter | None,
        *,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        attn_drop: nn.Dropout | None = None,
        proj_drop: nn.Module | None = None,
        rope: nn.Module | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.scale = scale
        self.use_rel_pos = rel_pos_h is not None
        if rel_pos_h is not None and rel_pos_w is not None:
            self.rel_pos_h = rel_pos_h
            self.rel_pos_w = rel_pos_w
        self.qkv = qkv
        self.q_norm = nn.Identity() if q_norm is None else q_norm
        self.k_norm = nn.Identity() if k_norm is None else k_norm
        self.attn_drop = nn.Dropout(0.0) if attn_drop is None else attn_drop
        self.proj = proj
        self.proj_drop = nn.Identity() if proj_drop is None else proj_drop
        self.rope = rope
        self._set_heads(num_heads, head_dim_of(self))

    def forward(
        self,
        x: Tensor,
        num_image_tokens: int | None = None,
        num_prompt_tokens: int | None = None,
        grid_size: tuple[int, int] | None = None,
        *,
        window_size: int = 0,
    ) -> Tensor:
        """Self-attention among patches, or among patches and prompt tokens.

        Args:
            x: ``[B, H, W, C]``, or ``[B, N, C]``: the patches in raster order, then the prompt tokens. Prompt tokens
                have no relative position, neither as queries nor as keys.
            num_image_tokens: number of patches of ``[B, N, C]``; the rest of the tokens by default.
            num_prompt_tokens: number of prompt tokens of ``[B, N, C]``; the rest of the tokens by default.
            grid_size: (height, width) in patches for ``[B, N, C]``; square by default.
            window_size: attend within windows of so many patches a side, for ``[B, H, W, C]``; 0 for the whole image.
                The result is that of the encoder's window blocks, which pad ``x`` with zeros to whole windows.

        Returns:
            The shape of ``x``.

        Raises:
            ValueError: if the numbers of tokens do not add up, or no grid is known for the patches, or there are
                windows on anything but ``[B, H, W, C]``.
        """
        grid = _token_grid(x, num_image_tokens, num_prompt_tokens, grid_size)
        if window_size == 0:
            return self._attend_to(x, grid)
        if window_size < 0 or x.dim() != 4:
            raise ValueError(
                f"{_NAME}: window_size must be positive and x of shape [B, H, W, C], "
                f"got {window_size} and {list(x.shape)}"
            )
        window, qkv, proj = TokenGrid(window_size, window_size), self.qkv, self.proj
        if is_plain_linear(qkv) and is_plain_linear(proj) and self._averages_values(window, x.device):
            return self._attend_in_windows(x, window, qkv, proj)
        return self._attend_in_padded_windows(x, window)

    def _averages_values(self, window: TokenGrid, device: torch.device) -> bool:
        """Whether there is nothing between the projections but a softmax over at least one key of each query."""
        if self.rope is not None or not (is_plain(self.q_norm, nn.Identity) and is_plain(self.k_norm, nn.Identity)):
            return False
        if self.training and self.attn_drop.p > 0:
            return False
        if isinstance(self.pattern, Dense):
            return True
        is_fixed = not self.pattern.is_dynamic_on(window, window)
        return is_fixed and self.block_mask(window, self.num_heads, device).is_dense

    def _attend_to(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Attention of all tokens to all, as far as the pattern goes."""
        query, key, value = self._project(x)
        query, key = self.q_norm(query), self.k_norm(key)
        bias = self._relative_position(query, grid) if self.use_rel_pos else None
        if self.rope is not None:
            query, key = self._rotate(self.rope, query, key, grid)
        out = self._attend(query, key, value, grid, bias)
        return self.proj_drop(self.proj(self._like(x, out)))

    def _attend_in_windows(self, x: Tensor, grid: TokenGrid, qkv: nn.Linear, proj: nn.Linear) -> Tensor:
        """Attention within windows of the image as it lies in memory."""
        size, window = (x.shape[1], x.shape[2]), (grid.height, grid.width)
        query, key, value = self._project_in_parts(x, qkv, None)
        bias = None
        if self.use_rel_pos:
            bias = relative_position(query, self.rel_pos_h, self.rel_pos_w, size, window)
        arguments = query, key, value, size, window
        options: dict[str, Any] = {"scale": self.scale, "relative_position": bias}
        if self.backend in (None, "cuda") and why_not_in_place(*arguments, **options) is None:
            out = window_attention(*arguments, **options)
        else:
            query, key, value = (partition(tensor, size, window) for tensor in (query, key, value))
            if bias is not None:
                bias = partition(bias[0], size, window), partition(bias[1], size, window)
            out = unpartition(self._attend(query, key, value, grid, bias), size, window)
        out = self._like(x, out)
        width = x.shape[-1]
        out_bias = proj.bias if qkv.bias is None else F.linear(qkv.bias[2 * width :], proj.weight, proj.bias)
        return self.proj_drop(F.linear(out, proj.weight, out_bias))

    def _attend_in_padded_windows(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """The same, cut as the encoder does it: projections see the very windows that they see there."""
        size, window = (x.shape[1], x.shape[2]), (grid.height, grid.width)
        windows = partition(x.flatten(1, 2)[:, None], size, window)  # [B · windows, 1, window patches, C]
        out = self._attend_to(windows.squeeze(1).unflatten(1, window), grid)
        return unpartition(out.flatten(1, 2)[:, None], size, window).view_as(x)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid, bias: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        return self.attend(
            query,
            key,
            value,
            grid,
            scale=self.scale,
            relative_position=bias,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, views ``[B, heads, N, D]`` each."""
        if self.use_rel_pos and is_plain_linear(self.qkv):
            # Products with the tables read queries in place only if those lie by themselves.
            width = x.shape[-1]
            return self._project_in_parts(x, self.qkv, None if self.qkv.bias is None else self.qkv.bias[width:])
        return self._in_compute_dtype(self._heads(self.qkv(x), 3))

    def _project_in_parts(
        self, x: Tensor, qkv: nn.Linear, key_value_bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries by themselves, then keys and values together with another bias than their own."""
        width = x.shape[-1]
        query = F.linear(x, qkv.weight[:width], None if qkv.bias is None else qkv.bias[:width])
        key_value = F.linear(x, qkv.weight[width:], key_value_bias)
        return self._in_compute_dtype([*self._heads(query, 1), *self._heads(key_value, 2)])

    def _heads(self, projected: Tensor, parts: int) -> list[Tensor]:
        """``[B, …, parts · heads · D]`` -> views ``[B, heads, N, D]``."""
        tokens = projected.flatten(1, -2).unflatten(-1, (parts, self.num_heads, -1))  # [B, N, parts, heads, D]
        return [part.transpose(1, 2) for part in tokens.unbind(2)]

    def _like(self, x: Tensor, out: Tensor) -> Tensor:
        """``[B, heads, N, D]`` in the shape of ``x``, and in its dtype where attention had one of its own."""
        out = out.transpose(1, 2).flatten(2).view(x.shape)
        return out if self.compute_dtype is None else out.to(x.dtype)

    def _in_compute_dtype(self, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if self.compute_dtype is not None:
            parts = [part.to(self.compute_dtype) for part in parts]
        query, key, value = parts
        return query, key, value

    def _relative_position(self, query: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """The bias of each query per key row, ``[B, heads, N, H]``, and per key column, ``[B, heads, N, W]``."""
        size = (grid.height, grid.width)
        patches = query[:, :, : grid.num_patches] if grid.suffix else query
        rel_h, rel_w = relative_position(patches, self.rel_pos_h, self.rel_pos_w, size)
        if grid.suffix:
            return F.pad(rel_h, (0, 0, 0, grid.suffix)), F.pad(rel_w, (0, 0, 0, grid.suffix))
        return rel_h, rel_w

    def _rotate(self, rope: Any, query: Tensor, key: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """Rotary position of the patches; prompt tokens have none."""
        from timm.layers import apply_rot_embed_cat

        embedding = rope.get_embed()  # [patches, 2 D]
        if embedding.shape[0] != grid.num_patches:
            raise ValueError(
                f"{_NAME}: x must have as many patches as the rotary position, {embedding.shape[0]}, got {grid}"
            )
        rotated = []
        for tensor in (query, key):
            patches = apply_rot_embed_cat(tensor[:, :, : grid.num_patches], embedding).type_as(tensor)
            rotated.append(torch.cat([patches, tensor[:, :, grid.num_patches :]], dim=2) if grid.suffix else patches)
        return rotated[0], rotated[1]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, use_rel_pos={self.use_rel_pos}, {super().extra_repr()}"


def _token_grid(
    x: Tensor, num_image_tokens: int | None, num_prompt_tokens: int | None, grid_size: tuple[int, int] | None
) -> TokenGrid:
    """The geometry of the input."""
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{_NAME}: x must have shape [B, H, W, C] or [B, N, C], got {got}")
    if x.dim() == 4:
        if num_image_tokens is not None or num_prompt_tokens is not None or grid_size is not None:
            raise ValueError(
                f"{_NAME}: x must have shape [B, N, C] with num_image_tokens, num_prompt_tokens or grid_size, "
                f"got {list(x.shape)}"
            )
        return TokenGrid(x.shape[1], x.shape[2])
    tokens = x.shape[1]
    if num_prompt_tokens is None:
        num_prompt_tokens = 0 if num_image_tokens is None else tokens - num_image_tokens
    if num_image_tokens is None:
        num_image_tokens = tokens - num_prompt_tokens
    if num_image_tokens < 1 or num_prompt_tokens < 0 or num_image_tokens + num_prompt_tokens != tokens:
        raise ValueError(
            f"{_NAME}: num_image_tokens and num_prompt_tokens must add up to the {tokens} tokens of x, "
            f"got {num_image_tokens} and {num_prompt_tokens}"
        )
    if grid_size is None:
        side = math.isqrt(num_image_tokens)
        grid_size = (side, side)
        if side * side != num_image_tokens:
            raise ValueError(f"{_NAME}: grid_size must be given if it is not square, got {num_image_tokens} patches")
    height, width = grid_size
    if height * width != num_image_tokens:
        raise ValueError(f"{_NAME}: grid_size must hold the {num_image_tokens} image tokens, got {height}×{width}")
    return TokenGrid(height, width, suffix=num_prompt_tokens)
