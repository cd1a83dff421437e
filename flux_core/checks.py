"""Checks of inputs that several stages share."""

import torch
from torch import Tensor

from .errors import FamilyMismatchError, NonFiniteError, ShapeError
from .specs import LatentSpec, ReferenceSize

_LOOK_BEFORE = (
    "look at the node that made it; float16 overflows on some models and devices: load them as "
    "bfloat16 or float32."
)


def check_finite(values: Tensor, name: str, fix: str = _LOOK_BEFORE) -> None:
    """Checks a tensor for NaN and infinity.

    Args:
        values: any tensor.
        name: what it is, for the message.
        fix: what to change.

    Raises:
        NonFiniteError: there are some.
    """
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NonFiniteError(
            f"The {name} holds {bad} values that are NaN or infinite, of {values.numel()}.",
            "finite values.",
            fix,
        )


def check_latent(found: LatentSpec, needed: LatentSpec, name: str) -> None:
    """Checks that tokens and a model or an autoencoder have the same latent.

    Raises:
        FamilyMismatchError: they have different ones.
    """
    if found != needed:
        raise FamilyMismatchError(
            f"The {name} input holds {found.name} tokens.",
            f"{needed.name} tokens.",
            "use one family throughout: in [model loader], [autoencoder loader] and "
            "[latent_format], or take all parts from one [nano loader].",
        )


def check_sides(height_px: int, width_px: int, spec: LatentSpec) -> None:
    """Checks that an image divides into tokens.

    Raises:
        ShapeError: a side is not a multiple of spec.token_px.
    """
    if height_px % spec.token_px or width_px % spec.token_px:
        raise ShapeError(
            f"The picture is {width_px}x{height_px}.",
            f"sides that are multiples of {spec.token_px} px.",
            "bring the image to size with [image fit].",
        )


def check_reference(
    height_px: int, width_px: int, rule: ReferenceSize, name: str, *, cropped_px: int = 0
) -> None:
    """Checks that an image is a legal reference.

    Args:
        height_px, width_px: of the image.
        rule: the model's rule for references.
        name: of the image, as the beginning of a sentence.
        cropped_px: what may have been cropped off its short side since it was legal.

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
        "crop it, or set [fit size] to exact and [fit method] to pad.",
    )
