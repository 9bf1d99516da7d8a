"""The fraction of a model's attention weight that lies on the blocks it computes when patched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sparse_attn_modules.patching.observing import AttentionCall, observing_attention, replaceable_slots
from torch import Tensor, nn

from sparse_attn_modules import TokenGrid

_CHUNK = 512  # queries whose attention is written out at a time


@dataclass
class AttentionSample:
    """The queries and keys of every layer of a model on a few images, as they are when nothing is skipped."""

    calls: list[tuple[str, AttentionCall]] = field(default_factory=list)
    _masses: dict[tuple[int, TokenGrid], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, images: Sequence[Tensor]) -> AttentionSample:
        """Runs the model on images, patched or not."""
        sample = cls()
        names = {id(slot.original): slot.name for slot in replaceable_slots(model)}
        with observing_attention(model, lambda layer, call: sample.calls.append((names[id(layer)], call))):
            for image in images:
                model(image)
        return sample

    def kept_by(self, model: nn.Module) -> tuple[float, float]:
        """Density of a patched model's masks for these queries and keys, and the fraction of weight on their blocks."""
        densities, masses = [], []
        for number, (name, call) in enumerate(self.calls):
            layer = model.get_submodule(name)
            mask = layer.mask_for(call.query, call.key, call.query_grid, call.key_grid, scale=call.scale)
            mass = self._mass(number, mask.query_grid)
            densities.append(mask.blocks.expand_as(mass).float().mean())
            masses.append((mass * mask.blocks).sum((-2, -1)).mean())
        return float(torch.stack(densities).mean()), float(torch.stack(masses).mean())

    def _mass(self, number: int, grid: TokenGrid) -> Tensor:
        """The mean weight that a query token puts on each block, ``[B, heads, query blocks, key blocks]``."""
        if (number, grid) not in self._masses:
            self._masses[number, grid] = block_mass(self.calls[number][1], grid)
        return self._masses[number, grid]


def block_mass(call: AttentionCall, grid: TokenGrid) -> Tensor:
    """The attention weight on each block of a grid, over the number of queries: ``[B, heads, blocks, blocks]``."""
    device = call.query.device
    batch, heads, tokens = call.query.shape[:3]
    member = F.one_hot(grid.block_of_token(device), grid.num_blocks).float()  # [N, blocks]
    everything = torch.arange(tokens, device=device)
    mass = torch.zeros(batch, heads, grid.num_blocks, grid.num_blocks, device=device)
    for image in range(batch):
        for queries in everything.split(_CHUNK):
            weights = call.weights(image, queries, everything).float()  # [heads, queries, N]
            mass[image] += member[queries].T @ (weights @ member)
    return mass / tokens
