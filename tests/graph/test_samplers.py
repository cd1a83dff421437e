"""Everyone's samplers run our network, and ours everyone's; what cannot be followed is refused."""

from typing import Any

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return run_probe("probe_samplers")


def test_samplers_agree_in_both_directions(probe: dict[str, Any]) -> None:
    """Guider and SAMPLERs on our network and on a native MODEL, our solvers, image to image, masks.

    Both generations; with and without true CFG; 0 to 2 references.
    """
    apart = probe["apart"]
    assert len(apart) == 38
    assert {name: one for name, one in apart.items() if one > 1e-5} == {}


def test_the_guider_reads_references_that_our_sampler_cached(probe: dict[str, Any]) -> None:
    assert probe["cached"] <= 1e-5
    assert probe["cached_passes"] == 1


def test_a_sampler_with_noise_of_its_own_repeats_itself(probe: dict[str, Any]) -> None:
    assert probe["same_noise_twice"]


@pytest.mark.parametrize(
    ("use", "kind", "words"),
    [
        ("mask of another size", "ShapeError", "The noise mask is 20x20. Needed: 96x64"),
        ("nested latent", "SettingError", "several at once"),
        ("latent of FLUX.2", "FamilyMismatchError", "(batch, 16, height, width) for FLUX.1 nano"),
        ("rising sigmas", "SettingError", "'Schedule (FLUX)'"),
        ("no negative pass", "SettingError", "wire negative to 'Guider (FLUX)'"),
        ("unknown option", "SettingError", "The sampler asks for sampler_cfg_function."),
        ("no sampler", "SettingError", "A str is wired where a SAMPLER goes."),
        ("rising sigmas, ours", "SettingError", "'Schedule (FLUX)'"),
        ("start of another size", "ShapeError", "The start image is 160x160, the noise 96x64."),
        ("start of another size, SAMPLER", "ShapeError", "The start image is 160x160"),
        ("noise of FLUX.1, SAMPLER", "FamilyMismatchError", "holds FLUX.1 tokens"),
        ("no sigmas, SAMPLER", "SettingError", "The sigmas have shape (0,)."),
        ("noise of another size", "ShapeError", "The noise has shape (2, 16, 4, 4)"),
        ("SAMPLER of another shape", "SettingError", "The SAMPLER gave back a Tensor of shape"),
        ("start of FLUX.2", "FamilyMismatchError", "The start image input holds FLUX.2 tokens."),
        ("conditioning of FLUX.2", "FamilyMismatchError", "'Load Text Encoders (FLUX)'"),
        ("denoise 0", "SettingError", "set denoise on 'Schedule (FLUX)'"),
        ("denoise by hand", "SettingError", "sigmas on 'Schedule (FLUX)'"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    probe: dict[str, Any], use: str, kind: str, words: str
) -> None:
    found = probe["refused"][use]
    assert found[0] == kind
    assert words in found[1]
