"""patch_model and unpatch_model: plan every replacement, then make them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from ..backends import BACKENDS
from ..modules import SparseAttention
from ..patterns import Pattern
from .adapters import LeftAlone, Replaceable, Site
from .calibrated_layers import hand_out_calibrated
from .grids import GridSource, remove_sources
from .selection import DenseOnFewTiles, Include, Selection
from .walk import Original, Slot, adopt, attention_slots, inspect
from .window_blocks import fit_window_blocks

Model = TypeVar("Model", bound=nn.Module)
_Arguments = tuple[Pattern, "str | None", "torch.dtype | None"]


def patch_model(
    model: Model,
    pattern: Pattern | str | Mapping[str, Pattern | str] | None = None,
    *,
    include: Include = None,
    backend: str | None = None,
    compute_dtype: torch.dtype | None = None,
    strict: bool = True,
) -> Model:
    """Replaces the attention layers of a model by block-sparse ones that own the same parameters.

    Known are timm's vision transformers (ViT, DeiT, DINOv2, SigLIP, EVA02, RoPE-ViT, DINOv3, samvit, …), the image
    encoder of segment_anything, and torchvision's ViT; layers are recognised by class. ``state_dict``, optimizers,
    hooks, train or eval mode, device, dtype and ``requires_grad`` stay as they are. Patching again starts from the
    original layers, so the last call alone counts. Blocks of Segment Anything that attend within windows are replaced
    too, by ones that read the windows from the image, without padding it. Patch before ``torch.compile`` runs the model
    for the first time, and before ``fully_shard``, which keeps track of the modules that hold its parameters.

    The grid of patches is followed from image to image. Tokens that do not fit it (token dropping) get dense
    attention, and the log says so once. Where skipping blocks cannot pay, attention stays dense whatever the pattern;
    :func:`patch_report` names those layers, and those left alone with the reason.

    Args:
        model: the model, or any part of it that contains the patch embedding as well.
        pattern: which blocks are computed: a Pattern, a short name, or a mapping from globs over names of layers to
            patterns, where the first match wins and layers that match none are left alone; or what :func:`calibrate`
            chose for this model. Dense, which is exact, if None.
        include: which layers are patched: a glob over their names, several globs, or ``function(name, layer)``; all
            if None.
        backend: backend of :func:`block_sparse_attention`; the best that can run if None.
        compute_dtype: dtype in which attention itself runs; that of its inputs if None.
        strict: if False, a model in which nothing can be patched or nothing was selected is returned unchanged (after
            an earlier call: with its original layers), and globs that match no layer are passed over. All other
            errors are raised all the same.

    Returns:
        The same model.

    Raises:
        ValueError: if nothing can be patched, with what was seen and why it was left alone; if a glob matches no
            attention layer; if a pattern does not fit a layer, or a name is unknown; if a calibrated pattern was made
            for another model or image size. The model is then as it was.
        TypeError: if an argument is not as described.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_model: model must be a torch.nn.Module, got {type(model).__name__}")
    if inspect(Site("", model, ())) is not None or isinstance(model, SparseAttention):
        raise ValueError(
            "patch_model: model must contain attention layers, got one; use the from_module of ViTSparseAttention, "
            "SAMAttentionSparse or SparseMultiheadAttention"
        )
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"patch_model: backend must be one of {list(BACKENDS)} or None, got {backend!r}")
    if compute_dtype is not None and not (isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point):
        raise TypeError(f"patch_model: compute_dtype must be a floating-point dtype or None, got {compute_dtype!r}")
    selection = Selection(pattern, include)
    slots = attention_slots(model)
    if strict:
        selection.check_names(slot.name for slot in slots)

    patterns = {slot.name: selection.pattern_for(slot.name, slot.original) for slot in slots}
    patterns = hand_out_calibrated(patterns, slots)

    replacements: dict[int, nn.Module] = {}
    sources: set[GridSource] = set()
    for slot in slots:
        chosen = patterns[slot.name]
        if chosen is None or isinstance(slot.verdict, LeftAlone) or id(slot.original) in replacements:
            continue
        replacements[id(slot.original)] = _replacement(slot, slot.verdict, (chosen, backend, compute_dtype))
        if slot.verdict.source is not None:
            sources.add(slot.verdict.source)
    if not replacements and strict:
        raise ValueError(nothing_to_patch(slots))

    _restore([slot for slot in slots if id(slot.original) not in replacements])
    for slot in slots:
        slot.parent._modules[slot.key] = replacements.get(id(slot.original), slot.original)
    fit_window_blocks(model)
    _follow_grids(model, sources)
    return model


