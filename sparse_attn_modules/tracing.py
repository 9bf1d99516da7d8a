"""Whether somebody watches operators: then they must go through the dispatcher, which eager calls can skip."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_watched() -> bool:
    """Whether something traces, intercepts or transforms operators."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
