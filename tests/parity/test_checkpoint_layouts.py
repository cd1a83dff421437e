"""Folders that diffusers writes itself: every key is used, and the loaded modules agree."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from glassbox.flux_core.weights import autoencoder_keys, transformer_keys
from glassbox.flux_core.weights.load import load_autoencoder, load_flux
from glassbox.tests.core.checkpoints import randomise, same


def tiny_transformer(*, guidance: bool) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(16, 56, 56),
    )
    randomise(transformer)
    return transformer.eval()


def tiny_autoencoder() -> AutoencoderKL:
    autoencoder = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    randomise(autoencoder)
    return autoencoder.eval()


@torch.no_grad()
def test_a_transformer_folder_in_shards_loads_and_computes_the_same(tmp_path: Path) -> None:
    for guidance in (True, False):
        folder = tmp_path / f"FLUX.1-{guidance}" / "transformer"
        theirs = tiny_transformer(guidance=guidance)
        theirs.save_pretrained(folder, max_shard_size="4MB")
        ours, report = load_flux(folder)
        assert report.files > 1
        state = ours.modulation.state_dict() | ours.blocks.state_dict()
        assert same(transformer_keys.to_diffusers(state), theirs.state_dict())
        generator = torch.Generator().manual_seed(1)
        img = torch.randn(2, 12, 64, generator=generator)
        txt = torch.randn(2, 5, 48, generator=generator)
        pooled = torch.randn(2, 32, generator=generator)
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))
        time, strength = torch.tensor([0.7, 0.3]), torch.tensor([2.5, 3.5])
        wanted = theirs(
            hidden_states=img,
            encoder_hidden_states=txt,
            pooled_projections=pooled,
            timestep=time,
            img_ids=ids,
            txt_ids=torch.zeros(5, 3),
            guidance=strength if guidance else None,
            return_dict=False,
        )[0]
        found = ours(img, ids, txt, torch.zeros(5, 3), time, pooled, strength)
        assert (found - wanted).abs().max() < 5e-6 * max(1.0, float(wanted.abs().max()))


@torch.no_grad()
def test_an_autoencoder_folder_loads_and_computes_the_same(tmp_path: Path) -> None:
    theirs = tiny_autoencoder()
    theirs.save_pretrained(tmp_path / "vae")
    ours, _ = load_autoencoder(tmp_path / "vae")
    assert same(autoencoder_keys.to_diffusers(ours.state_dict()), theirs.state_dict())
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = theirs.encode(pixels).latent_dist.mode()
    assert (ours.encode(pixels) - latent).abs().max() < 2e-5
    assert (ours.decode(latent) - theirs.decode(latent).sample).abs().max() < 2e-5
