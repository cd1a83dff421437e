"""The described sequence is the one the transformer reads."""

import torch

from glassbox.flux_core.families import FLUX1_LATENT
from glassbox.flux_core.tokens.ids import place
from glassbox.flux_core.tokens.inspect import describe_sequence, sequence_report
from glassbox.flux_core.tokens.pack import latent_tokens
from glassbox.flux_core.values import Conditioning, TextFeatures


def _tokens(rows, columns):
    return latent_tokens(torch.zeros(1, 16, 2 * rows, 2 * columns), FLUX1_LATENT)


def _conditioning(*references):
    text = TextFeatures(txt=torch.zeros(1, 7, 24), pooled=torch.zeros(1, 12))
    return Conditioning(text=text, references=references)


def test_segments_come_in_the_order_of_the_sequence_with_counts_and_places():
    reference = place(_tokens(2, 5), index=1, row=3, column=0.5)
    found = describe_sequence(_conditioning(reference), _tokens(4, 6))
    assert found["total"] == 7 + 24 + 10
    assert [one["name"] for one in found["segments"]] == ["text", "target", "reference 1"]
    assert [one["count"] for one in found["segments"]] == [7, 24, 10]
    assert [one["grid"] for one in found["segments"]] == [None, [4, 6], [2, 5]]
    zero = [("index", 0, 0), ("row", 0, 0), ("column", 0, 0)]
    assert found["segments"][0]["ids"] == zero
    assert found["segments"][2]["ids"] == [("index", 1, 1), ("row", 3, 4), ("column", 0.5, 4.5)]


def test_without_a_picture_the_text_stands_alone():
    found = describe_sequence(_conditioning(), None)
    assert [one["count"] for one in found["segments"]] == [7]
    assert sequence_report(found).endswith("7 tokens in all")
