"""FLUX.2's whole loops against diffusers' three pipelines, tiny random weights, fp32, CPU.

Both sides get the same encoded prompts; text has tests of its own. Everything else on our side is
ours: encoding, packing, placing, noise, sigmas, guidance, cached references, solver, decoding.
"""

from dataclasses import dataclass

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from glassbox.flux_core.families import (
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B_KV,
    FLUX2_KLEIN_BASE_4B,
)
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.image.pixels import to_image, to_pixels
from glassbox.flux_core.sampling.guidance import TrueCFG
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.noise import make_noise
from glassbox.flux_core.sampling.run import finish, run
from glassbox.flux_core.sampling.sigmas import flux_sigmas
from glassbox.flux_core.specs import FluxFamily
from glassbox.flux_core.tokens.pack import latent_tokens, tokens_latent
from glassbox.flux_core.tokens.references import place_references
from glassbox.flux_core.transformer.flux import Flux, build_flux
from glassbox.flux_core.values import Conditioning, Reference, TextFeatures
from glassbox.flux_core.weights.autoencoder_keys import autoencoder_key_map
from glassbox.flux_core.weights.transformer_keys import to_diffusers
from glassbox.tests.parity import flux2_samples as samples

TOLERANCE = 1e-5
GUIDANCE, SEED, TEXT_TOKENS = 3.5, 11, 9


@dataclass(frozen=True)
class Case:
    """One run: sizes are (width, height) in px."""

    family: FluxFamily
    references: tuple[tuple[int, int], ...] = ()
    size: tuple[int, int] = (80, 64)
    cfg: float = 1.0
    batch: int = 1
    steps: int = 4


CASES = {
    "dev, two references": Case(FLUX2_DEV, ((64, 80), (96, 64))),
    "dev, no reference": Case(FLUX2_DEV, size=(48, 96), steps=6),
    "dev, two at once": Case(FLUX2_DEV, ((64, 64),), batch=2),
    "klein, one reference": Case(FLUX2_KLEIN_4B, ((64, 80),)),
    "klein, three references": Case(FLUX2_KLEIN_4B, ((64, 80), (96, 64), (64, 64))),
    "klein, no reference": Case(FLUX2_KLEIN_4B, size=(64, 96)),
    "base with CFG": Case(FLUX2_KLEIN_BASE_4B, ((64, 80),), cfg=4.0, steps=5),
    "base with CFG, two references, two at once": Case(
        FLUX2_KLEIN_BASE_4B, ((64, 80), (96, 64)), cfg=2.5, batch=2
    ),
    "base with CFG, no reference": Case(FLUX2_KLEIN_BASE_4B, cfg=4.0),
    "KV, one reference": Case(FLUX2_KLEIN_9B_KV, ((64, 80),)),
    "KV, two references": Case(FLUX2_KLEIN_9B_KV, ((64, 80), (96, 64))),
    "KV, two references, two at once": Case(FLUX2_KLEIN_9B_KV, ((64, 80), (96, 64)), batch=2),
    "KV, no reference": Case(FLUX2_KLEIN_9B_KV),
}


@pytest.fixture(scope="module")
def vae() -> diffusers.AutoencoderKLFlux2:
    return samples.tiny_vae()


@pytest.fixture(scope="module")
def autoencoder(vae: diffusers.AutoencoderKLFlux2) -> Autoencoder:
    """Our autoencoder with diffusers' weights, through the layout a file would be read by."""
    ours, state = Autoencoder(samples.autoencoder_spec()), vae.state_dict()
    key_map = autoencoder_key_map(state)
    assert key_map is not None
    named = {}
    for name, rule in key_map.rules.items():
        (part,) = rule.sources
        named[name] = state[part].reshape(ours.state_dict()[name].shape)
    ours.load_state_dict(named, strict=True)
    return ours.eval()


