"""Which sizes the models want pictures in."""

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
"""Width and height Kontext was trained at."""


def preferred_size(width: int, height: int) -> tuple[int, int]:
    """Pick the trained Kontext size whose width / height is nearest.

    Args:
        width, height: of the picture, in pixels.

    Returns:
        (width, height); of two equally near the narrower one.

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
    """Say how large a picture becomes as a reference.

    Args:
        height, width: of the picture, in pixels.
        rule: what the model takes.

    Returns:
        (height, width) it is scaled to, its own when it is small enough; and (height, width) it is
        then cropped to, multiples of rule.multiple.

    Raises:
        ShapeError: the model takes no such picture.

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
    """Give the next multiples at or below (height, width), at least one."""
    return max(1, height // multiple) * multiple, max(1, width // multiple) * multiple
