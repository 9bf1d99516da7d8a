"""The kernels that choose blocks against the rule in plain PyTorch: features, choices up to ties, lists, graphs."""

import random

import pytest
import torch

from sparse_attn_modules import (
    BlockMask,
    DynamicTopK,
    DynamicTopP,
    TokenGrid,
    ViTSparseAttention,
    block_sparse_attention,
)
from sparse_attn_modules.backends import cuda
from sparse_attn_modules.patterns import block_features, cuda_selection
from sparse_attn_modules.patterns.choosing import Rule, always_active, block_mass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or cuda.why_not_here() is not None, reason="needs a GPU that the kernels run on"
    ),
]
LISTS = ("key_counts", "key_indices", "row_order", "query_counts", "query_indices")


def draw(seed):
    """Grids, and queries and keys that are alike in neighbours, as views of a fused projection."""
    chance = random.Random(seed)
    torch.manual_seed(seed)

    def grid():
        tile = chance.choice([(8, 16), (8, 16), (16, 8), (4, 32), (1, 128), (128, 1)])
        prefix, suffix = chance.choice([0, 1, 5, 130]), chance.choice([0, 0, 4, 129])
        return TokenGrid(chance.randint(1, 90), chance.randint(1, 90), prefix, suffix, tile)

    query_grid = grid()
    key_grid = query_grid if chance.random() < 0.6 else grid()
    dtype = chance.choice([torch.bfloat16, torch.float16])
    batch, key_heads, group = chance.choice([1, 3]), chance.choice([1, 2, 3]), chance.choice([1, 1, 2])
    head_dim = chance.choice([8, 32, 40, 64, 64, 80, 96, 128])

    def tokens(heads, grid):
        noise = torch.randn(batch, grid.num_tokens, 2, heads, head_dim, device="cuda")
        return (noise.cumsum(1) / 16 + noise / 2).to(dtype)[:, :, 1].transpose(1, 2)

    return tokens(key_heads * group, query_grid), tokens(key_heads, key_grid), query_grid, key_grid


def in_plain_torch(query, key, query_grid, key_grid, scale):
    """Features by the readable rule, of the same numbers in float64."""
    return (
        block_features.query_features(query.double(), query_grid, scale),
        block_features.key_features(key.double(), key_grid),
    )


@pytest.mark.parametrize("seed", range(24))
def test_features_are_those_of_the_rule(seed, poisoned_memory):
    query, key, query_grid, key_grid = draw(seed)
    ours = cuda_selection.features(query, key, query_grid, key_grid, 0.3)
    for mine, expected in zip(ours, in_plain_torch(query, key, query_grid, key_grid, 0.3)):
        width = expected.shape[-1]
        torch.testing.assert_close(mine[..., :width].double(), expected, atol=1e-3, rtol=1e-4)
        assert (mine[..., width:] == 0).all()


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("kind", ["count", "mass"])
def test_choices_are_those_of_the_rule_up_to_ties(seed, kind, poisoned_memory):
    query, key, query_grid, key_grid = draw(seed)
    scale = query.shape[-1] ** -0.5
    mass = block_mass(*in_plain_torch(query, key, query_grid, key_grid, scale), query_grid, key_grid)
    certain = always_active(query_grid, key_grid, mass.device)
    pattern = DynamicTopK(density=0.3) if kind == "count" else DynamicTopP(mass=0.7)
    mask = pattern.select(query, key, query_grid, key_grid)
    assert mask._lists  # made by the kernel
    blocks = mask.blocks
    assert (blocks | ~certain).all()
    optional = ~certain.expand_as(blocks)
    # Products are rounded to 11 bits, so blocks of nearly the same mass may change places.
    most_left = mass.masked_fill(blocks, 0).amax(-1)
    least_taken = mass.masked_fill(~(blocks & optional), torch.inf).amin(-1)
    assert (most_left <= least_taken * 1.05 + 1e-6).all()
    if kind == "count":
        count = pattern.rule(query_grid, key_grid).count
        assert (blocks[:, :, query_grid.tile_blocks].sum(-1) == count).all()
    else:
        kept = (mass * blocks).sum(-1)
        assert (kept >= 0.7 - 0.01).all()
        without_last = kept - torch.where(least_taken.isinf(), kept, least_taken)
        assert (without_last < 0.7 + 0.01)[:, :, query_grid.tile_blocks].all()


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("rule", [Rule(0, 0.6), Rule(3, 0.0)], ids=str)
def test_lists_are_those_of_the_blocks(seed, rule, poisoned_memory):
    query, key, query_grid, key_grid = draw(seed)
    if rule.count:
        extra = key_grid.num_blocks - key_grid.num_tiles
        rule = Rule(min(rule.count + extra, key_grid.num_blocks), 0.0)
    features = cuda_selection.features(query, key, query_grid, key_grid, 0.3)
    blocks, *lists = cuda_selection.choose(*features, query_grid, key_grid, rule, with_query_lists=True)
    expected = BlockMask(blocks, query_grid, key_grid)
    for name, ours in zip(LISTS, lists):
        assert torch.equal(ours, getattr(expected, name)), name


