"""Tiny FLUX.2 models of diffusers, with random weights that leave no wiring untested."""

import diffusers
import numpy as np
import torch
from PIL import Image as PILImage

from glassbox.flux_core.families import FLUX2_AUTOENCODER, FLUX2_DEV
from glassbox.flux_core.specs import AutoencoderSpec, TransformerSpec
from glassbox.tests.parity import text_samples as samples

CONTEXT = 96
AXES = (4, 4, 4, 4)
HIDDEN, DOUBLE, SINGLE = 32, 2, 3
WIDTH, MULTIPLES = 32, (1, 2, 2, 2)


def tiny_transformer(*, guided: bool, seed: int = 5) -> diffusers.Flux2Transformer2DModel:
    return samples.perturb(
        lambda: diffusers.Flux2Transformer2DModel(
            in_channels=128,
            num_layers=DOUBLE,
            num_single_layers=SINGLE,
            attention_head_dim=sum(AXES),
            num_attention_heads=HIDDEN // sum(AXES),
            joint_attention_dim=CONTEXT,
            axes_dims_rope=AXES,
            rope_theta=2000,
            guidance_embeds=guided,
        ),
        seed=seed,
    )


def transformer_spec(*, guided: bool) -> TransformerSpec:
    return TransformerSpec(
        hidden=HIDDEN,
        double_blocks=DOUBLE,
        single_blocks=SINGLE,
        mlp_ratio=3.0,
        in_channels=128,
        out_channels=128,
        context_width=CONTEXT,
        pooled_width=0,
        has_guidance=guided,
        axes_dim=AXES,
        theta=FLUX2_DEV.transformer.theta,
        has_bias=False,
        is_gated=True,
        shares_modulation=True,
    )


def tiny_vae(*, decoder: int | None = None) -> diffusers.AutoencoderKLFlux2:
    vae = samples.perturb(
        lambda: diffusers.AutoencoderKLFlux2(
            block_out_channels=tuple(WIDTH * multiple for multiple in MULTIPLES),
            decoder_block_out_channels=decoder and tuple(decoder * one for one in MULTIPLES),
            layers_per_block=2,
            latent_channels=32,
            norm_num_groups=32,
        ),
        seed=6,
    )
    draw = torch.Generator().manual_seed(7)
    vae.bn.running_mean.copy_(torch.randn(128, generator=draw))
    vae.bn.running_var.copy_(0.2 + torch.rand(128, generator=draw))
    return vae


def autoencoder_spec(*, decoder: int | None = None) -> AutoencoderSpec:
    return AutoencoderSpec(
        channels=WIDTH,
        channel_mult=MULTIPLES,
        res_blocks=2,
        norm_groups=32,
        latent=FLUX2_AUTOENCODER.latent,
        decoder_channels=decoder,
        patch=2,
    )


def picture(width: int, height: int) -> PILImage.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PILImage.fromarray(values)
