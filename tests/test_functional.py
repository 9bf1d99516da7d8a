"""block_sparse_attention: its checks, autocast, and the layouts it takes."""

import pytest
import torch

from sparse_attn_modules import BlockMask, LocalWindow, Random, TokenGrid, block_sparse_attention

GRID = TokenGrid(9, 11, prefix=1, tile=(4, 4))
MASK = Random(0.4).mask(GRID, 4)
N = GRID.num_tokens


def tensors(heads=4, tokens=N, head_dim=8, batch=2, **options):
    return torch.randn(batch, heads, tokens, head_dim, **options)


def call(query=None, key=None, value=None, mask=MASK, **options):
    query = tensors() if query is None else query
    key = tensors() if key is None else key
    value = tensors() if value is None else value
    return block_sparse_attention(query, key, value, mask, **options)


def test_views_of_a_fused_projection_are_read_in_place():
    qkv = torch.randn(2, N, 3, 4, 8)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    expected = call(query.contiguous(), key.contiguous(), value.contiguous(), backend="reference")
    for backend in ("reference", "gathered"):
        torch.testing.assert_close(call(query, key, value, backend=backend), expected)


def test_last_dimension_of_size_one_needs_no_unit_stride():
    query = torch.randn(2, 4, N, 2)[..., :1]
    assert call(query, query, query).shape == (2, 4, N, 1)


