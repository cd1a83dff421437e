"""Noise: seeded, device independent, drawn as ComfyUI and diffusers draw it."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from glassbox.flux_core.errors import SettingError, ShapeError
from glassbox.flux_core.families import FLUX1_LATENT
from glassbox.flux_core.sampling.noise import make_noise
from glassbox.flux_core.tokens.pack import pack_latent, tokens_latent


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_noise_is_comfyuis_bit_for_bit(seed: int, batch: int) -> None:
    """comfy/sample.py prepare_noise: seed the global CPU generator, draw the latent's shape."""
    generator = torch.manual_seed(seed)
    theirs = torch.randn((batch, 16, 12, 8), generator=generator, device="cpu")
    assert torch.equal(tokens_latent(make_noise(FLUX1_LATENT, 96, 64, seed, batch)), theirs)


def test_noise_is_diffusers_bit_for_bit() -> None:
    theirs = randn_tensor(
        (2, 16, 12, 8), generator=torch.Generator().manual_seed(5), dtype=torch.float32
    )
    ours = make_noise(FLUX1_LATENT, 96, 64, 5, 2)
    assert torch.equal(ours.values, pack_latent(theirs, FLUX1_LATENT))


def test_noise_is_placed_as_a_target() -> None:
    noise = make_noise(FLUX1_LATENT, 96, 64, 1)
    assert noise.values.shape == (1, 24, 64)
    assert noise.values.dtype == torch.float32
    assert noise.grid == (6, 4)
    assert noise.ids[0].tolist() == [0.0, 0.0, 0.0]
    assert noise.ids[-1].tolist() == [0.0, 5.0, 3.0]
    assert noise.latent is FLUX1_LATENT


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    make_noise(FLUX1_LATENT, 64, 64, 9)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("height", "width"), [(100, 64), (64, 8), (0, 64), (64, -16)])
def test_an_illegal_size_names_a_legal_one(height: int, width: int) -> None:
    with pytest.raises(ShapeError, match=r"multiples of 16 px.*such as") as caught:
        make_noise(FLUX1_LATENT, height, width, 0)
    assert caught.value.settings == ("width", "height", "image fit")


def test_seed_and_batch_out_of_range_are_refused() -> None:
    for seed in (-1, 2**64):
        with pytest.raises(SettingError) as caught:
            make_noise(FLUX1_LATENT, 64, 64, seed)
        assert caught.value.settings == ("seed",)
    with pytest.raises(SettingError, match="batch_size is 0") as caught:
        make_noise(FLUX1_LATENT, 64, 64, 0, 0)
    assert caught.value.settings == ("batch_size",)
