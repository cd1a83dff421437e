"""Packing, ids and placement: permutations and small tables, checked bit for bit."""

import pytest
import torch

from glassbox.flux_core.errors import SettingError, ShapeError
from glassbox.flux_core.families import FLUX1_LATENT, FLUX2_LATENT
from glassbox.flux_core.tokens.ids import drop_tokens, image_ids, place, text_ids
from glassbox.flux_core.tokens.pack import latent_tokens, pack_latent, tokens_latent
from glassbox.flux_core.tokens.references import place_references

SIDES_PX = [*range(64, 2049, 16)]


@pytest.mark.parametrize("height_px", SIDES_PX[::12])
@pytest.mark.parametrize("width_px", SIDES_PX[5::24])
def test_unpacking_packed_tokens_gives_the_same_latent_bit_for_bit(height_px, width_px):
    latent = torch.randn(2, 16, height_px // 8, width_px // 8)
    tokens = latent_tokens(latent, FLUX1_LATENT)
    assert tokens.values.shape == (2, height_px * width_px // 256, 64)
    assert torch.equal(tokens_latent(tokens), latent)


def test_packing_orders_channels_as_pixel_unshuffle_does():
    latent = torch.randn(1, 16, 6, 10)
    expected = torch.nn.functional.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)
    assert torch.equal(pack_latent(latent, FLUX1_LATENT), expected)


@pytest.mark.parametrize("shape", [(1, 16, 7, 8), (1, 4, 8, 8), (16, 8, 8), (1, 16, 0, 8)])
def test_a_latent_that_cannot_be_packed_is_refused(shape):
    with pytest.raises(ShapeError):
        pack_latent(torch.zeros(shape), FLUX1_LATENT)


def test_ids_count_rows_and_columns_from_their_corner():
    ids = image_ids((2, 3), FLUX1_LATENT, index=1, row=4, column=0.5)
    assert ids.dtype == torch.float32
    assert ids.tolist() == [
        [1, 4, 0.5], [1, 4, 1.5], [1, 4, 2.5], [1, 5, 0.5], [1, 5, 1.5], [1, 5, 2.5],
    ]  # fmt: skip


def test_text_sits_at_the_origin_or_is_counted_on_an_axis_of_its_own():
    assert torch.equal(text_ids(5, FLUX1_LATENT), torch.zeros(5, 3))
    assert text_ids(3, FLUX2_LATENT).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (8, 2)])
def test_a_cell_of_flux2_is_a_token(size):
    latent = torch.randn(2, 128, *size)
    tokens = latent_tokens(latent, FLUX2_LATENT)
    assert torch.equal(tokens.values, latent.flatten(2).transpose(1, 2))
    assert torch.equal(tokens_latent(tokens), latent)


def _references(*grids, spec=FLUX1_LATENT):
    side, channels = spec.patch, spec.channels
    return [latent_tokens(torch.randn(1, channels, side * r, side * c), spec) for r, c in grids]


def _corners(tokens):
    return [one.ids[0].tolist() for one in tokens]


@pytest.mark.parametrize(
    ("spec", "placement", "corners"),
    [
        (FLUX1_LATENT, "offset", [[1, 0, 0], [1, 0, 6], [1, 9, 0]]),
        (FLUX1_LATENT, "index", [[1, 0, 0], [2, 0, 0], [3, 0, 0]]),
        (FLUX2_LATENT, "offset", [[1, 0, 0, 0], [1, 0, 6, 0], [1, 9, 0, 0]]),
        (FLUX2_LATENT, "index", [[10, 0, 0, 0], [20, 0, 0, 0], [30, 0, 0, 0]]),
    ],
)
def test_three_references_go_where_the_convention_says(spec, placement, corners):
    # ComfyUI's rule: the second would make 4+9 rows below, 6+2 columns beside: beside. The third
    # 9+2 rows below, 8+4 columns beside: below.
    grids = ((4, 6), (9, 2), (2, 4))
    placed = place_references(_references(*grids, spec=spec), placement)
    assert _corners(placed) == corners


