"""Guidance: which passes run at which step, and that both ways of running them agree."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import SettingError, ShapeError
from glassbox.flux_core.families import FLUX1_KONTEXT
from glassbox.flux_core.sampling.guidance import TrueCFG, guider, join
from glassbox.flux_core.sampling.noise import make_noise
from glassbox.flux_core.sampling.sigmas import linear_sigmas
from glassbox.flux_core.specs import TransformerSpec
from glassbox.flux_core.tokens.ids import place
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.values import Conditioning, TextFeatures, Tokens

TINY = TransformerSpec(
    hidden=32,
    double_blocks=2,
    single_blocks=2,
    mlp_ratio=4.0,
    in_channels=64,
    out_channels=64,
    context_width=48,
    pooled_width=24,
    has_guidance=True,
    axes_dim=(4, 6, 6),
    theta=10_000.0,
)


def picture(seed: int, *, batch: int = 1, size: int = 32, index: float = 1.0) -> Tokens:
    return place(make_noise(FLUX1_KONTEXT.latent, size, size, seed, batch), index=index)


def conditioning(seed: int, *references: Tokens, batch: int = 1, length: int = 5) -> Conditioning:
    draw = torch.Generator().manual_seed(seed)
    text = TextFeatures(
        txt=torch.randn(batch, length, 48, generator=draw),
        pooled=torch.randn(batch, 24, generator=draw),
    )
    return Conditioning(text=text, references=references, guidance=2.5)


class Passes:
    """A network whose velocity is its text's first number; it counts passes and their batch."""

    def __init__(self) -> None:
        self.family, self.spec = FLUX1_KONTEXT, TINY
        self.planned: list[Conditioning] = []
        self.ran: list[tuple[int, int]] = []  # (step, batch)

    def plans(self, conditionings: Sequence[Conditioning], target: Tokens, sigmas: Tensor):
        self.planned += conditionings
        return [_Pass(self, one) for one in conditionings]


class _Pass:
    def __init__(self, network: Passes, conditioning: Conditioning) -> None:
        self.network, self.conditioning = network, conditioning

    def velocity(self, x: Tensor, step: int) -> Tensor:
        self.network.ran.append((step, x.shape[0]))
        return self.conditioning.text.txt[:, :1, :1].expand(x.shape)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    network = build_flux(FLUX1_KONTEXT, TINY, dtype=torch.float32)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


NOISE = make_noise(FLUX1_KONTEXT.latent, 32, 32, 0)


