"""Solvers on velocities whose path is known."""

import math

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.sampling.sigmas import linear_sigmas, parse_sigmas
from glassbox.flux_core.sampling.solvers import SOLVERS, Step, euler, heun


def curved(sigmas: Tensor):
    """dx / dsigma = (1 + sigma) x."""

    def velocity(x: Tensor, step: int) -> Tensor:
        return (1.0 + float(sigmas[step])) * x

    return velocity


def exact(x: Tensor) -> Tensor:
    """x(0) from x(1): the logarithm changes by the integral of 1 + sigma over 0..1."""
    return x * math.exp(-1.5)


def run(solver: str, velocity, x: Tensor, sigmas: Tensor) -> list[Step]:
    return list(SOLVERS[solver](velocity, x, sigmas))


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_flow_is_exact_in_any_number_of_steps(solver: str, steps: int) -> None:
    noise, picture = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    ran = run(solver, lambda x, step: noise - picture, noise, linear_sigmas(steps))
    assert len(ran) == steps
    torch.testing.assert_close(ran[-1].x, picture, atol=1e-6, rtol=0)
    for step in ran:
        torch.testing.assert_close(step.denoised, picture, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_of_a_curved_flow_falls_with_the_solvers_order(solver: str, order: int) -> None:
    x, errors = torch.ones(1, 1, 1), []
    for steps in (20, 40):
        sigmas = linear_sigmas(steps)
        end = run(solver, curved(sigmas), x, sigmas)[-1].x
        errors.append(float((end - exact(x)).abs()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_heun_asks_at_both_ends_of_each_step_and_once_in_the_last() -> None:
    asked: list[int] = []

    def velocity(x: Tensor, step: int) -> Tensor:
        asked.append(step)
        return x

    run("heun", velocity, torch.ones(1, 1, 1), linear_sigmas(3))
    assert asked == [0, 1, 1, 2, 2]
    asked.clear()
    run("euler", velocity, torch.ones(1, 1, 1), linear_sigmas(3))
    assert asked == [0, 1, 2]


def test_steps_say_where_they_are() -> None:
    ran = run("euler", lambda x, step: x, torch.ones(1, 1, 1), parse_sigmas("1, 0.5, 0.25, 0"))
    assert [step.index for step in ran] == [0, 1, 2]
    assert {step.steps for step in ran} == {3}
    assert [step.sigma for step in ran] == [1.0, 0.5, 0.25]
    assert [step.sigma_next for step in ran] == [0.5, 0.25, 0.0]


@pytest.mark.parametrize("solver", [euler, heun])
def test_a_solver_computes_nothing_before_it_is_asked(solver) -> None:
    calls: list[int] = []

    def velocity(x: Tensor, step: int) -> Tensor:
        calls.append(step)
        return x

    steps = solver(velocity, torch.ones(1, 1, 1), linear_sigmas(5))
    assert calls == []
    next(steps)
    assert len(calls) == (1 if solver is euler else 2)
    steps.close()
    assert len(calls) <= 2


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_state_stays_float32_when_the_network_computes_in_bfloat16(solver: str) -> None:
    ran = run(solver, lambda x, step: x.bfloat16(), torch.ones(1, 2, 2).half(), linear_sigmas(3))
    assert {step.x.dtype for step in ran} == {torch.float32}
    assert {step.denoised.dtype for step in ran} == {torch.float32}
