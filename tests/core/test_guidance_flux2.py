"""True CFG on FLUX.2: the base models, and models whose references are isolated."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import FamilyMismatchError
from glassbox.flux_core.families import (
    FLUX1_LATENT,
    FLUX2_DEV,
    FLUX2_KLEIN_9B_KV,
    FLUX2_KLEIN_BASE_4B,
)
from glassbox.flux_core.sampling.guidance import TrueCFG, guided, join
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.run import run as run_job
from glassbox.flux_core.sampling.sigmas import linear_sigmas
from glassbox.flux_core.specs import FluxFamily
from glassbox.flux_core.tokens.pack import latent_tokens
from glassbox.flux_core.transformer.flux import Flux, cache_for_the_run
from glassbox.flux_core.values import Conditioning, Reference, TextFeatures
from glassbox.tests.core import tiny_flux2 as tiny

STEPS, SCALE = 4, 3.0
FAMILIES = pytest.mark.parametrize(
    "family", [FLUX2_KLEIN_BASE_4B, FLUX2_KLEIN_9B_KV], ids=lambda family: family.name
)


def run(network: Flux, positive: Conditioning, batch: int = 1, **cfg) -> Tensor:
    settings = TrueCFG(**{"scale": SCALE, **cfg})
    noise, sigmas = tiny.noise(3, batch=batch), linear_sigmas(STEPS)
    job = Job(conditioning=positive, noise=noise, sigmas=sigmas, cfg=settings)
    *_, last = run_job(network, job)
    return last.x


@FAMILIES
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_is_the_sum_of_two_single_passes(family: FluxFamily, batch: int) -> None:
    network, references = tiny.network(family), tiny.pictures(1, 2)
    positive, negative = (tiny.conditioning(seed, references) for seed in (1, 2))
    noise, sigmas = tiny.noise(3, batch=batch), [1.0, 0.5, 0.0]
    with torch.no_grad():
        v_c, v_u = (
            network.plan(one, noise, sigmas).velocity(noise.values, 0.5)
            for one in (positive, negative)
        )
        for passes in ("batched", "in turn"):
            cfg = TrueCFG(negative=negative, scale=SCALE, passes=passes)
            found = guided(network, positive, noise, sigmas, cfg=cfg).velocity(noise.values, 0.5)
            torch.testing.assert_close(found, v_u + SCALE * (v_c - v_u), atol=5e-6, rtol=0)


@FAMILIES
@pytest.mark.parametrize("end", [0.5, 1.0])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "a reference for each image"])
def test_batched_and_in_turn_agree(family: FluxFamily, end: float, own: bool) -> None:
    network, references = tiny.network(family), tiny.pictures(1, 2, batch=3 if own else 1)
    positive, negative = (tiny.conditioning(seed, references) for seed in (1, 2))
    batched, in_turn = (
        run(network, positive, 3, negative=negative, end=end, passes=passes)
        for passes in ("batched", "in turn")
    )
    torch.testing.assert_close(batched, in_turn, atol=1e-5, rtol=0)
    alone = run(network, positive, 3, negative=negative, scale=1.0)
    assert float((batched - alone).abs().max()) > 1e-2


@pytest.mark.parametrize("end", [0.5, 1.0])
@pytest.mark.parametrize("passes", ["batched", "in turn"])
def test_references_that_both_passes_share_are_computed_and_held_once(end, passes: str) -> None:
    network, references = tiny.network(FLUX2_KLEIN_9B_KV), tiny.pictures(1, 2)
    held = []

    def hold(references, computed):
        held.append(cache_for_the_run(references, computed))
        return held[-1]

    network.reference_cache = hold
    # a node places them anew for each conditioning: other ids and tokens, the same values
    positive, negative = (
        tiny.conditioning(seed, tuple(replace(one, ids=one.ids.clone()) for one in references))
        for seed in (1, 2)
    )
    cached = run(network, positive, 2, negative=negative, passes=passes, end=end)
    assert len(held) == 1
    assert {kv.key.shape[0] for kv in held[0]} == {1}
    network.reference_cache = tiny.compute_every_step
    again = run(network, positive, 2, negative=negative, passes=passes, end=end)
    assert torch.equal(cached, again)


def test_other_references_in_the_negative_are_cached_apart() -> None:
    network = tiny.network(FLUX2_KLEIN_9B_KV)
    one, other = tiny.pictures(1), tiny.pictures(4)  # of one size
    positive = tiny.conditioning(1, one)
    results = [
        run(network, positive, negative=tiny.conditioning(2, theirs), passes=passes)
        for theirs in (one, other, ())
        for passes in (("batched", "in turn") if theirs else ("in turn",))
    ]
    for first, second in ((0, 1), (2, 3)):
        torch.testing.assert_close(results[first], results[second], atol=1e-5, rtol=0)
    assert float((results[0] - results[2]).abs().max()) > 1e-3
    assert float((results[0] - results[4]).abs().max()) > 1e-3


def test_text_without_pooled_features_is_joined_without_them() -> None:
    joined = join(tiny.conditioning(1), tiny.conditioning(2), batch=2)
    assert joined.text.pooled is None
    assert joined.text.txt.shape[0] == 4


@pytest.mark.parametrize("passes", ["batched", "in turn"])
def test_a_negative_of_another_model_is_refused_with_both_families(passes: str) -> None:
    network = tiny.network(FLUX2_KLEIN_BASE_4B)
    positive = tiny.conditioning(1, tiny.pictures(1))
    text = TextFeatures(txt=torch.randn(1, 6, 4096), pooled=torch.randn(1, 768))
    with pytest.raises(FamilyMismatchError, match=r"\(FLUX\.1\).*FLUX\.2 \[klein\] base 4B"):
        run(network, positive, negative=replace(positive, text=text), passes=passes)
    other = latent_tokens(torch.randn(1, 16, 6, 6), FLUX1_LATENT)
    words = r"Reference 1 holds FLUX\.1 tokens.*FLUX\.2 tokens for FLUX\.2 \[klein\] base 4B"
    negative = replace(positive, references=(Reference(tokens=other),))
    with pytest.raises(FamilyMismatchError, match=words):
        run(network, positive, negative=negative, passes=passes)


def test_cfg_on_a_model_with_a_guidance_input_uses_the_default_in_both_passes() -> None:
    network, negative = tiny.network(FLUX2_DEV), tiny.conditioning(2)
    default = FLUX2_DEV.default_guidance
    filled, given = (
        run(network, tiny.conditioning(1, guidance=one), negative=replace(negative, guidance=two))
        for one, two in ((None, None), (default, default))
    )
    assert torch.equal(filled, given)
