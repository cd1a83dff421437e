"""What our samplers would pass over in a CONDITIONING is refused by name, and so is rubbish."""

from typing import Any

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return run_probe("probe_native_conditioning_refused")


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("mask", ("a mask", "mask_strength", "'Conditioning (Set Mask)'")),
        ("area", ("an area", "(area)", "take 'Conditioning (Set Area)' off")),
        ("strength", ("a strength", "'Conditioning (Set Area Strength)'")),
        ("range", ("a part of the steps", "end_percent", "'ConditioningSetTimestepRange'")),
        ("combined", ("2 prompts", "'Conditioning (Combine)'")),
        ("unclip", ("unCLIP", "'unCLIPConditioning'")),
        ("control", ("a ControlNet", "'Apply ControlNet'")),
        ("gligen", ("GLIGEN", "'Apply GLIGEN Text Box'")),
        ("hooks", ("hooks", "'Cond Set Props'")),
        ("concat_latent_image", ("a picture to fill in", "'InpaintModelConditioning'")),
        ("default", ("default", "'Cond Set Default Combine'")),
        ("style", ("attention mask", "'Apply Style Model'")),
        ("unknown", ("a" * 79 + "…, b\\n, c and 1 more",)),
        ("both", ("a mask", "a ControlNet", "'Conditioning (Set Mask)' and 'Apply ControlNet'")),
        ("uxo", ("by 'uxo'", "'Edit Model Reference Method'")),
        ("index_timestep_zero", ("by 'index_timestep_zero'", "offset or index")),
        ("none\x00such", ("by 'none\\x00such'",)),
        ("off", ("guidance switched off", "FLUX.2 [dev]", "'FluxDisableGuidance'")),
        ("negative", ("The negative input", "a mask")),
    ],
)
def test_what_only_comfyuis_samplers_read_is_named_with_its_node(
    probe: dict[str, Any], use: str, words: tuple[str, ...]
) -> None:
    message = probe["carried"][use]
    assert message.startswith("glassbox.SettingError: ")
    assert [one for one in words if one not in message] == []


def test_every_refusal_above_is_tested(probe: dict[str, Any]) -> None:
    assert len(probe["carried"]) == 19


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("SDXL", "2048 wide, pooled 1280: SDXL's"),
        ("SD 1.5", "SD 1.5's, or CLIP-L's alone"),
        ("SD 3", "SD 3's"),
        ("T5", "none pooled: T5's alone"),
        ("Qwen", "Qwen-Image's"),
        ("klein 9B", "FLUX.2's, from Qwen3 8B"),
        ("T5 alone on nano", "192 wide, none pooled"),
        ("other generation", "FLUX.2's, from Qwen3 4B"),
        ("native MODEL", "FLUX.2's, from Qwen3 4B"),
    ],
)
def test_text_of_another_model_is_named_with_what_the_model_reads(
    probe: dict[str, Any], use: str, words: str
) -> None:
    message = probe["foreign"][use]
    assert message.startswith("glassbox.FamilyMismatchError: ")
    assert words in message
    assert "for Glassbox nano Kontext" in message


@pytest.mark.parametrize("use", ["SDXL", "SD 1.5", "SD 3", "T5", "Qwen"])
def test_text_that_is_no_flux_models_is_refused_without_a_model_too(
    probe: dict[str, Any], use: str
) -> None:
    message = probe["foreign"][f"{use} without a model"]
    assert message.startswith("glassbox.FamilyMismatchError: ")
    assert "FLUX.1's, from CLIP-L and T5, or FLUX.2's" in message
    assert probe["foreign"]["klein 9B without a model"] == ""


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("reference", "Reference 1 holds FLUX.2 tokens."),
        ("SDXL reference", "The latent has shape (1, 4, 8, 8)."),
        ("video reference", "The latent has shape (1, 16, 1, 8, 8)."),
    ],
)
def test_a_reference_of_another_model_is_named(probe: dict[str, Any], use: str, words: str) -> None:
    assert probe["foreign"][use].startswith(f"glassbox.FamilyMismatchError: {words}")


def test_rubbish_gets_our_errors_on_every_socket(probe: dict[str, Any]) -> None:
    assert len(probe["rubbish"]) == 46 * 8
    raw = {name: one for name, one in probe["rubbish"].items() if not one.startswith("glassbox.")}
    assert raw == {}
    assert [name for name, one in probe["rubbish"].items() if "Fix: " not in one] == []


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("references", "SettingError: The text input's CONDITIONING carries 2 references."),
        ("batch of 3", "ShapeError: The text has a batch of 3, the noise 1."),
        ("references of 3", "ShapeError: The reference 1 has a batch of 3, the noise 1."),
        ("huge text", "NonFiniteError: The text of the conditioning input's CONDITIONING"),
        ("latent for noise", "FamilyMismatchError: The latent has shape (1, 4, 8, 8)."),
        ("no latent for noise", "SettingError: A SimpleNamespace is wired where tokens go."),
    ],
)
def test_what_would_be_lost_or_does_not_fit_is_refused(
    probe: dict[str, Any], use: str, words: str
) -> None:
    assert probe["conditioner"][use].startswith(f"glassbox.{words}")
