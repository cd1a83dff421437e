"""The pack leaves ComfyUI as it was, and leaves nothing behind when its last user is gone."""

from typing import Any

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return run_probe("probe_core")


def test_no_attribute_of_comfyui_changes_when_the_pack_is_imported_and_runs(
    probe: dict[str, Any],
) -> None:
    assert probe["pixels"] == [1, 64, 64, 3]
    assert probe["watched"] > 1000
    assert probe["changed"] == []
    assert probe["added"] == []


def test_two_loaders_of_one_file_share_one_model(probe: dict[str, Any]) -> None:
    assert probe["shared"]
    assert probe["dtypes_apart"]
    assert probe["patchers"] == 2


def test_a_model_is_freed_with_its_last_user(probe: dict[str, Any]) -> None:
    """No garbage collector runs in the probe: there is no reference cycle to collect."""
    assert all(probe["freed"])
    assert probe["still_loaded"] == 0


def test_a_cancel_in_a_step_ends_it_and_frees_the_plan(probe: dict[str, Any]) -> None:
    assert probe["interrupted"]
    assert probe["steps_begun"] == 3
    assert probe["plans_freed"]


def test_modulation_is_not_loaded_while_the_blocks_run(probe: dict[str, Any]) -> None:
    assert probe["loaded_while_sampling"]
    for loaded in probe["loaded_while_sampling"]:
        assert "FluxBlocks" in loaded
        assert "FluxModulation" not in loaded


def test_the_embedded_models_folder_comes_last(probe: dict[str, Any]) -> None:
    """New files a user saves must not land in the pack."""
    *others, last = probe["folders"]
    assert last.endswith("flux_core/nano/diffusion_models")
    assert others
    assert last not in others
