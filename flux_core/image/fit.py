"""Fits images to sizes that the models accept, and undoes it after the edit.

Every method is crop, resize, pad, in that order, with whole pixels. `Fit` holds the numbers, so
that `undo_fit` can restore the original's size and position. An image whose size is legal already
is returned bit for bit.
"""

from typing import Literal

import numpy as np
import torch
from PIL import Image as PILImage

from ..errors import SettingError, ShapeError
from ..specs import ReferenceSize
from ..types import Image
from ..values import Fit
from .pixels import check_image
from .sizes import reference_size

FitMethod = Literal["pad", "crop", "stretch"]


def fit_image(
    image: Image, size: tuple[int, int], method: FitMethod, multiple: int
) -> tuple[Image, Fit]:
    """Fits an image to a size.

    Args:
        image: (B, H, W, 3) in 0..1.
        size: (height, width) to reach, in pixels.
        method: "pad" scales to fit inside, centres, and repeats the edge pixels around it (a plain
            colour would add a hard edge to the reference, which the model continues); "crop" crops
            the centre to the target's aspect, then resizes; "stretch" resizes.
        multiple: both sides of size must be multiples of it.

    Returns:
        The image (B, *size, 3), and how to undo the fit.

    Raises:
        ShapeError: image is not a colour image, or size is not a multiple.
        SettingError: the method is unknown.

    Source: crop rectangle of Comfy-Org/ComfyUI@14b05228 comfy/utils.py common_upscale "center".
    Deviation: resampled in float32, where black-forest-labs/flux resizes 8-bit pictures.
    """
    check_image(image)
    _check_size(size, multiple)
    original = (image.shape[1], image.shape[2])
    if method == "pad":
        fit = _pad_geometry(original, size)
    elif method == "crop":
        box = centre_crop(original, size)
        fit = Fit(original=original, crop=box, resized=size, canvas=size)
    elif method == "stretch":
        fit = Fit(original=original, crop=(0, 0, *original), resized=size, canvas=size)
    else:
        raise _unknown(method)
    return _apply(image, fit), fit


