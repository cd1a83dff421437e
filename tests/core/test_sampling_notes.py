"""What a run of FLUX.2 says, by the kind of model it is: distilled, step-distilled, or neither."""

from dataclasses import replace

import pytest
import torch

from glassbox.flux_core.families import (
    FAMILIES,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B_KV,
    FLUX2_KLEIN_BASE_4B,
    FLUX2_LATENT,
)
from glassbox.flux_core.sampling.guidance import TrueCFG
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.notes import run_notes
from glassbox.flux_core.sampling.run import run
from glassbox.flux_core.sampling.sigmas import linear_sigmas
from glassbox.flux_core.tokens.ids import drop_tokens
from glassbox.flux_core.tokens.references import place_references
from glassbox.tests.core import tiny_flux2 as tiny

FLUX2 = [family for family in FAMILIES.values() if family.latent == FLUX2_LATENT]
NAMES = [family.name for family in FLUX2]


def job(one, steps: int, **settings) -> Job:
    return Job(conditioning=one, noise=tiny.noise(), sigmas=linear_sigmas(steps), **settings)


def notes(family, one=None, *, steps: int = 0, **settings) -> tuple[str, ...]:
    made = job(one or tiny.conditioning(1), steps or family.default_steps, **settings)
    return run_notes(tiny.network(family), made)


@pytest.mark.parametrize("family", FLUX2, ids=NAMES)
def test_a_run_as_the_model_was_published_says_nothing(family) -> None:
    references = tiny.pictures(1, 2)
    one, cfg = tiny.conditioning(1, references, guidance=family.default_guidance), None
    if family.guidance == "true cfg":
        cfg = TrueCFG(negative=tiny.conditioning(2, references), scale=family.default_guidance)
    assert notes(family, one, cfg=cfg) == ()


@pytest.mark.parametrize("family", [FLUX2_KLEIN_4B, FLUX2_KLEIN_9B_KV], ids=lambda one: one.name)
def test_klein_says_that_guidance_is_ignored_only_where_someone_set_it(family) -> None:
    words = f"guidance 3.5 is ignored: {family.title} has no guidance input."
    assert notes(family, tiny.conditioning(1, guidance=3.5)) == (words,)
    assert notes(family, tiny.conditioning(1, guidance=family.default_guidance)) == ()
    assert notes(family, tiny.conditioning(1, guidance=None)) == ()


def test_ignored_guidance_changes_no_bit() -> None:
    network = tiny.network(FLUX2_KLEIN_4B)
    ran = [
        [step.x for step in run(network, job(tiny.conditioning(1, guidance=guidance), 2))]
        for guidance in (None, 7.0)
    ]
    assert all(map(torch.equal, *ran))


def test_a_base_model_without_cfg_is_told_where_to_find_it() -> None:
    (note,) = notes(FLUX2_KLEIN_BASE_4B)
    assert "[true CFG], cfg 4, with an empty negative prompt" in note
    ignored, without = notes(FLUX2_KLEIN_BASE_4B, tiny.conditioning(1, guidance=2.5))
    assert ignored.startswith("guidance 2.5 is ignored")
    assert "Its strength is [cfg]" in ignored
    assert without == note
    cfg = TrueCFG(negative=tiny.conditioning(2), scale=1.0)
    assert notes(FLUX2_KLEIN_BASE_4B, cfg=cfg) == (
        "the negative conditioning is not used: cfg is 1 or less.",
    )


@pytest.mark.parametrize("family", [FLUX2_DEV, FLUX2_KLEIN_4B], ids=lambda one: one.name)
def test_cfg_on_a_distilled_model_is_said(family) -> None:
    one = tiny.conditioning(1, guidance=family.default_guidance)
    cfg = TrueCFG(negative=tiny.conditioning(2), scale=2.0)
    steps = family.default_steps
    words = f"{steps} of {steps} steps run twice; this model needs no negative."
    assert notes(family, one, cfg=cfg) == (words,)


def test_dev_without_guidance_runs_with_its_own_and_says_so() -> None:
    assert notes(FLUX2_DEV) == ("guidance is 4, the default of FLUX.2 [dev].",)
    network = tiny.network(FLUX2_DEV)
    default, same, other = (
        next(iter(run(network, job(tiny.conditioning(1, guidance=one), 1)))).x
        for one in (None, 4.0, 2.5)
    )
    assert torch.equal(default, same)
    assert not torch.equal(default, other)


def test_other_steps_are_said_on_step_distilled_models_only() -> None:
    (note,) = notes(FLUX2_KLEIN_4B, steps=20)
    assert note.startswith("20 steps; FLUX.2 [klein] 4B was distilled to 4: set [steps]")
    dev = tiny.conditioning(1, guidance=4.0)
    assert notes(FLUX2_DEV, dev, steps=4) == ()


def test_references_beyond_the_trained_number_are_allowed_and_said() -> None:
    many = tiny.conditioning(1, tiny.pictures(1, 2, 3, 4, 5))
    assert notes(FLUX2_KLEIN_4B, many) == (
        "5 references; FLUX.2 [klein] 4B was made for at most 4.",
    )
    (step,) = run(tiny.network(FLUX2_KLEIN_4B), job(many, 1))
    assert bool(torch.isfinite(step.x).all())


def test_several_references_that_are_too_large_are_said_and_one_is_not() -> None:
    rule = replace(FLUX2_KLEIN_4B.references, several_px=2 * 16**2)
    small = replace(FLUX2_KLEIN_4B, references=rule)
    (note,) = notes(small, tiny.conditioning(1, tiny.pictures(1, 2)))
    assert "'FLUX.2 several references'" in note
    assert notes(small, tiny.conditioning(1, tiny.pictures(1))) == ()


@pytest.mark.parametrize("placement", ["offset", "reversed"])
def test_references_at_ids_the_model_does_not_know_are_said_once(placement: str) -> None:
    known = tiny.pictures(1, 2)
    placed = known[::-1] if placement == "reversed" else place_references(known, "offset")
    (note,) = notes(FLUX2_KLEIN_4B, tiny.conditioning(1, placed))
    assert note.startswith("reference 1 lies elsewhere than FLUX.2 [klein] 4B was trained with")
    assert "set [placement] to 'auto' or 'index'" in note


def test_dropped_tokens_leave_the_rest_where_the_model_knows_it() -> None:
    first, second = tiny.pictures(1, 2)
    part = drop_tokens(second, torch.arange(second.count) % 2 == 0)
    assert notes(FLUX2_KLEIN_4B, tiny.conditioning(1, (first, part))) == ()


def test_text_longer_than_trained_is_said() -> None:
    one = tiny.conditioning(1, length=513)
    (note,) = notes(FLUX2_KLEIN_4B, one)
    assert note.startswith("the text is 513 tokens long; FLUX.2 [klein] 4B was trained with 512")
    short = replace(FLUX2_KLEIN_4B, text=replace(FLUX2_KLEIN_4B.text, tokens=513))
    assert notes(short, one) == ()
