"""Guidance: one velocity from one or two conditionings.

A guidance-distilled model has a guidance input and needs one pass. True CFG runs a second,
negative pass and moves away from it; each pass has its own text, references and guidance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..errors import SettingError, ShapeError
from ..specs import FluxFamily, TransformerSpec
from ..steps import step_of
from ..types import TokenValues
from ..values import MAX_GUIDANCE, Conditioning, Reference, Tokens

Passes = Literal["batched", "in turn"]

_IN_TURN = "set [passes] to 'in turn'."


class StepPlan(Protocol):
    """One conditioning, ready for every step, such as a `Plan`."""

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        ...

    def velocity(self, x: TokenValues, sigma: float) -> TokenValues:
        """Predicts noise - image for x (B, N, D) at a noise level."""
        ...


class Network(Protocol):
    """What sampling needs of a transformer; `Flux` implements it."""

    family: FluxFamily
    spec: TransformerSpec
    supports: frozenset[str]  # the `Reference.controls` that it follows

    def plans(
        self,
        conditionings: Sequence[Conditioning],
        target: Tokens,
        sigmas: Sequence[float],
        asked: Sequence[float] | None = None,
    ) -> Sequence[StepPlan]:
        """Makes one plan for each conditioning."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueCFG:
    """The settings of true classifier-free guidance.

    Args:
        negative: what to move away from; usually with the positive's guidance and references.
        scale: 1 or less runs the positive pass only.
        start, end: the window of steps that run both passes, as fractions 0..1 of all steps; it
            begins at step start * steps and ends before step end * steps, both rounded up.
        passes: "batched" runs both in one pass of twice the batch; "in turn" runs one after the
            other, with half the activation memory, and allows the two to differ in shape.

    Raises:
        SettingError: a number is out of range, or start is after end.
    """

    negative: Conditioning
    scale: float
    start: float = 0.0
    end: float = 1.0
    passes: Passes = "batched"

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale <= MAX_GUIDANCE:
            needed = f"a number from 0 to {MAX_GUIDANCE:g}."
            raise SettingError(f"cfg is {self.scale}.", needed, "set [cfg].")
        if not (0.0 <= self.start <= 1.0 and 0.0 <= self.end <= 1.0):
            raise SettingError(
                f"The CFG window is {self.start} to {self.end}.",
                "start and end in 0..1.",
                "set [cfg start] and [cfg end].",
            )
        if self.start > self.end:
            raise SettingError(
                f"The CFG window is reversed: start {self.start} is after end {self.end}.",
                "start at or before end.",
                "swap [cfg start] and [cfg end].",
            )

    def window(self, steps: int) -> range:
        """The steps that run both passes; none when the scale is 1 or less."""
        if self.scale <= 1.0:
            return range(0)
        slack = 1e-6  # 0.7 * 10 is 7.000000000000001
        return range(math.ceil(self.start * steps - slack), math.ceil(self.end * steps - slack))


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The steps that run both passes, looked up by noise level."""

    sigmas: Sequence[float]  # the level at which each step begins
    steps: range

    def __contains__(self, sigma: float) -> bool:
        return step_of(sigma, self.sigmas) in self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Guided:
    """One or two passes as one velocity.

    Args:
        scale: of true CFG; 1 with a single pass.
        window: the steps that run both passes; others run the positive alone.
        positive: plan of the positive conditioning; None if every step runs `both`.
        negative: plan of the negative one, run in turn with the positive.
        both: plan over the batch [negative, positive], in place of `negative`.
    """

    scale: float
    window: Window | None
    positive: StepPlan | None
    negative: StepPlan | None = None
    both: StepPlan | None = None

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        plan = self.positive or self.both
        assert plan is not None
        return plan.device

    def velocity(self, x: TokenValues, sigma: float) -> TokenValues:
        """Returns the combined velocity, (B, N, D) float32."""
        return self.combine(*self.passes(x, sigma))

    def combine(self, positive: TokenValues, negative: TokenValues | None) -> TokenValues:
        """Combines two passes: moves away from the negative one, if it ran."""
        return positive if negative is None else negative + self.scale * (positive - negative)

    def passes(self, x: TokenValues, sigma: float) -> tuple[TokenValues, TokenValues | None]:
        """Returns each pass's velocity, (B, N, D) float32; None if the negative does not run."""
        if self.window is not None and sigma in self.window:
            if self.both is not None:
                halves = self.both.velocity(torch.cat((x, x)), sigma).float().chunk(2)
                return halves[1], halves[0]
            if self.positive is not None and self.negative is not None:
                positive = self.positive.velocity(x, sigma).float()
                return positive, self.negative.velocity(x, sigma).float()
        assert self.positive is not None
        return self.positive.velocity(x, sigma).float(), None


