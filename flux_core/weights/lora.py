"""A LoRA of a FLUX transformer: W + strength * (alpha / rank) * B A on some rows of a weight.

What is wrong with a file is said from its header: weights are read after `fit_lora` alone. Layers
are matched to rows of our tensors, so a fused qkv, a split one and a block-sparse one all give
exactly that sum.

Source: Hu et al. 2021, "LoRA", equation 3; Yeh et al. 2023, "LyCORIS", section 3 for LoKr.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import CheckpointError, shorten
from ..specs import FluxFamily, TransformerSpec
from ..transformer.flux import Flux
from .checkpoint import Checkpoint, open_checkpoint
from .key_map import swap_halves
from .lora_fit import LoraFit, LoraReport, fit_lora, report_lora
from .lora_keys import CHOOSE, AdapterConfig, LoraLayer, LoraTarget, read_config
from .lora_strengths import BlockStrengths

_MOST = 1e6  # of alpha / rank; trainers write 1, or less


@dataclass(frozen=True, slots=True)
class LowRank:
    """up @ down: (rows, rank) times (rank, columns)."""

    up: Tensor
    down: Tensor

    def delta(self, device: torch.device) -> Tensor:
        """Returns the delta in float32."""
        return self.up.to(device, torch.float32) @ self.down.to(device, torch.float32)

    def swapped(self) -> "LowRank":
        """Exchanges the two halves of the rows."""
        return LowRank(swap_halves(self.up), self.down)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """The Kronecker product of two matrices."""

    first: Tensor
    second: Tensor

    def delta(self, device: torch.device) -> Tensor:
        """Returns the delta in float32."""
        first, second = (one.to(device, torch.float32) for one in (self.first, self.second))
        return torch.kron(first.contiguous(), second.contiguous())

    def swapped(self) -> "Kronecker | Full":
        """Exchanges the two halves of the rows."""
        if self.first.shape[0] % 2 == 0:
            return Kronecker(swap_halves(self.first), self.second)
        return Full(swap_halves(self.delta(torch.device("cpu"))))


@dataclass(frozen=True, slots=True)
class Full:
    """The delta as it is: of a weight, or of a bias."""

    values: Tensor

    def delta(self, device: torch.device) -> Tensor:
        """Returns the delta in float32."""
        return self.values.to(device, torch.float32)

    def swapped(self) -> "Full":
        """Exchanges the two halves of the rows."""
        return Full(swap_halves(self.values))


Delta: TypeAlias = LowRank | Kronecker | Full


@dataclass(frozen=True, slots=True)
class LoraPart:
    """What one LoRA adds to some rows of one tensor."""

    key: str  # our name of the tensor
    start: int
    rows: int
    whole: bool  # the rows are all that the tensor has
    change: Delta
    scale: float  # alpha / rank, times the strengths


@dataclass(frozen=True, slots=True)
class AddedAtUse:
    """Changes of one weight that stays quantised, added whenever it is dequantised.

    Args:
        parts: the changes.
        divisor: (columns,), by which the layer multiplies its input before the weight, if it does.
    """

    parts: tuple[LoraPart, ...]
    divisor: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """Changes a dequantised weight (rows, columns); the sum is rounded once."""
        made = weight.to(torch.float32)
        _add(made, self.parts, None if self.divisor is None else self.divisor.to(made))
        return made.to(weight.dtype)


@dataclass(frozen=True, slots=True)
class Lora:
    """The changes of one file at strength 1, and what was found in it."""

    parts: tuple[LoraPart, ...]
    report: LoraReport
    norms: tuple[tuple[str, Tensor], ...] = ()  # which replace the model's own, by name

    def scaled(self, strength: float, blocks: BlockStrengths) -> tuple[LoraPart, ...]:
        """Returns the changes at a strength, without those of strength 0."""
        scaled = (
            replace(part, scale=part.scale * strength * blocks.of(part.key)) for part in self.parts
        )
        return tuple(part for part in scaled if part.scale)


def load_lora(
    path: Path, family: FluxFamily, spec: TransformerSpec, *, takes_control: bool = False
) -> Lora:
    """Loads a LoRA that fits a transformer.

    Args:
        path: a .safetensors file.
        family: which model the transformer is.
        spec: its real shape.
        takes_control: FLUX.1's Canny and Depth LoRAs are read too; their img_in has twice the
            columns, and the model's is to get as many of zeros first.

    Raises:
        CheckpointError: the file is broken, is no LoRA, holds half of one, or holds values that
            cannot be.
        FamilyMismatchError: it was made for another model; no weight was read.
    """
    checkpoint = open_checkpoint(path)
    fit = fit_lora(checkpoint, family, spec, takes_control=takes_control)
    read = _Reader(checkpoint, read_config(checkpoint))
    parts: list[LoraPart] = []
    scales: list[float] = []
    for name, target in fit.matched.items():
        mine = list(read.parts(name, fit.keys.layers[name], target, fit))
        parts += mine
        scales += [one.scale for one in mine if one.key == target.key]
    norms = read.tensors({key: key for key in fit.norms})
    return Lora(tuple(parts), report_lora(checkpoint, fit, scales), tuple(norms.items()))


def patched(weight: Tensor, parts: Iterable[LoraPart]) -> Tensor:
    """Adds changes to a weight, in float32.

    Returns:
        A new tensor of the weight's dtype, on its device.
    """
    made = weight.detach().to(torch.float32, copy=True)
    _add(made, parts)
    return made.to(weight.dtype)


def merge_lora(network: Flux, parts: Iterable[LoraPart]) -> None:
    """Changes a network's weights for good; parts of several LoRAs add up before they are rounded.

    Raises:
        KeyError: a part changes a tensor that the network does not have.
    """
    by_key: dict[str, list[LoraPart]] = {}
    for part in parts:
        by_key.setdefault(part.key, []).append(part)
    parameters = {
        **dict(network.modulation.named_parameters()),
        **dict(network.blocks.named_parameters()),
    }
    for key, changes in by_key.items():
        parameters[key].data = patched(parameters[key].data, changes)


class _Reader:
    """Makes changes of a file's tensors."""

    def __init__(self, checkpoint: Checkpoint, config: AdapterConfig) -> None:
        self.checkpoint, self.config = checkpoint, config

    def parts(
        self, name: str, layer: LoraLayer, target: LoraTarget, fit: LoraFit
    ) -> Iterable[LoraPart]:
        """Yields the changes of one layer: its weight's, then its bias's."""
        tensors = self.tensors({key: role for role, key in layer.keys.items()})
        scale = self._scale(name, layer, tensors)
        whole = target.rows == fit.shapes[target.key][0]
        for delta, factor in self._deltas(tensors, scale):
            made = delta.swapped() if target.swapped else delta
            yield LoraPart(target.key, target.start, target.rows, whole, made, factor)
        key = target.key.removesuffix("weight") + "bias"
        for role, factor in (("bias", scale), ("full bias", 1.0)):
            if role in tensors:
                bias = Full(tensors[role])
                made = bias.swapped() if target.swapped else bias
                yield LoraPart(key, target.start, target.rows, whole, made, factor)

    def tensors(self, named: Mapping[str, str]) -> dict[str, Tensor]:
        """Copies tensors, renamed: files of LoRAs are often written again while they are in use.

        Raises:
            CheckpointError: a value is not finite.
        """
        tensors: dict[str, Tensor] = {}
        for key, tensor in self.checkpoint.stream(named):
            wide = tensor.to(torch.float32)
            wrong = int((~wide.isfinite()).sum())
            if wrong:
                raise CheckpointError(
                    f"{self.checkpoint.path.name} holds {wrong:,} values that are not numbers in "
                    f"'{shorten(key)}' of {tensor.numel():,}.",
                    "a LoRA of finite values.",
                    CHOOSE,
                )
            tensors[named[key]] = wide if tensor.dtype.itemsize == 1 else tensor.clone()
        return tensors

    def _deltas(self, tensors: dict[str, Tensor], scale: float) -> Iterable[tuple[Delta, float]]:
        if "down" in tensors:
            yield LowRank(tensors["up"], tensors["down"]), scale
        if "first" in tensors or "first a" in tensors:
            yield Kronecker(_factor(tensors, "first"), _factor(tensors, "second")), scale
        if "full" in tensors:
            yield Full(tensors["full"]), 1.0

    def _scale(self, name: str, layer: LoraLayer, tensors: dict[str, Tensor]) -> float:
        """Returns alpha / rank: 1 where neither the file's tensors nor its header say alpha."""
        rank = layer.rank(self.checkpoint.shapes)
        if rank == 0:
            return 1.0
        scale = self.config.scale(name, rank)
        if "alpha" in tensors:
            scale = float(tensors["alpha"].reshape(())) / rank
        if abs(scale) > _MOST:
            raise CheckpointError(
                f"{self.checkpoint.path.name} makes {shorten(layer.name)} {scale:.3g} times as "
                "strong as it was trained.",
                f"an alpha of at most {_MOST:g} times the rank.",
                CHOOSE,
            )
        return scale


def _factor(tensors: dict[str, Tensor], which: str) -> Tensor:
    if which in tensors:
        return tensors[which]
    return tensors[f"{which} a"].float() @ tensors[f"{which} b"].float()


def _add(made: Tensor, parts: Iterable[LoraPart], divisor: Tensor | None = None) -> None:
    """Adds changes, divided by column where there is a divisor, to a float32 weight in place."""
    for part in parts:
        rows = made.narrow(0, part.start, part.rows)
        if divisor is None:
            rows.add_(part.change.delta(made.device), alpha=part.scale)
        else:
            rows.addcdiv_(part.change.delta(made.device), divisor, value=part.scale)
