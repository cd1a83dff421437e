"""The part of the network that depends only on timestep, guidance and pooled text.

27.5 % of FLUX.1's weights do nothing but turn one vector per step into shifts, scales and gates;
FLUX.2 shares them between its blocks. They are a module of their own so that a run can use them
once, up front, and unload them. Key names are the published ones.
Source: black-forest-labs/flux@802fb47 src/flux/modules/layers.py MLPEmbedder, Modulation,
LastLayer, timestep_embedding; black-forest-labs/flux2@ab7cca6 src/flux2/model.py Flux2. Deviation:
the timestep embedding stays float32 until it meets the first weight (published code multiplies by
1000 in the model's dtype).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingError
from ..operations import Operations
from ..specs import TransformerSpec
from .build import Build

EMBEDDING_WIDTH = 256


@dataclass(frozen=True, slots=True)
class Modulation:
    """One modulation: x -> gate * f((1 + scale) * norm(x) + shift), each (B, 1, hidden)."""

    shift: Tensor
    one_plus_scale: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepModulation:
    """Every shift, scale and gate of one step."""

    img: tuple[tuple[Modulation, ...], ...]  # per double block: attention, mlp
    txt: tuple[tuple[Modulation, ...], ...]
    single: tuple[Modulation, ...]
    final: Modulation


def timestep_embedding(t: Tensor, width: int = EMBEDDING_WIDTH) -> Tensor:
    """Embeds t (B,), sigma in 0..1 or guidance, as (B, width) float32: cosines, then sines."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(10_000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angle = 1000.0 * t.float()[:, None] * frequencies[None]
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class _Embedder(nn.Module):
    def __init__(self, build: Build, inputs: int) -> None:
        super().__init__()
        self.in_layer = build.linear(inputs, build.spec.hidden)
        self.out_layer = build.linear(build.spec.hidden, build.spec.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class _ModulationLayer(nn.Module):
    def __init__(self, build: Build, parts: int) -> None:
        super().__init__()
        self.lin = build.linear(build.spec.hidden, parts * build.spec.hidden)
        self.parts = parts

    def forward(self, activated: Tensor) -> tuple[Modulation, ...]:
        chunks = self.lin(activated)[:, None, :].chunk(self.parts, dim=-1)
        return tuple(
            Modulation(shift, 1 + scale, gate)
            for shift, scale, gate in zip(chunks[0::3], chunks[1::3], chunks[2::3], strict=True)
        )


class _DoubleModulation(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        self.img_mod = _ModulationLayer(build, 6)
        self.txt_mod = _ModulationLayer(build, 6)


class _SingleModulation(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        self.modulation = _ModulationLayer(build, 3)


class _FinalModulation(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(  # a published key name
            nn.SiLU(), build.linear(build.spec.hidden, 2 * build.spec.hidden)
        )

    def forward(self, vec: Tensor) -> Modulation:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return Modulation(shift, 1 + scale)


class FluxModulation(nn.Module):
    """Computes the modulation of every block from timestep, guidance and pooled text."""

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
        self.spec = spec
        self.time_in = _Embedder(build, EMBEDDING_WIDTH)
        if spec.pooled_width:
            self.vector_in = _Embedder(build, spec.pooled_width)
        if spec.has_guidance:
            self.guidance_in = _Embedder(build, EMBEDDING_WIDTH)
        if spec.shares_modulation:
            self.double_stream_modulation_img = _ModulationLayer(build, 6)
            self.double_stream_modulation_txt = _ModulationLayer(build, 6)
            self.single_stream_modulation = _ModulationLayer(build, 3)
        else:
            self.double_blocks = nn.ModuleList(
                _DoubleModulation(build) for _ in range(spec.double_blocks)
            )
            self.single_blocks = nn.ModuleList(
                _SingleModulation(build) for _ in range(spec.single_blocks)
            )
        self.final_layer = _FinalModulation(build)

    def forward(
        self, t: Tensor, pooled: Tensor | None, guidance: Tensor | None, dtype: torch.dtype
    ) -> StepModulation:
        """Returns one step's modulation.

        Args:
            t: (B,) sigma in 0..1, float32.
            pooled: (B, P); None for a model without pooled text.
            guidance: (B,) float32; not used by a model without a guidance input.
            dtype: of the computation.

        Raises:
            SettingError: guidance is None for a model with a guidance input.
        """
        vec = self.time_in(timestep_embedding(t).to(dtype))
        if self.spec.has_guidance:
            if guidance is None:
                raise SettingError(
                    "No guidance is given.",
                    "a number: the network has a guidance input.",
                    "set [guidance].",
                )
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(dtype))
        if self.spec.pooled_width:
            assert pooled is not None  # checked with the conditioning
            vec = vec + self.vector_in(pooled.to(dtype))
        return self._of_blocks(F.silu(vec), self.final_layer(vec))

    def _of_blocks(self, activated: Tensor, final: Modulation) -> StepModulation:
        spec = self.spec
        if spec.shares_modulation:
            return StepModulation(
                img=(self.double_stream_modulation_img(activated),) * spec.double_blocks,
                txt=(self.double_stream_modulation_txt(activated),) * spec.double_blocks,
                single=self.single_stream_modulation(activated) * spec.single_blocks,
                final=final,
            )
        doubles = cast(Iterable[_DoubleModulation], self.double_blocks)
        singles = cast(Iterable[_SingleModulation], self.single_blocks)
        return StepModulation(
            img=tuple(block.img_mod(activated) for block in doubles),
            txt=tuple(block.txt_mod(activated) for block in doubles),
            single=tuple(block.modulation(activated)[0] for block in singles),
            final=final,
        )
