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
        self.begin(0, uses_cached=False)

    def begin(self, activations: int, *, uses_cached: bool) -> None:
        """Gets ready for a run.

        Args:
            activations: bytes it needs beside the weights.
            uses_cached: whether it may need the references cached last, which then stay.
        """
        self.activations, self.uses_cached = activations, uses_cached
        self.is_stepping = False  # set once the run is planned

    def __call__(self, part: nn.Module) -> torch.device:
        """Loads a part; returns the device it is on.

        Modulation is needed while a run is planned. A sampler that asks for more of it later asks
        again: from then on both stay.
        """
        is_modulation = part is self.modulation.model
        if is_modulation and not self.is_stepping:
            return host.load([self.modulation], 0)
        if not self.is_stepping:
            host.unload(self.modulation)
        beside = self.cached.on_device() if self.uses_cached else []
        first = [self.modulation] if is_modulation else []
        return host.load([*first, self.blocks, *beside], self.activations)
