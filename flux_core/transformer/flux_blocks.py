"""The part of FLUX.1 that every step needs: projections, blocks, the last linear layer."""

from typing import Any

import torch
from torch import nn

from ..families import TransformerSpec
from ..operations import Operations, torch_operations
from .blocks import DoubleBlock, SingleBlock


class _FinalLayer(nn.Module):
    def __init__(self, spec: TransformerSpec, operations: Operations, **where: Any) -> None:
        super().__init__()
        self.linear = operations.Linear(spec.hidden, spec.out_channels, bias=True, **where)


class FluxBlocks(nn.Module):
    """FLUX.1 without its modulation; key names are the published ones."""

    def __init__(
        self,
        spec: TransformerSpec,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Operations | None = None,
    ) -> None:
        super().__init__()
        ops = operations or torch_operations()
        where: dict[str, Any] = {"dtype": dtype, "device": device}
        self.img_in = ops.Linear(spec.in_channels, spec.hidden, bias=True, **where)
        self.txt_in = ops.Linear(spec.context_width, spec.hidden, bias=True, **where)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(spec, ops, **where) for _ in range(spec.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(spec, ops, **where) for _ in range(spec.single_blocks)
        )
        self.final_layer = _FinalLayer(spec, ops, **where)
