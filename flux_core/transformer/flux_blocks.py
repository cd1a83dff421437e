"""The part of the network that every step runs: projections, blocks, the last linear layer."""

import torch
from torch import nn

from ..operations import Operations
from ..specs import TransformerSpec
from .blocks import DoubleBlock, SingleBlock
from .build import Build


class _FinalLayer(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        self.linear = build.linear(build.spec.hidden, build.spec.out_channels)


class FluxBlocks(nn.Module):
    """The network without its modulation; key names are the published ones."""

    def __init__(
        self,
        spec: TransformerSpec,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Operations | None = None,
    ) -> None:
        super().__init__()
        build = Build(spec, dtype=dtype, device=device, operations=operations)
        self.img_in = build.linear(spec.in_channels, spec.hidden)
        self.txt_in = build.linear(spec.context_width, spec.hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(build) for _ in range(spec.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(build) for _ in range(spec.single_blocks))
        self.final_layer = _FinalLayer(build)
