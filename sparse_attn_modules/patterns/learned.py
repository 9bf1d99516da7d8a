"""LearnedTopK: blocks chosen at run time by scores that were trained on the attention of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .dynamic import DynamicTopK


@dataclass(frozen=True)
class LearnedTopK(DynamicTopK):
    """As :class:`DynamicTopK`, with scores that bend to the model: every layer gets a ``selector`` with parameters.

    Untrained it chooses what ``DynamicTopK`` chooses; :func:`train_selectors` trains the selectors of a patched model.
    They lie in its ``state_dict`` as ``<layer>.selector.weight``. Another density takes the same selectors.

    Args:
        density: fraction of block pairs; met to within one block per row.
    """

    @property
    def has_selector(self) -> bool:
        return True

    def _features(self, selector: nn.Module | None) -> Callable[..., tuple[Tensor, Tensor]]:
        if selector is None:
            raise TypeError(f"{type(self).__name__}.select: selector must be a BlockSelector, got None")
        return selector
