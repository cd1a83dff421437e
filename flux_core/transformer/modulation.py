"""All of FLUX.1 that depends on the timestep, the guidance and the pooled text.

27.5 % of FLUX.1's weights do nothing but turn one vector per step into shifts, scales and gates.
They live in this module of their own so that a run can use them once, up front, and free them.
Key names are the published ones.
Source: black-forest-labs/flux@802fb47 src/flux/modules/layers.py MLPEmbedder, Modulation,
LastLayer, timestep_embedding. Deviation: the timestep embedding stays float32 until it meets the
first weight (published code multiplies by 1000 in the model's dtype).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingError
from ..families import TransformerSpec
from ..operations import Operations, torch_operations

EMBEDDING_WIDTH = 256


@dataclass(frozen=True, slots=True)
class Shift:
    """One modulation: x -> gate * f((1 + scale) * norm(x) + shift), each (B, 1, hidden)."""

    shift: Tensor
    one_plus_scale: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepModulation:
    """Every shift, scale and gate of one step."""

    img: tuple[tuple[Shift, ...], ...]  # per double block: attention, mlp
    txt: tuple[tuple[Shift, ...], ...]
    single: tuple[Shift, ...]
    final: Shift


def timestep_embedding(t: Tensor, width: int = EMBEDDING_WIDTH) -> Tensor:
    """Embed t (B,), sigma in 0..1 or guidance, as (B, width) float32: cosines, then sines."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(10_000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angle = 1000.0 * t.float()[:, None] * frequencies[None]
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class _Embedder(nn.Module):
    def __init__(self, inputs: int, hidden: int, operations: Operations, **where: Any) -> None:
        super().__init__()
        self.in_layer = operations.Linear(inputs, hidden, bias=True, **where)
        self.out_layer = operations.Linear(hidden, hidden, bias=True, **where)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class _Modulation(nn.Module):
    def __init__(self, hidden: int, parts: int, operations: Operations, **where: Any) -> None:
        super().__init__()
        self.lin = operations.Linear(hidden, parts * hidden, bias=True, **where)
        self.parts = parts

    def forward(self, activated: Tensor) -> tuple[Shift, ...]:
        chunks = self.lin(activated)[:, None, :].chunk(self.parts, dim=-1)
        return tuple(
            Shift(shift, 1 + scale, gate)
            for shift, scale, gate in zip(chunks[0::3], chunks[1::3], chunks[2::3], strict=True)
        )


class _DoubleModulation(nn.Module):
    def __init__(self, hidden: int, operations: Operations, **where: Any) -> None:
        super().__init__()
        self.img_mod = _Modulation(hidden, 6, operations, **where)
        self.txt_mod = _Modulation(hidden, 6, operations, **where)

    def forward(self, activated: Tensor) -> tuple[tuple[Shift, ...], tuple[Shift, ...]]:
        return self.img_mod(activated), self.txt_mod(activated)


class _SingleModulation(nn.Module):
    def __init__(self, hidden: int, operations: Operations, **where: Any) -> None:
        super().__init__()
        self.modulation = _Modulation(hidden, 3, operations, **where)

    def forward(self, activated: Tensor) -> Shift:
        return self.modulation(activated)[0]


class _FinalModulation(nn.Module):
    def __init__(self, hidden: int, operations: Operations, **where: Any) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(  # a published key name
            nn.SiLU(), operations.Linear(hidden, 2 * hidden, bias=True, **where)
        )

    def forward(self, vec: Tensor) -> Shift:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return Shift(shift, 1 + scale)


class FluxModulation(nn.Module):
    """Timestep, guidance and pooled text to the modulation of every block."""

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
        hidden = spec.hidden
        self.time_in = _Embedder(EMBEDDING_WIDTH, hidden, ops, **where)
        self.vector_in = _Embedder(spec.pooled_width, hidden, ops, **where)
        if spec.has_guidance:
            self.guidance_in = _Embedder(EMBEDDING_WIDTH, hidden, ops, **where)
        self.double_blocks = nn.ModuleList(
            _DoubleModulation(hidden, ops, **where) for _ in range(spec.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            _SingleModulation(hidden, ops, **where) for _ in range(spec.single_blocks)
        )
        self.final_layer = _FinalModulation(hidden, ops, **where)

    def forward(self, t: Tensor, pooled: Tensor, guidance: Tensor | None) -> StepModulation:
        """Compute one step's modulation.

        Args:
            t: (B,) sigma in 0..1, float32.
            pooled: (B, P); its dtype is the dtype of the computation.
            guidance: (B,) float32; not used by a model without a guidance input.

        Raises:
            SettingError: a model with a guidance input is given none.
        """
        dtype = pooled.dtype
        vec = self.time_in(timestep_embedding(t).to(dtype))
        if hasattr(self, "guidance_in"):
            if guidance is None:
                raise SettingError(
                    "No guidance is given.",
                    "a number: the network has a guidance input.",
                    "set guidance on 'Reference Conditioner (FLUX)'.",
                )
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(dtype))
        vec = vec + self.vector_in(pooled)
        activated = F.silu(vec)
        doubles = cast(Iterable[_DoubleModulation], self.double_blocks)
        singles = cast(Iterable[_SingleModulation], self.single_blocks)
        img, txt = zip(*(block(activated) for block in doubles), strict=True)
        return StepModulation(
            img=img,
            txt=txt,
            single=tuple(block(activated) for block in singles),
            final=self.final_layer(vec),
        )
