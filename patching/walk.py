"""Finds the attention layers of a model, patched or not, and asks the adapters about each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from ..modules import SparseAttention
from . import segment_anything, timm, torch_multihead
from .adapters import LeftAlone, Replaceable, Site
from .grids import GridSource

_ADAPTERS = (timm, segment_anything, torch_multihead)


class Original:
    """The layer that a replacement replaced.

    Held by the replacement as a plain attribute, in here so that it is no submodule: it shares its parameters with the
    replacement, and they must not appear twice.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module


@dataclass(frozen=True)
class Slot:
    """A place in the model that holds an attention layer; a shared layer has several.

    Args:
        name: dotted path from the model.
        parent, key: the layer is ``parent._modules[key]``.
        current: the layer that is there, the replacement of a patched one.
        original: the layer as it was before patching.
        verdict: what can be done about the original.
    """

    name: str
    parent: nn.Module
    key: str
    current: nn.Module
    original: nn.Module
    verdict: Replaceable | LeftAlone


def original_of(layer: nn.Module) -> Original | None:
    """What a layer replaced, None if it is no replacement."""
    return vars(layer).get("_original")


def adopt(new: nn.Module, original: nn.Module) -> None:
    """Gives a replacement what other code may look for on the original: hooks and plain attributes."""
    for name, value in vars(original).items():
        if "_hooks" in name:
            # The very dictionaries, so that handles of hooks can still remove them.
            vars(new)[name] = value
        elif not name.startswith("_") and not hasattr(new, name):
            setattr(new, name, value)
    new._is_full_backward_hook = original._is_full_backward_hook


def attention_slots(model: nn.Module) -> list[Slot]:
    """Every place of the model that holds an attention layer, in the order of ``named_modules``.

    Besides the layers that an adapter knows, these are modules whose class is called an attention and that contain no
    other such layer. Their names serve to tell the reader what was seen; nothing is replaced by name.
    """
    visits = _slots_below(model, "", (), {})
    sources: dict[int, set[GridSource | None]] = {}
    slots: dict[tuple[int, str], Slot] = {}
    for slot in visits:
        slots.setdefault((id(slot.parent), slot.key), slot)
        if isinstance(slot.verdict, Replaceable):
            sources.setdefault(id(slot.original), set()).add(slot.verdict.source)
    reason = "it is shared by models with grids of their own"
    return [
        replace(slot, verdict=LeftAlone(slot.verdict.kind, reason))
        if len(sources.get(id(slot.original), ())) > 1
        else slot
        for slot in slots.values()
    ]


def inspect(site: Site) -> Replaceable | LeftAlone | None:
    """What can be done about a module; None if no adapter knows it as an attention layer."""
    if isinstance(site.module, SparseAttention):
        return LeftAlone(type(site.module).__name__, "it is block-sparse already")
    for adapter in _ADAPTERS:
        verdict = adapter.inspect(site)
        if isinstance(verdict, Replaceable) and "forward" in vars(site.module):
            return LeftAlone(verdict.kind, "its forward method has been replaced")
        if verdict is not None:
            return verdict
    return None


def _slots_below(
    parent: nn.Module, path: str, ancestors: tuple[nn.Module, ...], sources: dict[int, GridSource]
) -> list[Slot]:
    """Every visit to a slot: of a shared part of the model once per way to it, for each may have a grid of its own."""
    if any(parent is ancestor for ancestor in ancestors):
        return []
    ancestors = (*ancestors, parent)
    slots = []
    for key, current in parent._modules.items():
        if current is None:
            continue
        name = f"{path}.{key}" if path else key
        memory = original_of(current)
        original = current if memory is None else memory.module
        verdict = inspect(Site(name, original, ancestors, sources))
        inside = []
        if verdict is None:
            inside = _slots_below(current, name, ancestors, sources)
            if not inside and _is_called_attention(current):
                verdict = LeftAlone(type(current).__name__, "its forward pass is not reproduced here")
        if verdict is not None:
            slots.append(Slot(name, parent, key, current, original, verdict))
        slots += inside
    return slots


def _is_called_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name
