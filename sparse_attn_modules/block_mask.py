"""BlockMask: which pairs of blocks are computed, and the index lists that kernels walk."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from .shared_tensors import MadeOnStream, leaving_modes, may_keep
from .token_grid import TokenGrid

LISTS = ("key_counts", "key_indices", "query_counts", "query_indices", "row_order")
_making = threading.RLock()  # of all masks: one that held its own could not be copied


class BlockMask:
    """Block pairs that attention computes, per batch entry and head or broadcast over them.

    The index lists are built on first use, on the device of ``blocks``, without host synchronisation, and kept; streams
    other than that of the first use wait for them. Regions that are compiled, or captured in a CUDA graph, compute them
    at each call unless they exist. A mask is immutable: treat its tensors as read-only.

    Args:
        blocks: bool ``[B | 1, H | 1, query blocks, key blocks]``, true where the pair is computed. ``[H, Q, K]`` and
            ``[Q, K]`` are accepted.
        query_grid: geometry of the queries.
        key_grid: geometry of the keys; that of the queries if None.

    Raises:
        TypeError: if ``blocks`` is not a boolean tensor.
        ValueError: if its last two sizes are not the grids' numbers of blocks.
    """

    def __init__(self, blocks: Tensor, query_grid: TokenGrid, key_grid: TokenGrid | None = None) -> None:
        key_grid = query_grid if key_grid is None else key_grid
        for name, grid in (("query_grid", query_grid), ("key_grid", key_grid)):
            if not isinstance(grid, TokenGrid):
                raise TypeError(f"BlockMask: {name} must be a TokenGrid, got {type(grid).__name__}")
        if not isinstance(blocks, Tensor) or blocks.dtype != torch.bool:
            got = blocks.dtype if isinstance(blocks, Tensor) else type(blocks).__name__
            raise TypeError(f"BlockMask: blocks must be a boolean tensor, got {got}")
        expected = (query_grid.num_blocks, key_grid.num_blocks)
        if not 2 <= blocks.dim() <= 4 or tuple(blocks.shape[-2:]) != expected:
            raise ValueError(
                f"BlockMask: blocks must have shape [B | 1, H | 1, {expected[0]}, {expected[1]}] for query grid "
                f"{query_grid} and key grid {key_grid}, got {list(blocks.shape)}"
            )
        if not torch.compiler.is_compiling() and blocks.is_inference():
            # Autograd could not save it in a later training step.
            with _outliving_the_call():
                blocks = blocks.clone()
        self.blocks = blocks.reshape((1,) * (4 - blocks.dim()) + tuple(blocks.shape))
        self.query_grid = query_grid
        self.key_grid = key_grid
        self._lists: dict[str, Tensor] = {}
        self._made = MadeOnStream()
        self._splits: dict[tuple[tuple[int, int], tuple[int, int]], BlockMask] = {}
        # Calls that passed their checks with this mask, see functional.py: the backend and the mask it runs on, or None
        # for this one, which would keep itself alive.
        self.plans: dict[Any, tuple[str, BlockMask | None]] = {}
        # Looking at values would wait for an accelerator and break a compiled graph; a mask then counts as dense only
        # if it is declared so.
        may_look = self.blocks.device.type == "cpu" and not torch.compiler.is_compiling()
        self._is_dense = may_look and bool(self.blocks.all())
        # The density where the maker of the mask knows it without looking at values.
        self.declared_density: float | None = None

    @classmethod
    def dense(
        cls, query_grid: TokenGrid, key_grid: TokenGrid | None = None, device: torch.device | str | None = None
    ) -> BlockMask:
        """Every block pair."""
        key_grid = query_grid if key_grid is None else key_grid
        blocks = torch.ones(1, 1, query_grid.num_blocks, key_grid.num_blocks, dtype=torch.bool, device=device)
        mask = cls(blocks, query_grid, key_grid)
        mask._is_dense = True
        return mask

    @classmethod
    def from_lists(
        cls,
        blocks: Tensor,
        lists: dict[str, Tensor],
        query_grid: TokenGrid,
        key_grid: TokenGrid,
        is_dense: bool,
        density: float | None = None,
    ) -> BlockMask:
        """A mask whose index lists are known already, by the names of the properties; and its density, if known."""
        mask = cls(blocks, query_grid, key_grid)
        mask._lists = dict(lists)
        mask._is_dense = is_dense
        mask.declared_density = density
        return mask

    @classmethod
    def from_token_mask(
        cls,
        token_mask: Tensor,
        query_grid: TokenGrid,
        key_grid: TokenGrid | None = None,
        reduce: Literal["any", "all"] = "any",
    ) -> BlockMask:
        """The block mask of a token mask.

        Args:
            token_mask: bool ``[..., Nq, Nk]`` with up to two leading dimensions, true where attention is allowed.
            reduce: a block is active if ``any`` (a superset of the token mask) or ``all`` (a subset) of the token
                pairs that exist in it are allowed.
        """
        key_grid = query_grid if key_grid is None else key_grid
        if reduce not in ("any", "all"):
            raise ValueError(f"BlockMask.from_token_mask: reduce must be 'any' or 'all', got {reduce!r}")
        if not isinstance(token_mask, Tensor) or token_mask.dtype != torch.bool:
            raise TypeError("BlockMask.from_token_mask: token_mask must be a boolean tensor")
        expected = (query_grid.num_tokens, key_grid.num_tokens)
        if not 2 <= token_mask.dim() <= 4 or tuple(token_mask.shape[-2:]) != expected:
            raise ValueError(
                f"BlockMask.from_token_mask: token_mask must end in {list(expected)}, got {list(token_mask.shape)}"
            )
        device = token_mask.device
        hits = token_mask if reduce == "any" else ~token_mask
        for dim, grid in ((-2, query_grid), (-1, key_grid)):
            hits = hits.transpose(dim, -1)
            index = grid.block_of_token(device).expand_as(hits)
            zeros = torch.zeros(*hits.shape[:-1], grid.num_blocks, dtype=torch.uint8, device=device)
            hits = zeros.scatter_reduce(-1, index, hits.to(torch.uint8), "amax").bool().transpose(dim, -1)
        return cls(hits if reduce == "any" else ~hits, query_grid, key_grid)

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def is_dense(self) -> bool:
        """Whether every pair is known to be active. Never waits for an accelerator."""
        return self._is_dense

    @property
    def density(self) -> float:
        """Fraction of block pairs that are computed. Waits for the device."""
        return float(self.blocks.double().mean())

    @property
    def token_density(self) -> float:
        """Fraction of token pairs that are computed: what attention FLOPs are proportional to. Waits for the device."""
        query_sizes = self.query_grid.block_sizes(self.device).double()
        key_sizes = self.key_grid.block_sizes(self.device).double()
        pairs = torch.einsum("bhqk,q,k->bh", self.blocks.double(), query_sizes, key_sizes).mean()
        return float(pairs) / (self.query_grid.num_tokens * self.key_grid.num_tokens)

    @property
    def key_counts(self) -> Tensor:
        """Active key blocks of each query block: int32 ``[B | 1, H | 1, Q]``."""
        return self._list("key_counts")

    @property
    def key_indices(self) -> Tensor:
        """Key blocks of each query block, active ones first and ascending: int32 ``[B | 1, H | 1, Q, K]``."""
        return self._list("key_indices")

    @property
    def query_counts(self) -> Tensor:
        """Active query blocks of each key block: int32 ``[B | 1, H | 1, K]``."""
        return self._list("query_counts")

    @property
    def query_indices(self) -> Tensor:
        """Query blocks of each key block, active ones first and ascending: int32 ``[B | 1, H | 1, K, Q]``."""
        return self._list("query_indices")

    @property
    def row_order(self) -> Tensor:
        """Query blocks, those with most keys first, for balanced launches: int32 ``[B | 1, H | 1, Q]``."""
        return self._list("row_order")

    def token_mask(self) -> Tensor:
        """The same mask for every pair of tokens: bool ``[B | 1, H | 1, Nq, Nk]``."""
        rows = self.blocks[:, :, self.query_grid.block_of_token(self.device)]
        return rows[..., self.key_grid.block_of_token(self.device)]

    def split(self, query_tile: tuple[int, int], key_tile: tuple[int, int]) -> BlockMask:
        """The same mask in smaller blocks; itself if these are its tiles. Kept once made.

        Raises:
            ValueError: if a tile is no pair of positive integers, or does not divide that of this mask's grid.
        """
        tiles = _checked_tile(query_tile), _checked_tile(key_tile)
        if tiles == (self.query_grid.tile, self.key_grid.tile):
            return self
        if tiles in self._splits and not torch.compiler.is_compiling():
            finer_mask = self._splits[tiles]
            finer_mask._made.wait(self.device)
            return finer_mask
        with _outliving_the_call():
            grids, parents = [], []
            for grid, tile in zip((self.query_grid, self.key_grid), tiles):
                if grid.tile[0] % tile[0] or grid.tile[1] % tile[1]:
                    raise ValueError(f"BlockMask.split: tiles must divide {grid.tile}, got {tile}")
                finer = TokenGrid(grid.height, grid.width, grid.prefix, grid.suffix, tile)
                # A block is never empty, and its first slot always exists.
                parents.append(grid.block_of_token(self.device)[finer.block_tokens(self.device)[:, 0]])
                grids.append(finer)
            finer_mask = BlockMask(self.blocks[:, :, parents[0]][:, :, :, parents[1]], *grids)
        finer_mask._is_dense = self.is_dense
        finer_mask.declared_density = self.declared_density
        if may_keep(self.device):
            finer_mask._made.mark(self.device)
            self._splits[tiles] = finer_mask
        return finer_mask

    def to(self, device: torch.device | str) -> BlockMask:
        """This mask on another device; itself if it is already there."""
        moved_blocks = self.blocks.to(device)
        if moved_blocks is self.blocks:
            return self
        moved = BlockMask(moved_blocks, self.query_grid, self.key_grid)
        if self.device.type == "cpu" and not self.is_dense and may_keep(moved.device):
            # A copy from pageable memory is there when it returns, for every stream.
            moved._lists = {name: self._list(name).to(device) for name in LISTS}
        moved._is_dense = self.is_dense
        moved.declared_density = self.declared_density
        return moved

    def __or__(self, other: BlockMask) -> BlockMask:
        """Union: pairs active in either mask. Batch and head sizes broadcast."""
        self._check_same_geometry(other, "union")
        return BlockMask(self.blocks | other.blocks, self.query_grid, self.key_grid)

    def __and__(self, other: BlockMask) -> BlockMask:
        """Intersection: pairs active in both masks. Batch and head sizes broadcast."""
        self._check_same_geometry(other, "intersection")
        return BlockMask(self.blocks & other.blocks, self.query_grid, self.key_grid)

    union = __or__
    intersection = __and__

    def __repr__(self) -> str:
        batch, heads, queries, keys = self.blocks.shape
        state = "" if self.device.type == "meta" else f", density {self.density:.3f}"
        return f"BlockMask({batch} × {heads} × {queries} × {keys} blocks, grid {self.query_grid}{state})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lists": {}, "_splits": {}, "_made": MadeOnStream(), "plans": {}}

    def _list(self, name: str) -> Tensor:
        found = self._lists.get(name)
        if found is not None:
            if self._made.event is not None:
                self._made.wait(self.device)
            return found
        if not may_keep(self.device):
            return self._make(name)[name]
        with _making:
            if name not in self._lists:
                self._made.wait(self.device)
                made = self._make(name)
                self._made.mark(self.device)
                self._lists.update(made)
            else:
                self._made.wait(self.device)
            return self._lists[name]

    def _make(self, name: str) -> dict[str, Tensor]:
        with _outliving_the_call():
            if name == "row_order":
                return {name: torch.argsort(self.key_counts, dim=-1, descending=True, stable=True).int()}
            side = name.partition("_")[0]
            counts, indices = _index_lists(self.blocks if side == "key" else self.blocks.mT)
        return {f"{side}_counts": counts, f"{side}_indices": indices}

    def _check_same_geometry(self, other: BlockMask, what: str) -> None:
        if not isinstance(other, BlockMask):
            raise TypeError(f"BlockMask: {what} must be with a BlockMask, got {type(other).__name__}")
        if (self.query_grid, self.key_grid) != (other.query_grid, other.key_grid):
            raise ValueError(
                f"BlockMask: {what} must be of masks on the same grids, got {self.query_grid} × {self.key_grid} and "
                f"{other.query_grid} × {other.key_grid}"
            )


def _index_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    blocks = blocks.contiguous()  # or the lists would inherit its strides, and kernels read them as rows
    counts = blocks.sum(-1, dtype=torch.int32)
    return counts, torch.argsort((~blocks).to(torch.uint8), dim=-1, stable=True).int()


def _outliving_the_call() -> AbstractContextManager[Any]:
    """For what a mask keeps. The tracer of torch.compile keeps nothing, and knows inference mode alone."""
    return torch.inference_mode(False) if torch.compiler.is_compiling() else leaving_modes()


def _checked_tile(tile: Any) -> tuple[int, int]:
    is_pair = isinstance(tile, (tuple, list)) and len(tile) == 2
    if not is_pair or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in tile):
        raise ValueError(f"BlockMask.split: tiles must be (height, width) in positive integers, got {tile!r}")
    return tile[0], tile[1]
