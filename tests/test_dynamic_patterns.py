"""Patterns that choose blocks at run time: the estimate and the choice against loops, and life in a model."""

import copy
import math
import pickle

import pytest
import timm
import torch
from torch import nn

from sparse_attn_modules import (
    Dense,
    DensitySchedule,
    DynamicTopK,
    DynamicTopP,
    Hybrid,
    ImageToPrompt,
    LocalWindow,
    SAMAttentionSparse,
    SparseMultiheadAttention,
    TokenGrid,
    ViTSparseAttention,
    block_sparse_attention,
    patch_model,
    patch_report,
    unpatch_model,
)
from sparse_attn_modules.patterns.block_features import cut_of
from sparse_attn_modules.patterns.choosing import Rule, block_mass, choose
from sparse_attn_modules.patterns.selection import features

GRIDS = [
    (TokenGrid(9, 13, prefix=3, suffix=2, tile=(4, 4)), None),
    (TokenGrid(8, 16, tile=(2, 4)), None),
    (TokenGrid(7, 5, prefix=9, tile=(2, 4)), TokenGrid(11, 6, suffix=5, tile=(4, 2))),
    (TokenGrid.sequence(45, 8), TokenGrid.sequence(30, 8)),
    (TokenGrid(6, 10, tile=(3, 5)), None),
    (TokenGrid(20, 36, prefix=17, tile=(8, 16)), TokenGrid(40, 9, suffix=33, tile=(32, 4))),
]


def parts_of_tokens(grid):
    """For each block and part the tokens in it, found by asking every token where it lies."""
    rows, columns = cut_of(grid)
    number = rows * columns
    blocks, rows_of, columns_of = grid.block_of_token(), grid.patch_rows(), grid.patch_columns()
    members = [[[] for _ in range(number)] for _ in range(grid.num_blocks)]
    first_suffix = grid.num_tokens - grid.suffix
    for token in range(grid.num_tokens):
        y, x = int(rows_of[token]), int(columns_of[token])
        if y >= 0:
            part_y = y % grid.tile[0] // (grid.tile[0] // rows)
            part = part_y * columns + x % grid.tile[1] // (grid.tile[1] // columns)
        else:
            place = token if token < grid.prefix else token - first_suffix
            part = place % grid.block_size // (grid.block_size // number)
        members[int(blocks[token])][part].append(token)
    return members


