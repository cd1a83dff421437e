"""ComfyUI's own VAE on our autoencoder socket.

`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

from typing import Any, TypeAlias

import torch

from ...flux_core.checks import check_finite, check_latent, check_sides
from ...flux_core.errors import FamilyMismatchError, SettingError
from ...flux_core.families import FLUX1_LATENT, FLUX2_LATENT
from ...flux_core.image.pixels import check_image
from ...flux_core.specs import LatentSpec
from ...flux_core.types import Image, Latent
from .. import host
from ..runtime.handles import AutoencoderHandle

_OVERFLOW = "look at the node that made the tokens, or start ComfyUI with --fp32-vae."
_LOAD = "load ae.safetensors or flux2-vae.safetensors with 'Load VAE'."
_MODULE = "comfy.ldm.models.autoencoder"

AnyAutoencoder: TypeAlias = AutoencoderHandle | Any  # the other is ComfyUI's VAE


def as_autoencoder(autoencoder: AnyAutoencoder) -> "AutoencoderHandle | NativeAutoencoder":
    """Returns the autoencoder that is wired: this pack's own, or a native VAE."""
    if isinstance(autoencoder, AutoencoderHandle):
        return autoencoder
    return NativeAutoencoder(autoencoder)


class NativeAutoencoder:
    """A native VAE. ComfyUI loads it, splits batches, and falls back to tiles in little memory.

    Raises:
        FamilyMismatchError: its latents are not FLUX's.
    """

    def __init__(self, vae: Any) -> None:
        self.vae, self.latent = vae, _latent(vae)

    def encode(self, image: Image, generator: torch.Generator | None) -> Latent:
        """Encodes images (B, H, W, 3) to latents in the convention of ComfyUI's LATENT.

        Raises:
            ShapeError: channels or sides do not fit.
            SettingError: a generator is given, which a native VAE cannot use.
        """
        if generator is not None:
            raise SettingError(
                "posterior is 'sample', and the autoencoder is ComfyUI's own VAE.",
                "posterior 'mode', the only one a native VAE has.",
                "set posterior to 'mode', or load the file with [autoencoder loader].",
            )
        check_image(image)
        check_sides(image.shape[1], image.shape[2], self.latent)
        host.stop_if_cancelled()
        return host.to_outputs(self.vae.encode(image).float())

    def decode(self, latent: Latent, spec: LatentSpec) -> Image:
        """Decodes latents to images (B, H, W, 3) in 0..1.

        Raises:
            FamilyMismatchError: the latent is another autoencoder's.
            NonFiniteError: the VAE overflowed.
        """
        check_latent(spec, self.latent, "tokens")
        host.stop_if_cancelled()
        image = self.vae.decode(latent).float()
        check_finite(image, "decoded picture", _OVERFLOW)
        return host.to_outputs(image)


def _latent(vae: Any) -> LatentSpec:
    """Returns the latent spec of FLUX's VAEs, recognised by class and latent shape."""
    kind: type[object] = type(vae.first_stage_model)
    if all(one.__module__ != _MODULE for one in kind.__mro__):
        found = "empty" if vae.first_stage_model is None else f"a {kind.__name__}"
        raise FamilyMismatchError(f"The VAE is {found}.", "FLUX's own autoencoder.", _LOAD)
    shape = (vae.latent_dim, vae.latent_channels, vae.spacial_compression_encode())
    for latent in (FLUX1_LATENT, FLUX2_LATENT):
        if shape == (2, latent.channels, latent.downscale):
            return latent
    raise FamilyMismatchError(
        f"The VAE's latents have {shape[1]} channels, 1/{shape[2]} of the picture's size.",
        "FLUX.1's, 16 channels at 1/8, or FLUX.2's, 128 at 1/16.",
        _LOAD,
    )
