"""Guidance: how one velocity is made from one or two conditionings.

A guidance-distilled model takes its strength as an input and needs one pass. True CFG runs a
second, negative pass and moves away from it; text, references and guidance belong to each pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..errors import SettingError, ShapeError
from ..specs import FluxFamily, LatentSpec, TransformerSpec
from ..types import Sigmas, TokenValues
from ..values import MAX_GUIDANCE, Conditioning, Tokens

Passes = Literal["batched", "in turn"]

_IN_TURN = "set passes to 'in turn' in 'Sample True CFG (FLUX)'."


class StepPlan(Protocol):
    """One conditioning, ready for every step: `Plan`, or what this file makes of plans."""

    def velocity(self, x: TokenValues, step: int) -> TokenValues:
        """Predict noise - picture for x (B, N, D) at sigmas[step]."""
        ...


class Network(Protocol):
    """What sampling needs of a transformer; `Flux` is one."""

    family: FluxFamily
    spec: TransformerSpec

    def plans(
        self, conditionings: Sequence[Conditioning], target: Tokens, sigmas: Sigmas
    ) -> Sequence[StepPlan]:
        """Make one plan for each conditioning."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueCFG:
    """The settings of true classifier-free guidance.

    Args:
        negative: what to move away from; guidance and references as in the positive, usually.
        scale: 1 or less runs the positive pass only.
        start, end: part of the steps that run both passes, as fractions 0..1 of their count;
            the first step in is start * steps, the first out again end * steps, rounded up.
        passes: "batched" runs both in one pass of twice the batch; "in turn" one after the other,
            with half the activation memory, and lets the two differ in shape.

    Raises:
        SettingError: a number out of range, or start after end.
    """

    negative: Conditioning
    scale: float
    start: float = 0.0
    end: float = 1.0
    passes: Passes = "batched"

    def __post_init__(self) -> None:
        node = "set it in 'Sample True CFG (FLUX)'."
        if not 0.0 <= self.scale <= MAX_GUIDANCE:
            needed = f"a number from 0 to {MAX_GUIDANCE:g}."
            raise SettingError(f"cfg is {self.scale}.", needed, node)
        if not (0.0 <= self.start <= 1.0 and 0.0 <= self.end <= 1.0):
            raise SettingError(
                f"The CFG window is {self.start} to {self.end}.", "start and end in 0..1.", node
            )
        if self.start > self.end:
            raise SettingError(
                f"The CFG window is reversed: start {self.start} is after end {self.end}.",
                "start at or before end.",
                "swap start and end in 'Sample True CFG (FLUX)'.",
            )

    def window(self, steps: int) -> range:
        """Name the steps that run both passes; none when the scale is 1 or less."""
        if self.scale <= 1.0:
            return range(0)
        slack = 1e-6  # 0.7 * 10 is 7.000000000000001
        return range(math.ceil(self.start * steps - slack), math.ceil(self.end * steps - slack))