def samples_of(members, grid):
    """Every fourth token of each row of a whole part, two further in odd rows; all of one that is cut off."""
    rows, columns = cut_of(grid)
    height, width = grid.tile[0] // rows, grid.tile[1] // columns
    if len(members) < height * width:
        return members
    if width < 4 or grid.patch_rows()[members[0]] < 0:
        return members[::4]
    return [token for i, token in enumerate(members) if (i % width + 2 * (i // width)) % 4 == 0]


def mass_by_hand(query, key, query_grid, key_grid, scale, relative=None, padding=None):
    """The estimated mass, part by part, in float64."""
    batch, heads = query.shape[:2]
    group = heads // key.shape[1]
    mass = torch.zeros(batch, heads, query_grid.num_blocks, key_grid.num_blocks, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            k_all = key[b, h // group].double()
            for i, parts in enumerate(parts_of_tokens(query_grid)):
                size = sum(map(len, parts))
                for tokens in filter(None, parts):
                    q = query[b, h, samples_of(tokens, query_grid)].double().mean(0) * scale
                    logits, owners = [], []
                    for j, key_parts in enumerate(parts_of_tokens(key_grid)):
                        for members in key_parts:
                            if padding is not None:
                                members = [t for t in members if not padding[b, t]]
                            if not members:
                                continue
                            k = k_all[members if padding is not None else samples_of(members, key_grid)]
                            logit = q @ k.mean(0) + q @ q * k.var(0, correction=0).mean() / 2 + math.log(len(members))
                            if relative is not None and key_grid.patch_rows()[members[0]] >= 0:
                                y, x = (
                                    key_grid.patch_rows()[members].unique(),
                                    key_grid.patch_columns()[members].unique(),
                                )
                                logit = logit + relative[0][b, h, tokens][:, y].double().mean()
                                logit = logit + relative[1][b, h, tokens][:, x].double().mean()
                            logits.append(logit)
                            owners.append(j)
                    weights = torch.stack(logits).softmax(0) * len(tokens) / size
                    mass[b, h, i] += (
                        torch.zeros(key_grid.num_blocks).double().scatter_add(0, torch.tensor(owners), weights)
                    )
    return mass


def chosen_by_hand(mass, query_grid, key_grid, count=None, share=None):
    """Row by row: what is always active, then the blocks of most mass."""
    blocks = torch.zeros_like(mass, dtype=torch.bool)
    tiles = range(key_grid.num_blocks)[key_grid.tile_blocks]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, mass.shape[:3])).tolist():
        tile = i - query_grid.num_prefix_blocks
        if not 0 <= tile < query_grid.num_tiles:
            blocks[b, h, i] = True
            continue
        own = own_tile(tile, query_grid, key_grid) + key_grid.num_prefix_blocks
        order = sorted(range(key_grid.num_blocks), key=lambda j: (j in tiles and j != own, -float(mass[b, h, i, j]), j))
        total = 0.0
        for rank, j in enumerate(order):
            if j in tiles and j != own and (rank >= count if count else total >= share * float(mass[b, h, i].sum())):
                break
            blocks[b, h, i, j] = True
            total += float(mass[b, h, i, j])
    return blocks


def own_tile(tile, query_grid, key_grid):
    def nearest(index, size, step, key_size, key_step):
        centre = (index * step + min(index * step + step, size)) / 2 / size
        centres = [(first + min(first + key_step, key_size)) / 2 / key_size for first in range(0, key_size, key_step)]
        return min(range(len(centres)), key=lambda i: (round(abs(centres[i] - centre), 9), i))

    row, column = divmod(tile, query_grid.tile_columns)
    y = nearest(row, query_grid.height, query_grid.tile[0], key_grid.height, key_grid.tile[0])
    x = nearest(column, query_grid.width, query_grid.tile[1], key_grid.width, key_grid.tile[1])
    return y * key_grid.tile_columns + x


def draw(query_grid, key_grid=None, batch=2, heads=4, key_heads=2, width=8, dtype=torch.float32):
    key_grid = query_grid if key_grid is None else key_grid
    # Neighbours are alike, as in images, so that blocks differ.
    query = torch.randn(batch, query_grid.num_tokens, heads, width, dtype=dtype).cumsum(1).transpose(1, 2) / 3
    key = torch.randn(batch, key_heads, key_grid.num_tokens, width, dtype=dtype).cumsum(2) / 3
    return query, key


@pytest.mark.parametrize("grids", GRIDS, ids=str)
@pytest.mark.parametrize("extras", ["plain", "relative position", "padding"])
def test_the_estimate_is_that_of_a_loop_over_parts(grids, extras):
    query_grid, key_grid = grids[0], grids[1] or grids[0]
    query, key = draw(query_grid, key_grid, dtype=torch.float64)
    relative = padding = None
    if extras == "relative position":
        relative = tuple(
            torch.randn(2, 4, query_grid.num_tokens, size, dtype=torch.float64)
            for size in (key_grid.height, key_grid.width)
        )
    if extras == "padding":
        padding = torch.rand(2, key_grid.num_tokens) < 0.5
    mass = block_mass(*features(query, key, query_grid, key_grid, 0.4, relative, padding), query_grid, key_grid)
    expected = mass_by_hand(query, key, query_grid, key_grid, 0.4, relative, padding)
    torch.testing.assert_close(mass, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_the_choice_is_that_of_a_loop_over_rows(grids):
    query_grid, key_grid = grids[0], grids[1] or grids[0]
    mass = torch.rand(2, 3, query_grid.num_blocks, key_grid.num_blocks).pow(4)
    mass /= mass.sum(-1, keepdim=True)
    mass[0, 0] = 1 / key_grid.num_blocks  # nothing but ties
    extra = key_grid.num_blocks - key_grid.num_tiles
    for count in range(1 + extra, key_grid.num_blocks + 1):
        blocks = choose(mass, query_grid, key_grid, Rule(count, 0.0))
        assert torch.equal(blocks, chosen_by_hand(mass, query_grid, key_grid, count=count))
    for share in (0.1, 0.5, 0.93):
        blocks = choose(mass[1:], query_grid, key_grid, Rule(0, share))
        assert torch.equal(blocks, chosen_by_hand(mass[1:], query_grid, key_grid, share=share))


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_masks_have_the_density_that_is_foretold(grids):
    query_grid, key_grid = grids[0], grids[1] or grids[0]
    for density in (0.01, 0.3, 0.7, 1.0):
        pattern = DynamicTopK(density=density)
        mask = pattern.select(*draw(query_grid, key_grid), query_grid, key_grid)
        assert mask.blocks.shape == (2, 4, query_grid.num_blocks, key_grid.num_blocks)
        assert mask.density == pytest.approx(pattern.density_on(query_grid, key_grid=key_grid))
        assert mask.declared_density == pytest.approx(mask.density)
        sums = mask.blocks[:, :, query_grid.tile_blocks].sum(-1)
        assert (sums == sums[0, 0, 0]).all()
    assert DynamicTopK(density=0.25).density_on(TokenGrid(64, 64)) == 0.25


def test_top_p_keeps_the_mass_asked_for_and_no_more():
    grid = TokenGrid(16, 16, tile=(2, 4))
    query, key = draw(grid)
    mass = block_mass(*features(query, key, grid, grid, 8**-0.5), grid, grid)
    mask = DynamicTopP(mass=0.8).select(query, key, grid)
    kept = (mass * mask.blocks).sum(-1)
    assert (kept > 0.8 - 1e-5).all()
    least = mass.masked_fill(~mask.blocks | torch.eye(grid.num_blocks).bool(), torch.inf).amin(-1)
    has_more_than_its_own = mask.blocks.sum(-1) > 1
    assert has_more_than_its_own.any()
    assert (kept - least < 0.8 + 1e-5)[has_more_than_its_own].all()
    assert DynamicTopP(mass=1.0).select(query, key, grid).blocks.any()


def test_a_far_block_that_draws_all_attention_is_found():
    grid = TokenGrid(32, 64, prefix=1)
    for target in torch.randint(grid.num_tiles, (5,)).tolist():
        query, key = torch.randn(1, 2, grid.num_tokens, 16), torch.randn(1, 2, grid.num_tokens, 16)
        query[..., 0] += 3
        inside = grid.block_of_token() == grid.num_prefix_blocks + target
        key[:, :, inside, 0] += 6
        mask = DynamicTopK(density=0.2).select(query, key, grid)
        assert mask.blocks[..., grid.num_prefix_blocks + target].all()


def test_spread_keys_are_found_where_means_say_nothing():
    grid = TokenGrid(16, 64)
    query, key = torch.randn(1, 1, grid.num_tokens, 16) * 3, torch.randn(1, 1, grid.num_tokens, 16) * 0.1
    inside = grid.block_of_token() == 5
    spread = torch.randn(1, 1, int(inside.sum()), 16) * 3
    key[:, :, inside] = spread - spread.mean(2, keepdim=True)
    assert DynamicTopK(density=0.25).select(query, key, grid).blocks[..., 5].all()


@pytest.mark.parametrize("backend", ["gathered", "reference"])
@pytest.mark.parametrize("pattern", [DynamicTopK(density=0.4), DynamicTopP(mass=0.6)])
def test_gradients_are_those_of_attention_under_the_mask(oracle, backend, pattern):
    grid = TokenGrid(9, 13, prefix=3, tile=(4, 4))
    query, key = (x.double().requires_grad_() for x in draw(grid, dtype=torch.float64))
    value = torch.randn_like(key).requires_grad_()
    mask = pattern.select(query, key, grid)
    assert not mask.blocks.all()
    assert not mask.blocks.requires_grad
    assert "query_counts" in mask._lists
    out = block_sparse_attention(query, key, value, mask, backend=backend)
    token_mask = mask.token_mask()
    logits = query @ key.repeat_interleave(2, 1).mT * 8**-0.5
    expected = logits.masked_fill(~token_mask, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (query, key, value))
    for ours, theirs in zip(grads, torch.autograd.grad((expected * weight).sum(), (query, key, value))):
        torch.testing.assert_close(ours, theirs)


def vit(**options):
    sizes = {"img_size": (192, 384), "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, **options).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 20  # or every query would attend to everything alike
    return model


def test_a_model_patched_with_it():
    model = vit(num_classes=4)
    images = torch.randn(2, 3, 192, 384)
    with torch.no_grad():
        dense = model.forward_features(images)
        keys = list(model.state_dict())
        patch_model(model, {"blocks.0.*": DynamicTopK(density=0.3), "blocks.1.*": DynamicTopP(mass=0.5), "*": Dense()})
        sparse = model.forward_features(images)
        assert list(model.state_dict()) == keys
        assert not torch.allclose(sparse, dense, atol=1e-4)
        report = patch_report(model)
        first, second, third = report.layers
        grid = TokenGrid(24, 48, prefix=1)
        assert first.density == DynamicTopK(density=0.3).density_on(grid)
        assert first.note == "dynamic"
        assert first.flops_after == round(first.flops_before * first.density)
        assert second.density is None
        assert second.flops_after is None
        assert "depends on the image" in second.note
        assert third.density == 1.0
        assert report.flops_after == first.flops_after + second.flops_before + third.flops_before
        assert "DynamicTopK(density=0.3)" in str(report)
        assert "DynamicTopP(mass=0.5)" in str(report)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin.forward_features(images), sparse)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model)).forward_features(images), sparse)
        patch_model(model, DynamicTopP(mass=1.0))
        torch.testing.assert_close(model.forward_features(images), dense, atol=1e-5, rtol=1e-4)
        unpatch_model(model)
        assert torch.equal(model.forward_features(images), dense)


def test_layers_with_few_tiles_stay_dense():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2).eval()
    patch_model(model, DynamicTopK(density=0.25))
    layer = patch_report(model).layers[0]
    assert layer.density == 1.0
    assert "nothing to gain" in layer.note


