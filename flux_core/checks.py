"""Checks at the boundary that several stages share."""

import torch
from torch import Tensor

from .errors import FamilyMismatchError, NonFiniteError, ShapeError
from .specs import LatentSpec, ReferenceSize

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
            "use one family throughout: in 'Load Model (FLUX)', 'Load Autoencoder (FLUX)' and the "
            "latent_format of 'Pack Latent (FLUX)', or take all parts from one 'Load Nano (FLUX)'.",
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


def check_reference(
    height_px: int, width_px: int, rule: ReferenceSize, name: str, *, cropped_px: int = 0
) -> None:
    """Refuse a picture that the model does not take as a reference.

    Args:
        height_px, width_px: of the picture.
        rule: what the model takes.
        name: of the picture, as the beginning of a sentence.
        cropped_px: what its short side may have lost since it was a legal picture.

    Raises:
        ShapeError: `name` is too small or too long.

    Source: black-forest-labs/flux2@ab7cca6 src/flux2/sampling.py; huggingface/diffusers@0.42.1
    pipelines/flux2/image_processor.py check_image_input.
    """
    short, long = sorted((height_px, width_px))
    least, aspect = rule.shortest_px, rule.longest_aspect
    if short >= least and long <= aspect * (short + cropped_px):
        return
    times = f"{long / short:.1f}"
    if float(times) <= aspect:
        times = f"a little more than {aspect:g}"
    found = f"{times} times as long as it is short" if short >= least else "too small"
    raise ShapeError(
        f"{name} is {width_px}x{height_px}: {found} for a reference.",
        f"sides of at least {least} px, and none longer than {aspect:g} times the other.",
        "crop it, or use 'Fit Image (FLUX)' with size exact and method pad.",
    )
