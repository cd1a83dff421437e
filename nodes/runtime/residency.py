"""Which part of a transformer is loaded."""

from typing import Any

import torch
from torch import nn

from .. import host
from .reference_cache import ReferenceStore


class Residency:
    """Loads the part of a transformer that computes next, and unloads the other.

    It holds the patchers, not the network: in a reference cycle the network would not be freed.
    """

    def __init__(self, modulation: Any, blocks: Any, cached: ReferenceStore) -> None:
        self.modulation, self.blocks, self.cached = modulation, blocks, cached
        self.activations = 0  # bytes the next run needs besides the weights
        self.uses_cached = False  # whether the last cached entry stays loaded along with them

    def __call__(self, part: nn.Module) -> torch.device:
        """Loads a part; returns the device it is on."""
        if part is self.modulation.model:
            return host.load([self.modulation], 0)
        host.unload(self.modulation)
        cached = self.cached.on_device() if self.uses_cached else []
        return host.load([self.blocks, *cached], self.activations)