def test_training_goes_through_it():
    model = vit(num_classes=4).train()
    patch_model(model, DynamicTopK(density=0.4))
    nn.functional.cross_entropy(model(torch.randn(2, 3, 192, 384)), torch.tensor([0, 3])).backward()
    for block in model.blocks:
        assert block.attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("pattern", [DynamicTopK(density=0.3), DynamicTopP(mass=0.6)])
def test_compiles_into_one_graph(pattern):
    model = patch_model(vit(num_classes=4), pattern)
    images = torch.randn(2, 3, 192, 384)
    expected = model(images)
    expected.square().sum().backward()
    grad = model.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(images)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    out.square().sum().backward()
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, grad, atol=1e-4, rtol=1e-3)


def test_operators_pass_opcheck():
    grid = TokenGrid(9, 13, prefix=3, tile=(4, 4))
    query, key = draw(grid)
    padding = torch.rand(2, grid.num_tokens) < 0.2
    for with_query_lists in (False, True):
        arguments = (query, key, padding if with_query_lists else None, grid.pack(), grid.pack(), 0.5)
        torch.library.opcheck(torch.ops.sparse_attn_modules.pool_blocks.default, arguments)
        parts = features(query, key, grid, grid, 0.5)
        arguments = (*parts, grid.pack(), grid.pack(), 0, 0.5, with_query_lists)
        torch.library.opcheck(torch.ops.sparse_attn_modules.choose_blocks.default, arguments)