def unpatch_model(model: Model) -> Model:
    """Puts the original attention layers, the very objects, back in place; a model without patches stays as it is.

    Whatever became of the parameters in between stays: they are shared. So do submodules that were put in, such as a
    LoRA adapter around ``qkv``, hooks, and train or eval mode. What else was set on a replaced layer, new parameters of
    its own and plain attributes, goes with it.

    Returns:
        The same model.
    """
    slots = [slot for slot in attention_slots(model) if slot.current is not slot.original]
    _restore(slots)
    fit_window_blocks(model)
    _follow_grids(model, set())
    return model


def _follow_grids(model: nn.Module, sources: set[GridSource]) -> None:
    for module in model.modules():
        remove_sources(module, keep=sources)
    for source in sources:
        source.install()


def _restore(slots: list[Slot]) -> None:
    for slot in slots:
        if slot.current is not slot.original:
            _carry_back(slot.current, slot.original)
            slot.parent._modules[slot.key] = slot.original


def _replacement(slot: Slot, verdict: Replaceable, arguments: _Arguments) -> nn.Module:
    """The module to put in a slot; the one that is there if it is just what is asked for."""
    current = slot.current
    if isinstance(current, SparseAttention):
        if (DenseOnFewTiles.within(current.pattern), current.backend, current.compute_dtype) == arguments:
            return current
        _carry_back(current, slot.original)
    pattern, backend, compute_dtype = arguments
    new = verdict.build(DenseOnFewTiles.around(pattern), backend, compute_dtype)
    if isinstance(current, SparseAttention) and current.selector is not None and new.selector is not None:
        new.selector = current.selector
    geometry = verdict.geometry()
    if geometry is not None and not new.pattern.is_dynamic_on(geometry[0], geometry[0]):
        # A pattern that does not fit raises here rather than in the first forward pass; and a model that is compiled
        # before it ever runs finds its mask.
        device = next((parameter.device for parameter in new.parameters()), torch.device("cpu"))
        new.keep_masks([new.pattern.mask(geometry[0], verdict.num_heads, device=device)])
    adopt(new, slot.original)
    vars(new)["_original"] = Original(slot.original)
    return new


def _carry_back(current: nn.Module, original: nn.Module) -> None:
    """Brings the original up to date with what was done to its replacement."""
    for store in ("_parameters", "_buffers", "_modules"):
        ours, theirs = getattr(original, store), getattr(current, store)
        ours.update({name: theirs[name] for name in ours if name in theirs})
    original._is_full_backward_hook = current._is_full_backward_hook
    original.training = current.training


def nothing_to_patch(slots: list[Slot], op: str = "patch_model") -> str:
    """What an error says of a model in which nothing can be patched: what was seen, and why it was left alone."""
    lines = [f"{op}: model must have an attention layer that can be replaced"]
    if not slots:
        return lines[0] + ", and none of its modules is an attention layer"
    for slot in slots:
        verdict = slot.verdict
        reason = verdict.reason if isinstance(verdict, LeftAlone) else "not selected by include or pattern"
        lines.append(f"  {slot.name} ({verdict.kind}): {reason}")
    return "\n".join(lines)
