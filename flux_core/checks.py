"""Checks at the boundary that several stages share."""

import torch
from torch import Tensor

from .errors import FamilyMismatchError, NonFiniteError, ShapeError
from .specs import LatentSpec

_LOOK_BEFORE = (
    "look at the node that made it; float16 overflows on some models and devices: load them as "
    "bfloat16 or float32."
)


def check_finite(values: Tensor, name: str, fix: str = _LOOK_BEFORE) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: `name` holds some; `fix` says what to change.
    """
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NonFiniteError(
            f"The {name} holds {bad} values that are NaN or infinite, of {values.numel()}.",
            "finite values.",
            fix,
        )


def check_latent(found: LatentSpec, needed: LatentSpec, name: str) -> None:
    """Refuse tokens or an autoencoder of another latent.

    Raises:
        FamilyMismatchError: they do not belong together.
    """
    if found != needed:
        raise FamilyMismatchError(
            f"The {name} input holds {found.name} tokens.",
            f"{needed.name} tokens.",
            "use the model, the autoencoder and the latent format of one family.",
        )


def check_sides(height_px: int, width_px: int, spec: LatentSpec) -> None:
    """Refuse a picture that does not divide into tokens.

    Raises:
        ShapeError: a side is no multiple of spec.token_px.
    """
    if height_px % spec.token_px or width_px % spec.token_px:
        raise ShapeError(
            f"The picture is {width_px}x{height_px}.",
            f"sides that are multiples of {spec.token_px} px.",
            "put 'Fit Image (FLUX)' before it.",
        )