def test_ties_are_taken_in_order():
    grid = TokenGrid(64, 128, prefix=1)
    features = torch.zeros(1, 2, grid.num_blocks * 4, 16, device="cuda")
    blocks, *_ = cuda_selection.choose(features, features, grid, grid, Rule(9, 0.0), with_query_lists=False)
    expected = always_active(grid, grid, features.device)
    for row in range(1, grid.num_blocks):
        for column in range(grid.num_blocks):
            if expected[row].sum() < 9:
                expected[row, column] = True
    assert torch.equal(blocks, expected.expand_as(blocks))


@pytest.mark.parametrize("name", ["relative position", "padding", "float32", "16×16 tiles"])
def test_what_the_kernels_do_not_read_is_chosen_all_the_same(name):
    grid = TokenGrid(48, 64, tile=(16, 16) if "tiles" in name else (8, 16))
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    query, key = (torch.randn(2, 3, grid.num_tokens, 64, device="cuda", dtype=dtype) for _ in "qk")
    options = {}
    if name == "relative position":
        sizes = (grid.height, grid.width)
        options["relative_position"] = tuple(
            torch.randn(2, 3, grid.num_tokens, n, device="cuda").to(dtype) for n in sizes
        )
    if name == "padding":
        options["key_padding_mask"] = torch.rand(2, grid.num_tokens, device="cuda") < 0.3
    mask = DynamicTopK(density=0.25).select(query, key, grid, **options)
    relative = options.get("relative_position")
    on_cpu = DynamicTopK(density=0.25).select(
        query.cpu().float(),
        key.cpu().float(),
        grid,
        relative_position=None if relative is None else tuple(x.cpu().float() for x in relative),
        key_padding_mask=options["key_padding_mask"].cpu() if name == "padding" else None,
    )
    agreement = (mask.blocks.cpu() == on_cpu.blocks).float().mean()
    assert agreement > 0.98
    assert mask.density == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("pattern", [DynamicTopK(density=0.25), DynamicTopP(mass=0.6)])
def test_attention_and_its_gradients_under_the_mask(pattern):
    grid = TokenGrid(40, 50, prefix=1)
    query, key, value = (
        torch.randn(2, 3, grid.num_tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"
    )
    mask = pattern.select(query, key, grid)
    weight = torch.randn_like(query)
    results = []
    for backend in ("cuda", "gathered"):
        out = block_sparse_attention(query, key, value, mask, backend=backend)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (query, key, value))))
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()


@pytest.mark.parametrize("pattern", [DynamicTopK(density=0.25), DynamicTopP(mass=0.6)])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_and_in_cuda_graphs_it_follows_its_input(pattern, mode):
    torch.compiler.reset()
    grid = TokenGrid(64, 64)
    layer = ViTSparseAttention(128, num_heads=2, pattern=pattern, grid=grid).cuda().bfloat16().eval()
    layer.qkv.weight.data *= 12
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(4):
            tokens = torch.randn(2, grid.num_tokens, 128, device="cuda", dtype=torch.bfloat16)
            out = compiled(tokens).clone()
            torch.testing.assert_close(out, layer(tokens), atol=2e-2, rtol=2e-2)


def test_it_can_be_captured_by_hand():
    grid = TokenGrid(64, 64)
    query, key = (torch.randn(1, 2, grid.num_tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in "qk")
    pattern = DynamicTopK(density=0.25)
    pattern.select(query, key, grid)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = pattern.select(query, key, grid)
    for _ in range(3):
        query.normal_()
        key.normal_()
        graph.replay()
        assert torch.equal(mask.blocks, pattern.select(query, key, grid).blocks)
