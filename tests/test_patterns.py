"""Patterns: densities that are asked for, neighbourhoods that are meant, extra tokens that are always seen."""

import pickle

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from sparse_attn_modules import (
    Butterfly,
    CustomPattern,
    Dense,
    DilatedLocal,
    GlobalLocal,
    Hybrid,
    ImageToPrompt,
    LocalWindow,
    MultiScale,
    Pattern,
    Random,
    RegionFocused,
    Streaming,
    Strided,
    TokenGrid,
    Union,
)
from sparse_attn_modules.patterns import NAMED_PATTERNS, resolve_pattern

POINTS = ((0.2, 0.3), (0.9, 0.5))
WITH_DENSITY = {
    "LocalWindow": lambda density: LocalWindow(density=density),
    "GlobalLocal": lambda density: GlobalLocal(density, global_tiles=2),
    "Strided": lambda density: Strided(density=density),
    "Random": lambda density: Random(density, seed=5),
    "DilatedLocal": lambda density: DilatedLocal(density),
    "RegionFocused": lambda density: RegionFocused(POINTS, density),
    "Streaming": lambda density: Streaming(density=density, sink=2),
    "MultiScale": lambda density: MultiScale(densities=(density, density)),
    "ImageToPrompt": lambda density: ImageToPrompt(LocalWindow(density=density)),
    "Hybrid": lambda density: Hybrid(Random(density), LocalWindow(density=density), heads=1),
}
GRIDS = [
    TokenGrid(64, 64, suffix=1),
    TokenGrid(37, 53, prefix=5, suffix=3),
    TokenGrid(256, 40, suffix=200),
    TokenGrid(1, 4000, suffix=3, tile=(1, 128)),
]
# Blocks a row cannot do without, besides its own tile and extra tokens; and rows that see everything.
SEEN_BY_ALL = {"GlobalLocal": 2, "Streaming": 2}
SEES_ALL = {"GlobalLocal": 2}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", WITH_DENSITY)
@pytest.mark.parametrize("density", [0.15, 0.25, 0.5, 0.9, 1.0])
def test_density_is_reached_within_one_block_per_row(name, grid, density):
    pattern = WITH_DENSITY[name](density)
    mask = pattern.mask(grid, 4)
    extra = grid.num_blocks - grid.num_tiles
    dense_rows = extra + SEES_ALL.get(name, 0)
    least_row = extra + SEEN_BY_ALL.get(name, 0) + 1
    least = (dense_rows + (grid.num_blocks - dense_rows) * least_row / grid.num_blocks) / grid.num_blocks
    assert abs(mask.density - max(density, least)) * grid.num_blocks <= 1
    assert pattern.density_on(grid, 4) == mask.density


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_rectangular_masks_keep_the_density(name):
    queries, keys = TokenGrid(40, 64, suffix=2), TokenGrid(32, 96, suffix=4)
    mask = WITH_DENSITY[name](0.3).mask(queries, 4, key_grid=keys)
    assert abs(mask.density - 0.3) * keys.num_blocks <= 1


@pytest.mark.parametrize("name", [*WITH_DENSITY, "Butterfly"])
def test_every_query_tile_sees_itself_and_extra_tokens_see_and_are_seen(name):
    grid = TokenGrid(37, 53, prefix=5, suffix=3)
    pattern = Butterfly() if name == "Butterfly" else WITH_DENSITY[name](0.2)
    blocks = pattern.mask(grid, 4).blocks[0]
    assert blocks.diagonal(dim1=-2, dim2=-1).all()
    for extra in (0, grid.num_blocks - 1):
        assert blocks[:, extra].all()
        assert blocks[:, :, extra].all()


def test_local_window_by_radius_covers_every_patch_of_the_window():
    grid, radius = TokenGrid(37, 53, tile=(8, 16)), 5
    mask = LocalWindow(radius=radius).mask(grid, 1)
    tokens = mask.token_mask()[0, 0]
    rows, columns = grid.patch_rows(), grid.patch_columns()
    near = (rows[:, None] - rows).abs().maximum((columns[:, None] - columns).abs()) <= radius
    assert tokens[near].all()
    # No block is there for nothing: each holds a pair within the radius.
    reached = torch.zeros_like(mask.blocks[0, 0])
    block = grid.block_of_token()
    first, second = near.nonzero().unbind(1)
    reached[block[first], block[second]] = True
    assert mask.blocks[0, 0].equal(reached)


