"""The oracle every implementation is held against: attention written out over all token pairs, in float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn_modules import BlockMask, TokenGrid


@dataclass
class Case:
    """One drawn call of ``block_sparse_attention``; floating tensors in float64."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: BlockMask
    relative_position: tuple[Tensor, Tensor] | None
    key_padding_mask: Tensor | None
    scale: float | None

    def to(self, dtype: torch.dtype, requires_grad: bool = False) -> Case:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_(requires_grad)

        rel = self.relative_position
        return Case(
            cast(self.query),
            cast(self.key),
            cast(self.value),
            self.mask,
            None if rel is None else (cast(rel[0]), cast(rel[1])),
            self.key_padding_mask,
            self.scale,
        )

    @property
    def differentiable(self) -> list[Tensor]:
        return [self.query, self.key, self.value, *(self.relative_position or ())]

    @property
    def options(self) -> dict:
        return {
            "scale": self.scale,
            "relative_position": self.relative_position,
            "key_padding_mask": self.key_padding_mask,
        }


def attend_in_full(case: Case) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the dtype of the case, by plain differentiable PyTorch over the token mask."""
    group = case.query.shape[1] // case.key.shape[1]
    key, value = case.key.repeat_interleave(group, 1), case.value.repeat_interleave(group, 1)
    scale = case.query.shape[-1] ** -0.5 if case.scale is None else case.scale
    logits = case.query @ key.mT * scale
    if case.relative_position is not None:
        rel_h, rel_w = case.relative_position
        image = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
        grid = case.mask.key_grid
        logits = logits + F.pad(image, (grid.prefix, grid.suffix))
    attended = case.mask.token_mask()
    if case.key_padding_mask is not None:
        attended = attended & ~case.key_padding_mask[:, None, None]
    attended = attended.expand(logits.shape)
    has_keys = attended.any(-1)
    # Rows without keys are kept away from the softmax, whose NaN would spoil every gradient.
    logits = logits.masked_fill(~attended, -torch.inf).masked_fill(~has_keys[..., None], 0.0)
    out = torch.where(has_keys[..., None], logits.softmax(-1) @ value, 0.0)
    lse = torch.where(has_keys, logits.logsumexp(-1), -torch.inf)
    return out, lse


def draw_case(seed: int, *, block: tuple[int, int] | None = None, features: bool = True) -> Case:
    """A random geometry, mask and inputs: ragged tiles, extra tokens, empty and full rows, grouped heads, strides."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def grid() -> TokenGrid:
        tile = block or (draw(1, 4), draw(1, 5))
        return TokenGrid(draw(1, 9), draw(1, 9), draw(0, 5), draw(0, 5), tile)

    query_grid = grid()
    key_grid = query_grid if draw(0, 1) else grid()
    batch, key_heads, group, head_dim = draw(1, 2), draw(1, 2), draw(1, 2), draw(1, 9)
    heads = key_heads * group
    density = (0.0, 0.2, 0.6, 1.0)[draw(0, 3)]
    blocks = torch.rand(
        batch if draw(0, 1) else 1,
        heads if draw(0, 1) else 1,
        query_grid.num_blocks,
        key_grid.num_blocks,
        generator=generator,
    )

    def normal(heads: int, tokens: int, width: int) -> Tensor:
        tensor = torch.randn(batch, tokens, heads, width, generator=generator, dtype=torch.float64).transpose(1, 2)
        return tensor if draw(0, 1) else tensor.contiguous()

    tokens = query_grid.num_tokens
    relative = padding = scale = None
    if features and draw(0, 1):
        relative = normal(heads, tokens, key_grid.height), normal(heads, tokens, key_grid.width)
    if features and draw(0, 1):
        padding = torch.rand(batch, key_grid.num_tokens, generator=generator) < 0.4
    if features and draw(0, 1):
        scale = 0.3
    return Case(
        normal(heads, tokens, head_dim),
        normal(key_heads, key_grid.num_tokens, head_dim),
        normal(key_heads, key_grid.num_tokens, head_dim),
        BlockMask(blocks < density, query_grid, key_grid),
        relative,
        padding,
        scale,
    )


@pytest.fixture(scope="session")
def oracle() -> Callable[[Case], tuple[Tensor, Tensor]]:
    return attend_in_full


@pytest.fixture(scope="session")
def drawn_case() -> Callable[..., Case]:
    return draw_case


def pytest_report_header() -> str:
    seed = int(os.environ.get("SPARSE_ATTN_TEST_SEED", torch.seed() % 2**32))
    torch.manual_seed(seed)
    return f"random inputs: SPARSE_ATTN_TEST_SEED={seed}"
