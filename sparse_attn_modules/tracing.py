"""Whether somebody watches operators: then they must go through the dispatcher, which eager calls can skip."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# Every eager call asks: names found beforehand make up for one of the questions.
_functorch_interpreter = torch._C._functorch.peek_interpreter_stack
jit_tracer = torch._C._get_tracing_state  # of torch.jit.trace, or None


def is_watched() -> bool:
    """Whether something traces, intercepts or transforms operators."""
    return (
        is_compiling()
        or is_in_torch_dispatch_mode()
        or jit_tracer() is not None
        or _functorch_interpreter() is not None
    )


def is_disguised(tensor: Tensor) -> bool:
    """Whether a tensor stands for another thing: a subclass, or the batches of ``is_grads_batched``.

    The latter are made by a ``vmap`` older than ``torch.func``'s, which no interpreter tells of.
    """
    return type(tensor) is not Tensor or torch._C._functorch.is_legacy_batchedtensor(tensor)
