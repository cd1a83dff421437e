"""The one way to sample: what it checks, what it says, and that references never move."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import (
    FamilyMismatchError,
    NonFiniteError,
    SettingError,
    ShapeError,
)
from glassbox.flux_core.families import FLUX1_DEV, FLUX1_KONTEXT, FLUX1_SCHNELL, NANO_FLUX1_LATENT
from glassbox.flux_core.sampling.denoise import denoise, finish, sampling_notes
from glassbox.flux_core.sampling.guidance import TrueCFG
from glassbox.flux_core.sampling.noise import make_noise
from glassbox.flux_core.sampling.sigmas import linear_sigmas, parse_sigmas
from glassbox.flux_core.sampling.solvers import Step
from glassbox.flux_core.specs import FluxFamily, TransformerSpec
from glassbox.flux_core.tokens.ids import place
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.values import Conditioning, TextFeatures, Tokens

TINY = TransformerSpec(
    hidden=32,
    double_blocks=1,
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
NOISE = make_noise(FLUX1_KONTEXT.latent, 32, 48, 0)


def tiny(family: FluxFamily = FLUX1_KONTEXT, spec: TransformerSpec = TINY):
    torch.manual_seed(0)
    network = build_flux(family, spec, dtype=torch.float32)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def picture(seed: int, *, batch: int = 1, size: int = 32) -> Tokens:
    values = make_noise(FLUX1_KONTEXT.latent, size, size, seed, batch)
    return place(replace(values, is_noise=False), index=1.0)


def conditioning(seed: int, *references: Tokens, batch: int = 1) -> Conditioning:
    draw = torch.Generator().manual_seed(seed)
    text = TextFeatures(
        txt=torch.randn(batch, 5, 48, generator=draw), pooled=torch.randn(batch, 24, generator=draw)
    )
    return Conditioning(text=text, references=references, guidance=2.5)


def last(steps) -> Step:
    *_, step = steps
    return step


def everything(plan) -> list[Tensor]:
    """Copy every tensor a plan holds: text, references, rotations, modulation; not the weights."""
    held = [tensor.clone() for tensor in _tensors(plan)]
    assert len(held) > 4
    return held


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for one in value for tensor in _tensors(one)]
    names = getattr(value, "__dataclass_fields__", None) or ()
    return [tensor for name in names for tensor in _tensors(getattr(value, name))]


class Recording:
    """The real network; it remembers its plans, what they held at first, and each x."""

    def __init__(self, network) -> None:
        self.network, self.family, self.spec = network, network.family, network.spec
        self.conditionings: list[Conditioning] = []
        self.plans_made: list = []
        self.held_at_first: list[list[Tensor]] = []
        self.seen: list[tuple[int, Tensor]] = []

    def plans(self, conditionings: Sequence[Conditioning], target: Tokens, sigmas: Tensor):
        self.conditionings += conditionings
        made = self.network.plans(conditionings, target, sigmas)
        self.plans_made += made
        self.held_at_first += [everything(plan) for plan in made]
        return [_Recorded(self, plan) for plan in made]


class _Recorded:
    def __init__(self, recording: Recording, plan) -> None:
        self.recording, self.plan = recording, plan

    def velocity(self, x: Tensor, step: int) -> Tensor:
        self.recording.seen.append((step, x.clone()))
        return self.plan.velocity(x, step)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("passes", [None, "batched", "in turn"])
def test_references_and_text_never_change_during_denoising(solver: str, passes: str | None) -> None:
    """A mature tool concatenated references once and integrated them, so they drifted each step."""
    references = (picture(1), picture(2, size=48))
    positive, negative = conditioning(3, *references), conditioning(4, *references)
    inputs = [positive.text.txt, positive.text.pooled, *(one.values for one in references)]
    before = [tensor.clone() for tensor in inputs]
    recording = Recording(tiny())
    cfg = passes and TrueCFG(negative=negative, scale=3.0, end=0.5, passes=passes)
    steps = denoise(recording, positive, NOISE, linear_sigmas(4), cfg=cfg or None, solver=solver)
    xs = [NOISE.values]
    for step in steps:
        xs.append(step.x)
        for plan, held in zip(recording.plans_made, recording.held_at_first, strict=True):
            assert all(map(torch.equal, everything(plan), held))
    assert all(map(torch.equal, inputs, before))
    count = NOISE.values.shape[1]
    assert {x.shape[1] for _, x in recording.seen} == {count}
    assert all(not torch.equal(one, other) for one, other in pairwise(xs))
    if passes is None and solver == "euler":
        assert all(map(torch.equal, [x for _, x in recording.seen], xs[:-1]))
    for one in recording.conditionings:
        for given, reached in zip(references, one.references, strict=True):
            assert torch.equal(reached.values[:1], given.values)
            assert torch.equal(reached.ids, given.ids)


def test_the_result_is_unscaled_and_lies_on_the_targets_grid() -> None:
    step = last(denoise(tiny(), conditioning(1), NOISE, linear_sigmas(3)))
    tokens = finish(step.x, NOISE)
    spec = FLUX1_KONTEXT.latent
    torch.testing.assert_close((tokens.values - spec.shift) * spec.scale, step.x)
    assert tokens.ids is NOISE.ids
    assert tokens.grid == NOISE.grid
    assert tokens.latent is spec


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_batch_equals_its_single_runs(solver: str) -> None:
    noise = make_noise(FLUX1_KONTEXT.latent, 32, 48, 6, 3)
    references = picture(2, batch=3)
    whole = last(denoise(tiny(), conditioning(1, references), noise, linear_sigmas(3)))
    for number in range(3):
        one = slice(number, number + 1)
        alone = last(
            denoise(
                tiny(),
                conditioning(1, replace(references, values=references.values[one])),
                replace(noise, values=noise.values[one]),
                linear_sigmas(3),
            )
        )
        torch.testing.assert_close(alone.x, whole.x[one], atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_picture() -> None:
    network = tiny()
    first, second = (
        last(denoise(network, conditioning(1, picture(2)), NOISE, linear_sigmas(3)))
        for _ in range(2)
    )
    assert torch.equal(first.x, second.x)


def test_nothing_runs_before_a_step_is_asked_for_and_no_gradient_is_kept() -> None:
    recording = Recording(tiny())
    steps = denoise(recording, conditioning(1), NOISE, linear_sigmas(5))
    assert recording.seen == []
    step = next(iter(steps))
    assert len(recording.seen) == 1
    assert not step.x.requires_grad
    assert torch.is_grad_enabled()
    steps.close()
    assert len(recording.seen) == 1


class Straight:
    """A network that always points from one picture to the noise it was given."""

    family, spec = FLUX1_KONTEXT, TINY

    def __init__(self, velocity: Tensor) -> None:
        self.constant = velocity

    def plans(self, conditionings: Sequence[Conditioning], target: Tokens, sigmas: Tensor):
        return [self]

    def velocity(self, x: Tensor, step: int) -> Tensor:
        return self.constant


def test_a_start_below_sigma_one_mixes_the_noise_with_the_picture() -> None:
    """The true velocity at the mixture leads exactly back to the picture."""
    start, spec = make_noise(FLUX1_KONTEXT.latent, 32, 48, 8), FLUX1_KONTEXT.latent
    scaled = (start.values - spec.shift) * spec.scale
    network = Straight(NOISE.values - scaled)
    sigmas = parse_sigmas("0.6, 0.3, 0")
    tokens = finish(last(denoise(network, conditioning(1), NOISE, sigmas, start=start)).x, NOISE)
    torch.testing.assert_close(tokens.values, start.values, atol=1e-5, rtol=0)
    without = last(denoise(Straight(NOISE.values), conditioning(1), NOISE, sigmas)).x
    torch.testing.assert_close(without, torch.zeros_like(without), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("noise", "The noise input holds"),
        ("start", "The start picture input holds"),
        ("text", "The text input holds"),
        ("pooled", "The pooled text input holds"),
        ("reference", "The reference 2 input holds"),
        ("negative", "The reference 1 of the negative conditioning input holds"),
    ],
)
def test_nan_is_refused_and_its_input_named(part: str, name: str) -> None:
    nan = float("nan")
    good, bad = picture(1), replace(picture(2), values=picture(2).values * nan)
    one, noise, start, cfg = conditioning(1, good), NOISE, None, None
    if part == "noise":
        noise = replace(noise, values=noise.values * nan)
    elif part == "start":
        start = replace(noise, values=noise.values * nan)
    elif part == "text":
        one = replace(one, text=replace(one.text, txt=one.text.txt * nan))
    elif part == "pooled":
        one = replace(one, text=replace(one.text, pooled=one.text.pooled * float("inf")))
    elif part == "reference":
        one = replace(one, references=(good, bad))
    else:
        cfg = TrueCFG(negative=conditioning(1, bad), scale=2.0)
    with pytest.raises(NonFiniteError, match=name):
        denoise(tiny(), one, noise, linear_sigmas(2), cfg=cfg, start=start)


def test_nan_made_by_the_network_is_reported_not_decoded() -> None:
    network = Straight(NOISE.values * float("inf"))
    step = last(denoise(network, conditioning(1), NOISE, linear_sigmas(2)))
    with pytest.raises(NonFiniteError, match="bfloat16"):
        finish(step.x, NOISE)


def test_parts_of_another_family_are_refused() -> None:
    other = replace(NOISE, latent=NANO_FLUX1_LATENT)
    with pytest.raises(FamilyMismatchError, match=r"noise input holds FLUX\.1 nano tokens"):
        denoise(tiny(), conditioning(1), other, linear_sigmas(2))
    with pytest.raises(FamilyMismatchError, match=r"start picture input holds FLUX\.1 nano tokens"):
        denoise(tiny(), conditioning(1), NOISE, linear_sigmas(2), start=other)
    reference = replace(picture(1), latent=NANO_FLUX1_LATENT)
    with pytest.raises(FamilyMismatchError, match="Reference 1"):
        denoise(tiny(), conditioning(1, reference), NOISE, linear_sigmas(2))


def test_batches_and_sizes_that_do_not_go_together_are_refused() -> None:
    noise = make_noise(FLUX1_KONTEXT.latent, 32, 48, 6, 3)
    with pytest.raises(ShapeError, match=r"batch of 2.* 3"):
        denoise(tiny(), conditioning(1, picture(1, batch=2)), noise, linear_sigmas(2))
    with pytest.raises(ShapeError, match=r"start picture is 32x32, the noise 48x32"):
        denoise(tiny(), conditioning(1), noise, linear_sigmas(2), start=picture(1))
    start = make_noise(FLUX1_KONTEXT.latent, 32, 48, 6, 2)
    with pytest.raises(ShapeError, match="start picture has a batch of 2, the noise 3"):
        denoise(tiny(), conditioning(1), noise, linear_sigmas(2), start=start)


def test_sigmas_and_solvers_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(SettingError, match=r"end in 0\.5"):
        denoise(tiny(), conditioning(1), NOISE, torch.tensor([1.0, 0.5]))
    with pytest.raises(SettingError, match="euler or heun"):
        denoise(tiny(), conditioning(1), NOISE, linear_sigmas(2), solver="dpm")


def test_guidance_on_a_family_without_it_is_said_to_be_ignored(caplog) -> None:
    spec = replace(TINY, has_guidance=False)
    network = tiny(FLUX1_SCHNELL, spec)
    words = "guidance 2.5 is ignored: FLUX.1 [schnell] has no guidance input."
    assert sampling_notes(network, conditioning(1), steps=4) == (words,)
    with caplog.at_level(logging.WARNING):
        ignored = last(denoise(network, conditioning(1), NOISE, linear_sigmas(2)))
    assert words in caplog.text
    without = replace(conditioning(1), guidance=None)
    assert sampling_notes(network, without, steps=4) == ()
    assert torch.equal(last(denoise(network, without, NOISE, linear_sigmas(2))).x, ignored.x)


def test_ignored_guidance_may_differ_between_the_two_passes() -> None:
    network = tiny(FLUX1_SCHNELL, replace(TINY, has_guidance=False))
    cfg = TrueCFG(negative=replace(conditioning(2), guidance=7.0), scale=2.0)
    last(denoise(network, conditioning(1), NOISE, linear_sigmas(1), cfg=cfg))


def test_no_guidance_means_the_familys_default_and_a_note() -> None:
    network, without = tiny(), replace(conditioning(1), guidance=None)
    assert sampling_notes(network, without, steps=4) == (
        "guidance is 2.5, the default of FLUX.1 Kontext [dev].",
    )
    ran, default, other = (
        last(denoise(network, one, NOISE, linear_sigmas(2))).x
        for one in (without, conditioning(1), replace(conditioning(1), guidance=7.0))
    )
    assert torch.equal(ran, default)
    assert not torch.equal(ran, other)


def test_an_unused_negative_and_the_price_of_a_used_one_are_said() -> None:
    network, negative = tiny(), conditioning(2)
    for scale, end, words in (
        (1.0, 1.0, "the negative conditioning is not used: cfg is 1 or less."),
        (4.0, 0.0, "the negative conditioning is not used: the window holds no step."),
        (4.0, 0.5, "2 of 4 steps run twice"),
    ):
        cfg = TrueCFG(negative=negative, scale=scale, end=end)
        (note,) = sampling_notes(network, conditioning(1), steps=4, cfg=cfg)
        assert note.startswith(words)


def test_more_references_than_the_family_was_trained_with_are_said() -> None:
    two = conditioning(1, picture(1), picture(2))
    assert sampling_notes(tiny(), two, steps=4) == (
        "2 references; FLUX.1 Kontext [dev] was made for at most 1.",
    )
    assert "made for none" in sampling_notes(tiny(FLUX1_DEV), two, steps=4)[0]


def test_a_picture_in_the_place_of_noise_and_noise_as_a_reference_are_said() -> None:
    one = conditioning(1, make_noise(FLUX1_KONTEXT.latent, 32, 32, 1))
    notes = sampling_notes(tiny(), one, steps=4, noise=picture(1))
    assert "not from 'Noise (FLUX)'" in notes[0]
    assert notes[1] == "reference 1 is noise, not a picture."
    assert sampling_notes(tiny(), conditioning(1), steps=4, noise=NOISE) == ()
