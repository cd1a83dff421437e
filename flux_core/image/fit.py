"""Make a picture's size legal for the model, remember how, and undo it afterwards.

Every way is crop, resize, pad, in that order, with whole pixels: `Fit` holds the numbers, so
`undo_fit` can lay the edited picture over the original. A picture that is legal already passes
through bit for bit.
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
    """Bring a picture to a size.

    Args:
        image: (B, H, W, 3) in 0..1.
        size: (height, width) to reach, in pixels.
        method: "pad" scales to fit inside, centres it and repeats the edge pixels around it (a
            plain colour would put a hard edge, which the model continues, into the reference);
            "crop" cuts the centre to the target's aspect, then resizes; "stretch" resizes.
        multiple: what both sides of size have to divide by.

    Returns:
        The picture (B, *size, 3), and how to undo it.

    Raises:
        ShapeError: not a colour picture, or size does not divide.
        SettingError: an unknown method.

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
    """Bring a picture to the next legal size without touching its scale.

    Args:
        image: (B, H, W, 3) in 0..1.
        method: "pad" goes up, repeating the edge pixels evenly around it; "crop" goes down, cutting
            evenly from all sides. Neither resamples. "stretch" is the one that does: it resizes to
            the nearest legal size, up or down for each side.
        multiple: what both sides have to divide by.

    Returns:
        The picture, and how to undo it; for "pad" undoing gives every pixel back bit for bit.

    Raises:
        ShapeError: not a colour picture, or too small to crop.
        SettingError: an unknown method.
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
                "set method to pad or stretch in 'Fit Image (FLUX)'.",
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
    """Bring a picture to the size a model takes it as a reference in.

    Args:
        image: (B, H, W, 3) in 0..1.
        rule: what the model takes.
        method: "crop" is the published way: a picture with too many pixels is scaled down, then
            cropped evenly to the multiple. "pad" and "stretch" reach the same size and keep all of
            the picture.

    Returns:
        The picture, and how to undo it. For "crop" of a scaled picture `fit.crop` is what is left
        of the original, to its nearest pixel.

    Raises:
        ShapeError: not a colour picture, or one the model does not take.
        SettingError: an unknown method.

    Source: as `reference_size`.
    """
    check_image(image)
    original = (image.shape[1], image.shape[2])
    scaled, size = reference_size(*original, rule)
    if method != "crop":
        return fit_image(image, size, method, rule.multiple)
    offset = ((scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2)
    (top, rows), (left, columns) = (
        _seen(*axis) for axis in zip(original, scaled, offset, size, strict=True)
    )
    fitted = _resize(image, scaled)[
        :, offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]
    ]
    return fitted, Fit(
        original=original, crop=(top, left, rows, columns), resized=size, canvas=size
    )


def _seen(original: int, scaled: int, offset: int, size: int) -> tuple[int, int]:
    """Say which pixels of one axis are left, (first, count), when it is scaled and then cropped."""
    first = round(offset * original / scaled)
    return first, round((offset + size) * original / scaled) - first


def undo_fit(image: Image, fit: Fit) -> Image:
    """Bring an edited picture back to the size and place of the original's pixels.

    Padding is cut away and the rest resized back. What a crop cut off is not in the picture, so
    the result then has the size of the crop rectangle, `fit.crop`.

    Args:
        image: (B, *fit.canvas, 3).
        fit: of the picture that was edited.

    Returns:
        (B, fit.crop height, fit.crop width, 3).

    Raises:
        ShapeError: the picture has another size than the fitted one.
    """
    check_image(image)
    height, width = image.shape[1], image.shape[2]
    if (height, width) != fit.canvas:
        raise ShapeError(
            f"The picture is {width}x{height}, but the fit made one of "
            f"{fit.canvas[1]}x{fit.canvas[0]}.",
            "both the same size.",
            "wire width and height of the same 'Fit Image (FLUX)' to 'Noise (FLUX)', or take the "
            "fit wire off 'Unpack and Decode (FLUX)'.",
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
    row_of = down.clamp(0, fit.resized[0] - 1)  # outside: the nearest row of the picture
    column_of = across.clamp(0, fit.resized[1] - 1)
    return resized[:, row_of[:, None], column_of[None, :]]


def _resize(image: Image, size: tuple[int, int]) -> Image:
    """Resample every channel in float32 with Pillow's Lanczos filter, clamped to 0..1."""
    if (image.shape[1], image.shape[2]) == size:
        return image
    result = torch.empty(image.shape[0], *size, 3, dtype=torch.float32)
    for number, picture in enumerate(image):
        for channel in range(3):
            plane = PILImage.fromarray(picture[..., channel].float().cpu().contiguous().numpy())
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
    """Take the same number of pixels off two opposite sides, until the aspect is the target's."""
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
        "set width and height in 'Fit Image (FLUX)'.",
    )


def _legal(side: int, multiple: int) -> str:
    """Name the legal sides below and above."""
    below, above = max(1, side // multiple) * multiple, _up(side, multiple)
    return f"{below}" if below == above else f"{below} or {above}"


def _unknown(method: str) -> SettingError:
    return SettingError(
        f"The method is {method!r}.", "pad, crop or stretch.", "choose one in 'Fit Image (FLUX)'."
    )


def _up(side: int, multiple: int) -> int:
    return max(1, -(-side // multiple)) * multiple


def _nearest(side: int, multiple: int) -> int:
    return max(1, (side + multiple // 2) // multiple) * multiple