@dataclass(frozen=True, slots=True, kw_only=True)
class CFGInTurn:
    """True CFG as two plans; the negative one runs inside the window only."""

    positive: StepPlan
    negative: StepPlan
    scale: float
    window: range

    def velocity(self, x: TokenValues, step: int) -> TokenValues:
        """Combine both passes, (B, N, D) float32; outside the window the positive alone."""
        positive = self.positive.velocity(x, step).float()
        if step not in self.window:
            return positive
        return _combine(positive, self.negative.velocity(x, step).float(), self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class CFGBatched:
    """True CFG as one plan over the batch [negative, positive].

    Args:
        both: plan of the joined conditionings.
        positive: plan for the steps outside the window; None when there are none.
    """

    both: StepPlan
    positive: StepPlan | None
    scale: float
    window: range

    def velocity(self, x: TokenValues, step: int) -> TokenValues:
        """Combine both halves, (B, N, D) float32; outside the window the positive alone."""
        if self.positive is not None and step not in self.window:
            return self.positive.velocity(x, step).float()
        negative, positive = self.both.velocity(torch.cat((x, x)), step).float().chunk(2)
        return _combine(positive, negative, self.scale)


def guider(
    network: Network,
    positive: Conditioning,
    target: Tokens,
    sigmas: Sigmas,
    cfg: TrueCFG | None = None,
) -> StepPlan:
    """Make the plans that a run needs, and no others.

    Args:
        network: the transformer.
        positive: the conditioning; alone it is the guided (distilled) way.
        target: the noise; its ids and batch are used.
        sigmas: (S + 1,), checked.
        cfg: true CFG settings, or None.

    Returns:
        The velocity of the whole guidance, one step at a time.

    Raises:
        ShapeError: "batched" with conditionings of different shapes or places.
        SettingError: "batched" with different guidance.
        FamilyMismatchError: a conditioning of another model.

    Source: huggingface/diffusers@0.42.1 pipelines/flux/pipeline_flux_kontext.py __call__,
        pipelines/flux2/pipeline_flux2_klein.py __call__ (two passes, references in both).
        Deviation: the sum is float32 whatever the network computes.
    """
    steps = len(sigmas) - 1
    window = range(0) if cfg is None else cfg.window(steps)
    if cfg is None or not window:
        return network.plans([positive], target, sigmas)[0]
    if cfg.passes == "in turn":
        first, second = network.plans([positive, cfg.negative], target, sigmas)
        return CFGInTurn(positive=first, negative=second, scale=cfg.scale, window=window)
    own = network.family.latent
    if _kind(positive, own) != _kind(cfg.negative, own):
        # one of them is another model's: the network refuses it by name, before it computes
        network.plans([positive, cfg.negative], target, sigmas)
    joined = join(cfg.negative, positive, batch=target.values.shape[0])
    twice = replace(target, values=torch.cat((target.values, target.values)))
    if len(window) == steps:
        both, alone = network.plans([joined], twice, sigmas)[0], None
    elif _is_single(positive):  # fits any batch: one call, so the network is loaded once
        both, alone = network.plans([joined, positive], twice, sigmas)
    else:
        both = network.plans([joined], twice, sigmas)[0]
        alone = network.plans([positive], target, sigmas)[0]
    return CFGBatched(both=both, positive=alone, scale=cfg.scale, window=window)


def join(negative: Conditioning, positive: Conditioning, *, batch: int) -> Conditioning:
    """Stack two conditionings to one of twice the batch, the negative first.

    Args:
        negative, positive: texts of equal length, and references of equal shapes at equal places.
        batch: pictures being made; parts of batch 1 are repeated for each.

    Raises:
        ShapeError: they cannot be stacked.
        SettingError: their guidance differs.
    """
    if negative.guidance != positive.guidance:
        raise SettingError(
            f"guidance is {positive.guidance} for the positive and {negative.guidance} for the "
            "negative conditioning.",
            "the same for both, to run them as one batch.",
            f"set both alike in 'Reference Conditioner (FLUX)', or {_IN_TURN}",
        )
    _check_alike(negative, positive)
    pooled = None
    if negative.text.pooled is not None and positive.text.pooled is not None:
        pooled = _stack("pooled text", negative.text.pooled, positive.text.pooled, batch)
    txt = _stack("text", negative.text.txt, positive.text.txt, batch)
    references: list[Tokens] = []
    for one, other in zip(negative.references, positive.references, strict=True):
        values = one.values
        if values is not other.values or values.shape[0] > 1:  # one shared picture stays one
            values = _stack("reference", values, other.values, batch)
        references.append(replace(one, values=values))
    text = replace(positive.text, txt=txt, pooled=pooled)
    return replace(positive, text=text, references=tuple(references))


def _check_alike(negative: Conditioning, positive: Conditioning) -> None:
    """Refuse conditionings that no single batch can hold."""
    lengths = [one.text.txt.shape[1] for one in (positive, negative)]
    if lengths[0] != lengths[1]:
        raise ShapeError(
            f"The positive text has {lengths[0]} tokens, the negative {lengths[1]}.",
            "equal lengths, to run both as one batch.",
            f"give both the same t5_tokens in 'Encode Text (FLUX)', or {_IN_TURN}",
        )
    counts = [len(one.references) for one in (positive, negative)]
    if counts[0] != counts[1]:
        raise ShapeError(
            f"The positive conditioning has {counts[0]} references, the negative {counts[1]}.",
            "the same references in both, to run them as one batch.",
            f"wire the same ones to both, or {_IN_TURN}",
        )
    for number, (one, other) in enumerate(
        zip(positive.references, negative.references, strict=True), 1
    ):
        if one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids.to(one.ids)):
            raise ShapeError(
                f"Reference {number} is {one.grid[0]}x{one.grid[1]} tokens in the positive and "
                f"{other.grid[0]}x{other.grid[1]} in the negative conditioning, or at another "
                "place.",
                "equal sizes at equal places, to run both as one batch.",
                f"fit and place them alike, or {_IN_TURN}",
            )


def _kind(conditioning: Conditioning, own: LatentSpec) -> tuple[object, ...]:
    """Tell whose text this is by its widths, and which references are not the model's own."""
    text = conditioning.text
    pooled = None if text.pooled is None else text.pooled.shape[-1]
    latents = [tokens.latent for tokens in conditioning.references if tokens.latent != own]
    return (text.txt.shape[-1], pooled, *latents)


def _stack(what: str, negative: Tensor, positive: Tensor, batch: int) -> Tensor:
    """Concatenate along the batch; a batch of 1 is repeated to `batch` first."""
    for one in (negative, positive):
        if one.shape[0] not in (1, batch):
            raise ShapeError(
                f"The {what} has a batch of {one.shape[0]}, the noise {batch}.",
                "a batch of 1, or the same batch as the noise.",
                "set batch_size in 'Noise (FLUX)', or hand over one picture.",
            )
    halves = [one.expand(batch, *one.shape[1:]) for one in (negative, positive)]
    return torch.cat((halves[0], halves[1].to(halves[0])))


def _is_single(conditioning: Conditioning) -> bool:
    references = (tokens.values for tokens in conditioning.references)
    return all(values.shape[0] == 1 for values in (conditioning.text.txt, *references))


def _combine(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    return negative + scale * (positive - negative)
