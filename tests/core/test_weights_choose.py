from dataclasses import replace
from pathlib import Path

import pytest

from glassbox.flux_core.errors import FamilyMismatchError
from glassbox.flux_core.families import (
    FAMILIES,
    FLUX1_DEV,
    FLUX1_KONTEXT,
    FLUX1_KREA,
    FLUX1_SCHNELL,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    FLUX2_KLEIN_9B_KV,
    FLUX2_KLEIN_BASE_4B,
    FLUX2_KLEIN_BASE_9B,
    NANO_KLEIN,
    NANO_KONTEXT,
)
from glassbox.flux_core.specs import FluxFamily, TransformerSpec
from glassbox.flux_core.weights.detect import DetectedFamily, describe_size, detect_family
from glassbox.tests.core.checkpoints import TINY_FLUX1, TINY_FLUX2, TINY_KLEIN, TINY_SCHNELL

FULL, UNGUIDED = FLUX1_DEV.transformer, FLUX1_SCHNELL.transformer
DEV2, KLEIN_9B, KLEIN_4B = (
    family.transformer for family in (FLUX2_DEV, FLUX2_KLEIN_9B, FLUX2_KLEIN_4B)
)


def test_a_size_that_no_family_has_is_said() -> None:
    assert describe_size(TINY_FLUX1, FLUX1_DEV) == (
        "a custom size: width 128, 2 + 3 blocks, text 48 wide"
    )
    assert describe_size(FULL, FLUX1_DEV) == ""


@pytest.mark.parametrize(
    ("spec", "path", "family", "guessed"),
    [
        (FULL, "flux1-dev-kontext_fp8_scaled.safetensors", FLUX1_KONTEXT, True),
        (FULL, "flux1-kontext-dev.safetensors", FLUX1_KONTEXT, True),
        (FULL, "FLUX.1-Kontext-dev/transformer", FLUX1_KONTEXT, True),
        (
            FULL,
            "FLUX.1-Krea-dev/transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
            FLUX1_KREA,
            True,
        ),
        (FULL, "flux1-krea-dev.safetensors", FLUX1_KREA, True),
        (FULL, "Flux.1_Dev-bf16.safetensors", FLUX1_DEV, True),
        (FULL, "kontext/somebody's mix.safetensors", FLUX1_DEV, True),
        (FULL, "flux1-schnell.safetensors", FLUX1_DEV, True),
        (UNGUIDED, "flux1-schnell.safetensors", FLUX1_SCHNELL, False),
        (UNGUIDED, "anything.safetensors", FLUX1_SCHNELL, False),
        (TINY_SCHNELL, "anything.safetensors", FLUX1_SCHNELL, True),
        (NANO_KONTEXT.transformer, "anything.safetensors", NANO_KONTEXT, False),
        (TINY_FLUX1, "glassbox_nano_kontext.safetensors", NANO_KONTEXT, True),
        (TINY_FLUX1, "anything.safetensors", FLUX1_DEV, True),
        (DEV2, "flux2-dev.safetensors", FLUX2_DEV, False),
        (DEV2, "flux-2-klein-9b-kv.safetensors", FLUX2_DEV, False),
        (KLEIN_9B, "flux-2-klein-9b.safetensors", FLUX2_KLEIN_9B, True),
        (KLEIN_9B, "FLUX.2-klein-9B/transformer", FLUX2_KLEIN_9B, True),
        (KLEIN_9B, "flux-2-klein-9b-kv.safetensors", FLUX2_KLEIN_9B_KV, True),
        (KLEIN_9B, "flux2_klein_9B_KV_fp8.safetensors", FLUX2_KLEIN_9B_KV, True),
        (
            KLEIN_9B,
            "FLUX.2-klein-9b-kv/transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
            FLUX2_KLEIN_9B_KV,
            True,
        ),
        (KLEIN_9B, "flux-2-klein-base-9b.safetensors", FLUX2_KLEIN_BASE_9B, True),
        (KLEIN_9B, "flux2_klein_9b_base.safetensors", FLUX2_KLEIN_BASE_9B, True),
        (KLEIN_9B, "my-klein-base-mix.safetensors", FLUX2_KLEIN_BASE_9B, True),
        (KLEIN_9B, "my-klein-9b-mark-v2.safetensors", FLUX2_KLEIN_9B, True),
        (KLEIN_9B, "anything.safetensors", FLUX2_KLEIN_9B, True),
        (KLEIN_4B, "flux-2-klein-4b.safetensors", FLUX2_KLEIN_4B, True),
        (KLEIN_4B, "FLUX.2-klein-4B/transformer", FLUX2_KLEIN_4B, True),
        (KLEIN_4B, "flux-2-klein-base-4b-fp8.safetensors", FLUX2_KLEIN_BASE_4B, True),
        (KLEIN_4B, "FLUX.2-klein-base-4B/transformer", FLUX2_KLEIN_BASE_4B, True),
        (KLEIN_4B, "flux-2-klein-9b-kv.safetensors", FLUX2_KLEIN_4B, True),
        (KLEIN_4B, "anything.safetensors", FLUX2_KLEIN_4B, True),
        (NANO_KLEIN.transformer, "anything.safetensors", NANO_KLEIN, False),
        (TINY_FLUX2, "anything.safetensors", FLUX2_DEV, True),
        (TINY_KLEIN, "anything.safetensors", FLUX2_KLEIN_4B, True),
        (TINY_KLEIN, "klein-9b-kv.safetensors", FLUX2_KLEIN_9B_KV, True),
    ],
)
def test_a_family_is_known_by_shape_or_guessed_from_the_name(
    spec: TransformerSpec, path: str, family: object, guessed: bool
) -> None:
    detected = detect_family(spec, Path("models") / path, {}, None)
    assert (detected.family, detected.guessed) == (family, guessed)
    assert ("guessed" in detected.known_by) == guessed


