"""FLUX.2's rule for references: which pictures it takes, and what becomes of larger ones."""

import random

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image as PILImage
from torch import Tensor

from glassbox.flux_core.errors import ShapeError
from glassbox.flux_core.families import (
    FLUX1_LATENT,
    FLUX2_LATENT,
    FLUX2_ONE_REFERENCE,
    FLUX2_SEVERAL_REFERENCES,
    LATENTS,
    REFERENCE_SIZES,
    TOKEN_PX,
)
from glassbox.flux_core.image.fit import fit_reference, undo_fit
from glassbox.flux_core.image.sizes import floor_size, reference_size
from glassbox.flux_core.specs import LatentSpec, Placement, ReferenceSize
from glassbox.flux_core.tokens.ids import image_ids
from glassbox.flux_core.tokens.references import check_references, place_references
from glassbox.flux_core.values import Tokens

METHODS = ["pad", "crop", "stretch"]
RULES = list(REFERENCE_SIZES.values())


def noise_picture(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(height))


def published_size(width: int, height: int, limit: int) -> tuple[int, int]:
    """Width and height that the published pipeline encodes, by its own code."""
    picture = PILImage.new("L", (width, height))
    processor = Flux2ImageProcessor()
    processor.check_image_input(picture)
    picture = processor._resize_if_exceeds_area(picture, limit)
    return picture.width // 16 * 16, picture.height // 16 * 16


def test_every_model_takes_sides_of_the_same_multiple() -> None:
    assert TOKEN_PX == 16
    assert {latent.token_px for latent in LATENTS.values()} == {TOKEN_PX}
    assert FLUX2_ONE_REFERENCE.most_px == 4_096_576
    assert FLUX2_SEVERAL_REFERENCES.most_px == 1_048_576


@pytest.mark.parametrize("rule", RULES)
def test_sizes_are_those_of_the_published_pipeline(rule: ReferenceSize) -> None:
    draw = random.Random(3)
    sizes = [(64, 64), (64, 512), (512, 64), (1024, 1024), (2024, 2024), (1025, 1024), (8000, 1000)]
    sizes += [(draw.randint(64, 5000), draw.randint(64, 5000)) for _ in range(60)]
    for width, height in sizes:
        if max(width, height) <= 8 * min(width, height):
            _, size = reference_size(height, width, rule)
            assert size[::-1] == published_size(width, height, rule.most_px), (width, height)


@pytest.mark.parametrize(
    ("width", "height"), [(1500, 1000), (1000, 1501), (700, 333), (1024, 1024), (2100, 1111)]
)
def test_cropping_gives_the_pixels_of_the_published_pipeline(width: int, height: int) -> None:
    image = ((0.35 + 0.3 * noise_picture(height, width)) * 255).round() / 255  # nothing to clip
    fitted, fit = fit_reference(image, FLUX2_SEVERAL_REFERENCES, "crop")
    picture = PILImage.fromarray((image[0].numpy() * 255).round().astype(np.uint8))
    processor = Flux2ImageProcessor()
    theirs = processor._resize_if_exceeds_area(picture, FLUX2_SEVERAL_REFERENCES.most_px)
    size = theirs.width // 16 * 16, theirs.height // 16 * 16
    theirs = np.asarray(processor._resize_and_crop(theirs, *size)) / 255
    assert fitted.shape[1:] == theirs.shape
    assert np.abs(fitted[0].numpy() - theirs).max() <= 1.5 / 255  # Pillow rounds to 8 bit
    assert fit.canvas == fitted.shape[1:3]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_a_legal_reference_passes_through_bit_for_bit(method: str, rule: ReferenceSize) -> None:
    for size in ((64, 64), (64, 512), (1024, 1024)):
        image = noise_picture(*size, batch=2)
        fitted, fit = fit_reference(image, rule, method)
        assert torch.equal(fitted, image)
        assert torch.equal(undo_fit(fitted, fit), image)