def test_meta_tensors_give_shapes():
    query = tensors(device="meta")
    out, lse = call(query, query, query, mask=MASK.to("meta"), backend="reference", return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == ((2, 4, N, 8), (2, 4, N), "meta")


def test_empty_batch():
    assert call(*(tensors(batch=0) for _ in range(3))).shape == (0, 4, N, 8)


@pytest.mark.parametrize("backend", ["reference", "gathered"])
def test_autocast_runs_in_its_dtype_and_keeps_statistics_in_float32(backend):
    query, key, value = (tensors(requires_grad=True) for _ in range(3))
    rel = torch.randn(2, 4, N, GRID.height), torch.randn(2, 4, N, GRID.width)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = call(query, key, value, relative_position=rel, return_lse=True, backend=backend)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    low = [tensor.detach().bfloat16() for tensor in (query, key, value)]
    low_rel = rel[0].bfloat16(), rel[1].bfloat16()
    explicit, explicit_lse = call(*low, relative_position=low_rel, return_lse=True, backend=backend)
    # Autocast must not reach into the backend: the same numbers come out of an explicit cast.
    torch.testing.assert_close(out, explicit, rtol=0, atol=0)
    torch.testing.assert_close(lse, explicit_lse, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        out.float().sum().backward()
    assert query.grad.dtype == torch.float32
    assert query.grad.isfinite().all()


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*(tensors(dtype=torch.float64) for _ in range(3))).dtype == torch.float64


SEQUENCE = TokenGrid.sequence(N)
BAD_CALLS = [
    ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    ({"query": tensors()[0]}, ValueError, "query must have 4 dimensions [B, H, N, D], got shape [4, 100, 8]"),
    ({"query": tensors().int()}, TypeError, "query must be float16, bfloat16, float32 or float64, got torch.int32"),
    ({"key": tensors().double()}, TypeError, "key must have the dtype of query, torch.float32, got torch.float64"),
    ({"value": tensors(device="meta")}, ValueError, "value must be on the device of query, cpu, got meta"),
    ({"key": tensors(head_dim=16)}, ValueError, "key must have query's batch and head_dim"),
    ({"key": tensors(batch=1)}, ValueError, "key must have query's batch and head_dim"),
    ({"value": tensors(heads=2)}, ValueError, "value must have the shape of key"),
    (
        {"key": tensors(heads=3), "value": tensors(heads=3)},
        ValueError,
        "query must have a multiple of key's 3 heads, got 4",
    ),
    ({"query": tensors(head_dim=16)[..., ::2]}, ValueError, "query must have a contiguous last dimension"),
    ({"key": tensors().mT.contiguous().mT}, ValueError, "key must have a contiguous last dimension"),
    ({"mask": None}, TypeError, "mask must be a BlockMask, got NoneType"),
    ({"mask": MASK.blocks}, TypeError, "mask must be a BlockMask, got Tensor"),
    (
        {"mask": LocalWindow(density=0.5).mask(TokenGrid(9, 12, tile=(4, 4)), 4)},
        ValueError,
        "mask must be for 100 query tokens, got one for 108",
    ),
    (
        {"mask": BlockMask.dense(GRID, TokenGrid.sequence(5))},
        ValueError,
        "mask must be for 100 key tokens, got one for 5",
    ),
    ({"mask": Random(0.4).mask(GRID, 3)}, ValueError, "mask must have a head size of 1 or 4, got 3"),
    (
        {"mask": BlockMask(MASK.blocks.expand(3, -1, -1, -1), GRID)},
        ValueError,
        "mask must have a batch size of 1 or 2, got 3",
    ),
    ({"mask": MASK.to("meta")}, ValueError, "mask must be on the device of query, cpu, got meta"),
    ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be a number in [0, 1], got 1.5"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must be a number in [0, 1], got nan"),
    ({"relative_position": torch.zeros(2)}, TypeError, "relative_position must be a pair (rel_h, rel_w)"),
    (
        {"relative_position": (torch.zeros(2, 4, N, 9), torch.zeros(2, 4, N, 9))},
        ValueError,
        "rel_w must have shape [2, 4, 100, 11], got [2, 4, 100, 9]",
    ),
    (
        {"relative_position": (torch.zeros(2, 4, N, 9), torch.zeros(2, 4, N, 11).double())},
        ValueError,
        "rel_w must have the dtype and device of query",
    ),
    ({"relative_position": (None, torch.zeros(2, 4, N, 11))}, TypeError, "rel_h must be a tensor, got NoneType"),
    ({"key_padding_mask": torch.zeros(2, N)}, TypeError, "key_padding_mask must be a boolean tensor"),
    (
        {"key_padding_mask": torch.zeros(2, N + 1, dtype=torch.bool)},
        ValueError,
        "key_padding_mask must have shape [2, 100] on cpu, got [2, 101]",
    ),
    ({"scale": 10**400}, ValueError, "scale must be a finite number, got 1000"),
    ({"scale": -(10**400)}, ValueError, "scale must be a finite number, got -1000"),
    ({"scale": "a"}, ValueError, "scale must be a finite number, got 'a'"),
    ({"dropout_p": "a"}, ValueError, "dropout_p must be a number in [0, 1], got 'a'"),
    ({"backend": ["gathered"]}, ValueError, "backend must be one of"),
    ({"backend": "fast"}, ValueError, "backend must be one of ['cuda', 'flex', 'gathered', 'reference'] or None"),
    ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot run: it needs CUDA tensors, got cpu"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS, ids=[call[2][:50] for call in BAD_CALLS])
def test_bad_input_is_refused_before_anything_runs(arguments, error, message):
    with pytest.raises(error) as raised:
        call(**arguments)
    assert str(raised.value).startswith("block_sparse_attention: ")
    assert message in str(raised.value)


def test_a_call_that_passed_once_excuses_no_other():
    mask = Random(0.4).mask(GRID, 4)
    rel = torch.randn(2, 4, N, GRID.height), torch.randn(2, 4, N, GRID.width)
    padding = torch.zeros(2, N, dtype=torch.bool)
    good = {"mask": mask, "relative_position": rel, "key_padding_mask": padding, "backend": "gathered"}
    expected = call(*(tensors() for _ in range(3)), **good)
    for wrong, message in (
        ({"query": tensors(heads=3)}, "multiple of key's"),
        ({"query": tensors().double()}, "dtype of query"),
        ({"key": tensors(tokens=N + 1)}, "mask must be for|shape of key"),
        ({"value": torch.randn(2, 4, 8, N).mT}, "contiguous last dimension"),
        ({"value": tensors(batch=1)}, "value must have"),
        ({"query": tensors(device="meta")}, "device"),
        ({"mask": "dense"}, "must be a BlockMask"),
        ({"relative_position": (rel[1], rel[0])}, "rel_h must have shape"),
        ({"relative_position": rel[:1]}, "must be a pair"),
        ({"relative_position": rel[0]}, "must be a pair"),
        ({"relative_position": dict.fromkeys(rel)}, "must be a pair"),
        ({"relative_position": (part for part in rel)}, "must be a pair"),
        ({"relative_position": iter(rel)}, "must be a pair"),
        ({"key_padding_mask": padding.int()}, "boolean"),
        ({"key_padding_mask": padding[:, 1:]}, "key_padding_mask must have shape"),
        ({"backend": "nothing"}, "backend must be one of"),
        ({"scale": float("nan")}, "scale"),
        ({"dropout_p": 2.0}, "dropout_p"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call(**{**good, **wrong})
    assert call(*(tensors() for _ in range(3)), **good).shape == expected.shape


def test_a_stacked_relative_position_is_refused_after_a_pair_too():
    grid = TokenGrid(9, 9)
    mask = Random(0.4).mask(grid, 4)
    query, rel = tensors(tokens=81), torch.randn(2, 2, 4, 81, 9)
    call(query, query, query, mask, relative_position=(rel[0], rel[1]))
    with pytest.raises(TypeError, match="block_sparse_attention: relative_position must be a pair"):
        call(query, query, query, mask, relative_position=rel)


def test_gradients_by_torch_func_are_refused():
    """As the docstring says; what it names instead works, see test_operator.py."""
    query = tensors()
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
            transform(lambda query: call(query, mask=MASK).sum())(query)


def test_a_mask_remembers_a_bounded_number_of_calls():
    mask = Random(0.4).mask(GRID, 4)
    for batch in range(1, 140):
        call(*(tensors(batch=batch, head_dim=2) for _ in range(3)), mask=mask, backend="reference")
    assert 0 < len(mask.plans) <= 64
