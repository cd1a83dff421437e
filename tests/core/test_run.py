"""The one way to sample: references never move, edits are seen, a start is mixed in."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import NonFiniteError
from glassbox.flux_core.families import FLUX1_KONTEXT
from glassbox.flux_core.sampling.guidance import TrueCFG
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.run import finish, run
from glassbox.flux_core.sampling.sigmas import linear_sigmas, parse_sigmas
from glassbox.flux_core.sampling.solvers import SOLVERS
from glassbox.tests.core import tiny_flux1 as tiny

NOISE = tiny.noise()
FEW = parse_sigmas("1, 0.8, 0.5, 0.2, 0")
SPEC = FLUX1_KONTEXT.latent


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("passes", [None, "batched", "in turn"])
def test_references_and_text_never_change_during_a_run(solver: str, passes: str | None) -> None:
    """A mature tool concatenated references once and integrated them, so they drifted each step."""
    references = (tiny.picture(1), tiny.picture(2, size=48))
    positive, negative = (tiny.conditioning(seed, *references) for seed in (3, 4))
    inputs = [positive.text.txt, positive.text.pooled, *(one.values for one in references)]
    before = [tensor.clone() for tensor in inputs]
    recording = tiny.Recording(tiny.network())
    cfg = None if passes is None else TrueCFG(negative=negative, scale=3.0, end=0.5, passes=passes)
    job = Job(conditioning=positive, noise=NOISE, sigmas=FEW, cfg=cfg, solver=solver)
    xs = [NOISE.values]
    for step in run(recording, job):
        xs.append(step.x)
        for plan, held in zip(recording.plans_made, recording.held_at_first, strict=True):
            assert all(map(torch.equal, tiny.everything(plan), held))
    assert all(map(torch.equal, inputs, before))
    assert {x.shape[1] for _, x in recording.seen} == {NOISE.count}
    assert all(not torch.equal(one, other) for one, other in pairwise(xs))
    if passes is None and solver != "heun":
        assert all(map(torch.equal, [x for _, x in recording.seen], xs[:-1]))
    for one in recording.conditionings:
        for given, reached in zip(references, one.references, strict=True):
            assert torch.equal(reached.tokens.values[:1], given.values)
            assert torch.equal(reached.tokens.ids, given.ids)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("passes", [None, "batched", "in turn"])
def test_no_step_needs_a_modulation_that_was_not_announced(solver: str, passes: str | None) -> None:
    """Otherwise the modulation's weights would be loaded once more in the middle of a run."""
    recording, negative = tiny.Recording(tiny.network()), tiny.conditioning(4)
    cfg = None if passes is None else TrueCFG(negative=negative, scale=3.0, end=0.5, passes=passes)
    one = tiny.conditioning(3)
    tiny.steps(recording, one, NOISE, FEW, cfg=cfg, solver=solver)
    assert {sigma for sigma, _ in recording.seen} == set(recording.planned)
    for plan, held in zip(recording.plans_made, recording.held_at_first, strict=True):
        assert len(tiny.everything(plan)) == len(held), "nothing was added to the plan"


