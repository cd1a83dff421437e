"""ComfyUI's own CLIP on our socket reads as our text encoders do, all length rules included."""

from typing import Any

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return run_probe("probe_native_text")


@pytest.mark.parametrize("model", ["FLUX.1", "Qwen3", "Mistral"])
def test_a_native_clip_gives_our_text_at_every_length(probe: dict[str, Any], model: str) -> None:
    """Prompts that fit, are empty, hold marks, and are cut; in the largest number of the text."""
    apart = {name: one for name, one in probe["apart"].items() if name.startswith(model)}
    assert len(apart) == 12
    assert {name: one for name, one in apart.items() if one > 1e-6} == {}


def test_lengths_are_ours_and_not_comfyuis(probe: dict[str, Any]) -> None:
    """ComfyUI pads T5 to 256 and does not pad Mistral; 0 is 512 here."""
    for setting, length in probe["lengths"].items():
        asked = int(setting.rpartition(" ")[2])
        assert length == (asked or 512), setting


def test_the_report_counts_tokens_and_names_what_was_cut_as_ours_does(
    probe: dict[str, Any],
) -> None:
    assert len(probe["reports"]) == 36
    assert all(probe["reports"].values())


def test_a_second_prompt_is_t5s_alone(probe: dict[str, Any]) -> None:
    assert probe["second_apart"] <= 1e-6
    assert probe["second_from_first"] > 0.1


def test_a_loras_patches_on_the_clip_are_read_with_and_left_on_their_clone(
    probe: dict[str, Any],
) -> None:
    assert probe["patched_apart"] <= 1e-6
    assert min(probe["patched_from_plain"]) > 1e-3
    assert probe["plain_again"]


def test_comfyuis_own_encoding_is_the_same_where_its_length_is_and_stays_so(
    probe: dict[str, Any],
) -> None:
    assert probe["from_comfyui"] <= 1e-6
    assert probe["same_as_before"]


def test_a_clip_with_more_places_reads_77_tokens(probe: dict[str, Any]) -> None:
    assert probe["long_clip"] <= 1e-6


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("sdxl", "FamilyMismatchError: The CLIP is SDXLClipModel, made of clip_l, clip_g."),
        ("sd3", "FamilyMismatchError: The CLIP is SD3ClipModel, made of clip_l, t5xxl."),
        ("t5 only", "FamilyMismatchError: The CLIP is SD3ClipModel, made of t5xxl."),
        ("z-image", "FamilyMismatchError: The CLIP is ZImageTEModel, made of qwen3_4b."),
        ("skipped", "SettingError: 'CLIP Set Last Layer' is at -2 on this CLIP."),
        ("hooked", "SettingError: The CLIP carries hooks"),
        ("length", "SettingError: The text length is 600 tokens."),
    ],
)
def test_what_does_not_fit_is_refused_by_name(probe: dict[str, Any], use: str, words: str) -> None:
    assert probe["refused"][use].startswith(words)


def test_another_models_clip_is_told_what_is_needed(probe: dict[str, Any]) -> None:
    for use in ("sdxl", "sd3", "t5 only", "z-image"):
        said = probe["refused"][use]
        assert "CLIP-L and T5 for FLUX.1, or Qwen3 or Mistral for FLUX.2" in said
        assert "'Load CLIP (Dual)', type flux" in said
