"""Solvers on velocities whose path is known, and against their papers' formulas."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.sampling.sigmas import linear_sigmas, parse_sigmas
from glassbox.flux_core.sampling.solvers import SOLVERS, Step

ONE = torch.ones(1, 1, 1)
FROM_ONE = [1.0, 0.83, 0.61, 0.3, 0.12, 0.0]
FROM_BELOW = [0.72, 0.5, 0.44, 0.1, 0.0]
STOPPING = [1.0, 0.83, 0.61, 0.3]


def keep(x: Tensor, sigma_next: float) -> Tensor:
    """The edit that changes nothing."""
    return x


def solve(solver: str, velocity, x: Tensor, sigmas, edit=keep) -> list[Step]:
    return list(SOLVERS[solver].steps(velocity, x, [float(one) for one in sigmas], edit))


def curved(x: Tensor, sigma: float) -> Tensor:
    """dx / dsigma = (1 + sigma) x: the logarithm changes by the integral of 1 + sigma."""
    return (1.0 + sigma) * x


def bent(x, sigma: float):
    """A velocity that is linear in nothing; Tensor or float."""
    sine = torch.sin if isinstance(x, Tensor) else math.sin
    return sine(3 * x) + sigma**2 * x - 0.4 * x * x


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_flow_is_exact_in_any_number_of_steps(solver: str, steps: int) -> None:
    noise, image = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    ran = solve(solver, lambda x, sigma: noise - image, noise, linear_sigmas(steps))
    assert len(ran) == steps
    torch.testing.assert_close(ran[-1].x, image, atol=2e-6, rtol=0)
    for step in ran:
        torch.testing.assert_close(step.denoised, image, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("heun", 2), ("dpm++ 2m", 2), ("res multistep", 2)]
)
def test_the_error_of_a_curved_flow_falls_with_the_solvers_order(solver: str, order: int) -> None:
    """In float64, from 1 to 0.2: the last step to 0, of first order, would hide the rest."""
    exact, errors = math.exp(-(0.8 + (1 - 0.2**2) / 2)), []
    for steps in (40, 80):
        sigmas = [1 - 0.8 * index / steps for index in range(steps + 1)]
        errors.append(abs(float(solve(solver, curved, ONE.double(), sigmas)[-1].x) - exact))
    assert errors[1] > 1e-9, "still above rounding"
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("heun", 2), ("dpm++ 2m", 2), ("res multistep", 2)]
)
def test_the_error_down_to_zero_falls_too(solver: str, order: int) -> None:
    """Evenly spaced levels end in one step to 0, so the order shows only in the size of errors."""
    errors = []
    for steps in (20, 40):
        end = solve(solver, curved, ONE, linear_sigmas(steps))[-1].x
        errors.append(abs(float(end) - math.exp(-1.5)))
    if solver in ("euler", "heun"):
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)
    else:
        assert errors[0] / errors[1] > 1.8


def dpm_solver_2m(x: float, sigmas: list[float]) -> list[float]:
    """Algorithm 2 of arXiv 2211.01095 as it is written, with alpha = 1 and lambda = -log sigma."""
    levels = [math.inf if t == 0 else -math.log(t) for t in sigmas]
    denoised: list[float] = []
    path = []
    for i in range(1, len(sigmas)):
        denoised.append(x - sigmas[i - 1] * bent(x, sigmas[i - 1]))  # x_theta at t_{i-1}
        h = levels[i] - levels[i - 1]
        data = denoised[-1]
        if i >= 2 and sigmas[i] > 0:
            r = (levels[i - 1] - levels[i - 2]) / h
            data = (1 + 1 / (2 * r)) * denoised[-1] - 1 / (2 * r) * denoised[-2]
        x = sigmas[i] / sigmas[i - 1] * x - (math.exp(-h) - 1) * data
        path.append(x)
    return path


def res_2m(x: float, sigmas: list[float]) -> list[float]:
    """The multistep of arXiv 2308.02157 from its own condition, not from its coefficients.

    Over a step of length h in lambda, x' = D - x is solved for the D that is a line through the
    last two evaluations: x(h) = e^-h x + integral of e^-(h-s) D(s) over 0..h, by quadrature.
    """
    path, before = [], None
    for begin, end in pairwise(sigmas):
        now = x - begin * bent(x, begin)
        if before is None or end == 0:
            x = end / begin * x + (1 - end / begin) * now
        else:
            h, back = math.log(begin / end), math.log(before[0] / begin)
            slope = (now - before[1]) / back
            x = math.exp(-h) * x + simpson(lambda s: math.exp(s - h) * (now + slope * s), h)  # noqa: B023
        before = (begin, now)
        path.append(x)
    return path


def simpson(function: Callable[[float], float], end: float, pieces: int = 400) -> float:
    step = end / pieces
    inner = sum((4 if i % 2 else 2) * function(i * step) for i in range(1, pieces))
    return step / 3 * (function(0.0) + inner + function(end))


@pytest.mark.parametrize(
    ("solver", "paper"), [("dpm++ 2m", dpm_solver_2m), ("res multistep", res_2m)]
)
@pytest.mark.parametrize("sigmas", [FROM_ONE, FROM_BELOW, STOPPING])
@pytest.mark.parametrize("x", [1.3, -0.7])
def test_a_multistep_solver_equals_its_papers_formulas(solver, paper, sigmas, x: float) -> None:
    found = solve(solver, bent, torch.full((1, 1, 1), x, dtype=torch.float64), sigmas)
    expected = paper(x, sigmas)
    assert [float(step.x) for step in found] == pytest.approx(expected, abs=1e-9)
    euler = solve("euler", bent, torch.full((1, 1, 1), x, dtype=torch.float64), sigmas)
    assert abs(float(euler[1].x) - expected[1]) > 1e-4, "the step before matters here"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("begin", [1.0, 0.6])
def test_one_step_is_an_euler_step(solver: str, begin: float) -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    (one,), (euler,) = (solve(name, bent, x, [begin, 0.0]) for name in (solver, "euler"))
    torch.testing.assert_close(one.x, euler.x, atol=2e-6, rtol=0)
    assert torch.equal(one.denoised, euler.denoised)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sigmas", [FROM_ONE, FROM_BELOW, STOPPING, [1.0, 0.0]])
def test_a_solver_asks_for_the_levels_it_names(solver: str, sigmas: list[float]) -> None:
    asked: list[float] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return bent(x, sigma)

    solve(solver, velocity, ONE, sigmas)
    named = SOLVERS[solver].asks(sigmas)
    assert set(asked) <= set(named)
    assert set(sigmas[:-1]) <= set(asked), "each step is asked for where it begins"
    assert 0.0 not in named


def test_heun_asks_at_both_ends_of_each_step_and_once_in_the_last() -> None:
    for solver, levels in (
        ("heun", [1.0, 0.5, 0.5, 0.25, 0.25]),
        ("euler", [1.0, 0.5, 0.25]),
        ("dpm++ 2m", [1.0, 0.5, 0.25]),
        ("res multistep", [1.0, 0.5, 0.25]),
    ):
        asked: list[float] = []

        def velocity(x: Tensor, sigma: float, asked=asked) -> Tensor:
            asked.append(sigma)
            return x

        solve(solver, velocity, ONE, [1.0, 0.5, 0.25, 0.0])
        assert asked == levels


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_say_where_they_are(solver: str) -> None:
    ran = solve(solver, curved, ONE, parse_sigmas("1, 0.5, 0.25, 0"))
    assert [step.index for step in ran] == [0, 1, 2]
    assert {step.steps for step in ran} == {3}
    assert [step.sigma for step in ran] == [1.0, 0.5, 0.25]
    assert [step.sigma_next for step in ran] == [0.5, 0.25, 0.0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_computes_nothing_before_it_is_asked(solver: str) -> None:
    calls: list[float] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return x

    steps = SOLVERS[solver].steps(velocity, ONE, FROM_ONE, keep)
    assert calls == []
    next(steps)
    assert len(calls) == (2 if solver == "heun" else 1)
    steps.close()
    assert len(calls) <= 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_edit_is_what_the_next_step_begins_from(solver: str) -> None:
    told: list[float] = []
    seen: list[tuple[float, float]] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        seen.append((sigma, float(x)))
        return bent(x, sigma)

    def edit(x: Tensor, sigma_next: float) -> Tensor:
        told.append(sigma_next)
        return torch.full_like(x, 100 * sigma_next)

    ran = solve(solver, velocity, ONE, FROM_ONE, edit)
    assert told == FROM_ONE[1:]
    assert [float(step.x) for step in ran] == pytest.approx([100 * one for one in FROM_ONE[1:]])
    begins = dict(seen)  # Heun's first look at a level is before the edit
    assert [begins[one] for one in FROM_ONE[1:-1]] == pytest.approx(
        [100 * one for one in FROM_ONE[1:-1]]
    )