def test_the_result_is_unscaled_and_lies_on_the_targets_grid() -> None:
    x = tiny.last(tiny.network(), tiny.conditioning(1), NOISE, linear_sigmas(3))
    tokens = finish(x, NOISE)
    torch.testing.assert_close((tokens.values - SPEC.shift) * SPEC.scale, x)
    assert tokens.ids is NOISE.ids
    assert tokens.grid == NOISE.grid
    assert tokens.latent is SPEC
    assert not tokens.is_noise


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_equals_its_single_runs(solver: str) -> None:
    net, noise, references = tiny.network(), tiny.noise(6, batch=3), tiny.picture(2, batch=3)
    whole = tiny.last(net, tiny.conditioning(1, references), noise, FEW, solver=solver)
    for number in range(3):
        one = slice(number, number + 1)
        own = tiny.conditioning(1, replace(references, values=references.values[one]))
        target = replace(noise, values=noise.values[one])
        alone = tiny.last(net, own, target, FEW, solver=solver)
        torch.testing.assert_close(alone, whole[one], atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_image_and_a_run_can_be_run_again() -> None:
    net = tiny.network()
    job = Job(conditioning=tiny.conditioning(1, tiny.picture(2)), noise=NOISE, sigmas=FEW)
    first = run(net, job)
    ran = [[step.x for step in one] for one in (first, first, run(net, job))]
    assert all(map(torch.equal, ran[0], ran[1]))
    assert all(map(torch.equal, ran[0], ran[2]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_state_stays_float32_when_the_network_computes_in_bfloat16(solver: str) -> None:
    noise = replace(NOISE, values=NOISE.values.half())
    net = tiny.network().to(torch.bfloat16)
    ran = tiny.steps(net, tiny.conditioning(1), noise, FEW, solver=solver)
    assert {tensor.dtype for step in ran for tensor in (step.x, step.denoised)} == {torch.float32}


def test_nothing_runs_before_a_step_is_asked_for_and_no_gradient_is_kept() -> None:
    recording = tiny.Recording(tiny.network())
    job = Job(conditioning=tiny.conditioning(1), noise=NOISE, sigmas=linear_sigmas(5))
    steps = iter(run(recording, job))
    assert recording.seen == []
    step = next(steps)
    assert len(recording.seen) == 1
    assert not step.x.requires_grad
    assert torch.is_grad_enabled()
    steps.close()
    assert len(recording.seen) == 1


def test_a_start_below_sigma_one_mixes_the_noise_with_the_image() -> None:
    """The true velocity at the mixture leads exactly back to the image."""
    start = tiny.noise(8)
    net = tiny.Constant(NOISE.values - (start.values - SPEC.shift) * SPEC.scale)
    sigmas = parse_sigmas("0.6, 0.3, 0")
    x = tiny.last(net, tiny.conditioning(1), NOISE, sigmas, start=start)
    torch.testing.assert_close(finish(x, NOISE).values, start.values, atol=1e-5, rtol=0)
    without = tiny.last(tiny.Constant(NOISE.values), tiny.conditioning(1), NOISE, sigmas)
    torch.testing.assert_close(without, torch.zeros_like(without), atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_edits_are_done_in_order_and_the_next_step_sees_their_result(solver: str) -> None:
    done: list[tuple[str, float]] = []

    def half(x: Tensor, sigma_next: float) -> Tensor:
        done.append(("half", sigma_next))
        return x / 2

    def raise_it(x: Tensor, sigma_next: float) -> Tensor:
        done.append(("raise", sigma_next))
        return x + 1 + sigma_next

    recording = tiny.Recording(tiny.network())
    one, edits = tiny.conditioning(1), (half, raise_it)
    ran = tiny.steps(recording, one, NOISE, FEW, solver=solver, edits=edits)
    levels = [float(sigma) for sigma in FEW]
    assert done == [(name, sigma) for sigma in levels[1:] for name in ("half", "raise")]
    begins = [x for sigma, x in _first_of_each_level(recording.seen)]
    assert all(map(torch.equal, begins, [NOISE.values, *(step.x for step in ran[:-1])]))

    plain = tiny.steps(tiny.network(), one, NOISE, FEW, solver=solver)
    expected = plain[0].x / 2 + 1 + levels[1]
    assert torch.equal(ran[0].x, expected)
    assert torch.equal(ran[0].denoised, plain[0].denoised), "seen from before the edits"
    assert not torch.equal(ran[1].denoised, plain[1].denoised)


def _first_of_each_level(seen: Sequence[tuple[float, Tensor]]) -> list[tuple[float, Tensor]]:
    """Where each step begins: Heun looks at its end first, so the last call of a level counts."""
    return list({sigma: (sigma, x) for sigma, x in seen}.values())


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_edit_that_pins_tokens_holds_them_in_every_step(solver: str) -> None:
    """As a mask does: what is outside it goes back to the start, noised to the next level."""
    keep = torch.arange(NOISE.count) < 3
    start = SPEC.to_network(tiny.picture(5, size=32).values[:, :1])

    def pin(x: Tensor, sigma_next: float) -> Tensor:
        known = (1 - sigma_next) * start + sigma_next * NOISE.values
        return torch.where(keep[None, :, None], known, x)

    one = tiny.conditioning(1)
    ran = tiny.steps(tiny.network(), one, NOISE, FEW, solver=solver, edits=(pin,))
    free = tiny.last(tiny.network(), one, NOISE, FEW, solver=solver)
    assert torch.equal(ran[-1].x[:, keep], start.expand(1, 3, -1))
    assert float((ran[-1].x[:, ~keep] - free[:, ~keep]).abs().max()) > 1e-3, "the rest sees it"


def test_a_run_may_stop_above_zero_where_it_is_told_so() -> None:
    one, sigmas = tiny.conditioning(1), parse_sigmas("1, 0.7, 0.4, 0")
    whole = tiny.steps(tiny.network(), one, NOISE, sigmas)
    job = Job(conditioning=one, noise=NOISE, sigmas=sigmas[:3])
    (*_, stopped) = run(tiny.network(), job, may_stop=True)
    assert stopped.sigma_next == pytest.approx(0.4)
    assert torch.equal(stopped.x, whole[1].x)


def test_nan_made_by_the_network_is_reported_not_decoded() -> None:
    net = tiny.Constant(NOISE.values * float("inf"))
    x = tiny.last(net, tiny.conditioning(1), NOISE, linear_sigmas(2))
    with pytest.raises(NonFiniteError, match="bfloat16") as caught:
        finish(x, NOISE)
    assert caught.value.settings == ("model dtype",)
