"""The transformer and the autoencoder against diffusers, same tiny random weights, fp32."""

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from glassbox.flux_core.families import FLUX1_KONTEXT, FLUX1_LATENT
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.specs import AutoencoderSpec, TransformerSpec
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.weights.autoencoder_keys import to_diffusers as autoencoder_to_diffusers
from glassbox.flux_core.weights.transformer_keys import to_diffusers as transformer_to_diffusers

TRANSFORMER_TOLERANCE = 5e-6
AUTOENCODER_TOLERANCE = 2e-5


def _perturb(module):
    """Default initialisation leaves zeros and ones, which hide wrong wiring."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def _spec(guided):
    return TransformerSpec(
        hidden=32,
        double_blocks=2,
        single_blocks=3,
        mlp_ratio=4.0,
        in_channels=64,
        out_channels=64,
        context_width=48,
        pooled_width=32,
        has_guidance=guided,
        axes_dim=(4, 6, 6),
        theta=10_000.0,
    )


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_transformer_equals_diffusers(guided, batch):
    torch.manual_seed(batch)
    ours = _perturb(build_flux(FLUX1_KONTEXT, _spec(guided)))
    theirs = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=guided,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    state = {**ours.modulation.state_dict(), **ours.blocks.state_dict()}
    theirs.load_state_dict(transformer_to_diffusers(state), strict=True)

    img, txt = torch.randn(batch, 24, 64), torch.randn(batch, 7, 48)
    img_ids, txt_ids = torch.randint(0, 40, (24, 3)).float(), torch.zeros(7, 3)
    t, pooled = torch.rand(batch), torch.randn(batch, 32)
    guidance = torch.full((batch,), 2.5) if guided else None
    with torch.no_grad():
        expected = theirs(
            hidden_states=img,
            encoder_hidden_states=txt,
            pooled_projections=pooled,
            timestep=t,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
        ).sample
        found = ours(img, img_ids, txt, txt_ids, t, pooled, guidance)
    assert (found - expected).abs().max().item() <= TRANSFORMER_TOLERANCE


@pytest.mark.parametrize("size", [(64, 48), (96, 80)])
def test_the_autoencoder_equals_diffusers(size):
    torch.manual_seed(0)
    spec = AutoencoderSpec(
        channels=32, channel_mult=(1, 2, 2, 2), res_blocks=2, norm_groups=32, latent=FLUX1_LATENT
    )
    ours = _perturb(Autoencoder(spec))
    theirs = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    ).eval()
    theirs.load_state_dict(autoencoder_to_diffusers(ours.state_dict()), strict=True)
    pixels = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        mode = ours.encode(pixels)
        assert (mode - posterior.mode()).abs().max().item() <= AUTOENCODER_TOLERANCE
        sampled = ours.encode(pixels, generator=torch.Generator().manual_seed(3))
        expected = posterior.sample(torch.Generator().manual_seed(3))
        assert (sampled - expected).abs().max().item() <= AUTOENCODER_TOLERANCE
        decoded = theirs.decode(mode).sample
        assert (ours.decode(mode) - decoded).abs().max().item() <= AUTOENCODER_TOLERANCE
