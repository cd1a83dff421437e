"""Solvers: follow the velocity from noise to image, one step at a time.

Each is a generator that reads like its paper, over `velocity(x, sigma)` = noise - image, so that
the caller owns progress, previews and interruption. The image predicted from x is
`x - sigma * velocity`; the state stays float32 whatever dtype the network computes in.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from ..types import TokenValues

Velocity: TypeAlias = Callable[[TokenValues, float], TokenValues]
"""velocity(x, sigma): predicted noise - image; x and result (B, N, D) float32."""

Edit: TypeAlias = Callable[[TokenValues, float], TokenValues]
"""edit(x, sigma_next): returns x (B, N, D) after a step, changed; a mask is such an edit."""

SolverName = Literal["euler", "heun", "dpm++ 2m", "res multistep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A solver's state after one step; all tensors are in the transformer's scale."""

    index: int  # of the completed step, from 0
    steps: int
    x: TokenValues  # (B, N, D) float32, at sigma_next, edited
    sigma: float  # at which the step began
    sigma_next: float
    denoised: TokenValues  # (B, N, D) float32, the image predicted at the step's beginning


Steps: TypeAlias = Generator[Step, None, None]


def euler(velocity: Velocity, x: TokenValues, sigmas: Sequence[float], edit: Edit) -> Steps:
    """Follows the velocity in straight lines: one evaluation a step, first order.

    Args:
        velocity: the network's.
        x: (B, N, D) float32 at sigmas[0].
        sigmas: S + 1 noise levels, falling.
        edit: applied to x after each step.

    Yields:
        S steps; the last one's x is the image.

    Source: black-forest-labs/flux@802fb47 src/flux/sampling.py denoise.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v = velocity(x, sigma)
        denoised = x - sigma * v
        x = edit(x + (sigma_next - sigma) * v, sigma_next)
        yield _step(index, sigmas, x, denoised)


def heun(velocity: Velocity, x: TokenValues, sigmas: Sequence[float], edit: Edit) -> Steps:
    """Averages the velocity at both ends of each step: two evaluations a step, second order.

    A step to sigma 0, where no velocity exists, is an Euler step: S steps cost 2 S - 1
    evaluations. Arguments and steps as `euler`.

    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1, with sigma as the time.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v = velocity(x, sigma)
        denoised = x - sigma * v
        there = x + (sigma_next - sigma) * v
        if sigma_next > 0.0:
            there = x + (sigma_next - sigma) * (v + velocity(there, sigma_next)) / 2
        x = edit(there, sigma_next)
        yield _step(index, sigmas, x, denoised)


def dpmpp_2m(velocity: Velocity, x: TokenValues, sigmas: Sequence[float], edit: Edit) -> Steps:
    """DPM-Solver++ (2M): one evaluation a step, second order by the previous step.

    In k-diffusion's time, log(sigma): the paper's with alpha = 1, for the denoised image of a flow
    obeys the same ODE in sigma. The first step and one to sigma 0 are of first order. Arguments
    and steps as `euler`.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2; crowsonkb/k-diffusion@21d12c9
        k_diffusion/sampling.py sample_dpmpp_2m.
    """
    previous, h_previous = None, 0.0
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = x - sigma * velocity(x, sigma)
        ratio = sigma_next / sigma
        target = denoised
        if previous is not None and sigma_next > 0.0:
            r = h_previous / -math.log(ratio)
            target = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * previous
        x = edit(ratio * x + (1 - ratio) * target, sigma_next)
        yield _step(index, sigmas, x, denoised)
        previous, h_previous = denoised, -math.log(ratio) if sigma_next > 0.0 else 0.0


def res_multistep(velocity: Velocity, x: TokenValues, sigmas: Sequence[float], edit: Edit) -> Steps:
    """RES, multistep, deterministic: one evaluation a step, second order by the previous step.

    Exponential integrator with h = log(sigma / sigma_next) and the functions phi_1, phi_2; the
    first step and one to sigma 0 are Euler steps. Arguments and steps as `euler`.

    Source: Zhang et al. 2023 (arXiv 2308.02157), with eta 0, as
        Comfy-Org/ComfyUI@14b05228 comfy/k_diffusion/sampling.py res_multistep.
    """
    previous, h_previous = None, 0.0
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v = velocity(x, sigma)
        denoised = x - sigma * v
        h = math.log(sigma / sigma_next) if sigma_next > 0.0 else math.inf
        if previous is None or sigma_next == 0.0:
            there = x + (sigma_next - sigma) * v
        else:
            phi_1 = math.expm1(-h) / -h
            phi_2 = (phi_1 - 1) / -h
            c_2 = -h_previous / h
            there = math.exp(-h) * x + h * (
                (phi_1 - phi_2 / c_2) * denoised + (phi_2 / c_2) * previous
            )
        x = edit(there, sigma_next)
        yield _step(index, sigmas, x, denoised)
        previous, h_previous = denoised, h


def _step(index: int, sigmas: Sequence[float], x: TokenValues, denoised: TokenValues) -> Step:
    return Step(
        index=index,
        steps=len(sigmas) - 1,
        x=x,
        sigma=sigmas[index],
        sigma_next=sigmas[index + 1],
        denoised=denoised,
    )


def levels_above_zero(sigmas: Sequence[float]) -> Sequence[float]:
    """The noise levels of a solver that evaluates at the ends of steps only."""
    return [sigma for sigma in sigmas if sigma > 0.0]


@dataclass(frozen=True, slots=True)
class Solver:
    """A solver, and the noise levels it will ask for, so that modulation is computed up front."""

    steps: Callable[[Velocity, TokenValues, Sequence[float], Edit], Steps]
    asks: Callable[[Sequence[float]], Sequence[float]] = levels_above_zero


SOLVERS: dict[SolverName, Solver] = {  # saved graphs hold the names: new ones go to the end
    "euler": Solver(euler),
    "heun": Solver(heun),
    "dpm++ 2m": Solver(dpmpp_2m),
    "res multistep": Solver(res_multistep),
}