def test_wired_ids_stay_and_values_are_never_touched():
    references = [place(one, index=7, row=1, column=2) for one in _references((2, 2), (3, 1))]
    for placement in ("as wired", "offset", "index", "auto"):
        placed = place_references(references, placement)
        assert all(a.values is b.values for a, b in zip(placed, references, strict=True))
    assert _corners(place_references(references, "as wired")) == [[7, 1, 2], [7, 1, 2]]


def test_the_published_rule_takes_one_reference():
    one = place_references(_references((2, 3)), "single")
    assert _corners(one) == [[1, 0, 0]]
    one = place_references(_references((2, 3), spec=FLUX2_LATENT), "single")
    assert _corners(one) == [[10, 0, 0, 0]]
    with pytest.raises(SettingError, match="2 references"):
        place_references(_references((2, 3), (2, 2)), "single")


@pytest.mark.parametrize("placement", ["offset", "index", "single", "auto"])
def test_one_reference_lies_where_its_model_was_trained_with_it_however_it_is_placed(placement):
    """So that a graph made for Kontext serves FLUX.2 when its loader is changed."""
    for spec, corner in ((FLUX1_LATENT, [1, 0, 0]), (FLUX2_LATENT, [10, 0, 0, 0])):
        assert _corners(place_references(_references((2, 3), spec=spec), placement)) == [corner]


@pytest.mark.parametrize("placement", ["as wired", "offset", "index", "single", "auto"])
def test_no_reference_is_text_to_image(placement):
    assert place_references([], placement) == ()


@pytest.mark.parametrize(
    ("spec", "rule", "corners"),
    [
        (FLUX1_LATENT, "offset", [[1, 0, 0], [1, 0, 6], [1, 9, 0]]),
        (FLUX2_LATENT, "index", [[10, 0, 0, 0], [20, 0, 0, 0], [30, 0, 0, 0]]),
    ],
)
def test_auto_is_the_rule_of_the_latent_the_references_are_of(spec, rule, corners):
    references = _references((4, 6), (9, 2), (2, 4), spec=spec)
    auto, named = (place_references(references, placement) for placement in ("auto", rule))
    assert _corners(auto) == corners
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(auto, named, strict=True))


def _part(grid, *cells, spec=FLUX1_LATENT):
    (whole,) = _references(grid, spec=spec)
    present = torch.zeros(whole.count, dtype=torch.bool)
    present[list(cells)] = True
    return whole, drop_tokens(whole, present)


def test_dropping_tokens_leaves_values_and_ids_of_the_rest():
    whole, part = _part((2, 3), 1, 2, 5)
    assert part.count == 3
    assert part.grid == (2, 3)
    assert torch.equal(part.values, whole.values[:, [1, 2, 5]])
    assert part.ids.tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 2]]
    assert part.cells.tolist() == [1, 2, 5]
    again = drop_tokens(part, torch.tensor([False, True, True]))
    assert again.cells.tolist() == [2, 5], "cells are of the whole image"
    assert torch.equal(again.values, whole.values[:, [2, 5]])
    assert torch.equal(again.ids, whole.ids[[2, 5]])


@pytest.mark.parametrize("spec", [FLUX1_LATENT, FLUX2_LATENT])
@pytest.mark.parametrize("placement", ["as wired", "offset", "index", "single", "auto"])
def test_placing_moves_the_tokens_that_are_there(spec, placement):
    whole, part = _part((3, 2), 0, 3, 4, spec=spec)
    (moved,), (all_moved,) = (place_references([one], placement) for one in (part, whole))
    assert torch.equal(moved.cells, part.cells)
    assert moved.values is part.values
    assert torch.equal(moved.ids, all_moved.ids[[0, 3, 4]])


def test_an_image_without_some_of_its_tokens_has_its_whole_size_on_the_canvas():
    _, part = _part((4, 6), 0)
    (second,) = _references((9, 2))
    assert _corners(place_references([part, second], "offset")) == [[1, 0, 0], [1, 0, 6]]


def test_dropped_tokens_have_no_latent_and_at_least_one_must_stay():
    _, part = _part((2, 3), 1, 2, 5)
    with pytest.raises(ShapeError, match="3 of 6 tokens were dropped"):
        tokens_latent(part)
    for present in (torch.zeros(3, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        with pytest.raises(ShapeError, match=r"\(3,\), at least one of them true"):
            drop_tokens(part, present)
