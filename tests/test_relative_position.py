"""The factors of the relative position against products written out."""

import pytest
import torch
import torch.nn.functional as F

from sparse_attn_modules.relative_position import relative_position

GRIDS = [((5, 7), None), ((6, 9), (4, 4)), ((1, 3), (14, 14)), ((8, 8), (3, 5)), ((16, 16), (16, 16))]


def written_out(query, table_h, table_w, grid, window):
    """One product for each query and key."""
    found = []
    for axis, table in enumerate((table_h, table_w)):
        period = window[axis]
        if table.shape[0] != 2 * period - 1:
            table = F.interpolate(table.T[None], size=2 * period - 1, mode="linear")[0].T
        patches = torch.arange(grid[0] * grid[1])
        position = (patches // grid[1] if axis == 0 else patches % grid[1]) % period
        embedding = table[position[:, None] - torch.arange(period) + period - 1]  # [N, keys, D]
        found.append(torch.einsum("bhnd,nkd->bhnk", query, embedding))
    return found


def draw(grid, fused, dtype=torch.float64, batch=2, heads=3, head_dim=6, length=(9, 7)):
    tokens = grid[0] * grid[1]
    projected = torch.randn(batch, tokens, 3 if fused else 1, heads, head_dim, dtype=dtype)
    query = projected[:, :, 0].transpose(1, 2).requires_grad_()
    return query, *(torch.randn(rows, head_dim, dtype=dtype, requires_grad=True) for rows in length)


@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("fused", [True, False])
def test_products_and_gradients(grid, window, fused):
    inputs = draw(grid, fused)
    found = relative_position(*inputs, grid, window)
    expected = written_out(*inputs, grid, window or grid)
    grads = [torch.randn_like(tensor) for tensor in expected]
    for actual, reference in zip(
        (*found, *torch.autograd.grad(found, inputs, grads)), (*expected, *torch.autograd.grad(expected, inputs, grads))
    ):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_of_one_axis_alone(axis):
    inputs = draw((4, 6), fused=True)
    grad = torch.randn(2, 3, 24, (4, 6)[axis], dtype=torch.float64)
    found = torch.autograd.grad(relative_position(*inputs, (4, 6))[axis], inputs, grad, materialize_grads=True)
    expected = torch.autograd.grad(
        written_out(*inputs, (4, 6), (4, 6))[axis], inputs, grad, materialize_grads=True, allow_unused=True
    )
    for actual, reference in zip(found, expected):
        torch.testing.assert_close(actual, reference)


def test_gradients_of_tables_add_up_in_full_precision():
    """Each row of a table serves every position and image; in bfloat16 such a sum would lose its small terms."""
    inputs = draw((24, 24), fused=False, batch=4, length=(47, 47))
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    grads = [torch.ones(4, 3, 576, 24, dtype=torch.bfloat16)] * 2
    found = torch.autograd.grad(relative_position(*low, (24, 24)), low[1:], grads)
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    expected = torch.autograd.grad(
        written_out(*exact, (24, 24), (24, 24)), exact[1:], [grad.double() for grad in grads]
    )
    for actual, reference in zip(found, expected):
        assert (actual - reference).abs().max() < 2**-7 * reference.abs().max()


def test_rows_of_the_result_begin_at_multiples_of_16_bytes():
    query, *tables = draw((14, 14), fused=False, dtype=torch.bfloat16)
    for rel in relative_position(query, *tables, (14, 14)):
        assert rel.shape == (2, 3, 196, 14)
        assert all(stride % 8 == 0 for stride in rel.stride()[:3])
        assert rel.stride(3) == 1


def test_second_derivatives_are_refused():
    inputs = draw((3, 4), fused=False)
    (grad,) = torch.autograd.grad(relative_position(*inputs, (3, 4))[0].square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"must be of first order"):
        grad.sum().backward()


def test_autocast_does_not_reach_inside():
    query, *tables = draw((4, 5), fused=False, dtype=torch.float32)
    expected = relative_position(query, *tables, (4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        found = relative_position(query, *tables, (4, 5))
    for actual, reference in zip(found, expected):
        assert torch.equal(actual, reference)


def test_operator_checks():
    query, *tables = draw((4, 6), fused=True)
    torch.library.opcheck(
        torch.ops.sparse_attn_modules.relative_position.default,
        (query, *tables, [4, 6], [3, 3]),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiles_in_one_graph():
    torch.compiler.reset()
    inputs = draw((4, 6), fused=True)
    compiled = torch.compile(relative_position, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*inputs, (4, 6), (3, 3)), written_out(*inputs, (4, 6), (3, 3))
    for actual, reference in zip(
        (*found, *torch.autograd.grad([tensor.square().sum() for tensor in found], inputs)),
        (*expected, *torch.autograd.grad([tensor.square().sum() for tensor in expected], inputs)),
    ):
        torch.testing.assert_close(actual, reference)
