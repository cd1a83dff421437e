"""A MODEL as GGUF loaders make it samples as a plain one: in our samplers, and with our places."""

from typing import Any

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return run_probe("probe_native_packed")


def test_our_sampler_on_packed_weights_is_the_one_on_what_they_stand_for(
    probe: dict[str, Any],
) -> None:
    """Both generations, 0 and 2 references placed by hand; alone, with a LoRA, and alone again."""
    assert probe["packed"] == {"FLUX.1": True, "FLUX.2": True}
    assert len(probe["apart"]) == 12
    assert {name: one for name, one in probe["apart"].items() if one > 1e-5} == {}


def test_comfyuis_sampler_with_our_places_on_packed_weights_is_ours(probe: dict[str, Any]) -> None:
    assert len(probe["routes"]) == 12
    assert {name: one for name, one in probe["routes"].items() if one > 1e-5} == {}


def test_a_lora_that_hangs_on_packed_weights_is_followed_and_leaves_nothing(
    probe: dict[str, Any],
) -> None:
    assert min(probe["lora"].values()) > 0.01
    assert probe["again"] == {"FLUX.1": True, "FLUX.2": True}
