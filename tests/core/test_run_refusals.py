"""What a run refuses before anything is computed, by the name of the input."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from glassbox.flux_core.errors import (
    FamilyMismatchError,
    GlassboxError,
    NonFiniteError,
    SettingError,
    ShapeError,
)
from glassbox.flux_core.families import (
    FLUX1_KONTEXT,
    FLUX1_LATENT,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_LATENT,
    NANO_FLUX1_LATENT,
)
from glassbox.flux_core.sampling.check import check_conditioning
from glassbox.flux_core.sampling.guidance import TrueCFG
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.run import run
from glassbox.flux_core.sampling.sigmas import linear_sigmas
from glassbox.flux_core.sampling.solvers import SOLVERS
from glassbox.flux_core.tokens.ids import drop_tokens
from glassbox.flux_core.tokens.pack import latent_tokens
from glassbox.flux_core.values import Conditioning, Reference, TextFeatures, Tokens
from glassbox.tests.core import tiny_flux1 as tiny

NOISE = tiny.noise()


class Untouched:
    """A network that fails the test when it is planned."""

    family, spec, supports = FLUX1_KONTEXT, tiny.SPEC, frozenset({"dropped tokens"})

    def plans(self, *_: object) -> list:
        raise AssertionError("a job that is refused was planned")


def refused(
    kind: type[GlassboxError], words: str, one: Conditioning | None = None, **settings: Any
) -> GlassboxError:
    job = {"noise": NOISE, "sigmas": linear_sigmas(2), **settings}
    with pytest.raises(kind, match=words) as caught:
        run(Untouched(), Job(conditioning=one or tiny.conditioning(1), **job))
    return caught.value


def test_nan_is_refused_and_its_input_named() -> None:
    nan = float("nan")
    good = tiny.picture(1)
    bad = replace(good, values=good.values * nan)
    one = tiny.conditioning(1, good)
    noise = replace(NOISE, values=NOISE.values * nan)
    text = replace(one.text, txt=one.text.txt * nan)
    pooled = replace(one.text, pooled=one.text.pooled * float("inf"))
    cfg = TrueCFG(negative=tiny.conditioning(1, bad), scale=2.0)
    for words, changed, settings in (
        ("The noise input holds", one, {"noise": noise}),
        ("The start image input holds", one, {"start": noise}),
        ("The text input holds", replace(one, text=text), {}),
        ("The pooled text input holds", replace(one, text=pooled), {}),
        ("The reference 2 input holds", tiny.conditioning(1, good, bad), {}),
        ("The reference 1 of the negative conditioning input holds", one, {"cfg": cfg}),
    ):
        refused(NonFiniteError, words, changed, **settings)


def test_noise_or_a_start_of_another_family_is_refused() -> None:
    other = replace(NOISE, latent=NANO_FLUX1_LATENT)
    second = latent_tokens(torch.randn(1, 128, 2, 2), FLUX2_LATENT)
    refused(FamilyMismatchError, r"noise input holds FLUX\.1 nano tokens", noise=other)
    refused(FamilyMismatchError, r"start image input holds FLUX\.1 nano tokens", start=other)
    refused(FamilyMismatchError, r"noise input holds FLUX\.2 tokens.*FLUX\.1 tokens", noise=second)


def test_a_reference_of_another_family_is_refused_by_its_number() -> None:
    other = replace(tiny.picture(1), latent=NANO_FLUX1_LATENT)
    error = refused(
        FamilyMismatchError,
        r"Reference 2 holds FLUX\.1 nano tokens",
        tiny.conditioning(1, tiny.picture(1), other),
    )
    # its channels do not tell the two apart, so a LATENT has to be named
    loaders = ("autoencoder loader", "nano loader")
    assert error.settings == (*loaders, "latent packing", "latent_format")
    second = latent_tokens(torch.randn(1, 128, 2, 2), FLUX2_LATENT)
    words = r"Reference 1 holds FLUX\.2 tokens.*FLUX\.1 tokens for FLUX\.1 Kontext"
    error = refused(FamilyMismatchError, words, tiny.conditioning(1, second))
    assert error.settings == loaders


def test_batches_and_sizes_that_do_not_go_together_are_refused() -> None:
    three, two = tiny.noise(6, batch=3), tiny.picture(1, batch=2)
    for words, one, settings, named in (
        ("text has a batch of 2, the noise 3", tiny.conditioning(1, batch=2), {}, "batch_size"),
        ("reference 1 has a batch of 2, .* 3", tiny.conditioning(1, two), {}, "batch_size"),
        ("start image is 32x32, the noise 48x32", None, {"start": tiny.picture(1)}, "image fit"),
        ("start image has a batch of 2, .* 3", None, {"start": tiny.noise(batch=2)}, "batch_size"),
    ):
        error = refused(ShapeError, words, one, noise=three, **settings)
        assert named in error.settings
    part = drop_tokens(NOISE, torch.arange(NOISE.count) > 0)
    refused(ShapeError, "start image is 48x32 with dropped tokens", start=part)


def test_sigmas_and_solvers_that_cannot_be_followed_are_refused() -> None:
    refused(SettingError, r"end in 0\.5", sigmas=torch.tensor([1.0, 0.5]))
    error = refused(SettingError, " or ".join(SOLVERS).replace("+", r"\+"), solver="dpm")
    assert error.settings == ("solver",)


TOKENS: Tokens = tiny.picture(1)


@pytest.mark.parametrize(
    ("asked", "control"),
    [
        ({"strength": 0.5}, "strength"),
        ({"mask": torch.ones(TOKENS.count)}, "mask"),
        ({"steps": (0.0, 0.5)}, "steps"),
        ({"blocks": (0,)}, "blocks"),
        ({"blocks": (0,), "strength": 0.0}, "strength and blocks"),
    ],
)
def test_a_control_that_the_network_does_not_follow_is_refused(asked: dict, control: str) -> None:
    seen = (Reference(tokens=TOKENS), Reference(tokens=TOKENS, **asked))
    one = replace(tiny.conditioning(1), references=seen)
    words = f"Reference 2 has {control} set, which this network does not follow"
    error = refused(SettingError, words, one)
    assert error.settings == ("references",)
    assert error.needed == "controls that it follows: dropped tokens."
    negative = TrueCFG(negative=one, scale=2.0)
    assert refused(SettingError, words, cfg=negative).settings == ("references",)


def test_dropped_tokens_are_refused_by_a_network_that_cannot_drop_them() -> None:
    part = drop_tokens(TOKENS, torch.arange(TOKENS.count) > 0)
    job = Job(conditioning=tiny.conditioning(1, part), noise=NOISE, sigmas=linear_sigmas(2))
    with pytest.raises(SettingError, match="Reference 1 has dropped tokens set") as caught:
        run(tiny.Constant(NOISE.values), job)
    assert caught.value.needed == "controls that it follows: none."


@pytest.mark.parametrize(
    ("family", "widths", "source", "words"),
    [
        (FLUX2_KLEIN_4B, (4096, 768), "", r"pooled 768 \(FLUX\.1\).*\[klein\] 4B, from Qwen3 4B"),
        (FLUX2_KLEIN_4B, (4096, 768), "CLIP-L and T5", r"\(FLUX\.1, from CLIP-L and T5\)"),
        (FLUX2_KLEIN_4B, (12288, 0), "Qwen3 8B", r"\(FLUX\.2, from Qwen3 8B\).*\[klein\] 4B"),
        (FLUX2_DEV, (7680, 0), "", r"\(FLUX\.2\).*FLUX\.2 \[dev\], from Mistral Small 3"),
        (FLUX1_KONTEXT, (15360, 0), "", r"\(FLUX\.2\).*4096 and 768 for FLUX\.1 Kontext \[dev\]"),
        (FLUX1_KONTEXT, (16, 768), "", r"16 wide, pooled 768\..*4096 and 768"),
    ],
)
def test_text_of_another_model_is_named_with_both_families(family, widths, source, words) -> None:
    pooled = torch.randn(1, widths[1]) if widths[1] else None
    text = TextFeatures(txt=torch.randn(1, 5, widths[0]), pooled=pooled, source=source)
    latent = family.latent
    target = latent_tokens(torch.randn(1, latent.channels, 2, 2), latent)
    with pytest.raises(FamilyMismatchError, match=words) as caught:
        check_conditioning(Conditioning(text=text), target, family, family.transformer)
    assert caught.value.settings == ("text encoder loader", "nano loader")


def test_a_run_refuses_text_of_another_model() -> None:
    text = TextFeatures(txt=torch.randn(1, 5, 16), pooled=torch.randn(1, tiny.POOLED))
    refused(FamilyMismatchError, "16 wide.*48 and 24", Conditioning(text=text))


def test_a_target_of_the_same_latent_and_batch_is_taken() -> None:
    reference = latent_tokens(torch.randn(3, 16, 4, 4), FLUX1_LATENT)
    check_conditioning(
        tiny.conditioning(1, reference, batch=3), tiny.noise(batch=3), FLUX1_KONTEXT, tiny.SPEC
    )
