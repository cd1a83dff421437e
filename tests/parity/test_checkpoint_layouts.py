"""Folders that diffusers writes itself: every key is used, and the loaded modules agree."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
)
from torch import Tensor

from glassbox.flux_core.families import (
    FLUX2_AUTOENCODER,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    FLUX2_SMALL_DECODER,
)
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.specs import AutoencoderSpec, FluxFamily
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.weights import autoencoder_keys, transformer_keys
from glassbox.flux_core.weights.key_map import shapes_of
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


def flux2_transformer(*, guidance: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=48,
        guidance_embeds=guidance,
        axes_dims_rope=(32, 32, 32, 32),
        rope_theta=2000,
    )
    randomise(transformer)
    return transformer.eval()


@torch.no_grad()
@pytest.mark.parametrize("guidance", [True, False])
def test_a_flux2_transformer_folder_in_shards_loads_and_computes_the_same(
    tmp_path: Path, guidance: bool
) -> None:
    folder = tmp_path / f"FLUX.2-{guidance}" / "transformer"
    theirs = flux2_transformer(guidance=guidance)
    theirs.save_pretrained(folder, max_shard_size="9MB")
    ours, report = load_flux(folder)
    assert report.files > 1
    state = ours.modulation.state_dict() | ours.blocks.state_dict()
    assert same(transformer_keys.to_diffusers(state), theirs.state_dict())
    generator = torch.Generator().manual_seed(1)
    img = torch.randn(2, 12, 128, generator=generator)
    txt = torch.randn(2, 5, 48, generator=generator)
    axes = torch.zeros(1), torch.arange(3.0), torch.arange(4.0), torch.zeros(1)
    img_ids = torch.cartesian_prod(*axes)
    txt_ids = torch.cartesian_prod(
        torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.arange(5.0)
    )
    time, strength = torch.tensor([0.7, 0.3]), torch.tensor([2.5, 3.5])
    wanted = theirs(
        hidden_states=img,
        encoder_hidden_states=txt,
        timestep=time,
        img_ids=img_ids,
        txt_ids=txt_ids,
        guidance=strength if guidance else None,
        return_dict=False,
    )[0]
    found = ours(img, img_ids, txt, txt_ids, time, None, strength)
    assert wanted.std() > 0.01
    assert (found - wanted).abs().max() < 5e-6 * max(1.0, float(wanted.abs().max()))


def flux2_autoencoder(decoder: tuple[int, ...] | None) -> AutoencoderKLFlux2:
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(32, 64, 128, 128),
        decoder_block_out_channels=decoder,
        layers_per_block=2,
        latent_channels=32,
        norm_num_groups=32,
    )
    randomise(autoencoder)
    generator = torch.Generator().manual_seed(3)
    autoencoder.bn.running_mean.copy_(torch.randn(128, generator=generator))
    autoencoder.bn.running_var.copy_(torch.rand(128, generator=generator) * 3 + 0.1)
    return autoencoder.eval()


def published_latent(autoencoder: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """Encode as diffusers' pipelines do: patched and normalised outside the autoencoder."""
    patched = F.pixel_unshuffle(autoencoder.encode(pixels).latent_dist.mode(), 2)
    mean, variance = autoencoder.bn.running_mean, autoencoder.bn.running_var
    size = torch.sqrt(variance + autoencoder.config.batch_norm_eps)
    return (patched - mean.view(1, -1, 1, 1)) / size.view(1, -1, 1, 1)


def published_picture(autoencoder: AutoencoderKLFlux2, latent: Tensor) -> Tensor:
    mean, variance = autoencoder.bn.running_mean, autoencoder.bn.running_var
    size = torch.sqrt(variance + autoencoder.config.batch_norm_eps)
    patched = latent * size.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    return autoencoder.decode(F.pixel_shuffle(patched, 2)).sample


@torch.no_grad()
@pytest.mark.parametrize("decoder", [None, (64, 128, 256, 256)], ids=["as encoder", "other width"])
def test_a_flux2_autoencoder_folder_loads_and_computes_the_same(
    tmp_path: Path, decoder: tuple[int, ...] | None
) -> None:
    theirs = flux2_autoencoder(decoder)
    theirs.save_pretrained(tmp_path / "vae")
    ours, report = load_autoencoder(tmp_path / "vae")
    assert report.title == "The autoencoder of FLUX.2"
    assert same(autoencoder_keys.to_diffusers(ours.state_dict()), theirs.state_dict())
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = published_latent(theirs, pixels)
    assert latent.shape == (1, 128, 2, 3)
    assert (ours.encode(pixels) - latent).abs().max() < 2e-5
    assert (ours.decode(latent) - published_picture(theirs, latent)).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("family", "tensors", "parameters"),
    [
        (FLUX2_DEV, 299, 32_223_281_152),
        (FLUX2_KLEIN_9B, 201, 9_078_581_248),
        (FLUX2_KLEIN_4B, 149, 3_875_544_576),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_published_size_of_a_flux2_transformer_has_all_of_diffusers_keys(
    family: FluxFamily, tensors: int, parameters: int
) -> None:
    spec = family.transformer
    with torch.device("meta"):
        theirs = Flux2Transformer2DModel(
            num_layers=spec.double_blocks,
            num_single_layers=spec.single_blocks,
            num_attention_heads=spec.heads,
            joint_attention_dim=spec.context_width,
            guidance_embeds=spec.has_guidance,
        )
    network = build_flux(family, device="meta")
    ours = shapes_of(network.modulation) | shapes_of(network.blocks)
    published = shapes_of(theirs)
    assert len(ours) == tensors
    assert sum(torch.Size(shape).numel() for shape in published.values()) == parameters
    meta = {key: torch.empty(shape, device="meta") for key, shape in ours.items()}
    split = transformer_keys.to_diffusers(meta)
    assert {key: tuple(tensor.shape) for key, tensor in split.items()} == published
    key_map = transformer_keys.transformer_key_map(published)
    assert key_map is not None
    assert key_map.unused == ()
    assert key_map.shapes(published) == ours


@pytest.mark.parametrize(
    ("spec", "decoder"),
    [(FLUX2_AUTOENCODER, None), (FLUX2_SMALL_DECODER, (96, 192, 384, 384))],
    ids=["full", "small decoder"],
)
def test_the_published_size_of_flux2s_autoencoder_has_all_of_diffusers_keys(
    spec: AutoencoderSpec, decoder: tuple[int, ...] | None
) -> None:
    with torch.device("meta"):
        theirs = AutoencoderKLFlux2(decoder_block_out_channels=decoder)
    published = shapes_of(theirs)
    assert len(published) == 251
    key_map = autoencoder_keys.autoencoder_key_map(published)
    assert key_map is not None
    assert key_map.unused == ()
    assert key_map.shapes(published) == shapes_of(Autoencoder(spec, device="meta"))