def test_without_cfg_one_pass_runs_each_step() -> None:
    network = Passes()
    plan = guider(network, conditioning(1), NOISE, linear_sigmas(3))
    for step in range(3):
        plan.velocity(NOISE.values, step)
    assert network.ran == [(0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("passes", ["batched", "in turn"])
def test_cfg_of_one_or_less_plans_and_runs_the_positive_only(scale: float, passes: str) -> None:
    network, positive = Passes(), conditioning(1)
    cfg = TrueCFG(negative=conditioning(2), scale=scale, passes=passes)
    plan = guider(network, positive, NOISE, linear_sigmas(2), cfg)
    plan.velocity(NOISE.values, 0)
    assert network.planned == [positive]
    assert network.ran == [(0, 1)]


@pytest.mark.parametrize(
    ("passes", "ran"), [("batched", [(0, 2), (1, 2)]), ("in turn", [(0, 1)] * 2 + [(1, 1)] * 2)]
)
def test_cfg_above_one_runs_exactly_two_passes(passes: str, ran: list[tuple[int, int]]) -> None:
    network = Passes()
    cfg = TrueCFG(negative=conditioning(2), scale=4.0, passes=passes)
    plan = guider(network, conditioning(1), NOISE, linear_sigmas(2), cfg)
    for step in range(2):
        plan.velocity(NOISE.values, step)
    assert network.ran == ran


@pytest.mark.parametrize("passes", ["batched", "in turn"])
def test_the_velocity_moves_away_from_the_negative(passes: str) -> None:
    positive, negative = conditioning(1), conditioning(2)
    cfg = TrueCFG(negative=negative, scale=3.0, passes=passes)
    plan = guider(Passes(), positive, NOISE, linear_sigmas(1), cfg)
    pos, neg = (float(one.text.txt[0, 0, 0]) for one in (positive, negative))
    expected = torch.full_like(NOISE.values, neg + 3.0 * (pos - neg))
    torch.testing.assert_close(plan.velocity(NOISE.values, 0), expected)


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
    network = Passes()
    cfg = TrueCFG(negative=conditioning(2), scale=2.0, start=start, end=end, passes=passes)
    assert list(cfg.window(steps)) == inside
    plan = guider(network, conditioning(1), NOISE, linear_sigmas(steps), cfg)
    for step in range(steps):
        before = sum(batch for _, batch in network.ran)
        plan.velocity(NOISE.values, step)
        assert sum(batch for _, batch in network.ran) - before == (2 if step in inside else 1)


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
def test_batched_and_in_turn_agree_on_a_real_network(tiny, batch: int, shared: bool) -> None:
    noise = make_noise(FLUX1_KONTEXT.latent, 32, 48, 4, batch)
    reference, second = picture(1, batch=batch), picture(2, index=2.0)
    positive = conditioning(3, reference, second, batch=batch)
    negative = conditioning(4, reference if shared else picture(5), second)
    sigmas = linear_sigmas(3)
    outs = []
    for passes in ("batched", "in turn"):
        cfg = TrueCFG(negative=negative, scale=4.0, start=0.0, end=0.6, passes=passes)
        plan = guider(tiny, positive, noise, sigmas, cfg)
        with torch.no_grad():
            outs.append([plan.velocity(noise.values, step) for step in range(3)])
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert not torch.equal(outs[0][0], outs[0][2])


def test_references_reach_both_passes(tiny) -> None:
    """Taking the reference out of either conditioning changes the result."""
    reference = picture(1)
    both = conditioning(3, reference), conditioning(4, reference)
    bare = conditioning(3), conditioning(4)
    results = []
    for positive, negative in (both, (both[0], bare[1]), (bare[0], both[1])):
        cfg = TrueCFG(negative=negative, scale=4.0, passes="in turn")
        with torch.no_grad():
            results.append(
                guider(tiny, positive, NOISE, linear_sigmas(1), cfg).velocity(NOISE.values, 0)
            )
    assert float((results[0] - results[1]).abs().max()) > 1e-3
    assert float((results[0] - results[2]).abs().max()) > 1e-3


def test_batches_that_do_not_match_the_noise_are_named_before_stacking() -> None:
    with pytest.raises(ShapeError, match="reference has a batch of 2, the noise 3"):
        join(conditioning(1, picture(1, batch=2)), conditioning(2, picture(1)), batch=3)
    with pytest.raises(ShapeError, match="text has a batch of 2, the noise 1"):
        join(conditioning(1, batch=2), conditioning(2), batch=1)


def test_a_shared_reference_is_not_stored_twice() -> None:
    reference = picture(1)
    joined = join(conditioning(1, reference), conditioning(2, reference), batch=2)
    assert joined.references[0].values is reference.values
    assert joined.text.txt.shape[0] == 4


@pytest.mark.parametrize(
    ("negative", "error", "words"),
    [
        (conditioning(2, picture(1), length=7), ShapeError, "5 tokens, the negative 7"),
        (conditioning(2), ShapeError, "1 references, the negative 0"),
        (conditioning(2, picture(1, size=64)), ShapeError, "2x2 tokens in the positive and 4x4"),
        (conditioning(2, picture(1, index=2.0)), ShapeError, "at another place"),
        (replace(conditioning(2, picture(1)), guidance=4.0), SettingError, "2.5 .* and 4.0"),
    ],
)
def test_what_no_batch_can_hold_runs_in_turn_and_the_error_says_so(
    tiny, negative: Conditioning, error: type[Exception], words: str
) -> None:
    positive = conditioning(1, picture(1))
    with pytest.raises(error, match=words) as caught:
        guider(tiny, positive, NOISE, linear_sigmas(1), TrueCFG(negative=negative, scale=2.0))
    assert "set passes to 'in turn'" in str(caught.value)
    cfg = TrueCFG(negative=negative, scale=2.0, passes="in turn")
    with torch.no_grad():
        out = guider(tiny, positive, NOISE, linear_sigmas(1), cfg).velocity(NOISE.values, 0)
    assert bool(torch.isfinite(out).all())
