"""Solvers: follow the velocity from noise to picture, one step at a time.

Each solver is a generator, so whoever runs it owns progress, previews and interruption. The
state stays float32 whatever the network computes in.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..types import Sigmas, TokenValues

Velocity: TypeAlias = Callable[[TokenValues, int], TokenValues]
"""velocity(x, step): the velocity noise - picture at sigmas[step]; x and result (B, N, D)."""

SolverName = Literal["euler", "heun"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where a solver stands after one step; all tensors in the network's scaled space."""

    index: int  # of the step just done, from 0
    steps: int
    x: TokenValues  # (B, N, D) float32, at sigma_next
    sigma: float  # where the step began
    sigma_next: float
    denoised: TokenValues  # (B, N, D) float32, the picture as seen from the step's beginning


def euler(velocity: Velocity, x: TokenValues, sigmas: Sigmas) -> Iterator[Step]:
    """Follow the velocity in straight lines: one evaluation a step, first order.

    Args:
        velocity: called with (x, index of the step).
        x: (B, N, D) at sigmas[0].
        sigmas: (S + 1,), checked.

    Yields:
        S steps; the x of the last is the picture.

    Source: black-forest-labs/flux@802fb47 src/flux/sampling.py denoise.
    """
    yield from _follow(velocity, x, sigmas, average=False)


def heun(velocity: Velocity, x: TokenValues, sigmas: Sigmas) -> Iterator[Step]:
    """Average the velocity at both ends of each step: two evaluations a step, second order.

    The last step goes to sigma 0, where no velocity exists, and is an Euler step. S steps cost
    2 S - 1 evaluations.

    Args:
        velocity: called with (x, index of the step), and at the far end with (x, index + 1).
        x: (B, N, D) at sigmas[0].
        sigmas: (S + 1,), checked.

    Yields:
        S steps; the x of the last is the picture.

    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1, with sigma as the time.
    """
    yield from _follow(velocity, x, sigmas, average=True)


def _follow(velocity: Velocity, x: TokenValues, sigmas: Sigmas, *, average: bool) -> Iterator[Step]:
    """Walk the sigmas; `average` takes the mean of the velocities at both ends of a step."""
    x = x.float()
    levels = [float(sigma) for sigma in sigmas]
    steps = len(levels) - 1
    for index in range(steps):
        sigma, sigma_next = levels[index], levels[index + 1]
        slope = velocity(x, index).float()
        x = x.to(slope.device)  # the first step takes it to the network
        denoised = x - sigma * slope
        there = x + (sigma_next - sigma) * slope
        if average and index + 1 < steps:
            far_slope = velocity(there, index + 1).float()
            there = x + (sigma_next - sigma) * (slope + far_slope) / 2
        x = there
        yield Step(
            index=index,
            steps=steps,
            x=x,
            sigma=sigma,
            sigma_next=sigma_next,
            denoised=denoised,
        )


SOLVERS: dict[SolverName, Callable[[Velocity, TokenValues, Sigmas], Iterator[Step]]] = {
    "euler": euler,
    "heun": heun,
}
