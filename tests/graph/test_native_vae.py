"""ComfyUI's own VAE on our sockets encodes and decodes what our autoencoder does."""

from typing import Any

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return run_probe("probe_native_vae")


@pytest.mark.parametrize("generation", ["FLUX.1", "FLUX.2"])
def test_a_native_vae_equals_our_autoencoder_with_the_same_file(
    probe: dict[str, Any], generation: str
) -> None:
    assert probe["encoded"][generation] <= 1e-5
    assert probe["decoded"][generation] <= 1e-5
    assert probe["spread"][generation] > 0.01


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("taesd", "FamilyMismatchError: The VAE is a TAESD. Needed: FLUX's own autoencoder."),
        ("empty", "FamilyMismatchError: The VAE is empty."),
        ("video", "FamilyMismatchError: The VAE's latents have 16 channels, 1/8"),
        (
            "sample",
            "SettingError: posterior is 'sample', and the autoencoder is ComfyUI's own",
        ),
        ("size", "ShapeError: The picture is 40x32."),
        ("tokens", "FamilyMismatchError: The tokens input holds FLUX.1 tokens."),
    ],
)
def test_what_does_not_fit_is_refused_by_name(probe: dict[str, Any], use: str, words: str) -> None:
    assert probe["refused"][use].startswith(words)