def test_inference_mode_leaves_masks_that_training_can_save():
    grid = TokenGrid(9, 13, tile=(4, 4))
    with torch.inference_mode():
        mask = DynamicTopK(density=0.4).select(*draw(grid), grid)
    assert not mask.blocks.is_inference()
    assert not mask.key_indices.is_inference()


def test_every_layer_takes_it():
    grid = TokenGrid(10, 14, prefix=1, tile=(4, 4))
    tokens = torch.randn(2, grid.num_tokens, 24)
    pattern = DynamicTopK(density=0.4)
    layer = ViTSparseAttention(24, num_heads=3, pattern=pattern, grid=grid)
    sparse = layer(tokens)
    # The dense way round, which a token mask takes, must choose the same blocks.
    everything = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    torch.testing.assert_close(layer(tokens, attn_mask=everything), sparse, atol=1e-5, rtol=1e-4)

    multihead = SparseMultiheadAttention(24, 3, batch_first=True, pattern=pattern, grid=grid)
    padding = torch.rand(2, grid.num_tokens) < 0.2
    one = multihead(tokens, tokens, tokens, key_padding_mask=padding, need_weights=False)[0]
    two, weights = multihead(tokens, tokens, tokens, key_padding_mask=padding, need_weights=True)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert (weights == 0).float().mean() > 0.3

    sam = SAMAttentionSparse(24, num_heads=3, use_rel_pos=True, input_size=(40, 48), pattern=pattern)
    nn.init.normal_(sam.rel_pos_h)
    nn.init.normal_(sam.rel_pos_w)
    image = torch.randn(1, 40, 48, 24)
    near = sam(image)
    sam.pattern = Dense()
    assert near.isfinite().all()
    assert not torch.allclose(near, sam(image), atol=1e-3)


