"""The sequence that a transformer reads, against tables written by hand."""

import pytest
import torch

from glassbox.flux_core.families import (
    FLUX1_KONTEXT,
    FLUX1_LATENT,
    FLUX2_DEV,
    FLUX2_KLEIN_9B_KV,
    FLUX2_LATENT,
)
from glassbox.flux_core.specs import FluxFamily, LatentSpec
from glassbox.flux_core.tokens.ids import drop_tokens, text_ids
from glassbox.flux_core.tokens.pack import latent_tokens
from glassbox.flux_core.tokens.references import place_references
from glassbox.flux_core.tokens.sequence import TokenSequence, arrange
from glassbox.flux_core.values import Reference, Tokens


def tokens(spec: LatentSpec, rows: int, columns: int) -> Tokens:
    cells = spec.patch * rows, spec.patch * columns
    return latent_tokens(torch.randn(1, spec.channels, *cells), spec)


def sequence(family: FluxFamily) -> TokenSequence:
    """Two text tokens, a target of 1 x 2, references of 1 x 1 and 2 x 1; the second has a name."""
    spec = family.latent
    placed = place_references([tokens(spec, 1, 1), tokens(spec, 2, 1)], "index")
    return arrange(
        text=text_ids(2, spec),
        target=tokens(spec, 1, 2),
        references=[Reference(tokens=placed[0]), Reference(tokens=placed[1], name="the chair")],
        order=family.references.sequence,
    )


# kind, name, range, grid
FULL = [
    ("text", "text", slice(0, 2), None),
    ("target", "target", slice(2, 4), (1, 2)),
    ("reference", "reference 1", slice(4, 5), (1, 1)),
    ("reference", "the chair", slice(5, 7), (2, 1)),
]
ISOLATED = [
    ("text", "text", slice(0, 2), None),
    ("reference", "reference 1", slice(2, 3), (1, 1)),
    ("reference", "the chair", slice(3, 5), (2, 1)),
    ("target", "target", slice(5, 7), (1, 2)),
]
FLUX1_IDS = [
    [0, 0, 0], [0, 0, 0],
    [0, 0, 0], [0, 0, 1],
    [1, 0, 0],
    [2, 0, 0], [2, 1, 0],
]  # fmt: skip
FLUX2_IDS = [
    [0, 0, 0, 0], [0, 0, 0, 1],
    [0, 0, 0, 0], [0, 0, 1, 0],
    [10, 0, 0, 0],
    [20, 0, 0, 0], [20, 1, 0, 0],
]  # fmt: skip
KV_IDS = [
    [0, 0, 0, 0], [0, 0, 0, 1],
    [10, 0, 0, 0],
    [20, 0, 0, 0], [20, 1, 0, 0],
    [0, 0, 0, 0], [0, 0, 1, 0],
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "table", "ids"),
    [
        (FLUX1_KONTEXT, FULL, FLUX1_IDS),
        (FLUX2_DEV, FULL, FLUX2_IDS),
        (FLUX2_KLEIN_9B_KV, ISOLATED, KV_IDS),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_segments_ranges_and_ids_are_those_of_the_family(family, table, ids) -> None:
    found = sequence(family)
    assert [(one.kind, one.name, one.range, one.grid) for one in found.segments] == table
    assert [one.count for one in found.segments] == [one[2].stop - one[2].start for one in table]
    assert len(found) == 7
    assert found.ids.tolist() == ids
    assert found.ids.dtype == torch.float32
    for segment in found.segments:
        assert torch.equal(found.ids[segment.range], segment.ids)


def test_a_reference_carries_how_it_is_seen() -> None:
    found = sequence(FLUX2_DEV)
    carried = [one.reference for one in found.segments]
    assert carried[:2] == [None, None]
    assert [one.name for one in carried[2:]] == ["", "the chair"]


@pytest.mark.parametrize(
    ("family", "ranges"),
    [
        (FLUX1_KONTEXT, {"text": (0, 2), "target": (2, 4), "reference": (4, 7)}),
        (FLUX2_KLEIN_9B_KV, {"text": (0, 2), "target": (5, 7), "reference": (2, 5)}),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_a_range_covers_all_segments_of_a_kind(family, ranges) -> None:
    found = sequence(family)
    for kind, (start, stop) in ranges.items():
        assert found.range_of(kind) == slice(start, stop)
    assert found.range_of("text", "target", "reference") == slice(0, 7)


def test_a_range_of_what_is_not_there_is_empty() -> None:
    alone = sequence(FLUX1_KONTEXT).only("target", "text")
    at = alone.range_of("reference")
    assert list(range(len(alone)))[at] == []
    assert TokenSequence(()).range_of("text") == slice(0, 0)


def test_only_some_kinds_move_together() -> None:
    isolated = sequence(FLUX2_KLEIN_9B_KV)
    own = isolated.only("text", "target")
    assert [(one.name, one.range) for one in own.segments] == [
        ("text", slice(0, 2)),
        ("target", slice(2, 4)),
    ]
    assert own.ids.tolist() == [KV_IDS[index] for index in (0, 1, 5, 6)]
    references = isolated.only("reference")
    assert [(one.name, one.range) for one in references.segments] == [
        ("reference 1", slice(0, 1)),
        ("the chair", slice(1, 3)),
    ]
    assert [one.name for one in isolated.of("target", "reference")] == [
        "reference 1",
        "the chair",
        "target",
    ]
    assert [one.start for one in isolated.segments] == [0, 2, 3, 5], "the whole is as it was"


def test_the_order_may_be_any_and_parts_may_be_missing() -> None:
    spec = FLUX1_LATENT
    target, reference = tokens(spec, 1, 2), Reference(tokens=tokens(spec, 1, 1))
    turned = arrange(
        text=text_ids(3, spec),
        target=target,
        references=[reference],
        order=("reference", "target", "text"),
    )
    assert [(one.name, one.range) for one in turned.segments] == [
        ("reference 1", slice(0, 1)),
        ("target", slice(1, 3)),
        ("text", slice(3, 6)),
    ]
    assert [one.name for one in arrange(target=target).segments] == ["target"]
    assert [one.name for one in arrange(references=[reference]).segments] == ["reference 1"]
    assert len(arrange(text=text_ids(3, spec))) == 3


def test_dropped_tokens_are_counted_as_they_are() -> None:
    whole = tokens(FLUX2_LATENT, 2, 3)
    part = drop_tokens(whole, torch.tensor([True, False, False, True, True, False]))
    found = arrange(text=text_ids(2, FLUX2_LATENT), references=[Reference(tokens=part)])
    (segment,) = found.of("reference")
    assert (segment.count, segment.range, segment.grid) == (3, slice(2, 5), (2, 3))
    assert found.ids[segment.range].tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]]