def network(family: FluxFamily) -> Flux:
    """Our network with weights of its own."""
    torch.manual_seed(3)
    net = build_flux(family, samples.transformer_spec(guided=family.transformer.has_guidance))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def published(family: FluxFamily, net: Flux, vae: diffusers.AutoencoderKLFlux2):
    """The pipeline that diffusers has for this family, with our network's weights."""
    transformer = samples.tiny_transformer(guided=family.transformer.has_guidance)
    state = {**net.modulation.state_dict(), **net.blocks.state_dict()}
    transformer.load_state_dict(to_diffusers(state), strict=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(  # FLUX.1 [dev]'s: the default is linear
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    parts = {
        "scheduler": scheduler,
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer,
    }
    if family.references.isolated:
        pipeline = diffusers.Flux2KleinKVPipeline(**parts)
    elif family.transformer.has_guidance:
        pipeline = diffusers.Flux2Pipeline(**parts)
    else:
        pipeline = diffusers.Flux2KleinPipeline(**parts, is_distilled=family.is_step_distilled)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, TEXT_TOKENS, samples.CONTEXT, generator=draw)


def run_published(case: Case, net: Flux, vae) -> tuple[Tensor, Tensor]:
    """Returns the last latent tokens, and the pictures (B, H, W, 3)."""
    seen: list[Tensor] = []

    def remember(pipeline, step: int, timestep: Tensor, values: dict[str, Tensor]):
        seen.append(values["latents"])
        return values

    settings = {}
    if case.family.guidance == "embedded":
        settings["guidance_scale"] = GUIDANCE
    elif case.family.guidance == "true cfg":
        settings = {"guidance_scale": case.cfg, "negative_prompt_embeds": prompt(2)}
    pictures = published(case.family, net, vae)(
        image=[samples.picture(*size) for size in case.references] or None,
        prompt_embeds=prompt(1),
        width=case.size[0],
        height=case.size[1],
        num_inference_steps=case.steps,
        num_images_per_prompt=case.batch,
        generator=torch.Generator().manual_seed(SEED),
        output_type="pt",
        callback_on_step_end=remember,
        **settings,
    ).images
    assert len(seen) == case.steps
    return seen[-1], pictures.permute(0, 2, 3, 1)


def encoded(autoencoder: Autoencoder, case: Case) -> tuple[Reference, ...]:
    tokens = []
    for size in case.references:
        image = torch.from_numpy(np.array(samples.picture(*size)))[None].float() / 255
        tokens.append(latent_tokens(autoencoder.encode(to_pixels(image)), case.family.latent))
    placed = place_references(tokens, "auto")
    return tuple(Reference(tokens=one) for one in placed)


@torch.no_grad()
def run_ours(
    case: Case, net: Flux, autoencoder: Autoencoder, passes: str = "batched"
) -> tuple[Tensor, Tensor]:
    family = case.family
    references = encoded(autoencoder, case)

    def condition(seed: int) -> Conditioning:
        guidance = GUIDANCE if family.guidance == "embedded" else None
        text = TextFeatures(txt=prompt(seed), pooled=None)
        return Conditioning(text=text, references=references, guidance=guidance)

    cfg = None
    if case.cfg > 1:
        cfg = TrueCFG(negative=condition(2), scale=case.cfg, passes=passes)
    noise = make_noise(family.latent, case.size[1], case.size[0], SEED, case.batch)
    sigmas = flux_sigmas(family.schedule, noise.ids.shape[0], case.steps)
    ours = run(net, Job(conditioning=condition(1), noise=noise, sigmas=sigmas, cfg=cfg))
    assert ours.notes == ()
    *_, last = ours
    return last.x, to_image(autoencoder.decode(tokens_latent(finish(last.x, noise))))


@pytest.mark.parametrize("name", CASES)
def test_the_whole_loop_equals_the_published_pipeline(vae, autoencoder, name: str) -> None:
    case = CASES[name]
    net = network(case.family)
    latents, pictures = run_published(case, net, vae)
    assert latents.std() > 0.1  # the comparison is not one of zeros
    assert pictures.std() > 0.01
    for passes in ("batched", "in turn") if case.cfg > 1 else ("in turn",):
        our_latents, our_pictures = run_ours(case, net, autoencoder, passes)
        torch.testing.assert_close(our_latents, latents, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(our_pictures, pictures, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("family", "cfg"),
    [(FLUX2_DEV, 1.0), (FLUX2_KLEIN_4B, 1.0), (FLUX2_KLEIN_BASE_4B, 4.0), (FLUX2_KLEIN_9B_KV, 1.0)],
    ids=lambda one: getattr(one, "name", ""),
)
def test_every_reference_changes_the_result(autoencoder, family: FluxFamily, cfg: float) -> None:
    """Otherwise the comparison above would pass with a part left out on both sides."""
    net, sizes = network(family), ((64, 80), (96, 64))
    whole, _ = run_ours(Case(family, sizes, cfg=cfg), net, autoencoder)
    for less in ((), sizes[:1], sizes[1:], sizes[::-1]):
        other, _ = run_ours(Case(family, less, cfg=cfg), net, autoencoder)
        assert float((other - whole).abs().max()) > 100 * TOLERANCE


def test_isolated_references_differ_from_full_attention(autoencoder) -> None:
    """The same weights without the rule give another picture: a KV model needs its own family."""
    net = network(FLUX2_KLEIN_9B_KV)
    isolated, _ = run_ours(Case(FLUX2_KLEIN_9B_KV, ((64, 80),)), net, autoencoder)
    net.family = FLUX2_KLEIN_4B
    full, _ = run_ours(Case(FLUX2_KLEIN_4B, ((64, 80),)), net, autoencoder)
    assert float((full - isolated).abs().max()) > 100 * TOLERANCE
