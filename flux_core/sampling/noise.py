"""Seeded noise, the same on every machine."""

from dataclasses import replace

import torch

from ..errors import SettingError, ShapeError
from ..specs import LatentSpec
from ..tokens.pack import latent_tokens
from ..values import Tokens

MAX_SEED = 2**64 - 1


def make_noise(
    spec: LatentSpec, height_px: int, width_px: int, seed: int, batch: int = 1
) -> Tokens:
    """Draws noise and packs it into tokens with the position ids of a target.

    It is drawn as a latent on the CPU in float32, whatever device will compute, so it equals
    ComfyUI's (a latent of the same shape) and diffusers' (a CPU generator) bit for bit.

    Args:
        spec: the latent of the model that will sample.
        height_px, width_px: size of the image; multiples of spec.token_px.
        seed: 0..2**64 - 1.
        batch: batch size, at least 1. One draw fills the whole batch.

    Returns:
        Tokens of standard normal values (batch, N, spec.token_width), float32 on the CPU.

    Raises:
        ShapeError: a side is not a multiple of spec.token_px.
        SettingError: seed or batch is out of range.

    Source: Comfy-Org/ComfyUI@14b05228 comfy/sample.py prepare_noise; huggingface/diffusers@0.42.1
        pipelines/flux/pipeline_flux_kontext.py prepare_latents.
    """
    if batch < 1:
        raise SettingError(f"batch_size is {batch}.", "at least 1.", "set [batch_size].")
    if not 0 <= seed <= MAX_SEED:
        raise SettingError(f"The seed is {seed}.", "0 to 2**64 - 1.", "set [seed].")
    if height_px < 1 or width_px < 1 or height_px % spec.token_px or width_px % spec.token_px:
        raise ShapeError(
            f"The size is {width_px}x{height_px}.",
            f"multiples of {spec.token_px} px for {spec.name}, such as "
            f"{_nearest(width_px, spec.token_px)}x{_nearest(height_px, spec.token_px)}.",
            "set [width] and [height], or wire those of [image fit] to them.",
        )
    shape = (batch, spec.channels, height_px // spec.downscale, width_px // spec.downscale)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    latent = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    return replace(latent_tokens(latent, spec), is_noise=True)


def _nearest(side_px: int, multiple: int) -> int:
    return max(multiple, round(side_px / multiple) * multiple)
