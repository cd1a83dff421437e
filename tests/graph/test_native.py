"""ComfyUI's own samplers with our references do what our sampler does, and keep what they are."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from glassbox.tests.graph.probe import run_probe
from glassbox.tests.graph.workflows import api_form, pixels, upload_pictures

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return run_probe("probe_native")


def test_native_samplers_agree_with_ours_for_every_placement_and_0_to_3_references(
    probe: dict[str, Any],
) -> None:
    """Both generations; FLUX.2's text is shorter than what ComfyUI fills it up to."""
    apart = probe["apart"]
    assert len(apart) == 26
    assert {name: one for name, one in apart.items() if one > 1e-5} == {}


def test_places_by_hand_need_apply_to_model(probe: dict[str, Any]) -> None:
    assert set(probe["without_places"]) == {"FLUX.1", "FLUX.2"}
    assert min(probe["without_places"].values()) > 1e-4


def test_applied_twice_the_last_one_holds(probe: dict[str, Any]) -> None:
    assert probe["twice"] <= 1e-5


def test_a_plain_native_run_is_the_same_bit_for_bit_after_all_of_it(probe: dict[str, Any]) -> None:
    """Errors in the middle of a native run included; the MODEL that came in is untouched."""
    assert probe["same_as_before"]
    assert probe["original_is_clean"] == [True, True]


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("count", "ShapeError: The sampler hands 1 references of 16 tokens to the model"),
        ("none", "ShapeError: The sampler hands no reference to the model"),
        ("generation", "FamilyMismatchError: The references are FLUX.2's, the MODEL is FLUX.1."),
        ("forward", "SettingError: Another node has replaced the network's code: diffusion_model"),
        ("scaled", "SettingError: 'ScaleROPE' moves all position ids of this model"),
        ("lengthened", "ShapeError: Another node has added tokens to the model's sequence."),
        ("fill", "SettingError: The MODEL takes 384 channels a token and gives 64"),
        ("sdxl", "FamilyMismatchError: The MODEL is SDXL around builtins.object."),
    ],
)
def test_what_does_not_fit_is_refused_by_name(probe: dict[str, Any], use: str, words: str) -> None:
    assert probe["refused"][use].startswith(words)


def test_the_native_workflow_makes_the_picture_of_the_one_it_is_taken_from(comfy: "Comfy") -> None:
    upload_pictures(comfy)
    names = ("04_nano_two_references", "12_native_nano_ksampler")
    ours, native = (pixels(comfy.images(comfy.run(api_form(name)))[0]) for name in names)
    assert np.ptp(ours) > 100
    assert np.abs(ours - native).max() <= 1  # of 255: one may be rounded the other way