@pytest.mark.parametrize("method", ["pad", "stretch"])
def test_what_keeps_the_whole_picture_gives_its_size_back(method: str) -> None:
    for height, width in ((1000, 1500), (77, 600), (2222, 999)):
        fitted, fit = fit_reference(noise_picture(height, width), FLUX2_SEVERAL_REFERENCES, method)
        _, size = reference_size(height, width, FLUX2_SEVERAL_REFERENCES)
        assert fitted.shape == (1, *size, 3)
        assert undo_fit(fitted, fit).shape == (1, height, width, 3)


def test_undoing_a_crop_gives_what_was_left_of_the_original_in_its_place() -> None:
    draw = random.Random(4)
    for _ in range(20):
        height, width = draw.randint(300, 1600), draw.randint(300, 1600)
        rows = torch.linspace(0, 1, height)[None, :, None, None].expand(1, height, width, 3)
        fitted, fit = fit_reference(rows, FLUX2_SEVERAL_REFERENCES, "crop")
        back = undo_fit(fitted, fit)
        top, left, kept, columns = fit.crop
        assert back.shape == (1, kept, columns, 3)
        assert top + kept <= height
        assert left + columns <= width
        assert height - kept <= 16 * max(1.0, height / 300)
        expected = rows[:, top : top + kept, left : left + columns]
        assert float((back - expected).abs().max()) < 1.0 / height  # less than one row


def test_a_crop_without_scaling_is_undone_bit_for_bit() -> None:
    image = noise_picture(70, 135)
    fitted, fit = fit_reference(image, FLUX2_ONE_REFERENCE, "crop")
    assert fit.crop == (3, 3, 64, 128)
    assert torch.equal(fitted, image[:, 3:67, 3:131])
    assert torch.equal(undo_fit(fitted, fit), fitted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("height", "width", "words"),
    [
        (63, 100, "100x63: too small"),
        (100, 63, "too small"),
        (100, 801, "801x100: a little more than 8 times"),
    ],
)
def test_a_picture_that_is_no_reference_is_refused(
    method: str, height: int, width: int, words: str
) -> None:
    with pytest.raises(ShapeError, match=words) as caught:
        fit_reference(noise_picture(height, width), FLUX2_ONE_REFERENCE, method)
    assert caught.value.settings == ("fit size", "fit method")
    with pytest.raises(ValueError, match="too"):
        Flux2ImageProcessor.check_image_input(PILImage.new("L", (width, height)))


def tokens(rows: int, columns: int, latent: LatentSpec) -> Tokens:
    grid = (rows, columns)
    values = torch.zeros(1, rows * columns, latent.token_width)
    return Tokens(values=values, ids=image_ids(grid, latent), grid=grid, latent=latent)


def test_encoded_references_are_held_to_the_same_rule() -> None:
    check_references([tokens(4, 4, FLUX2_LATENT), tokens(4, 32, FLUX2_LATENT)])
    check_references([tokens(1, 1, FLUX1_LATENT), tokens(1, 90, FLUX1_LATENT)])
    with pytest.raises(ShapeError, match="Reference 2 is 64x48"):
        check_references([tokens(4, 4, FLUX2_LATENT), tokens(3, 4, FLUX2_LATENT)])
    with pytest.raises(ShapeError, match=r"Reference 1 is 80x800: 10\.0 times"):
        check_references([tokens(50, 5, FLUX2_LATENT)])


def test_a_picture_that_was_legal_before_it_was_cropped_is_a_reference() -> None:
    fitted, _ = fit_reference(noise_picture(127, 1016), FLUX2_ONE_REFERENCE, "crop")
    height, width = fitted.shape[1:3]
    assert width > 8 * height  # 112 by 1008
    check_references([tokens(height // 16, width // 16, FLUX2_LATENT)])


def test_a_size_is_brought_down_to_a_multiple_but_never_to_nothing() -> None:
    assert floor_size(1023, 15, 16) == (1008, 16)


@pytest.mark.parametrize("placement", ["offset", "index", "single"])
def test_one_reference_goes_where_its_model_was_trained_with_it(placement: Placement) -> None:
    for latent, index in ((FLUX1_LATENT, 1.0), (FLUX2_LATENT, 10.0)):
        (placed,) = place_references([tokens(4, 5, latent)], placement)
        assert placed.ids[:, 0].unique().tolist() == [index]
        assert placed.ids[0, 1:].tolist() == [0.0] * (len(latent.id_axes) - 1)
