"""References in ComfyUI's own sequence: which rule of its places them, and places written over."""

import pytest
import torch

from glassbox.flux_core.errors import SettingError, ShapeError
from glassbox.flux_core.families import FLUX1_LATENT, FLUX2_LATENT
from glassbox.flux_core.specs import LatentSpec, Placement
from glassbox.flux_core.tokens.ids import image_ids, place, text_ids
from glassbox.flux_core.tokens.native import NativePositions, native_method
from glassbox.flux_core.tokens.references import place_references
from glassbox.flux_core.values import Tokens

SIZES = [(2, 3), (3, 2), (1, 4)]


def tokens(grid: tuple[int, int], latent: LatentSpec) -> Tokens:
    values = torch.zeros(1, grid[0] * grid[1], latent.token_width)
    return Tokens(values=values, ids=image_ids(grid, latent), grid=grid, latent=latent)


@pytest.mark.parametrize("latent", [FLUX1_LATENT, FLUX2_LATENT])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("placement", ["offset", "index"])
def test_placements_of_several_have_comfyuis_name(
    latent: LatentSpec, count: int, placement: Placement
) -> None:
    several = [tokens(grid, latent) for grid in SIZES[:count]]
    assert native_method(place_references(several, placement)) == placement


@pytest.mark.parametrize(("latent", "method"), [(FLUX1_LATENT, "offset"), (FLUX2_LATENT, "index")])
@pytest.mark.parametrize("placement", ["single", "offset", "index"])
def test_one_reference_where_the_model_was_trained_is_comfyuis_own_default(
    latent: LatentSpec, method: str, placement: Placement
) -> None:
    one = [tokens((2, 3), latent)]
    assert native_method(place_references(one, placement)) == method


def test_comfyuis_canvas_of_one_picture_of_flux2_is_not_its_index() -> None:
    one = place(tokens((2, 3), FLUX2_LATENT), index=1.0)
    assert native_method([one]) == "offset"


def test_places_by_hand_and_no_reference_have_no_name() -> None:
    first, second = (tokens(grid, FLUX1_LATENT) for grid in SIZES[:2])
    assert native_method([place(first, index=1.0, row=0.5)]) is None
    assert native_method([place(second, index=2.0), place(first, index=1.0)]) is None
    assert native_method([]) is None


def sequence(*counts: int, batch: int = 2) -> torch.Tensor:
    """ComfyUI's ids: a target of 6 tokens, then references at index 1, 2, and so on."""
    parts = [image_ids((2, 3), FLUX1_LATENT)]
    parts += [image_ids((1, n), FLUX1_LATENT, index=i) for i, n in enumerate(counts, 1)]
    return torch.cat(parts).expand(batch, -1, -1)


def positions(*counts: int, text_tokens: int = 3) -> NativePositions:
    ids = tuple(image_ids((1, n), FLUX1_LATENT, index=7.0, row=0.5) for n in counts)
    return NativePositions(references=ids, text_tokens=text_tokens)


def test_only_the_references_ids_are_written_over_and_none_is_added() -> None:
    before = sequence(2, 5)
    kept = before.clone()
    after = positions(2, 5).place(before, [2, 5])
    assert after.shape == before.shape
    assert torch.equal(after[:, :6], before[:, :6])
    for one in after:
        assert torch.equal(one[6:], torch.cat(positions(2, 5).references))
    assert torch.equal(before, kept)


def test_without_references_nothing_changes() -> None:
    before = sequence()
    assert positions().place(before, []) is before


@pytest.mark.parametrize("counts", [[], [2], [5, 2], [2, 5, 1]])
def test_another_count_is_refused_with_both(counts: list[int]) -> None:
    with pytest.raises(ShapeError) as caught:
        positions(2, 5).place(sequence(*counts), counts)
    assert "2 references of 2, 5 tokens" in caught.value.found
    assert caught.value.settings == ("native conditioning", "native positions")


def test_references_where_the_conditioning_has_none_are_refused() -> None:
    with pytest.raises(ShapeError, match="position ids are for no reference"):
        positions().place(sequence(2), [2])


def test_a_sequence_that_another_node_made_longer_is_refused() -> None:
    longer = torch.cat((sequence(2), sequence(2)[:, -1:]), dim=1)
    with pytest.raises(ShapeError, match="has added tokens"):
        positions(2).place(longer, [2])


def padded(*lengths: int, total: int = 8) -> torch.Tensor:
    """Projected texts of these lengths, with empty tokens before them."""
    txt = torch.zeros(len(lengths), total, 4)
    for row, length in zip(txt, lengths, strict=True):
        row[total - length :] = torch.randn(length, 4)
    return txt


IDS = text_ids(8, FLUX2_LATENT).expand(2, -1, -1)


@pytest.mark.parametrize("lengths", [(3, 3), (3, 0), (0, 0)])
def test_empty_tokens_before_a_text_of_our_length_are_taken_off(lengths: tuple[int, ...]) -> None:
    txt = padded(*lengths)
    after, ids = positions().trim(txt, IDS)
    assert torch.equal(after, txt[:, 5:])
    assert torch.equal(ids[0], text_ids(3, FLUX2_LATENT))


@pytest.mark.parametrize("lengths", [(8, 8), (5, 5), (2, 8)])
def test_other_texts_stay_as_they_are(lengths: tuple[int, ...]) -> None:
    txt = padded(*lengths)
    assert positions().trim(txt, IDS) == (txt, IDS)


def test_a_text_of_full_length_stays_as_it_is() -> None:
    txt = padded(8, 8)
    assert positions(text_tokens=8).trim(txt, IDS) == (txt, IDS)


def test_our_text_in_one_batch_with_another_length_is_refused() -> None:
    with pytest.raises(SettingError, match="differ in length"):
        positions().trim(padded(3, 8), IDS)
