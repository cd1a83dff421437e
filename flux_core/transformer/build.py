"""How the network's linear layers are made: one shape, dtype, device and layer namespace."""

from typing import Any

import torch
from torch import nn

from ..operations import Operations, torch_operations
from ..specs import TransformerSpec


class Build:
    """Makes the linear layers of one network."""

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
        """Make one layer, with a bias if this network has any."""
        return self._operations.Linear(inputs, outputs, bias=self.spec.has_bias, **self.where)
