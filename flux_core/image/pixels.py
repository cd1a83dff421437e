"""ComfyUI's IMAGE to the autoencoder's pixels and back."""

from torch import Tensor

from ..checks import check_finite
from ..errors import ShapeError
from ..types import Image

_CHANNEL_FIX = {
    4: "take the alpha channel off with 'Split Image with Alpha', and wire its image output.",
    1: "make three channels of the grey one, for example with 'Convert Mask to Image'.",
}


def check_image(image: Image) -> None:
    """Checks that an image is a batch of colour images.

    Raises:
        ShapeError: it is not (B, H, W, 3), or empty.
        NonFiniteError: it holds NaN or infinity.
    """
    if image.ndim != 4 or 0 in image.shape:
        raise ShapeError(
            f"The picture has shape {tuple(image.shape)}.",
            "(batch, height, width, 3), none of them 0.",
            "wire the image output of a node that loads or makes pictures.",
        )
    channels = image.shape[3]
    if channels != 3:
        kind = {4: " (colour and alpha)", 1: " (grey)"}.get(channels, "")
        raise ShapeError(
            f"The picture has {channels} channels{kind}.",
            "3: red, green and blue.",
            _CHANNEL_FIX.get(channels, "convert it to RGB first."),
        )
    check_finite(image, "picture", "look at the node that made it.")


def to_pixels(image: Image) -> Tensor:
    """Converts an image to the autoencoder's input.

    Args:
        image: (B, H, W, 3) in 0..1.

    Returns:
        (B, 3, H, W) in -1..1, float32, same device.

    Raises:
        ShapeError: it does not have three channels.

    Source: huggingface/diffusers@0.42.1 image_processor.py normalize.
    """
    check_image(image)
    return (image.float() * 2.0 - 1.0).permute(0, 3, 1, 2).contiguous()


def to_image(pixels: Tensor) -> Image:
    """Converts the autoencoder's output to an image.

    Args:
        pixels: (B, 3, H, W) in about -1..1.

    Returns:
        (B, H, W, 3) clamped to 0..1, float32, same device.

    Raises:
        ShapeError: it does not have three channels.

    Source: huggingface/diffusers@0.42.1 image_processor.py denormalize.
    """
    if pixels.ndim != 4:
        raise ShapeError(
            f"The pixels have shape {tuple(pixels.shape)}.",
            "(batch, 3, height, width).",
            "pass in what the autoencoder decoded.",
        )
    image = (pixels.float() * 0.5 + 0.5).clamp(0.0, 1.0).permute(0, 2, 3, 1)
    check_image(image)
    return image.contiguous()