def guided(
    network: Network,
    positive: Conditioning,
    target: Tokens,
    sigmas: Sequence[float],
    asked: Sequence[float] | None = None,
    cfg: TrueCFG | None = None,
) -> Guided:
    """Makes only the plans that a run needs.

    Args:
        network: the transformer.
        positive: the conditioning; without CFG the only one.
        target: the noise; only its position ids and batch are used.
        sigmas: S + 1 noise levels, checked.
        asked: the levels that the solver will ask for; None: those at which steps begin.
        cfg: true CFG settings, or None.

    Returns:
        The guided velocity.

    Raises:
        ShapeError: "batched" with conditionings of different shapes or position ids.
        SettingError: "batched" with different guidance.

    Source: huggingface/diffusers@0.42.1 pipelines/flux/pipeline_flux_kontext.py __call__,
        pipelines/flux2/pipeline_flux2_klein.py __call__ (two passes, references in both).
        Deviation: the sum is float32 whatever dtype the network computes in.
    """
    steps = len(sigmas) - 1
    if cfg is None or not cfg.window(steps):
        plan = network.plans([positive], target, sigmas, asked)[0]
        return Guided(scale=1.0, window=None, positive=plan)
    window = Window(sigmas=sigmas[:-1], steps=cfg.window(steps))
    if cfg.passes == "in turn":
        plans = network.plans([positive, cfg.negative], target, sigmas, asked)
        return Guided(scale=cfg.scale, window=window, positive=plans[0], negative=plans[1])
    joined = join(cfg.negative, positive, batch=target.values.shape[0])
    twice = replace(target, values=torch.cat((target.values, target.values)))
    if len(window.steps) == steps:
        both, alone = network.plans([joined], twice, sigmas, asked)[0], None
    elif _is_single(positive):  # its batch of 1 fits any: one call, so the network is loaded once
        both, alone = network.plans([joined, positive], twice, sigmas, asked)
    else:
        both = network.plans([joined], twice, sigmas, asked)[0]
        alone = network.plans([positive], target, sigmas, asked)[0]
    return Guided(scale=cfg.scale, window=window, positive=alone, both=both)


def join(negative: Conditioning, positive: Conditioning, *, batch: int) -> Conditioning:
    """Stacks two conditionings into one of twice the batch, the negative first.

    Args:
        negative, positive: texts of equal length, references of equal shapes and position ids.
        batch: of the noise; parts of batch 1 are repeated.

    Raises:
        ShapeError: they cannot be stacked.
        SettingError: their guidance differs.
    """
    if negative.guidance != positive.guidance:
        raise SettingError(
            f"guidance is {positive.guidance} for the positive and {negative.guidance} for the "
            "negative conditioning.",
            "the same for both, to run them as one batch.",
            f"set both to the same [guidance], or {_IN_TURN}",
        )
    _check_alike(negative, positive)
    pooled = None
    if negative.text.pooled is not None and positive.text.pooled is not None:
        pooled = _stack(negative.text.pooled, positive.text.pooled, batch)
    txt = _stack(negative.text.txt, positive.text.txt, batch)
    references: list[Reference] = []
    for one, other in zip(negative.references, positive.references, strict=True):
        values = one.tokens.values
        if values is not other.tokens.values or values.shape[0] > 1:  # one shared image stays one
            values = _stack(values, other.tokens.values, batch)
        references.append(replace(one, tokens=replace(one.tokens, values=values)))
    text = replace(positive.text, txt=txt, pooled=pooled)
    return replace(positive, text=text, references=tuple(references))


def _check_alike(negative: Conditioning, positive: Conditioning) -> None:
    """Raises for conditionings that cannot be stacked into one batch."""
    lengths = [one.text.txt.shape[1] for one in (positive, negative)]
    if lengths[0] != lengths[1]:
        raise ShapeError(
            f"The positive text has {lengths[0]} tokens, the negative {lengths[1]}.",
            "equal lengths, to run both as one batch.",
            f"set the same [text tokens] for both, or {_IN_TURN}",
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
        if not _same_positions(one.tokens, other.tokens):
            grids = [" x ".join(map(str, each.tokens.grid)) for each in (one, other)]
            raise ShapeError(
                f"Reference {number} is {grids[0]} tokens in the positive and {grids[1]} in the "
                "negative conditioning, or has other position ids.",
                "equal sizes at equal positions, to run both as one batch.",
                f"fit and place them alike, or {_IN_TURN}",
            )
        if _controls(one) != _controls(other):
            raise SettingError(
                f"Reference {number} is seen in another way in the negative conditioning.",
                "equal controls on both, to run them as one batch.",
                f"wire the same reference to both, or {_IN_TURN}",
            )


def _same_positions(one: Tokens, other: Tokens) -> bool:
    return one.ids.shape == other.ids.shape and torch.equal(one.ids, other.ids.to(one.ids))


def _controls(one: Reference) -> tuple[object, ...]:
    mask = None if one.mask is None else one.mask.cpu().numpy().tobytes()
    return one.strength, one.steps, one.blocks, mask


def _stack(negative: Tensor, positive: Tensor, batch: int) -> Tensor:
    """Concatenates along the batch; a batch of 1 is repeated to `batch` first."""
    halves = [one.expand(batch, *one.shape[1:]) for one in (negative, positive)]
    return torch.cat((halves[0], halves[1].to(halves[0])))


def _is_single(conditioning: Conditioning) -> bool:
    references = (one.tokens.values for one in conditioning.references)
    return all(values.shape[0] == 1 for values in (conditioning.text.txt, *references))
