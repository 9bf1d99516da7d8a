"""Which projections may be computed by their weights, in parts or with another bias, without calling the module."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is ``nn.Linear`` and nothing else: no adapter, no hooks, no quantized or distributed weight.

    Reading the weight of anything else would pass over what makes it different, silently.
    """
    return is_plain(module, nn.Linear) and not is_traceable_wrapper_subclass(module.weight)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class, with no forward method put in its place and no hooks: of its own, or
    of all modules."""
    return (
        type(module) is kind
        and not _has_any_global_hook()
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )
