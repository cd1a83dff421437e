"""Fitting a picture to a legal size, and undoing it."""

import random

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

from glassbox.flux_core.errors import SettingError, ShapeError
from glassbox.flux_core.image.fit import centre_crop, fit_image, keep_size, undo_fit
from glassbox.flux_core.image.sizes import PREFERRED_KONTEXT_SIZES, preferred_size

METHODS = ["pad", "crop", "stretch"]


def noise_picture(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(height))


def smooth_picture(height: int, width: int) -> Tensor:
    """A picture with one bright blob off its centre; its place can be measured."""
    rows = torch.linspace(-1, 1, height)[:, None] + 0.3
    columns = torch.linspace(-1, 1, width)[None, :] - 0.2
    blob = torch.exp(-8 * (rows**2 + columns**2))
    return blob[None, ..., None].expand(1, height, width, 3).contiguous()


def blob_place(image: Tensor) -> tuple[float, float]:
    """Centre of mass, as fractions of the height and width."""
    mass = image[0, ..., 0].double()
    height, width = mass.shape
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    total = mass.sum()
    return float((mass.sum(1) * rows).sum() / total), float((mass.sum(0) * columns).sum() / total)


def test_preferred_sizes_are_those_kontext_was_trained_at() -> None:
    assert len(PREFERRED_KONTEXT_SIZES) == 17
    assert all(w % 16 == 0 and h % 16 == 0 for w, h in PREFERRED_KONTEXT_SIZES)
    for size in PREFERRED_KONTEXT_SIZES:
        assert preferred_size(*size) == size
    assert preferred_size(1920, 1080) == (1392, 752)
    assert preferred_size(1, 1) == (1024, 1024)
    assert preferred_size(8000, 100) == (1568, 672)
    assert preferred_size(100, 8000) == (672, 1568)


def test_the_preferred_size_follows_the_published_rule_everywhere() -> None:
    draw = random.Random(0)
    for _ in range(500):
        width, height = draw.randint(1, 8000), draw.randint(1, 8000)
        aspect = width / height
        _, w, h = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_SIZES)
        assert preferred_size(width, height) == (w, h)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(64, 96), (16, 16), (1024, 672)])
def test_a_legal_picture_passes_through_bit_for_bit(method: str, size: tuple[int, int]) -> None:
    image = noise_picture(*size, batch=2)
    for fitted, fit in (fit_image(image, size, method, 16), keep_size(image, method, 16)):
        assert torch.equal(fitted, image)
        assert torch.equal(undo_fit(fitted, fit), image)
        assert fit.canvas == fit.resized == fit.original == size


def test_padding_that_keeps_the_scale_is_undone_bit_for_bit_at_every_size() -> None:
    draw = random.Random(1)
    sizes = [(64, 64), (64, 2100), (2100, 64), (1, 1), (15, 17), (1023, 1025)]
    sizes += [(draw.randint(64, 600), draw.randint(64, 600)) for _ in range(40)]
    for height, width in sizes:
        image = noise_picture(height, width)
        fitted, fit = keep_size(image, "pad", 16)
        assert fitted.shape[1] % 16 == 0
        assert fitted.shape[2] % 16 == 0
        assert 0 <= fitted.shape[1] - height < 16
        assert 0 <= fitted.shape[2] - width < 16
        assert torch.equal(undo_fit(fitted, fit), image)


@pytest.mark.parametrize("axis", [1, 2])
def test_every_side_from_64_to_2100_pads_and_crops_to_a_multiple(axis: int) -> None:
    for length in range(64, 2101):
        image = torch.rand(1, length, 16, 3) if axis == 1 else torch.rand(1, 16, length, 3)
        padded, fit = keep_size(image, "pad", 16)
        assert padded.shape[axis] == -(-length // 16) * 16
        assert torch.equal(undo_fit(padded, fit), image)
        cropped, _ = keep_size(image, "crop", 16)
        assert cropped.shape[axis] == length // 16 * 16


def test_keeping_by_crop_takes_the_centre_and_nothing_else() -> None:
    image = noise_picture(70, 45)
    fitted, fit = keep_size(image, "crop", 16)
    assert fit.crop == (3, 6, 64, 32)
    assert torch.equal(fitted, image[:, 3:67, 6:38])
    assert torch.equal(undo_fit(fitted, fit), fitted)


def test_keeping_by_stretch_goes_to_the_nearest_legal_size() -> None:
    for side, legal in ((1, 16), (16, 16), (23, 16), (24, 32), (1000, 1008), (1023, 1024)):
        fitted, fit = keep_size(noise_picture(side, 40), "stretch", 16)
        assert fitted.shape[1:3] == (legal, 48)
        assert undo_fit(fitted, fit).shape[1:3] == (side, 40)


def test_padding_repeats_the_edge_around_the_centred_picture() -> None:
    image = noise_picture(16, 32)
    fitted, fit = fit_image(image, (64, 32), "pad", 16)
    assert fit.offset == (24, 0)
    assert torch.equal(fitted[:, 24:40], image)
    assert torch.equal(fitted[:, :24], image[:, :1].expand(1, 24, 32, 3))
    assert torch.equal(fitted[:, 40:], image[:, -1:].expand(1, 24, 32, 3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("original", "size"),
    [
        ((100, 300), (128, 128)),
        ((301, 99), (64, 160)),
        ((500, 500), (96, 128)),
        ((1, 1), (64, 32)),
        ((1, 400), (64, 64)),
        ((3, 2), (48, 160)),
        ((127, 129), (128, 128)),
    ],
)
def test_the_result_has_the_size_asked_for_and_undoing_gives_the_size_back(
    original: tuple[int, int], size: tuple[int, int], method: str
) -> None:
    image = noise_picture(*original, batch=2)
    fitted, fit = fit_image(image, size, method, 16)
    assert fitted.shape == (2, *size, 3)
    assert fitted.dtype == torch.float32
    assert 0.0 <= float(fitted.min()) <= float(fitted.max()) <= 1.0
    back = undo_fit(fitted, fit)
    assert back.shape == (2, *fit.crop[2:], 3)
    if method != "crop":
        assert fit.crop == (0, 0, *original)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(128, 128), (96, 160), (160, 96)])
def test_undoing_puts_every_thing_back_where_it_was(method: str, size: tuple[int, int]) -> None:
    """Users lay the edited picture over the original: a quarter of a pixel is the most it moves."""
    image = smooth_picture(200, 300)
    fitted, fit = fit_image(image, size, method, 16)
    back = undo_fit(fitted, fit)
    top, left, rows, columns = fit.crop
    before = blob_place(image[:, top : top + rows, left : left + columns])
    after = blob_place(back)
    assert abs(before[0] - after[0]) * rows < 0.25
    assert abs(before[1] - after[1]) * columns < 0.25
    difference = (back - image[:, top : top + rows, left : left + columns]).abs()
    assert float(difference.mean()) < 0.005


def test_a_crop_is_centred_as_comfyui_centres_it() -> None:
    """comfy/utils.py common_upscale with crop "center", over many sizes."""
    draw = random.Random(2)
    for _ in range(300):
        width, height = draw.randint(16, 3000), draw.randint(16, 3000)
        target_width, target_height = draw.choice(PREFERRED_KONTEXT_SIZES)
        x = y = 0
        old, new = width / height, target_width / target_height
        if old > new:
            x = round((width - width * (new / old)) / 2)
        elif old < new:
            y = round((height - height * (old / new)) / 2)
        crop = centre_crop((height, width), (target_height, target_width))
        assert crop == (y, x, height - 2 * y, width - 2 * x)


def test_resampling_is_pillows_lanczos_without_rounding_to_8_bit() -> None:
    image = ((0.35 + 0.3 * noise_picture(60, 90)) * 255).round() / 255  # nothing to clip
    fitted, _ = fit_image(image, (48, 64), "stretch", 16)
    eight_bit = PILImage.fromarray((image[0].numpy() * 255).round().astype(np.uint8))
    theirs = np.asarray(eight_bit.resize((64, 48), PILImage.Resampling.LANCZOS)) / 255
    difference = np.abs(fitted[0].numpy() - theirs)
    assert difference.max() <= 1.5 / 255  # Pillow rounds to 8 bit after each of two passes
    assert len(fitted.unique()) > 256


def test_each_picture_of_a_batch_is_fitted_as_if_alone() -> None:
    batch = noise_picture(50, 70, batch=3)
    together, fit = fit_image(batch, (64, 64), "pad", 16)
    for number in range(3):
        alone, same = fit_image(batch[number : number + 1], (64, 64), "pad", 16)
        assert torch.equal(alone[0], together[number])
        assert same == fit


def test_half_precision_pictures_keep_their_type() -> None:
    fitted, _ = fit_image(noise_picture(50, 70).half(), (64, 64), "stretch", 16)
    assert fitted.dtype == torch.float16


def test_an_8000_pixel_picture_can_be_fitted() -> None:
    image = noise_picture(24, 8000)
    for method in METHODS:
        fitted, fit = fit_image(image, (672, 1568), method, 16)
        assert fitted.shape == (1, 672, 1568, 3)
        undo_fit(fitted, fit)
    fitted, fit = keep_size(image, "pad", 16)
    assert fitted.shape == (1, 32, 8000, 3)


def test_an_illegal_size_names_the_legal_ones_around_it() -> None:
    with pytest.raises(
        ShapeError, match=r"1000x763.*width 992 or 1008, height 752 or 768"
    ) as caught:
        fit_image(noise_picture(20, 20), (763, 1000), "pad", 16)
    assert caught.value.settings == ("fit width", "fit height")
    with pytest.raises(ShapeError, match="width 16, height 64"):
        fit_image(noise_picture(20, 20), (64, 0), "pad", 16)


def test_a_picture_too_small_to_crop_is_refused_with_the_way_out() -> None:
    with pytest.raises(ShapeError) as caught:
        keep_size(noise_picture(1, 40), "crop", 16)
    assert caught.value.settings == ("fit method",)


def test_undoing_the_fit_of_another_size_is_refused() -> None:
    _, fit = fit_image(noise_picture(50, 70), (64, 96), "pad", 16)
    with pytest.raises(ShapeError, match=r"is 64x96, but the fit made one of 96x64") as caught:
        undo_fit(noise_picture(96, 64), fit)
    assert caught.value.settings == ("image fit", "noise", "image decoding")


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures_are_refused_with_the_way_out(channels: int) -> None:
    image = torch.rand(1, 20, 20, channels)
    with pytest.raises(ShapeError, match=f"{channels} channels"):
        fit_image(image, (32, 32), "pad", 16)
    with pytest.raises(ShapeError, match=f"{channels} channels"):
        keep_size(image, "pad", 16)


def test_an_unknown_method_is_refused() -> None:
    for call in (
        lambda: fit_image(noise_picture(20, 20), (32, 32), "tile", 16),
        lambda: keep_size(noise_picture(20, 20), "tile", 16),
    ):
        with pytest.raises(SettingError) as caught:
            call()
        assert caught.value.settings == ("fit method",)