def test_what_the_user_or_the_file_says_goes_before_the_name() -> None:
    path = Path("flux1-kontext-dev.safetensors")
    assert detect_family(FULL, path, {}, FLUX1_DEV).family == FLUX1_DEV
    detected = detect_family(FULL, path, {"glassbox_family": "flux1-krea"}, None)
    assert detected == DetectedFamily(FLUX1_KREA, False, "named in the file")


@pytest.mark.parametrize(
    ("spec", "asked", "said"),
    [
        (FULL, FLUX1_SCHNELL, "has a guidance input"),
        (UNGUIDED, FLUX1_KONTEXT, "has no guidance input"),
        (replace(FULL, out_channels=128), FLUX1_DEV, "128 out"),
        (replace(FULL, in_channels=96), None, "96 channels in"),
        (
            KLEIN_4B,
            FLUX1_KONTEXT,
            r"no guidance input, 128 channels.*as FLUX\.2 \[klein\] base 4B or FLUX\.2 "
            r"\[klein\] 4B has.*FLUX\.1 Kontext.*64 channels",
        ),
        (FULL, FLUX2_DEV, r"64 channels in.*as FLUX\.1 Kontext.*FLUX\.2 \[dev\].*128 channels in"),
        (TINY_KLEIN, FLUX1_SCHNELL, r"as FLUX\.2 \[klein\] 4B has.*FLUX\.1 \[schnell\]"),
        (TINY_KLEIN, FLUX2_DEV, r"no guidance input.*FLUX\.2 \[dev\], which has a guidance input"),
        (
            DEV2,
            FLUX2_KLEIN_9B,
            r"a guidance input.*as FLUX\.2 \[dev\] has.*klein\] 9B, which has no",
        ),
        (
            KLEIN_4B,
            FLUX2_KLEIN_9B,
            r"is 3072 wide with 5 \+ 20 blocks, as FLUX\.2 \[klein\] base 4B or FLUX\.2 "
            r"\[klein\] 4B is.*FLUX\.2 \[klein\] 9B, which.*is 4096 wide with 8 \+ 24",
        ),
        (
            KLEIN_9B,
            FLUX2_KLEIN_BASE_4B,
            r"as FLUX\.2 \[klein\] base 9B, FLUX\.2 \[klein\] 9B KV or",
        ),
        (NANO_KLEIN.transformer, FLUX2_KLEIN_4B, "256 wide.*as Glassbox nano klein is"),
        (NANO_KONTEXT.transformer, FLUX1_KONTEXT, "256 wide.*as Glassbox nano Kontext is"),
    ],
)
def test_a_family_that_the_keys_contradict_is_refused(
    spec: TransformerSpec, asked: object, said: str
) -> None:
    with pytest.raises(FamilyMismatchError, match=said) as caught:
        detect_family(spec, Path("a.safetensors"), {}, asked)
    assert caught.value.settings == ("family",)


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        (KLEIN_9B, FLUX2_KLEIN_9B_KV),
        (KLEIN_9B, FLUX2_KLEIN_BASE_9B),
        (KLEIN_4B, FLUX2_KLEIN_BASE_4B),
        (TINY_KLEIN, FLUX2_KLEIN_9B_KV),
        (TINY_KLEIN, FLUX2_KLEIN_BASE_4B),
        (TINY_FLUX2, FLUX2_DEV),
    ],
)
def test_a_variant_or_a_size_that_no_family_has_is_the_users_choice(
    spec: TransformerSpec, asked: FluxFamily
) -> None:
    detected = detect_family(spec, Path("flux-2-klein-9b.safetensors"), {}, asked)
    assert detected == DetectedFamily(asked, False, "chosen by hand")


def test_a_family_that_the_file_contradicts_is_refused() -> None:
    metadata = {"glassbox_family": "nano-kontext"}
    with pytest.raises(FamilyMismatchError, match="says that it is Glassbox nano"):
        detect_family(NANO_KONTEXT.transformer, Path("a"), metadata, FLUX1_KONTEXT)


def test_every_family_is_found_by_its_own_hints() -> None:
    for family in FAMILIES.values():
        for hint in family.file_hints:
            path = Path(f"my-{hint}-model.safetensors")
            assert detect_family(family.transformer, path, {}, None).family == family
