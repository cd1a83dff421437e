"""Builds the network's linear layers from one spec, dtype, device and layer namespace."""

from typing import Any

import torch
from torch import nn

from ..operations import Operations, torch_operations
from ..specs import TransformerSpec


class Build:
    """Builds the linear layers of one network."""

    def __init__(
        self,
        spec: TransformerSpec,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Operations | None = None,
    ) -> None:
        self.spec = spec
        self.where: dict[str, Any] = {"dtype": dtype, "device": device}
        self._operations = operations or torch_operations()

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        """Returns a linear layer, with a bias if the network has biases."""
        return self._operations.Linear(inputs, outputs, bias=self.spec.has_bias, **self.where)
