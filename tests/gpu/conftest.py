"""Random calls of the compiled kernels: geometry, masks, strides, grouped heads, relative position, padding."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sparse_attn_modules import BlockMask, TokenGrid

Tile = tuple[int, int]
_TILES = [(8, 16), (16, 8), (4, 32), (2, 64), (1, 128), (128, 1)]
_HEAD_DIMS = [8, 16, 24, 32, 40, 48, 56, 64, 64, 64, 72, 80, 80, 80, 88, 96, 96, 104, 112, 120, 128, 128]
_LAYOUTS = ["heads first", "tokens first", "fused qkv", "slice"]


@dataclass
class CudaCase:
    """One call in float16 or bfloat16, on CUDA."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: BlockMask
    scale: float | None = None
    relative_position: tuple[Tensor, Tensor] | None = None
    key_padding_mask: Tensor | None = None

    def to(self, dtype: torch.dtype, requires_grad: bool = False) -> CudaCase:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_(requires_grad)

        rel = self.relative_position
        return replace(
            self,
            query=cast(self.query),
            key=cast(self.key),
            value=cast(self.value),
            relative_position=None if rel is None else (cast(rel[0]), cast(rel[1])),
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


def draw_tensor(draw: random.Random, batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    layout = draw.choice(_LAYOUTS)
    options = {"dtype": dtype, "device": "cuda"}
    if layout == "heads first":
        return torch.randn(batch, heads, tokens, width, **options)
    if layout == "tokens first":
        return torch.randn(batch, tokens, heads, width, **options).transpose(1, 2)
    if layout == "fused qkv":
        return torch.randn(batch, tokens, 3, heads, width, **options)[:, :, 1].transpose(1, 2)
    return torch.randn(batch, heads, tokens + 3, width + 16, **options)[:, :, 2 : tokens + 2, 8 : width + 8]


def _draw_grid(draw: random.Random, tiles: Sequence[Tile], may_be_sequence: bool) -> TokenGrid:
    if may_be_sequence and draw.random() < 0.2:
        return TokenGrid.sequence(draw.randint(1, 900))
    return TokenGrid(
        draw.randint(1, 40),
        draw.randint(1, 40),
        prefix=draw.choice([0, 0, 1, 5, 130]),
        suffix=draw.choice([0, 0, 4, 129]),
        tile=draw.choice(tiles),
    )


def draw_cuda_case(
    seed: int, tiles: Sequence[Tile] = _TILES, tiles_with_relative_position: Sequence[Tile] = ((8, 16),)
) -> CudaCase:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.bfloat16, torch.float16])
    head_dim, batch, key_heads = draw.choice(_HEAD_DIMS), draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 3])
    heads = key_heads * draw.choice([1, 1, 1, 2, 4])
    has_bias = draw.random() < 0.4
    if has_bias:
        tiles = [draw.choice(tiles_with_relative_position)]
    query_grid = _draw_grid(draw, tiles, not has_bias)
    key_grid = query_grid if draw.random() < 0.6 else _draw_grid(draw, tiles, not has_bias)

    shape = (draw.choice([1, batch]), draw.choice([1, heads]), query_grid.num_blocks, key_grid.num_blocks)
    blocks = torch.rand(shape, device="cuda") < draw.choice([0.1, 0.3, 0.6, 1.0])
    if draw.random() < 0.5:
        blocks[:, :, draw.randrange(shape[2])] = False
        blocks[:, :, draw.randrange(shape[2])] = True
    mask = BlockMask(blocks, query_grid, key_grid)
    if draw.random() < 0.2:
        mask = BlockMask.dense(query_grid, key_grid, device="cuda")

    relative = None
    if has_bias:
        sizes = (key_grid.height, key_grid.width)
        relative = tuple(draw_tensor(draw, batch, heads, query_grid.num_tokens, size, dtype) for size in sizes)
    padding = None
    if draw.random() < 0.25:
        padding = torch.rand(batch, key_grid.num_tokens, device="cuda") < draw.choice([0.1, 0.5, 1.0])
    query = draw_tensor(draw, batch, heads, query_grid.num_tokens, head_dim, dtype)
    key, value = (draw_tensor(draw, batch, key_heads, key_grid.num_tokens, head_dim, dtype) for _ in range(2))
    return CudaCase(query, key, value, mask, draw.choice([None, 0.3]), relative, padding)


@pytest.fixture(scope="session")
def cuda_case() -> type[CudaCase]:
    return CudaCase


@pytest.fixture(scope="session")
def drawn_cuda_case() -> Callable[..., CudaCase]:
    return draw_cuda_case


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