def test_a_density_schedule_drives_it():
    model = patch_model(vit(num_classes=4), DynamicTopK(density=0.9))
    schedule = DensitySchedule(model, {0: 1.0, 2: 0.3})
    model(torch.randn(1, 3, 192, 384))
    schedule.step(to=2)
    assert patch_report(model).layers[0].pattern == DynamicTopK(density=0.3)


def test_errors():
    for density in (0, -0.1, 1.1, float("nan"), True, "a"):
        with pytest.raises(ValueError, match=r"DynamicTopK: density must lie in \(0, 1\], got"):
            DynamicTopK(density=density)
        with pytest.raises(ValueError, match=r"DynamicTopP: mass must lie in \(0, 1\], got"):
            DynamicTopP(mass=density)
    grid = TokenGrid(16, 16)
    with pytest.raises(TypeError, match=r"DynamicTopK: the mask must be made by DynamicTopK.select\(query, key, …\)"):
        DynamicTopK(density=0.5).mask(grid, 3)
    for combine in (
        lambda p: p | LocalWindow(density=0.1),
        lambda p: LocalWindow(density=0.1) | p,
        lambda p: Hybrid(Dense(), p, heads=1),
        lambda p: ImageToPrompt(image=p),
    ):
        with pytest.raises(TypeError, match="whose mask follows from the geometry alone, got DynamicTop"):
            combine(DynamicTopP(mass=0.5))
    query, key = torch.randn(1, 4, 256, 8), torch.randn(1, 4, 256, 8)
    pattern = DynamicTopK(density=0.5)
    with pytest.raises(ValueError, match=r"DynamicTopK.select: query must have shape \[B, H, 256, D\] for 16×16"):
        pattern.select(query[:, :, 1:], key, grid)
    with pytest.raises(ValueError, match=r"DynamicTopK.select: key must have query's batch and head_dim"):
        pattern.select(query, key[:, :3], grid)
