"""Pictures to pixels and back."""

import pytest
import torch

from glassbox.flux_core.errors import ShapeError
from glassbox.flux_core.image.pixels import to_image, to_pixels


def test_pixels_lie_between_minus_one_and_one_with_channels_first() -> None:
    image = torch.rand(2, 5, 7, 3)
    pixels = to_pixels(image)
    assert pixels.shape == (2, 3, 5, 7)
    assert pixels.is_contiguous()
    assert torch.equal(pixels[1, 2], image[1, ..., 2] * 2 - 1)
    assert to_pixels(torch.zeros(1, 1, 1, 3)).unique().tolist() == [-1.0]
    assert to_pixels(torch.ones(1, 1, 1, 3)).unique().tolist() == [1.0]


def test_every_8_bit_picture_comes_back_as_it_was() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    image = levels.float() / 255
    back = to_image(to_pixels(image))
    assert torch.equal((back * 255).round().to(torch.uint8), levels)


def test_the_decoders_overshoot_is_clamped() -> None:
    pixels = torch.tensor([-1.5, 0.0, 1.5]).reshape(1, 3, 1, 1)
    assert to_image(pixels).flatten().tolist() == [0.0, 0.5, 1.0]
    assert to_image(pixels.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 4, 4, 4), r"4 channels \(colour and alpha\).*Split Image with Alpha"),
        ((1, 4, 4, 1), r"1 channels \(grey\).*Convert Mask to Image"),
        ((1, 4, 4, 2), "2 channels"),
        ((4, 4, 3), r"shape \(4, 4, 3\)"),
        ((0, 4, 4, 3), r"shape \(0, 4, 4, 3\)"),
        ((1, 0, 4, 3), r"shape \(1, 0, 4, 3\)"),
    ],
)
def test_what_is_no_colour_picture_is_refused_with_the_way_out(
    shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        to_pixels(torch.zeros(shape))


def test_pixels_without_a_batch_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 4, 4\)"):
        to_image(torch.zeros(3, 4, 4))
