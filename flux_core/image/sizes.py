"""The image sizes that the models were trained with or accept."""

import math

from ..checks import check_reference
from ..specs import ReferenceSize

PREFERRED_KONTEXT_SIZES = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)
"""Widths and heights that FLUX.1 Kontext was trained with."""


def preferred_size(width: int, height: int) -> tuple[int, int]:
    """Returns the trained size of Kontext whose aspect, width / height, is nearest.

    Args:
        width, height: of the image, in pixels.

    Returns:
        (width, height); the narrower of two equally near.

    Source: black-forest-labs/flux@802fb47 src/flux/sampling.py prepare_kontext.
    """
    aspect = width / height
    _, best_width, best_height = min(
        (abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_SIZES
    )
    return best_width, best_height


def reference_size(
    height: int, width: int, rule: ReferenceSize
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the size of an image as a reference.

    Args:
        height, width: of the image, in pixels.
        rule: the model's rule for references.

    Returns:
        The (height, width) it is scaled to, its own if it is small enough; and the (height, width)
        it is then cropped to, multiples of rule.multiple.

    Raises:
        ShapeError: the image is too small or too long.

    Source: black-forest-labs/flux2@ab7cca6 src/flux2/sampling.py; huggingface/diffusers@0.42.1
    pipelines/flux2/image_processor.py _resize_to_target_area.
    """
    check_reference(height, width, rule, "The picture")
    scaled = (height, width)
    if height * width > rule.most_px:
        scale = math.sqrt(rule.most_px / (width * height))
        scaled = (int(height * scale), int(width * scale))
    return scaled, floor_size(*scaled, rule.multiple)


def floor_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Returns height and width rounded down to multiples, at least one."""
    return max(1, height // multiple) * multiple, max(1, width // multiple) * multiple
