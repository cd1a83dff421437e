"""Read a LoRA for a FLUX transformer: what is wrong with it is said from its header.

Weights are read after `check_lora` alone. Layers are matched to rows of our tensors, so a fused
qkv, a split one and a block-sparse one all give exactly W + strength * (alpha / rank) * B A.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..specs import FluxFamily, TransformerSpec
from .files import Checkpoint, open_checkpoint
from .lora_alpha import AdapterConfig, read_config
from .lora_check import CHOOSE, LoraSetup, check_lora
from .lora_layers import Target
from .lora_names import LoraLayer
from .lora_parts import Change, Full, Kronecker, LoraPart, LowRank
from .lora_report import LoraReport
from .lora_strengths import BlockStrengths
from .names import shorten

_MOST = 1e6  # of alpha / rank; trainers write 1, or less


@dataclass(frozen=True, slots=True)
class Lora:
    """The changes of one file at strength 1, and what was found in it."""

    parts: tuple[LoraPart, ...]
    report: LoraReport
    norms: tuple[tuple[str, Tensor], ...] = ()  # what takes the place of the model's own, by name

    def scaled(self, strength: float, blocks: BlockStrengths) -> tuple[LoraPart, ...]:
        """Give the changes at a strength; what is 0 strong is left out."""
        scaled = (
            replace(part, scale=part.scale * strength * blocks.of(part.key)) for part in self.parts
        )
        return tuple(part for part in scaled if part.scale)


def load_lora(
    path: Path, family: FluxFamily, spec: TransformerSpec, *, takes_control: bool = False
) -> Lora:
    """Read a LoRA that fits a transformer.

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
    setup = check_lora(checkpoint, family, spec, takes_control=takes_control)
    config = read_config(checkpoint)
    read = _Reader(checkpoint, config)
    parts: list[LoraPart] = []
    scales: list[float] = []
    for name, target in setup.matched.items():
        layer = setup.names.layers[name]
        made = list(read.parts(name, layer, target, setup))
        parts += made
        scales += [one.scale for one in made if one.key == target.key]
    norms = read.tensors({key: key for key in setup.norms})
    return Lora(tuple(parts), _report(checkpoint, setup, scales), tuple(norms.items()))


class _Reader:
    """Makes changes out of a file's tensors."""

    def __init__(self, checkpoint: Checkpoint, config: AdapterConfig) -> None:
        self.checkpoint, self.config = checkpoint, config

    def parts(
        self, name: str, layer: LoraLayer, target: Target, setup: LoraSetup
    ) -> Iterable[LoraPart]:
        """Give the changes of one layer: its weight's, then its bias's."""
        tensors = self.tensors({key: role for role, key in layer.keys.items()})
        scale = self._scale(name, layer, tensors)
        whole = target.rows == setup.shapes[target.key][0]
        for change, factor in self._changes(tensors, scale):
            made = change.swapped() if target.swapped else change
            yield LoraPart(target.key, target.start, target.rows, whole, made, factor)
        key = target.key.removesuffix("weight") + "bias"
        for role, factor in (("bias", scale), ("full bias", 1.0)):
            if role in tensors:
                bias = Full(tensors[role])
                made = bias.swapped() if target.swapped else bias
                yield LoraPart(key, target.start, target.rows, whole, made, factor)

    def tensors(self, named: Mapping[str, str]) -> dict[str, Tensor]:
        """Copy tensors, named anew: files of LoRAs are often written again while they are in use.

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

    def _changes(self, tensors: dict[str, Tensor], scale: float) -> Iterable[tuple[Change, float]]:
        if "down" in tensors:
            yield LowRank(tensors["up"], tensors["down"]), scale
        if "first" in tensors or "first a" in tensors:
            yield Kronecker(_factor(tensors, "first"), _factor(tensors, "second")), scale
        if "full" in tensors:
            yield Full(tensors["full"]), 1.0

    def _scale(self, name: str, layer: LoraLayer, tensors: dict[str, Tensor]) -> float:
        """Tell alpha / rank: 1 where neither the file's tensors nor its header say alpha.

        LoKr has a rank where one of its two matrices is a product.
        """
        rank = rank_of(layer, self.checkpoint)
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


def rank_of(layer: LoraLayer, checkpoint: Checkpoint) -> int:
    """Tell a layer's rank; 0 where it has none."""
    for role in ("down", "second b", "first b"):
        if role in layer.keys:
            return checkpoint.shapes[layer.keys[role]][0]
    return 0


def _factor(tensors: dict[str, Tensor], which: str) -> Tensor:
    if which in tensors:
        return tensors[which]
    return tensors[f"{which} a"].float() @ tensors[f"{which} b"].float()


def _report(checkpoint: Checkpoint, setup: LoraSetup, scales: list[float]) -> LoraReport:
    names = setup.names
    ranks = {rank_of(names.layers[name], checkpoint) for name in setup.matched}
    return LoraReport(
        source=checkpoint.path.name,
        title=setup.title,
        writer=names.writer,
        ranks=tuple(sorted(ranks - {0})),
        scales=tuple(sorted({float(f"{one:.6g}") for one in scales})),
        layers=len(setup.matched),
        matched=(
            *(key for name in setup.matched for key in names.layers[name].keys.values()),
            *setup.norms,
        ),
        absent=tuple(key for name in setup.absent for key in names.layers[name].keys.values()),
        text=names.text,
        unknown=tuple(key for key in names.unknown if key not in setup.norms),
    )
