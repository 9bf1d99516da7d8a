"""What can be told of windows read in place without a GPU: checks, reasons, the operator's shapes."""

import pytest
import torch

from sparse_attn_modules.window_attention import why_not_in_place, window_attention

GRID, WINDOW = (5, 7), (2, 3)


def tensors(batch=2, heads=3, tokens=35, head_dim=8, **options):
    return [torch.randn(batch, heads, tokens, head_dim, **options) for _ in range(3)]


def test_needs_a_gpu():
    query, key, value = tensors(dtype=torch.bfloat16)
    assert why_not_in_place(query, key, value, GRID, WINDOW, scale=1.0) == "it needs CUDA tensors, got cpu"
    with pytest.raises(
        ValueError, match=r"^window_attention: arguments must be such .* it needs CUDA tensors, got cpu"
    ):
        window_attention(query, key, value, GRID, WINDOW)


def test_reasons_of_its_own():
    query, key, value = tensors()
    assert why_not_in_place(query, key, value, GRID, WINDOW, scale=0.0) == "scale must be positive, got 0.0"
    query.requires_grad_()
    assert "gradients" in why_not_in_place(query, key, value, GRID, WINDOW, scale=1.0)
    with torch.no_grad():
        assert "CUDA tensors" in why_not_in_place(query, key, value, GRID, WINDOW, scale=1.0)
    many = torch.empty(7282, 1, 35, 8, device="meta")
    reason = why_not_in_place(many, many, many, GRID, WINDOW, scale=1.0)
    assert reason == "there may be up to 65535 windows, got 7282 × 9"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (5, 8)}, "query must have 5 × 8 tokens, got 35"),
        ({"window": (0, 3)}, r"window must be \(height, width\) in patches, got \(0, 3\)"),
        ({"grid": (5, 7, 1)}, r"grid must be \(height, width\) in patches, got \(5, 7, 1\)"),
        ({"rel": (3, 3)}, r"rel_h must have shape \[2, 3, 35, 2\] and dtype torch.float32, got \[2, 3, 35, 3\]"),
        ({"rel": (2, 7)}, r"rel_w must have shape \[2, 3, 35, 3\]"),
    ],
)
def test_errors(change, message):
    rel = change.get("rel")
    with pytest.raises(ValueError, match=f"^window_attention: {message}"):
        window_attention(
            *tensors(),
            change.get("grid", GRID),
            change.get("window", WINDOW),
            relative_position=None if rel is None else tuple(torch.zeros(2, 3, 35, size) for size in rel),
        )


def test_the_operator_knows_its_result():
    query, key, value = tensors(device="meta")
    out = torch.ops.sparse_attn_modules.window_attention.default(query, key, value, None, None, GRID, WINDOW, 1.0)
    assert out.shape == query.shape
    assert out.transpose(1, 2).is_contiguous()
