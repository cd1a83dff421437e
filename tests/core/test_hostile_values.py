"""Values no honest graph holds: each is refused in words that can be printed."""

import math

import pytest
import torch

from glassbox.flux_core.errors import (
    CheckpointError,
    MemoryLimitError,
    NonFiniteError,
    SettingError,
    ShapeError,
)
from glassbox.flux_core.families import FLUX1_LATENT
from glassbox.flux_core.image.pixels import to_pixels
from glassbox.flux_core.memory import fit_bytes, noise_bytes, require_memory
from glassbox.flux_core.sampling.guidance import TrueCFG
from glassbox.flux_core.tokens.ids import place
from glassbox.flux_core.tokens.pack import latent_tokens, pack_latent
from glassbox.flux_core.values import Conditioning, TextFeatures

TEXT = TextFeatures(txt=torch.zeros(1, 2, 4), pooled=torch.zeros(1, 3))


def test_words_of_a_file_that_cannot_be_encoded_are_escaped():
    """Printing a lone surrogate ended ComfyUI's prompt thread: no later prompt ran."""
    error = CheckpointError("The tensor '\ud800' is there.", "text.", "rename caf\udce9.")
    for text in (str(error), *error.args):
        text.encode()
    assert "\\ud800" in str(error)
    assert "\\udce9" in str(error)


def test_a_message_does_not_grow_with_its_cause():
    error = SettingError("x" * 1_000_000, "less.", "write less.")
    assert len(str(error)) < 1000
    assert "write less." in str(error)


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -1.0, 1e9])
def test_guidance_is_a_number_people_use(guidance):
    with pytest.raises(SettingError, match="guidance is"):
        Conditioning(text=TEXT, guidance=guidance)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -5.0, 1e9])
def test_cfg_is_a_number_people_use(scale):
    with pytest.raises(SettingError, match="cfg is"):
        TrueCFG(negative=Conditioning(text=TEXT), scale=scale)


@pytest.mark.parametrize("axis", ["index", "row", "column"])
def test_a_place_is_finite(axis):
    tokens = latent_tokens(torch.zeros(1, 16, 4, 4), FLUX1_LATENT)
    with pytest.raises(SettingError, match="finite numbers"):
        place(tokens, **{"index": 1.0, "row": 0.0, "column": 0.0, axis: math.nan})


def test_a_latent_of_no_pictures_is_refused():
    with pytest.raises(ShapeError, match="batch of 1 or more"):
        pack_latent(torch.zeros(0, 16, 4, 4), FLUX1_LATENT)


def test_a_picture_with_nan_is_refused_before_it_is_encoded():
    image = torch.zeros(1, 16, 16, 3)
    image[0, 3, 3] = math.nan
    with pytest.raises(NonFiniteError, match="picture holds 3 values"):
        to_pixels(image)


def test_noise_and_pictures_beyond_memory_are_refused_by_their_size():
    for needed in (noise_bytes(FLUX1_LATENT, 2**40, 16384, 4096), fit_bytes(8, 2**33, 16384)):
        with pytest.raises(MemoryLimitError, match="takes about"):
            require_memory(needed, 64 * 2**30, "This", "make it smaller.")
    one = noise_bytes(FLUX1_LATENT, 1024, 1024, 1)
    assert one == 2 * 4 * 16 * 128 * 128
