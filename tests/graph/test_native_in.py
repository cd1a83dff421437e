"""ComfyUI's own MODEL on our sockets computes what our own network does, patches included."""

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
    return run_probe("probe_native_in")


def test_our_samplers_agree_on_both_networks_for_0_to_3_references(probe: dict[str, Any]) -> None:
    """Both generations; true CFG with a window, Heun, and a target at places of its own too."""
    apart = probe["apart"]
    assert len(apart) == 20
    assert {name: one for name, one in apart.items() if one > 1e-5} == {}


def test_noise_schedule_and_inspect_tokens_give_the_same_for_both(probe: dict[str, Any]) -> None:
    assert len(probe["others"]) == 6
    assert all(probe["others"].values())


def test_loras_attention_patches_and_wrappers_do_what_they_do_under_ksampler(
    probe: dict[str, Any],
) -> None:
    assert probe["patched_apart"] <= 1e-5
    assert probe["patched_from_plain"] > 0.1
    assert probe["calls"] == probe["calls_under_comfyui"]
    assert min(probe["calls"].values()) >= 3


def test_float8_weights_of_comfyuis_loader_compute_as_under_ksampler(probe: dict[str, Any]) -> None:
    assert probe["is_float8"]
    assert probe["float8_apart"] <= 1e-5


def test_apply_to_model_before_our_sampler_changes_nothing(probe: dict[str, Any]) -> None:
    assert probe["placed_before"] == 0.0


def test_nothing_is_left_on_the_model_and_a_plain_native_run_stays_the_same(
    probe: dict[str, Any],
) -> None:
    """After every run above, and after the exceptions below."""
    assert probe["left_behind"] == []
    assert probe["same_as_before"]


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("forward", "SettingError: Another node has replaced the network's code: diffusion_model"),
        ("scaled", "SettingError: 'ScaleROPE' moves all position ids of this model"),
        ("fill", "SettingError: The MODEL takes 384 channels a token and gives 64"),
        ("sdxl", "FamilyMismatchError: The MODEL is SDXL around builtins.object."),
        (
            "cache",
            "SettingError: The MODEL carries what only ComfyUI's samplers call: outer_sample",
        ),
        ("cfg", "SettingError: The MODEL carries what only ComfyUI's samplers call: sampler_post"),
        ("see only themselves", "SettingError: FLUX.2 [klein] 9B KV is wired as ComfyUI's own"),
        ("text", "FamilyMismatchError: The text features are 7680 wide, pooled 0 (FLUX.2)."),
        ("noise", "FamilyMismatchError: The noise input holds FLUX.2 tokens."),
        ("kept", "SettingError: reference_kv is 'kept'"),
        ("broken", "ValueError: a patch of another pack failed"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(probe: dict[str, Any], use: str, words: str) -> None:
    assert probe["refused"][use].startswith(words)


def test_the_native_workflow_makes_the_picture_of_the_one_it_is_taken_from(comfy: "Comfy") -> None:
    upload_pictures(comfy)
    names = ("01_nano_kontext_edit", "13_native_nano_model")
    ours, native = (pixels(comfy.images(comfy.run(api_form(name)))[0]) for name in names)
    assert np.ptp(ours) > 100
    assert np.abs(ours - native).max() <= 1  # of 255: one may be rounded the other way
