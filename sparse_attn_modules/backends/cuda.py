"""The compiled CUDA kernels. This release carries none yet, so the backend says so."""

from __future__ import annotations

from torch import Tensor

from .interface import AttentionGradients, AttentionInputs, Request

name = "cuda"


def why_not(request: Request) -> str | None:
    if request.device.type != "cuda":
        return f"it needs CUDA tensors, got {request.device.type}"
    return why_not_here()


def why_slower(request: Request) -> str | None:
    return None


def why_not_here() -> str | None:
    return "not built: this version has no compiled kernels"


def forward(inputs: AttentionInputs, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    raise RuntimeError(f"block_sparse_attention: backend 'cuda' cannot run: {why_not_here()}")


def backward(
    inputs: AttentionInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> AttentionGradients:
    raise RuntimeError(f"block_sparse_attention: backend 'cuda' cannot run: {why_not_here()}")