def test_local_window_by_density_takes_the_nearest_tiles():
    grid = TokenGrid(64, 64)
    blocks = LocalWindow(density=0.25).mask(grid, 1).blocks[0, 0]
    rows, columns = torch.arange(32) // 4 * 8 + 3.5, torch.arange(32) % 4 * 16 + 7.5
    distance = ((rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2).sqrt()
    for row in range(32):
        assert distance[row][blocks[row]].max() <= distance[row][~blocks[row]].min() + 1e-9


def test_global_tiles_see_and_are_seen():
    grid = TokenGrid(64, 64)
    blocks = GlobalLocal(0.3, global_tiles=3).mask(grid, 1).blocks[0, 0]
    assert blocks.all(-1).sum() == 3
    assert blocks.all(-1).equal(blocks.all(-2))


def test_global_tiles_and_sinks_stay_at_low_densities():
    grid = TokenGrid(64, 64)
    for global_tiles in (1, 4, 8):
        blocks = GlobalLocal(0.05, global_tiles).mask(grid, 1).blocks[0, 0]
        assert blocks.all(0).sum() == blocks.all(1).sum() == global_tiles
        assert blocks.diagonal().all()
    blocks = Streaming(density=0.03, sink=2).mask(grid, 1).blocks[0, 0]
    assert blocks[:, :2].all()
    assert blocks.diagonal().all()


def test_strided_by_stride():
    grid = TokenGrid.sequence(128 * 12)
    blocks = Strided(stride=4).mask(grid, 1).blocks[0, 0]
    tiles = torch.arange(12)
    assert blocks.equal((tiles[:, None] - tiles) % 4 == 0)


def test_random_is_seeded_and_differs_by_head():
    grid = TokenGrid(64, 64)
    first, again = Random(0.3, seed=1).mask(grid, 4).blocks, Random(0.3, seed=1).blocks(grid, grid, 4)
    assert first[0].equal(again)
    assert not first[0, 0].equal(first[0, 1])
    assert not first.equal(Random(0.3, seed=2).mask(grid, 4).blocks)


def test_dilated_local_prefers_its_lattices():
    grid = TokenGrid(13 * 8, 13 * 16)
    blocks = DilatedLocal(25 / 169, dilation_rates=(2,)).mask(grid, 1).blocks[0, 0]
    centre = 6 * 13 + 6
    row, column = blocks[centre].view(13, 13).nonzero().unbind(1)
    assert blocks[centre].sum() == 25
    assert ((row - 6) % 2 == 0).all()
    assert ((column - 6) % 2 == 0).all()


def test_multiscale_gives_groups_of_heads_their_own_window():
    grid = TokenGrid(64, 64)
    blocks = MultiScale(densities=(0.1, 0.5)).mask(grid, 6).blocks[0]
    counts = blocks.sum(-1).float().mean(-1)
    assert counts.tolist() == [3, 3, 3, 16, 16, 16]
    radii = MultiScale(radii=(0, 8)).mask(grid, 2).blocks[0]
    assert radii[0].sum(-1).max() == 1
    assert radii[1].equal(LocalWindow(radius=8).mask(grid, 1).blocks[0, 0])
    with pytest.raises(ValueError, match="heads must be at least as many as scales, 2, got 1"):
        MultiScale(radii=(0, 8)).mask(grid, 1)


def test_region_focused_looks_at_its_points():
    grid = TokenGrid(64, 64)
    blocks = RegionFocused(((0.0, 0.0), (0.99, 0.99)), density=3 / 32).mask(grid, 1).blocks[0, 0]
    assert blocks[:, 0].all()
    assert blocks[:, 31].all()


def test_hybrid_heads():
    grid = TokenGrid(64, 64)
    rest = LocalWindow(density=0.1)
    blocks = Hybrid(Dense(), rest, heads=(1, 3)).mask(grid, 4).blocks[0]
    for head in range(4):
        assert blocks[head].all() == (head in (1, 3))
    assert blocks[0].equal(rest.mask(grid, 1).blocks[0, 0])
    assert Hybrid(Dense(), rest, heads=2).mask(grid, 4).blocks[0, :2].all()
    with pytest.raises(ValueError, match="heads must lie below the number of heads, 4"):
        Hybrid(Dense(), rest, heads=(4,)).mask(grid, 4)


def test_union_of_patterns():
    grid = TokenGrid(64, 64)
    first, second = LocalWindow(density=0.1), Random(0.1)
    union = first | second
    assert union == Union((first, second))
    assert union.mask(grid, 3).blocks.equal(first.mask(grid, 3).blocks | second.mask(grid, 3).blocks)


def test_butterfly_reaches_everything_in_log_steps():
    grid = TokenGrid(64, 64)
    step = Butterfly().mask(grid, 1).blocks[0, 0].float()
    reached = torch.linalg.matrix_power(step, 5)  # log2 of 32 tiles
    assert (reached > 0).all()
    assert step.sum(-1).eq(6).all()


def test_streaming_has_sinks_and_neighbours():
    grid = TokenGrid.sequence(128 * 10)
    blocks = Streaming(local=3, sink=1).mask(grid, 1).blocks[0, 0]
    assert blocks[5].nonzero().flatten().tolist() == [0, 4, 5, 6]


def test_image_to_prompt_connects_prompts_fully():
    grid = TokenGrid(64, 64, suffix=130)
    blocks = ImageToPrompt().mask(grid, 1).blocks[0, 0]
    assert blocks[32:].all()
    assert blocks[:, 32:].all()
    assert not blocks[:32, :32].all()
    with pytest.raises(ValueError, match="ImageToPrompt: grid must have suffix tokens"):
        ImageToPrompt().mask(TokenGrid(64, 64), 1)


def checkerboard(query_grid, key_grid, num_heads):
    tiles = torch.arange(query_grid.num_tiles)
    return ((tiles[:, None] + torch.arange(key_grid.num_tiles)) % 2 == 0)[None]


def test_custom_pattern_by_function_and_by_class():
    grid = TokenGrid(64, 64, prefix=1)
    mask = CustomPattern(checkerboard).mask(grid, 2)
    assert mask.blocks[0, 0, 1:, 1:].equal(checkerboard(grid, grid, 2)[0])
    assert mask.blocks[0, 0, 0].all()
    wrong = CustomPattern(lambda q, k, h: torch.ones(3, q.num_tiles, k.num_tiles, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"CustomPattern: blocks must have shape \[2 \| 1, 33, 33\], got \[3, 33, 33\]"
    ):
        wrong.mask(grid, 2)


class Careless(Pattern):
    """Not a dataclass of its own, so that its instances would all be equal."""

    def __init__(self, stride):
        self.stride = stride

    def image_blocks(self, query_grid, key_grid, num_heads):
        tiles = torch.arange(query_grid.num_tiles)
        return ((tiles[:, None] - tiles) % self.stride == 0)[None]


def test_state_outside_of_fields_is_refused():
    with pytest.raises(TypeError, match="Careless: a pattern must be a frozen dataclass with all its state in fields"):
        Careless(2).mask(TokenGrid(64, 64), 1)


def test_the_first_caller_leaves_no_modes_behind():
    with torch.device("meta"):
        assert LocalWindow(density=0.31).mask(TokenGrid(24, 40), 2).device.type == "cpu"
    assert TokenGrid(24, 40).block_of_token().device.type == "cpu"
    with FakeTensorMode():
        mask = LocalWindow(density=0.32).mask(TokenGrid(24, 41), 2)
    assert not isinstance(mask.blocks, FakeTensor)
    with torch.inference_mode():
        for device in ("cpu", "meta"):
            mask = LocalWindow(density=0.33).mask(TokenGrid(24, 42), 2, device=device)
            assert not mask.blocks.is_inference()
            assert not mask.row_order.is_inference()
    previous = torch.get_default_dtype()
    expected = Random(0.3, seed=11).mask(TokenGrid(64, 64), 2).blocks
    try:
        torch.set_default_dtype(torch.float64)
        assert Random(0.3, seed=11).blocks(TokenGrid(64, 64), TokenGrid(64, 64), 2).equal(expected[0])
    finally:
        torch.set_default_dtype(previous)


def test_masks_are_built_once_and_shared():
    grid = TokenGrid(64, 64)
    assert LocalWindow(density=0.25).mask(grid, 4) is LocalWindow(density=0.25).mask(TokenGrid(64, 64), 4)
    assert LocalWindow(density=0.25).mask(grid, 4) is not LocalWindow(density=0.3).mask(grid, 4)


@pytest.mark.parametrize("name", NAMED_PATTERNS)
def test_named_patterns_make_masks_and_are_hashable_and_picklable(name):
    pattern = resolve_pattern(name)
    assert hash(pattern) == hash(pickle.loads(pickle.dumps(pattern)))
    mask = pattern.mask(TokenGrid(64, 64, prefix=1), 6)
    assert (mask.density == 1) == (name == "dense")


def test_resolve_pattern():
    pattern = Strided(stride=3)
    assert resolve_pattern(pattern) is pattern
    with pytest.raises(ValueError, match="pattern must be one of .*, got 'lokal'"):
        resolve_pattern("lokal")
    with pytest.raises(TypeError, match="pattern must be a Pattern or a short name, got float"):
        resolve_pattern(0.25)


@pytest.mark.parametrize("name", [name for name in WITH_DENSITY if name not in ("Hybrid", "ImageToPrompt")])
@pytest.mark.parametrize("density", [float("nan"), -0.1, 0, 1.5, float("inf"), "half", None, True])
def test_bad_densities_are_refused(name, density):
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got|exactly one of"):
        WITH_DENSITY[name](density)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalWindow(), "LocalWindow: exactly one of density or radius must be given, got none"),
        (lambda: LocalWindow(density=0.1, radius=1), "exactly one of density or radius must be given"),
        (lambda: LocalWindow(radius=-1), "LocalWindow: radius must be a distance in patches ≥ 0, got -1"),
        (lambda: LocalWindow(radius=float("nan")), "radius must be a distance in patches"),
        (lambda: Strided(stride=0), "Strided: stride must be an integer ≥ 1, got 0"),
        (lambda: DilatedLocal(0.1, ()), "DilatedLocal: dilation_rates must not be empty"),
        (lambda: DilatedLocal(0.1, (0,)), "dilation_rates must be an integer ≥ 1, got 0"),
        (lambda: MultiScale(densities=()), "MultiScale: densities must not be empty"),
        (lambda: RegionFocused((), 0.1), "RegionFocused: points must not be empty"),
        (lambda: RegionFocused(((2, 0),), 0.1), "points must be .* fractions of the image"),
        (lambda: GlobalLocal(0.1, -1), "GlobalLocal: global_tiles must be an integer ≥ 0, got -1"),
        (lambda: Streaming(local=0), "Streaming: local must be an integer ≥ 1, got 0"),
        (lambda: Random(0.1, seed=0.5), r"Random: seed must be an integer in \[0, 2⁶³\), got 0.5"),
        (lambda: Random(0.1, seed=2**70), "Random: seed must be an integer"),
        (lambda: RegionFocused((0.1, 0.2), 0.1), r"RegionFocused: points must be \(y, x\) pairs"),
        (lambda: Union(()), "Union: patterns must not be empty"),
        (lambda: Hybrid(Dense(), Dense(), heads=-1), "Hybrid: heads must be an integer ≥ 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_patterns_of_patterns_take_patterns():
    with pytest.raises(TypeError, match="Hybrid: first must be a Pattern, got str"):
        Hybrid("dense", Dense(), heads=1)
    with pytest.raises(TypeError, match="ImageToPrompt: image must be a Pattern"):
        ImageToPrompt(0.5)
