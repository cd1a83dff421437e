"""Keys and values of references: kept, reused, dropped, and never at the cost of a pixel."""

from typing import Any

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What the probe saw: pictures compared, and every computation of references counted."""
    return run_probe("probe_kept")


@pytest.fixture(scope="module")
def moved() -> dict[str, Any]:
    """What the probe saw of ComfyUI's memory management on a device that is made up."""
    return run_probe("probe_spill")


def test_a_new_prompt_seed_or_size_reuses_them_bit_for_bit(seen: dict[str, Any]) -> None:
    """Each picture is compared with that of a model that has sampled nothing before."""
    assert seen["again_passes"] == [1, 0, 0, 0]
    assert seen["again_equal"] == [True] * 4
    assert seen["again_differ"]
    assert "reused from an earlier run (0.2 MB)" in seen["again_told"][-1]


def test_every_mode_makes_the_same_picture_and_says_what_it_did(seen: dict[str, Any]) -> None:
    assert seen["modes_equal"]
    every_step, this_run, again, kept, auto = (notes[-1] for notes in seen["modes_told"])
    assert seen["modes_passes"] == [4, 1, 1, 1, 0]
    assert "computed in every step" in every_step
    assert "computed for this run" in this_run
    assert this_run == again
    assert "computed and kept" in kept
    assert "reused" in auto
    assert seen["modes_left"] == "cache_for_the_run"


def test_a_then_b_then_a_gives_the_first_picture_again(seen: dict[str, Any]) -> None:
    assert seen["aba_passes"] == [1, 1, 0]
    assert seen["aba_equal"]
    assert seen["aba_differ"]


def test_order_place_and_patched_weights_tell_them_apart(seen: dict[str, Any]) -> None:
    assert seen["order_passes"] == [1, 1, 0, 1]
    assert seen["patched_passes"] == 1


def test_the_least_recently_used_leave_first(seen: dict[str, Any]) -> None:
    """With room for two: B, A again, C (B leaves), A again, B anew."""
    assert seen["bound_passes"] == [1, 0, 1, 0, 1]
    assert seen["bound_entries"] == 2


def test_no_memory_for_them_means_every_step_and_the_same_pixels(seen: dict[str, Any]) -> None:
    assert seen["memory_equal"]
    before, midway = (notes[-1] for notes in seen["memory_told"])
    assert seen["memory_passes"] == [4, 5]
    assert "no memory" in before
    assert "no memory" in midway
    assert seen["memory_held"] == [0, 0]
    assert seen["memory_after"] == 1


def test_freeing_models_drops_them_even_in_the_middle_of_a_run(seen: dict[str, Any]) -> None:
    held, freed = seen["free_bytes"]
    assert held > 0
    assert freed == 0
    assert seen["free_passes"] == 1
    assert seen["free_equal"]


def test_a_cancel_keeps_what_is_complete_and_nothing_else(seen: dict[str, Any]) -> None:
    while_computing, between_steps = seen["cancel_held"]
    assert while_computing == 0
    assert between_steps > 0
    assert seen["cancel_passes"] == 0
    assert seen["cancel_equal"]
    assert seen["cancel_keep"] == "cache_for_the_run"


def test_both_passes_of_true_cfg_share_them(seen: dict[str, Any]) -> None:
    batched, _, in_turn, _, other_references, _ = seen["cfg_passes"]
    assert (batched, in_turn, other_references) == (1, 1, 2)
    assert seen["cfg_equal"] == [True] * 3


def test_they_die_with_their_model(seen: dict[str, Any]) -> None:
    assert seen["life_listed"]
    assert seen["life_freed"] == [True] * 5


def test_previews_show_flux2s_four_cells_a_token_in_its_colours_or_given_ones(
    seen: dict[str, Any],
) -> None:
    assert seen["preview_sizes"] == [[12, 6], [12, 6]]
    assert seen["preview_equal"] == [True, False]


def test_another_model_that_needs_room_pushes_them_off_tensor_by_tensor(
    moved: dict[str, Any],
) -> None:
    """ComfyUI decides: part of the device taken, nearly all of it, and given back each time.

    Wherever they are, all eight are read whole and on the device they are needed on.
    """
    first, part, back, most, both, again = moved["pushed"]
    assert (first["loaded"], first["pinned"]) == (8, 0)
    assert (part["loaded"], part["pinned"]) == (5, 3)
    assert (most["loaded"], most["pinned"], most["listed"]) == (0, 8, False)
    for one in (back, both, again):
        assert (one["loaded"], one["pinned"], one["listed"]) == (8, 0, True)
    assert [one["whole"] for one in moved["pushed"]] == [8] * 6


def test_what_does_not_fit_on_the_device_is_read_from_where_it_waits(
    moved: dict[str, Any],
) -> None:
    full = moved["short"][0]
    assert (full["loaded"], full["pinned"], full["whole"]) == (3, 5, 8)


def test_they_are_dropped_where_they_have_no_place_to_wait(moved: dict[str, Any]) -> None:
    assert moved["short_empty"]
    assert (moved["short"][1]["loaded"], moved["short"][1]["pinned"]) == (0, 0)


def test_unloading_with_no_prompt_running_drops_them_and_death_unpins(
    moved: dict[str, Any],
) -> None:
    (unloaded,) = moved["unloaded"]
    assert (unloaded["loaded"], unloaded["pinned"], unloaded["listed"]) == (0, 0, False)
    assert moved["waiting"] == 2
    assert moved["pinned_after_death"] == 0
