"""What a run of FLUX.1 says; `test_sampling_notes` has FLUX.2's."""

from dataclasses import replace

import pytest
import torch

from glassbox.flux_core.families import FLUX1_DEV, FLUX1_SCHNELL
from glassbox.flux_core.sampling.guidance import TrueCFG
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.notes import run_notes
from glassbox.flux_core.sampling.run import run
from glassbox.flux_core.sampling.sigmas import linear_sigmas, parse_sigmas
from glassbox.tests.core import tiny_flux1 as tiny

NOISE = tiny.noise()
UNGUIDED = replace(tiny.SPEC, has_guidance=False)


def notes(net, one, *, steps: int = 4, **settings) -> tuple[str, ...]:
    job = {"noise": NOISE, "sigmas": linear_sigmas(steps), **settings}
    return run_notes(net, Job(conditioning=one, **job))


def test_an_ordinary_run_has_no_notes() -> None:
    job = Job(conditioning=tiny.conditioning(1), noise=NOISE, sigmas=linear_sigmas(4))
    assert run(tiny.network(), job).notes == ()


def test_a_run_carries_its_notes() -> None:
    one = replace(tiny.conditioning(1), notes=("the prompt was cut.",))
    cfg = TrueCFG(negative=replace(one, notes=("the prompt was cut.", "another.")), scale=2.0)
    job = Job(conditioning=one, noise=NOISE, sigmas=linear_sigmas(2), cfg=cfg)
    said = run(tiny.network(), job).notes
    assert said == run_notes(tiny.network(), job)
    assert said[:2] == ("the prompt was cut.", "another.")


def test_guidance_on_a_family_without_it_is_said_to_be_ignored() -> None:
    net = tiny.network(FLUX1_SCHNELL, UNGUIDED)
    one, without = tiny.conditioning(1), tiny.conditioning(1, guidance=None)
    words = "guidance 2.5 is ignored: FLUX.1 [schnell] has no guidance input."
    assert notes(net, one) == (words,)
    assert notes(net, without) == ()
    ran = [tiny.last(net, each, NOISE, linear_sigmas(2)) for each in (one, without)]
    assert torch.equal(*ran)


def test_ignored_guidance_may_differ_between_the_two_passes() -> None:
    net = tiny.network(FLUX1_SCHNELL, UNGUIDED)
    one, sigmas = tiny.conditioning(1), linear_sigmas(1)
    ran = [
        tiny.last(
            net,
            one,
            NOISE,
            sigmas,
            cfg=TrueCFG(negative=tiny.conditioning(2, guidance=guidance), scale=2.0),
        )
        for guidance in (7.0, 2.5)
    ]
    assert torch.equal(*ran)


def test_no_guidance_means_the_familys_default_and_a_note() -> None:
    net, without = tiny.network(), tiny.conditioning(1, guidance=None)
    assert notes(net, without) == ("guidance is 2.5, the default of FLUX.1 Kontext [dev].",)
    ran, default, other = (
        tiny.last(net, one, NOISE, linear_sigmas(2))
        for one in (without, tiny.conditioning(1), tiny.conditioning(1, guidance=7.0))
    )
    assert torch.equal(ran, default)
    assert not torch.equal(ran, other)


@pytest.mark.parametrize(
    ("scale", "end", "words"),
    [
        (1.0, 1.0, "the negative conditioning is not used: cfg is 1 or less."),
        (4.0, 0.0, "the negative conditioning is not used: the window holds no step."),
        (4.0, 0.5, "2 of 4 steps run twice"),
    ],
)
def test_an_unused_negative_and_the_price_of_a_used_one_are_said(
    scale: float, end: float, words: str
) -> None:
    cfg = TrueCFG(negative=tiny.conditioning(2), scale=scale, end=end)
    (note,) = notes(tiny.network(), tiny.conditioning(1), cfg=cfg)
    assert note.startswith(words)


def test_more_references_than_the_family_was_trained_with_are_said() -> None:
    two = tiny.conditioning(1, tiny.picture(1), tiny.picture(2))
    assert notes(tiny.network(), two) == (
        "2 references; FLUX.1 Kontext [dev] was made for at most 1.",
    )
    assert "made for none" in notes(tiny.network(FLUX1_DEV), two)[0]


def test_an_image_in_the_place_of_noise_and_noise_as_a_reference_are_said() -> None:
    said = notes(tiny.network(), tiny.conditioning(1, tiny.noise(1)), noise=tiny.picture(1))
    assert "not from [noise]" in said[0]
    assert said[1] == "reference 1 is noise, not an image."


def test_a_start_image_that_sigma_one_drowns_is_said() -> None:
    one, start, net = tiny.conditioning(1), tiny.noise(3), tiny.network()
    (note,) = notes(net, one, start=start)
    assert "start image is not seen" in note
    assert "[denoise]" in note
    sigmas = parse_sigmas("0.9, 0.4, 0")
    assert notes(net, one, start=start, sigmas=sigmas) == ()
    drowned, without = (
        tiny.last(net, one, NOISE, linear_sigmas(2), start=each) for each in (start, None)
    )
    assert torch.equal(drowned, without)
