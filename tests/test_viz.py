"""The figures: what they show, not only that they exist."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from sparse_attn_modules import BlockMask, TokenGrid
from sparse_attn_modules.patterns import Hybrid, LocalWindow, Random
from sparse_attn_modules.viz import plot_attended_patches, plot_block_mask, plot_density

pytest.importorskip("matplotlib")


def render(figure):
    """The figure as it would be saved: uint8 [height, width, 4]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def texts(figure):
    from matplotlib.text import Text

    return [artist.get_text() for artist in figure.findobj(Text) if artist.get_text()]


def test_block_mask_panels_show_the_blocks_of_each_head():
    grid = TokenGrid(33, 40, prefix=3, suffix=2)
    mask = Random(0.4, seed=1).mask(grid, 5)
    figure = plot_block_mask(mask)
    assert len(figure.axes) == 5
    for head, ax in enumerate(figure.axes):
        np.testing.assert_array_equal(ax.images[0].get_array(), mask.blocks[0, head].numpy())
        assert ax.get_title() == f"head {head} · density {mask.blocks[0, head].double().mean():.2f}"
        edges = sorted(line.get_xdata()[0] for line in ax.lines if line.get_xdata()[0] == line.get_xdata()[1])
        assert edges == [grid.tile_blocks.start - 0.5, grid.tile_blocks.stop - 0.5]
    assert any("3 + 33×40 + 2 tokens" in text and "extra tokens" in text for text in texts(figure))
    active, skipped = (figure.axes[0].images[0].to_rgba(np.array([[value]]), bytes=True)[0, 0] for value in (1, 0))
    assert active[:3].sum() < skipped[:3].sum() - 200
    assert render(figure).std() > 10


def test_block_mask_of_chosen_heads_and_batch_entries():
    grid = TokenGrid(16, 16)
    blocks = torch.rand(2, 6, 2, 2) < 0.5
    figure = plot_block_mask(BlockMask(blocks, grid), heads=[4, 1], batch=1)
    assert [ax.get_title().split(" · ")[0] for ax in figure.axes] == ["head 4", "head 1"]
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), blocks[1, 4].numpy())
    shared = plot_block_mask(LocalWindow(density=0.5).mask(TokenGrid(32, 32), 6))
    assert [ax.get_title() for ax in shared.axes] == ["all heads · density 0.50"]
    assert len(plot_block_mask(BlockMask(blocks[:, :1].expand(2, 40, 2, 2), grid)).axes) == 16


def test_block_mask_between_two_grids_names_both():
    mask = LocalWindow(density=0.5).mask(TokenGrid(32, 32), 1, key_grid=TokenGrid(16, 40))
    assert any("32×32" in text and "keys: 16×40" in text for text in texts(plot_block_mask(mask)))


def test_attended_patches_are_shaded_by_number_of_heads():
    grid = TokenGrid(20, 40, prefix=1)
    mask = Hybrid(LocalWindow(density=0.6), LocalWindow(radius=0), heads=1).mask(grid, 3)
    photo = torch.rand(50, 100, 3)
    query = (3, 21)
    figure = plot_attended_patches(photo, mask, query)
    left, right = figure.axes[:2]
    np.testing.assert_allclose(left.images[0].get_array(), photo.numpy(), atol=1e-6)

    token_mask = mask.token_mask()[0, :, 1 + query[0] * 40 + query[1], 1:].view(3, 20, 40)
    counts = token_mask.sum(0).numpy()
    assert set(np.unique(counts)) == {0, 1, 3}
    shades = np.asarray(right.images[1].get_array())
    by_count = {count: np.unique(shades[counts == count], axis=0) for count in (0, 1, 3)}
    assert all(len(shade) == 1 for shade in by_count.values())
    lightness = [by_count[count][0][:3] @ (0.299, 0.587, 0.114) for count in (0, 1, 3)]
    assert lightness == sorted(lightness)
    assert lightness[1] - lightness[0] > 0.05
    assert lightness[2] - lightness[1] > 0.2

    marks = [patch.get_bbox().bounds for patch in right.patches]
    assert marks == [(21, 3, 1, 1)] * 2
    share = (counts > 0).mean()
    assert f"{counts.mean() / 3:.0%} per head, {share:.0%} by any" in right.get_title()
    assert "row 3, column 21" in " ".join(texts(figure))
    assert "heads that attend, of 3" in texts(figure)


