"""ControlNet and step caches of ComfyUI's own work under our references, and leave their places."""

from typing import Any

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return run_probe("probe_native_extras")


def test_a_control_net_without_strength_changes_nothing(probe: dict[str, Any]) -> None:
    """0 to 3 references placed by hand, with Apply To Model."""
    assert len(probe["control"]["off"]) == 4
    assert set(probe["control"]["off"].values()) == {0.0}


def test_under_a_control_net_our_places_are_those_comfyui_has_names_for(
    probe: dict[str, Any],
) -> None:
    """The conditioning names the other method, so that only Apply To Model can set them."""
    named = probe["control"]["named"]
    assert len(named) == 6
    assert {name: one for name, one in named.items() if one > 1e-5} == {}
    assert probe["ksampler"] <= 1e-5  # with a negative prompt
    assert min(probe["control"]["changes"].values()) > 0.01
    assert probe["control"]["unplaced"] > 0.01


def test_a_step_cache_that_reuses_nothing_changes_nothing(probe: dict[str, Any]) -> None:
    """EasyCache and LazyCache, both generations, 0 to 3 references placed by hand."""
    assert len(probe["caches"]["never"]) == 16
    assert set(probe["caches"]["never"].values()) == {0.0}


def test_a_step_cache_that_skips_steps_keeps_our_places(probe: dict[str, Any]) -> None:
    often = probe["caches"]["often"]
    assert len(often) == 12
    assert {name: one for name, one in often.items() if one > 1e-5} == {}
    assert min(probe["caches"]["changes"].values()) > 0.01


def test_a_plain_native_run_is_the_same_bit_for_bit_after_all_of_it(probe: dict[str, Any]) -> None:
    assert probe["same_as_before"]