def keep_size(image: Image, method: FitMethod, multiple: int) -> tuple[Image, Fit]:
    """Fits an image to the nearest legal size without changing its scale.

    Args:
        image: (B, H, W, 3) in 0..1.
        method: "pad" rounds up, repeating the edge pixels evenly around the image; "crop" rounds
            down, cropping evenly on all sides. Only "stretch" resamples: it resizes each side to
            the nearest multiple, up or down.
        multiple: both sides become multiples of it.

    Returns:
        The image, and how to undo the fit; undoing "pad" restores every pixel bit for bit.

    Raises:
        ShapeError: image is not a colour image, or too small to crop.
        SettingError: the method is unknown.
    """
    check_image(image)
    height, width = original = (image.shape[1], image.shape[2])
    whole = (0, 0, height, width)
    if method == "pad":
        canvas = (_up(height, multiple), _up(width, multiple))
        fit = Fit(
            original=original,
            crop=whole,
            resized=original,
            offset=((canvas[0] - height) // 2, (canvas[1] - width) // 2),
            canvas=canvas,
        )
    elif method == "crop":
        size = (height // multiple * multiple, width // multiple * multiple)
        if not all(size):
            raise ShapeError(
                f"The picture is {width}x{height}, with no {multiple}x{multiple} px in it to keep.",
                f"sides of at least {multiple} px to crop.",
                "set [fit method] to pad or stretch.",
            )
        box = ((height - size[0]) // 2, (width - size[1]) // 2, *size)
        fit = Fit(original=original, crop=box, resized=size, canvas=size)
    elif method == "stretch":
        size = (_nearest(height, multiple), _nearest(width, multiple))
        fit = Fit(original=original, crop=whole, resized=size, canvas=size)
    else:
        raise _unknown(method)
    return _apply(image, fit), fit


def fit_reference(image: Image, rule: ReferenceSize, method: FitMethod) -> tuple[Image, Fit]:
    """Fits an image to the size at which a model takes it as a reference.

    Args:
        image: (B, H, W, 3) in 0..1.
        rule: the model's rule for references.
        method: "crop" is the published way: an image with too many pixels is scaled down, then
            cropped evenly to the multiple. "pad" and "stretch" reach the same size with all of the
            image.

    Returns:
        The image, and how to undo the fit. For "crop" of a scaled image `fit.crop` is the part of
        the original that remains, to the nearest pixel.

    Raises:
        ShapeError: image is not a colour image, or no legal reference.
        SettingError: the method is unknown.

    Source: as `reference_size`.
    """
    check_image(image)
    original = (image.shape[1], image.shape[2])
    scaled, size = reference_size(*original, rule)
    if method != "crop":
        return fit_image(image, size, method, rule.multiple)
    offset = ((scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2)
    (top, rows), (left, columns) = (
        _cropped_axis(*axis) for axis in zip(original, scaled, offset, size, strict=True)
    )
    fitted = _resize(image, scaled)[
        :, offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]
    ]
    return fitted, Fit(
        original=original, crop=(top, left, rows, columns), resized=size, canvas=size
    )


def _cropped_axis(original: int, scaled: int, offset: int, size: int) -> tuple[int, int]:
    """Returns the pixels of one axis, (first, count), that remain after scaling and cropping."""
    first = round(offset * original / scaled)
    return first, round((offset + size) * original / scaled) - first


def undo_fit(image: Image, fit: Fit) -> Image:
    """Restores the original's size and position of an edited image.

    Padding is cut off and the rest resized back. What was cropped cannot come back, so the result
    then has the size of the crop rectangle, `fit.crop`.

    Args:
        image: (B, *fit.canvas, 3).
        fit: of the image that was edited.

    Returns:
        (B, fit.crop height, fit.crop width, 3).

    Raises:
        ShapeError: the image has another size than the fitted one.
    """
    check_image(image)
    height, width = image.shape[1], image.shape[2]
    if (height, width) != fit.canvas:
        raise ShapeError(
            f"The picture is {width}x{height}, but the fit made one of "
            f"{fit.canvas[1]}x{fit.canvas[0]}.",
            "both the same size.",
            "wire width and height of the same [image fit] to [noise], or take the fit wire off "
            "[image decoding].",
        )
    top, left = fit.offset
    rows, columns = fit.resized
    return _resize(image[:, top : top + rows, left : left + columns], fit.crop[2:])


def _apply(image: Image, fit: Fit) -> Image:
    top, left, rows, columns = fit.crop
    resized = _resize(image[:, top : top + rows, left : left + columns], fit.resized)
    if fit.resized == fit.canvas:
        return resized
    down = torch.arange(fit.canvas[0], device=image.device) - fit.offset[0]
    across = torch.arange(fit.canvas[1], device=image.device) - fit.offset[1]
    row_of = down.clamp(0, fit.resized[0] - 1)  # outside: the nearest row of the image
    column_of = across.clamp(0, fit.resized[1] - 1)
    return resized[:, row_of[:, None], column_of[None, :]]


def _resize(image: Image, size: tuple[int, int]) -> Image:
    """Resamples every channel in float32 with Pillow's Lanczos filter, clamped to 0..1."""
    if (image.shape[1], image.shape[2]) == size:
        return image
    result = torch.empty(image.shape[0], *size, 3, dtype=torch.float32)
    for number, single in enumerate(image):
        for channel in range(3):
            plane = PILImage.fromarray(single[..., channel].float().cpu().contiguous().numpy())
            resized = plane.resize((size[1], size[0]), PILImage.Resampling.LANCZOS)
            result[number, ..., channel] = torch.as_tensor(np.array(resized))
    return result.clamp_(0.0, 1.0).to(image)  # Lanczos overshoots at hard edges


def _pad_geometry(original: tuple[int, int], size: tuple[int, int]) -> Fit:
    scale = min(size[0] / original[0], size[1] / original[1])
    rows = min(size[0], max(1, round(original[0] * scale)))
    columns = min(size[1], max(1, round(original[1] * scale)))
    return Fit(
        original=original,
        crop=(0, 0, *original),
        resized=(rows, columns),
        offset=((size[0] - rows) // 2, (size[1] - columns) // 2),
        canvas=size,
    )


def centre_crop(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the centred rectangle (top, left, rows, columns) that has the target's aspect."""
    height, width = original
    aspect, target = width / height, size[1] / size[0]
    top = left = 0
    if aspect > target:
        left = min(round((width - width * (target / aspect)) / 2), (width - 1) // 2)
    elif aspect < target:
        top = min(round((height - height * (aspect / target)) / 2), (height - 1) // 2)
    return top, left, height - 2 * top, width - 2 * left


def _check_size(size: tuple[int, int], multiple: int) -> None:
    height, width = size
    if min(size) >= 1 and height % multiple == 0 and width % multiple == 0:
        return
    raise ShapeError(
        f"The size asked for is {width}x{height}.",
        f"multiples of {multiple} px: width {_legal(width, multiple)}, "
        f"height {_legal(height, multiple)}.",
        "set [fit width] and [fit height].",
    )


def _legal(side: int, multiple: int) -> str:
    """Returns the legal sides below and above, in words."""
    below, above = max(1, side // multiple) * multiple, _up(side, multiple)
    return f"{below}" if below == above else f"{below} or {above}"


def _unknown(method: str) -> SettingError:
    return SettingError(
        f"The method is {method!r}.", "pad, crop or stretch.", "choose [fit method]."
    )


def _up(side: int, multiple: int) -> int:
    return max(1, -(-side // multiple)) * multiple


def _nearest(side: int, multiple: int) -> int:
    return max(1, (side + multiple // 2) // multiple) * multiple
