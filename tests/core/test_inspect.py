"""The described sequence is the one the transformer reads."""

import torch

from glassbox.flux_core.families import (
    FLUX1_KONTEXT,
    FLUX1_LATENT,
    FLUX2_DEV,
    FLUX2_KLEIN_9B_KV,
    FLUX2_LATENT,
)
from glassbox.flux_core.tokens.ids import place
from glassbox.flux_core.tokens.inspect import describe_sequence, sequence_report
from glassbox.flux_core.tokens.pack import latent_tokens
from glassbox.flux_core.tokens.references import place_references
from glassbox.flux_core.values import Conditioning, Reference, TextFeatures


def _tokens(rows, columns):
    return latent_tokens(torch.zeros(1, 16, 2 * rows, 2 * columns), FLUX1_LATENT)


def _seen(tokens):
    return tuple(Reference(tokens=one) for one in tokens)


def _conditioning(*references):
    text = TextFeatures(txt=torch.zeros(1, 7, 24), pooled=torch.zeros(1, 12))
    return Conditioning(text=text, references=_seen(references))


def test_segments_come_in_the_order_of_the_sequence_with_counts_and_ids():
    reference = place(_tokens(2, 5), index=1, row=3, column=0.5)
    found = describe_sequence(_conditioning(reference), _tokens(4, 6))
    assert found["total"] == 7 + 24 + 10
    assert [one["name"] for one in found["segments"]] == ["text", "target", "reference 1"]
    assert [one["count"] for one in found["segments"]] == [7, 24, 10]
    assert [one["grid"] for one in found["segments"]] == [None, [4, 6], [2, 5]]
    zero = [("index", 0, 0), ("row", 0, 0), ("column", 0, 0)]
    assert found["segments"][0]["ids"] == zero
    assert found["segments"][2]["ids"] == [("index", 1, 1), ("row", 3, 4), ("column", 0.5, 4.5)]


def test_without_an_image_the_text_stands_alone():
    found = describe_sequence(_conditioning(), None)
    assert [one["count"] for one in found["segments"]] == [7]
    assert sequence_report(found).endswith("7 tokens in all")


def _flux2(*grids):
    tokens = [latent_tokens(torch.zeros(1, 128, *grid), FLUX2_LATENT) for grid in grids]
    text = TextFeatures(txt=torch.zeros(1, 7, 24), pooled=None)
    references = _seen(place_references(tokens[1:], "index"))
    return Conditioning(text=text, references=references), tokens[0]


def test_text_of_flux2_is_counted_on_its_own_axis():
    found = describe_sequence(*_flux2((4, 6), (2, 5)), FLUX2_DEV.references)
    assert found["segments"][0]["ids"] == [
        ("index", 0, 0), ("row", 0, 0), ("column", 0, 0), ("text", 0, 6),
    ]  # fmt: skip
    assert found["segments"][2]["ids"][0] == ("index", 10, 10)
    assert "text: 7 tokens; index 0, row 0, column 0, text 0 to 6" in sequence_report(found)


def test_the_order_is_the_familys():
    sequence = _flux2((4, 6), (2, 5), (3, 3))
    for family, order in (
        (FLUX2_DEV, ["text", "target", "reference 1", "reference 2"]),
        (FLUX1_KONTEXT, ["text", "target", "reference 1", "reference 2"]),
        (FLUX2_KLEIN_9B_KV, ["text", "reference 1", "reference 2", "target"]),
    ):
        found = describe_sequence(*sequence, family.references)
        assert [one["name"] for one in found["segments"]] == order
        assert found["total"] == 7 + 24 + 10 + 9


def test_references_that_see_themselves_alone_are_said():
    words = "references see themselves alone, at t = 0"
    isolated = sequence_report(
        describe_sequence(*_flux2((4, 6), (2, 5)), FLUX2_KLEIN_9B_KV.references)
    )
    assert words in isolated.splitlines()[-1]
    bare = describe_sequence(*_flux2((4, 6)), FLUX2_KLEIN_9B_KV.references)
    assert bare["notes"] == []
    assert describe_sequence(*_flux2((4, 6), (2, 5)), FLUX2_DEV.references)["notes"] == []
