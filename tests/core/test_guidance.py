"""Guidance: which passes run at which step, and that both ways of running them agree."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import GlassboxError, SettingError, ShapeError
from glassbox.flux_core.families import FLUX1_KONTEXT
from glassbox.flux_core.sampling.guidance import Guided, TrueCFG, guided, join
from glassbox.flux_core.sampling.sigmas import linear_sigmas
from glassbox.flux_core.values import Conditioning, Reference
from glassbox.tests.core import tiny_flux1 as tiny
from glassbox.tests.core.tiny_flux1 import conditioning, picture

NOISE = tiny.noise(width=32)


def levels(steps: int) -> list[float]:
    return [float(sigma) for sigma in linear_sigmas(steps)]


def plan(network, one: Conditioning, steps: int, cfg: TrueCFG | None = None) -> Guided:
    return guided(network, one, NOISE, levels(steps), cfg=cfg)


class Passes:
    """A network whose velocity is its text's first number; it counts passes and their batch."""

    family, spec, supports = FLUX1_KONTEXT, tiny.SPEC, frozenset[str]()

    def __init__(self, steps: int) -> None:
        self.levels = levels(steps)
        self.planned: list[Conditioning] = []
        self.ran: list[tuple[int, int]] = []  # (step, batch)

    def plans(self, conditionings: Sequence[Conditioning], target, sigmas, asked=None):
        self.planned += conditionings
        return [_Pass(self, one) for one in conditionings]


class _Pass:
    device = torch.device("cpu")

    def __init__(self, network: Passes, conditioning: Conditioning) -> None:
        self.network, self.conditioning = network, conditioning

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        self.network.ran.append((self.network.levels.index(sigma), x.shape[0]))
        return self.conditioning.text.txt[:, :1, :1].expand(x.shape)


@pytest.fixture(scope="module")
def network():
    return tiny.network()


