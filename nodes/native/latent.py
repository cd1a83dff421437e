"""ComfyUI's own LATENT on our token sockets: packed as Pack Latent does."""

from typing import Any, TypeAlias

from torch import Tensor

from ...flux_core.checks import check_finite
from ...flux_core.errors import FamilyMismatchError, SettingError
from ...flux_core.families import FLUX1_LATENT, FLUX2_LATENT
from ...flux_core.specs import LatentSpec
from ...flux_core.tokens.pack import latent_tokens
from ...flux_core.values import Tokens
from .. import host

AnyTokens: TypeAlias = Tokens | Any  # the other is ComfyUI's LATENT


def is_latent(value: object) -> bool:
    """Whether a value on a wire is a LATENT."""
    return isinstance(value, dict) and hasattr(value.get("samples"), "shape")


def as_tokens(tokens: AnyTokens, autoencoder: LatentSpec | None = None) -> Tokens:
    """Returns the tokens wired to a socket: tokens as they are, a LATENT packed as a target.

    Args:
        tokens: what is wired.
        autoencoder: the latent format of the model, if known; else the channels tell it.

    Raises:
        FamilyMismatchError: the latent is not FLUX's.
        ShapeError: its sides do not divide into tokens.
        SettingError: it carries what tokens cannot, such as a noise mask, or is not a latent.
    """
    if isinstance(tokens, Tokens):
        return tokens
    if not is_latent(tokens):
        raise SettingError(
            f"A {type(tokens).__name__} is wired where tokens go.",
            "tokens, or a LATENT.",
            "wire 'Noise (FLUX)', 'Encode and Pack (FLUX)' or a node that gives a LATENT.",
        )
    samples = host.latent_samples(tokens)
    spec = latent_spec(samples, autoencoder)
    check_finite(samples, "latent input")
    return latent_tokens(samples, spec)


def latent_spec(samples: Tensor, autoencoder: LatentSpec | None = None) -> LatentSpec:
    """Returns the format of a latent (B, C, h, w), by its channels.

    Raises:
        FamilyMismatchError: the latent is not FLUX's.
    """
    channels = samples.shape[1] if len(samples.shape) == 4 else 0
    known = [FLUX1_LATENT, FLUX2_LATENT]
    for spec in known if autoencoder is None else [autoencoder, *known]:
        if spec.channels == channels:
            return spec
    raise FamilyMismatchError(
        f"The latent has shape {tuple(samples.shape)}.",
        " or ".join(f"{one.name}'s, with {one.channels} channels" for one in known) + ".",
        "encode the picture with FLUX's VAE, or in 'Encode and Pack (FLUX)'; an empty one comes "
        "from 'Noise (FLUX)', or ComfyUI's 'EmptySD3LatentImage' or 'Empty Flux 2 Latent'.",
    )