@pytest.mark.parametrize("as_bytes", [True, False])
def test_attended_patches_of_a_shared_mask_over_a_grey_photograph(as_bytes):
    photo = np.random.default_rng(0).random((64, 48))
    given = (photo * 255).astype(np.uint8) if as_bytes else photo
    mask = LocalWindow(density=0.3).mask(TokenGrid(32, 24), 8)
    figure = plot_attended_patches(given, mask, (31, 0))
    assert len(figure.axes) == 2  # no colour bar where there is one colour
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), photo, atol=1 / 255)
    assert "of the image" in figure.axes[1].get_title()
    assert render(figure).std() > 10


def test_the_query_lies_on_the_key_grid_of_the_same_image():
    mask = LocalWindow(density=0.5).mask(TokenGrid(32, 32), 1, key_grid=TokenGrid(16, 64))
    figure = plot_attended_patches(torch.rand(20, 20), mask, (10, 8))
    assert figure.axes[1].patches[0].get_bbox().bounds == (16, 5, 1, 1)


def test_density_bars():
    rows = [("blocks.0.attn", 0.25), ("blocks.1.attn", 1.0), ("blocks.2.attn", None)]
    figure = plot_density(rows)
    (ax,) = figure.axes
    assert [bar.get_width() for bar in ax.patches] == [0.25, 1.0, 0.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [name for name, _ in rows]
    assert [text.get_text() for text in ax.texts] == ["0.25", "dense", "not known yet"]
    assert ax.patches[0].get_facecolor() != ax.patches[1].get_facecolor()
    assert "mean density 0.625" in ax.get_title()
    assert ax.lines[0].get_xdata()[0] == 0.625
    top, bottom = ax.patches[0].get_y(), ax.patches[2].get_y()
    assert ax.transData.transform((0, top))[1] > ax.transData.transform((0, bottom))[1]  # the first layer on top
    assert render(figure).std() > 10


def test_bad_arguments():
    mask = LocalWindow(density=0.5).mask(TokenGrid(32, 32), 4)
    photo = torch.rand(8, 8, 3)
    for call, message in (
        (lambda: plot_block_mask(mask, heads=[1]), r"plot_block_mask: heads must lie in \[0, 1\), got 1"),
        (lambda: plot_block_mask(mask, heads=[]), "plot_block_mask: heads must not be empty"),
        (lambda: plot_block_mask(mask, batch=-1), r"plot_block_mask: batch must lie in \[0, 1\), got -1"),
        (lambda: plot_attended_patches(photo, mask, (0, 32)), r"query column must lie in \[0, 32\), got 32"),
        (lambda: plot_attended_patches(photo, mask, (-1, 0)), r"query row must lie in \[0, 32\), got -1"),
        (lambda: plot_attended_patches(photo, mask, (0, 0), batch=1), r"batch must lie in \[0, 1\), got 1"),
        (lambda: plot_attended_patches(photo[..., :2], mask, (0, 0)), r"image must have shape .* got \[8, 8, 2\]"),
        (lambda: plot_attended_patches(photo * 255, mask, (0, 0)), r"image must be uint8 or lie in \[0, 1\]"),
        (lambda: plot_density([]), "plot_density: layers must not be empty"),
        (lambda: plot_density([("a", 1.5)]), r"plot_density: density must lie in \[0, 1\], got 1.5 for a"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_leaves_matplotlib_alone():
    script = """
import sys
import torch
import sparse_attn_modules.viz as viz
assert "matplotlib" not in sys.modules, "imported with the module"
import matplotlib
before = dict(matplotlib.rcParams)
viz.plot_density([("a", 0.5)])
mask = viz.BlockMask.dense(viz.TokenGrid(8, 8))
viz.plot_block_mask(mask)
viz.plot_attended_patches(torch.rand(8, 8), mask, (0, 0))
assert dict(matplotlib.rcParams) == before, "changed settings"
from matplotlib import pyplot
assert not pyplot.get_fignums(), "opened a window"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_flipped_photographs_and_pil_images():
    pil = pytest.importorskip("PIL.Image")
    mask = LocalWindow(density=0.25).mask(TokenGrid(32, 32), 2)
    pixels = np.random.default_rng().integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for image in (pixels[::-1], pil.fromarray(pixels)):
        assert plot_attended_patches(image, mask, (3, 4)).axes
