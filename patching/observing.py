"""Looks on while a model computes attention: query, key, relative position and scale exactly as they are used.

For the time being the model is patched with exact attention, by which every layer that ``patch_model`` knows makes the
same call; what it is called with is shown to an observer. Afterwards the model is as it was, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import SparseAttention
from ..patterns import Dense
from ..token_grid import TokenGrid
from .adapters import Replaceable
from .grids import installed_sources, remove_sources
from .patch import patch_model
from .walk import Slot, attention_slots


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention. Shapes as for :func:`block_sparse_attention`."""

    query: Tensor
    key: Tensor
    query_grid: TokenGrid
    key_grid: TokenGrid
    scale: float
    relative_position: tuple[Tensor, Tensor] | None
    key_padding_mask: Tensor | None

    def weights(self, batch: int, query_tokens: Tensor, key_tokens: Tensor) -> Tensor:
        """The attention weights of some queries of one image, in float32, or float64 for such inputs.

        Args:
            batch: batch entry.
            query_tokens: indices of queries, int64 ``[q]``.
            key_tokens: indices of all keys in any order, int64 ``[k]``; those that are −1 get no weight.

        Returns:
            ``[heads, q, k]``.
        """
        dtype = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        is_absent = key_tokens < 0
        key_tokens = key_tokens.clamp(min=0)
        query = self.query[batch][:, query_tokens].to(dtype)
        key = self.key[batch][:, key_tokens].to(dtype)
        groups = query.shape[0] // key.shape[0]
        logits = (query.unflatten(0, (-1, groups)) @ key.mT[:, None]).flatten(0, 1) * self.scale
        if self.relative_position is not None:
            rel_h, rel_w = (part[batch][:, query_tokens].to(dtype) for part in self.relative_position)
            rows = self.key_grid.patch_rows(query.device)[key_tokens]
            columns = self.key_grid.patch_columns(query.device)[key_tokens]
            bias = rel_h[..., rows.clamp(min=0)] + rel_w[..., columns.clamp(min=0)]
            logits += bias.masked_fill(rows < 0, 0)
        if self.key_padding_mask is not None:
            is_absent = is_absent | self.key_padding_mask[batch][key_tokens]
        weights = logits.masked_fill_(is_absent, -torch.inf).softmax(-1)
        # A query whose keys are all padding attends to nothing.
        return weights.nan_to_num_(nan=0.0) if self.key_padding_mask is not None else weights


Observe = Callable[[nn.Module, AttentionCall], None]
Attend = Callable[..., Tensor]


def replaceable_slots(model: nn.Module) -> list[Slot]:
    """The slots of a model that ``patch_model`` can patch."""
    return [slot for slot in attention_slots(model) if isinstance(slot.verdict, Replaceable)]


def observing_attention(model: nn.Module, observe: Observe) -> AbstractContextManager[None]:
    """While it is entered, ``observe(original layer, call)`` sees every call of attention in a model.

    The model runs in evaluation mode, without gradients, and eagerly even if it is compiled.

    Raises:
        ValueError: if nothing in the model can be patched, with the reasons.
    """
    return attending_by(model, lambda layer, original: _observed(layer, original, observe))


@contextmanager
def attending_by(model: nn.Module, make: Callable[[SparseAttention, nn.Module], Attend]) -> Iterator[None]:
    """While it is entered, attention is computed by ``make(replacement, original layer)`` for each layer."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    children = {id(module._modules): (module._modules, dict(module._modules)) for module in modules}
    sources = [(module, installed_sources(module)) for module in modules]
    try:
        # The backend that needs no compiler, any dtype, and memory that grows with the number of tokens.
        patch_model(model, Dense(), backend="gathered")
        for slot in attention_slots(model):
            if isinstance(slot.current, SparseAttention) and slot.current is not slot.original:
                vars(slot.current)["attend"] = make(slot.current, slot.original)
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for slot in attention_slots(model):
            vars(slot.current).pop("attend", None)
        for own, before in children.values():
            own.clear()
            own.update(before)
        for module, before_sources in sources:
            remove_sources(module, keep=before_sources)
            for source in before_sources:
                source.install()
        for module, mode in modes:
            module.training = mode


def _observed(layer: SparseAttention, original: nn.Module, observe: Observe) -> Attend:
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_grid: TokenGrid,
        key_grid: TokenGrid | None = None,
        *,
        scale: float | None = None,
        relative_position: tuple[Tensor, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        used = query.shape[-1] ** -0.5 if scale is None else scale
        keys = query_grid if key_grid is None else key_grid
        observe(original, AttentionCall(query, key, query_grid, keys, used, relative_position, key_padding_mask))
        return type(layer).attend(
            layer,
            query,
            key,
            value,
            query_grid,
            key_grid,
            scale=scale,
            relative_position=relative_position,
            key_padding_mask=key_padding_mask,
            **options,
        )

    return attend