def test_without_cfg_one_pass_runs_each_step() -> None:
    net = Passes(3)
    one = plan(net, conditioning(1), 3)
    for sigma in net.levels[:-1]:
        one.velocity(NOISE.values, sigma)
    assert net.ran == [(0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("passes", ["batched", "in turn"])
def test_cfg_of_one_or_less_plans_and_runs_the_positive_only(scale: float, passes: str) -> None:
    net, positive = Passes(2), conditioning(1)
    cfg = TrueCFG(negative=conditioning(2), scale=scale, passes=passes)
    plan(net, positive, 2, cfg).velocity(NOISE.values, 1.0)
    assert net.planned == [positive]
    assert net.ran == [(0, 1)]


@pytest.mark.parametrize(
    ("passes", "ran"), [("batched", [(0, 2), (1, 2)]), ("in turn", [(0, 1)] * 2 + [(1, 1)] * 2)]
)
def test_cfg_above_one_runs_exactly_two_passes(passes: str, ran: list[tuple[int, int]]) -> None:
    net = Passes(2)
    cfg = TrueCFG(negative=conditioning(2), scale=4.0, passes=passes)
    one = plan(net, conditioning(1), 2, cfg)
    for sigma in net.levels[:-1]:
        one.velocity(NOISE.values, sigma)
    assert net.ran == ran


@pytest.mark.parametrize("passes", ["batched", "in turn"])
def test_the_velocity_moves_away_from_the_negative(passes: str) -> None:
    positive, negative = conditioning(1), conditioning(2)
    cfg = TrueCFG(negative=negative, scale=3.0, passes=passes)
    one = plan(Passes(1), positive, 1, cfg)
    pos, neg = (float(each.text.txt[0, 0, 0]) for each in (positive, negative))
    expected = torch.full_like(NOISE.values, neg + 3.0 * (pos - neg))
    torch.testing.assert_close(one.velocity(NOISE.values, 1.0), expected)
    seen = one.passes(NOISE.values, 1.0)
    assert [float(each[0, 0, 0]) for each in seen] == [pos, neg]
    assert torch.equal(one.combine(*seen), one.velocity(NOISE.values, 1.0))


@pytest.mark.parametrize(
    ("start", "end", "steps", "inside"),
    [
        (0.0, 1.0, 4, [0, 1, 2, 3]),
        (0.0, 0.5, 4, [0, 1]),
        (0.5, 1.0, 4, [2, 3]),
        (0.25, 0.75, 8, [2, 3, 4, 5]),
        (0.7, 1.0, 10, [7, 8, 9]),  # 0.7 * 10 is 7.000000000000001
        (0.1, 0.3, 10, [1, 2]),
        (0.0, 0.3, 4, [0, 1]),
        (0.3, 1.0, 4, [2, 3]),
        (0.5, 0.5, 4, []),
        (0.0, 0.0, 4, []),
        (1.0, 1.0, 4, []),
    ],
)
@pytest.mark.parametrize("passes", ["batched", "in turn"])
def test_the_window_holds_the_steps_between_its_fractions(
    start: float, end: float, steps: int, inside: list[int], passes: str
) -> None:
    net = Passes(steps)
    cfg = TrueCFG(negative=conditioning(2), scale=2.0, start=start, end=end, passes=passes)
    assert list(cfg.window(steps)) == inside
    one = plan(net, conditioning(1), steps, cfg)
    for step, sigma in enumerate(net.levels[:-1]):
        before = sum(batch for _, batch in net.ran)
        one.velocity(NOISE.values, sigma)
        assert sum(batch for _, batch in net.ran) - before == (2 if step in inside else 1)


def test_a_level_inside_a_step_belongs_to_it() -> None:
    """A solver may ask between two steps; the window ends where a step begins, not before."""
    net = tiny.Constant(NOISE.values)
    cfg = TrueCFG(negative=conditioning(2), scale=2.0, start=0.25, end=0.5, passes="in turn")
    one = plan(net, conditioning(1), 4, cfg)  # both in step 1 alone: from 0.75 to 0.5
    ran = {sigma: one.passes(NOISE.values, sigma)[1] is not None for sigma in (0.76, 0.75, 0.6)}
    ran |= {sigma: one.passes(NOISE.values, sigma)[1] is not None for sigma in (0.51, 0.5, 0.1)}
    assert ran == {0.76: False, 0.75: True, 0.6: True, 0.51: True, 0.5: False, 0.1: False}


def test_a_reversed_window_or_a_number_out_of_range_is_refused() -> None:
    negative = conditioning(2)
    with pytest.raises(SettingError, match=r"reversed: start 0\.8 is after end 0\.2"):
        TrueCFG(negative=negative, scale=2.0, start=0.8, end=0.2)
    for start, end in ((-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)):
        with pytest.raises(SettingError, match=r"0\.\.1"):
            TrueCFG(negative=negative, scale=2.0, start=start, end=end)
    with pytest.raises(SettingError, match="cfg is nan"):
        TrueCFG(negative=negative, scale=float("nan"))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_batched_and_in_turn_agree_on_a_real_network(network, batch: int, shared: bool) -> None:
    noise, sigmas = tiny.noise(4, batch=batch), levels(3)
    reference, second = picture(1, batch=batch), picture(2, index=2.0)
    positive = conditioning(3, reference, second, batch=batch)
    negative = conditioning(4, reference if shared else picture(5), second)
    outs = []
    for passes in ("batched", "in turn"):
        cfg = TrueCFG(negative=negative, scale=4.0, start=0.0, end=0.6, passes=passes)
        with torch.no_grad():
            one = guided(network, positive, noise, sigmas, cfg=cfg)
            outs.append([one.velocity(noise.values, sigma) for sigma in sigmas[:-1]])
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert not torch.equal(outs[0][0], outs[0][2])


def test_references_reach_both_passes(network) -> None:
    """Taking the reference out of either conditioning changes the result."""
    reference = picture(1)
    both = conditioning(3, reference), conditioning(4, reference)
    bare = conditioning(3), conditioning(4)
    results = []
    for positive, negative in (both, (both[0], bare[1]), (bare[0], both[1])):
        cfg = TrueCFG(negative=negative, scale=4.0, passes="in turn")
        with torch.no_grad():
            results.append(plan(network, positive, 1, cfg).velocity(NOISE.values, 1.0))
    assert float((results[0] - results[1]).abs().max()) > 1e-3
    assert float((results[0] - results[2]).abs().max()) > 1e-3


def test_a_shared_reference_is_not_stored_twice() -> None:
    reference = picture(1)
    joined = join(conditioning(1, reference), conditioning(2, reference), batch=2)
    assert joined.references[0].tokens.values is reference.values
    assert joined.text.txt.shape[0] == 4


def seen_weaker(one: Conditioning) -> Conditioning:
    tokens = one.references[0].tokens
    return replace(one, references=(Reference(tokens=tokens, strength=0.5),))


@pytest.mark.parametrize(
    ("negative", "error", "words"),
    [
        (conditioning(2, picture(1), length=7), ShapeError, "5 tokens, the negative 7"),
        (conditioning(2), ShapeError, "1 references, the negative 0"),
        (conditioning(2, picture(1, size=64)), ShapeError, "2 x 2 tokens in .* 4 x 4 in"),
        (conditioning(2, picture(1, index=2.0)), ShapeError, "other position ids"),
        (conditioning(2, picture(1), guidance=4.0), SettingError, "2.5 .* and 4.0"),
        (seen_weaker(conditioning(2, picture(1))), SettingError, "seen in another way"),
    ],
)
def test_what_no_batch_can_hold_runs_in_turn_and_the_error_says_so(
    network, negative: Conditioning, error: type[GlassboxError], words: str
) -> None:
    positive = conditioning(1, picture(1))
    with pytest.raises(error, match=words) as caught:
        plan(network, positive, 1, TrueCFG(negative=negative, scale=2.0))
    assert caught.value.settings[-1] == "passes"
    cfg = TrueCFG(negative=negative, scale=2.0, passes="in turn")
    with torch.no_grad():
        out = plan(network, positive, 1, cfg).velocity(NOISE.values, 1.0)
    assert bool(torch.isfinite(out).all())
