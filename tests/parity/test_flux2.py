"""FLUX.2's transformer, autoencoder and ids against diffusers, same tiny random weights, fp32."""

from dataclasses import replace

import pytest
import torch
from diffusers import Flux2Pipeline

from glassbox.flux_core.families import FLUX2_DEV, FLUX2_KLEIN_4B, FLUX2_LATENT
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.tokens.ids import text_ids
from glassbox.flux_core.tokens.pack import latent_tokens
from glassbox.flux_core.tokens.references import place_references
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.values import Conditioning, Reference, TextFeatures
from glassbox.flux_core.weights.autoencoder_keys import to_diffusers as autoencoder_to_diffusers
from glassbox.flux_core.weights.transformer_keys import to_diffusers as transformer_to_diffusers
from glassbox.tests.parity import flux2_samples as samples

TRANSFORMER_TOLERANCE = 5e-6
AUTOENCODER_TOLERANCE = 2e-5


def _perturb(module):
    """Default initialisation leaves ones and zeros, which hide wrong wiring."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def _both(guided):
    """Our network and diffusers', with our weights in both."""
    family = FLUX2_DEV if guided else FLUX2_KLEIN_4B
    ours = _perturb(build_flux(family, samples.transformer_spec(guided=guided)))
    theirs = samples.tiny_transformer(guided=guided)
    state = {**ours.modulation.state_dict(), **ours.blocks.state_dict()}
    theirs.load_state_dict(transformer_to_diffusers(state), strict=True)
    return ours, theirs


def _tokens(batch, *grids):
    return [latent_tokens(torch.randn(batch, 128, *grid), FLUX2_LATENT) for grid in grids]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("references", [0, 1, 3])
def test_the_transformer_equals_diffusers(guided, batch, references):
    ours, theirs = _both(guided)
    torch.manual_seed(batch)
    target, *pictures = _tokens(batch, (4, 6), (3, 2), (2, 5), (4, 4))
    placed = place_references(pictures[:references], "index")
    txt, t = torch.randn(batch, 7, samples.CONTEXT), torch.tensor(0.62)
    with torch.no_grad():
        expected = theirs(
            hidden_states=torch.cat([target.values, *(one.values for one in placed)], dim=1),
            encoder_hidden_states=txt,
            timestep=t.expand(batch),
            img_ids=torch.cat([target.ids, *(one.ids for one in placed)]),
            txt_ids=text_ids(7, FLUX2_LATENT),
            guidance=torch.full((batch,), 3.5) if guided else None,
        ).sample[:, : target.values.shape[1]]
        conditioning = Conditioning(
            text=TextFeatures(txt=txt, pooled=None),
            references=tuple(Reference(tokens=one) for one in placed),
            guidance=3.5 if guided else None,
        )
        sigma = float(t)
        plan = ours.plan(conditioning, target, [1.0, sigma, 0.0])
        found = plan.velocity(target.values, sigma)
    assert expected.std() > 0.1
    assert (found - expected).abs().max().item() <= TRANSFORMER_TOLERANCE


@pytest.mark.parametrize("guided", [True, False])
def test_the_published_signature_equals_diffusers(guided):
    ours, theirs = _both(guided)
    torch.manual_seed(3)
    img, txt, t = torch.randn(2, 24, 128), torch.randn(2, 7, samples.CONTEXT), torch.rand(2)
    img_ids, txt_ids = torch.randint(0, 40, (24, 4)), torch.randint(0, 40, (7, 4))
    guidance = torch.tensor([2.0, 4.0]) if guided else None
    with torch.no_grad():
        expected = theirs(
            hidden_states=img,
            encoder_hidden_states=txt,
            timestep=t,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
        ).sample
        found = ours(img, img_ids.float(), txt, txt_ids.float(), t, guidance=guidance)
    assert (found - expected).abs().max().item() <= TRANSFORMER_TOLERANCE


@pytest.mark.parametrize("decoder", [None, 64], ids=["published", "a decoder of its own width"])
@pytest.mark.parametrize("size", [(64, 48), (96, 80)])
def test_the_autoencoder_equals_diffusers(size, decoder):
    theirs = samples.tiny_vae(decoder=decoder)
    ours = _perturb(Autoencoder(samples.autoencoder_spec(decoder=decoder)))
    ours.bn.load_state_dict(theirs.bn.state_dict())
    theirs.load_state_dict(autoencoder_to_diffusers(ours.state_dict()), strict=True)
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, *size) * 2 - 1
    mean = theirs.bn.running_mean[None, :, None, None]
    std = torch.sqrt(theirs.bn.running_var[None, :, None, None] + theirs.config.batch_norm_eps)
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        expected = (Flux2Pipeline._patchify_latents(posterior.mode()) - mean) / std
        latent = ours.encode(pixels)
        assert latent.shape == (2, 128, size[0] // 16, size[1] // 16)
        assert (latent - expected).abs().max().item() <= AUTOENCODER_TOLERANCE
        z = Flux2Pipeline._unpatchify_latents(latent * std + mean)
        expected = theirs.decode(z).sample
        assert (ours.decode(latent) - expected).abs().max().item() <= AUTOENCODER_TOLERANCE


def test_ids_equal_diffusers_exactly():
    target, *pictures = _tokens(1, (4, 6), (3, 2), (2, 5), (7, 7))
    latents = [torch.zeros(1, 128, *tokens.grid) for tokens in (target, *pictures)]
    pipeline = Flux2Pipeline
    assert torch.equal(target.ids, pipeline._prepare_latent_ids(latents[0])[0].float())
    placed = place_references(pictures, "index")
    expected = pipeline._prepare_image_ids(latents[1:])[0].float()
    assert torch.equal(torch.cat([one.ids for one in placed]), expected)
    expected = pipeline._prepare_text_ids(torch.zeros(1, 512, 8))[0].float()
    assert torch.equal(text_ids(512, FLUX2_LATENT), expected)


def test_a_model_without_guidance_has_no_weights_for_it():
    spec = samples.transformer_spec(guided=True)
    with_input = build_flux(FLUX2_DEV, spec).modulation.state_dict()
    without = build_flux(FLUX2_DEV, replace(spec, has_guidance=False)).modulation.state_dict()
    assert with_input.keys() - without.keys() == {
        "guidance_in.in_layer.weight",
        "guidance_in.out_layer.weight",
    }
