"""GGUF files that are no text encoder of FLUX, or broken, are refused by name and quickly."""

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from glassbox.flux_core.errors import CheckpointError, FamilyMismatchError, GlassboxError
from glassbox.flux_core.weights.load import load_flux
from glassbox.flux_core.weights.load_text import load_text_encoders
from glassbox.tests.core.text_gguf_files import (
    CONTROL,
    WORD,
    entries_of,
    gguf_file,
    language_file,
    said,
    tokenizer,
    vocabulary,
)
from glassbox.tests.parity import text_samples
from glassbox.tests.parity.text_language_samples import LanguageKit
from glassbox.tests.parity.text_samples import Kit

EMPTY = (0, (2,), bytes(8))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return text_samples.make_kit(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize(
    ("architecture", "title"),
    [
        ("gemma3", "Gemma 3"),
        ("qwen2vl", "Qwen2.5-VL"),
        ("qwen3vl", "Qwen3-VL"),
        ("qwen3moe", "a mixture of experts"),
        ("clip", r"the image half \(mmproj\)"),
        ("falcon", "'falcon' by its own words"),
        ("", "'' by its own words"),
    ],
)
def test_another_architecture_is_named(
    qwen: LanguageKit, architecture: str, title: str, tmp_path: Path
) -> None:
    state = {"model." + key: one for key, one in qwen.state.items()}
    entries, _ = entries_of(state, "qwen3", "Q8_0")
    file = gguf_file(tmp_path / "a.gguf", entries, said("general.architecture", architecture))
    with pytest.raises(FamilyMismatchError, match=title) as caught:
        qwen.load(file)
    assert "T5 for FLUX.1; Qwen3 or Mistral Small 3.2 for FLUX.2" in caught.value.needed
    with pytest.raises(
        CheckpointError, match=r"a\.gguf is a text encoder or language model"
    ) as wrong:
        load_flux(file)
    assert wrong.value.settings == ("text encoder loader",)


def test_the_picture_half_of_a_language_model_is_named(kit: Kit, tmp_path: Path) -> None:
    entries = dict.fromkeys(("v.blk.0.attn_q.weight", "mm.0.weight", "v.patch_embd.weight"), EMPTY)
    file = gguf_file(tmp_path / "mmproj.gguf", entries, said("general.architecture", "clip"))
    clip = text_samples.save(kit.clip, tmp_path / "clip.safetensors")
    with pytest.raises(FamilyMismatchError, match=r"the image half \(mmproj\)"):
        kit.load(file, clip)


def test_a_mistral_with_stretched_positions_is_another_model(
    mistral: LanguageKit, tmp_path: Path
) -> None:
    stretched = said("mistral3.rope.scaling.type", "yarn")
    file, _ = language_file(mistral, "mistral3", "F32", tmp_path / "a.gguf", stretched)
    with pytest.raises(FamilyMismatchError, match="Ministral 3, Devstral 2"):
        mistral.load(file)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"blk.1.ssm_a.weight": EMPTY}, r"1 is not known \(model\.layers\.1\.ssm_a"),
        ({"blk.1.attn_k.weight": None}, r"1 is missing \(model\.layers\.1\.self_attn\.k_proj"),
        ({"blk.1.attn_k.weight": (0, (4, 32), bytes(512))}, "is 4x32 and not 16x32"),
        ({"model.embed_tokens.weight": EMPTY}, "has two names for one tensor"),
        ({"token_embd.weight": None}, "'qwen3', and holds no 'token_embd"),
        ({"blk.0.attn_q.bias": EMPTY}, r"Qwen2\.5"),
        ({"blk.0.ffn_gate_inp.weight": EMPTY}, "a mixture of experts"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_named_before_a_weight_is_read(
    qwen: LanguageKit, change: Mapping[str, object], match: str, tmp_path: Path
) -> None:
    state = {"model." + key: one for key, one in qwen.state.items()}
    entries: dict[str, object] = {**entries_of(state, "qwen3", "Q8_0")[0], **change}
    kept = {key: one for key, one in entries.items() if isinstance(one, tuple)}
    file = gguf_file(tmp_path / "a.gguf", kept, said("general.architecture", "qwen3"))
    with pytest.raises(GlassboxError, match=match):
        qwen.load(file)


def test_the_first_t5_is_named(kit: Kit, tmp_path: Path) -> None:
    entries, _ = entries_of(dict(kit.t5), "t5", "Q8_0")
    kept = {key: one for key, one in entries.items() if "ffn_gate" not in key}
    file = gguf_file(tmp_path / "flan.gguf", kept, said("general.architecture", "t5"))
    clip = text_samples.save(kit.clip, tmp_path / "clip.safetensors")
    with pytest.raises(FamilyMismatchError, match=r"flan\.gguf is T5 of the first version"):
        kit.load(file, clip)


def test_umt5_is_named(kit: Kit, tmp_path: Path) -> None:
    """It has a table of places in every layer."""
    entries, _ = entries_of(dict(kit.t5), "t5encoder", "Q8_0")
    entries["enc.blk.1.attn_rel_b.weight"] = entries["enc.blk.0.attn_rel_b.weight"]
    form = said("general.architecture", "t5encoder")
    file = gguf_file(tmp_path / "umt5-xxl-encoder.gguf", entries, form)
    clip = text_samples.save(kit.clip, tmp_path / "clip.safetensors")
    with pytest.raises(FamilyMismatchError, match=r"umt5-xxl-encoder\.gguf is UMT5"):
        kit.load(file, clip)


def test_a_mistral_in_other_names_is_not_guessed_at(mistral: LanguageKit, tmp_path: Path) -> None:
    entries = {
        "model." + key: (0, tuple(one.shape), one.numpy().tobytes())
        for key, one in mistral.state.items()
    }
    file = gguf_file(tmp_path / "a.gguf", entries, said("general.architecture", "llama"))
    with pytest.raises(CheckpointError, match="says that it is 'llama', and holds no 'token_embd"):
        mistral.load(file)


Words = tuple[list[str], list[int]]
BROKEN = (
    (lambda words, kinds: (words, kinds[:-1]), r"tokens and \d+ kinds"),
    (lambda words, kinds: ([], []), "no token for some byte"),
    (lambda words, kinds: (["<unk>", *words[1:19], "<unk>", *words[20:]], kinds), "are the same"),
    (lambda words, kinds: ([*words[:-1], words[-2]], [*kinds[:-1], WORD]), "are the same"),
    (lambda words, kinds: ([*words[:-1], "\u4f60"], [*kinds[:-1], WORD]), "could not be read"),
    (lambda words, kinds: (words, [*kinds[:-1], CONTROL]), "do not come first"),
    (lambda words, kinds: ([*words[:-1], "a" * 20_000], [*kinds[:-1], WORD]), "longer than any"),
    (lambda words, kinds: ([*words, *map(str, range(300_000))], kinds), "it lists 300,"),
)


@pytest.mark.parametrize(("change", "match"), BROKEN, ids=[match for _, match in BROKEN])
def test_a_broken_vocabulary_is_refused_quickly(
    mistral: LanguageKit, change: object, match: str, tmp_path: Path
) -> None:
    assert callable(change)
    words, kinds = change(*vocabulary())
    file, _ = language_file(mistral, "llama", "F32", tmp_path / "a.gguf", *tokenizer(words, kinds))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"tokenizer of Mistral could not.*{match}|{match}"):
        mistral.load(file)
    assert time.process_time() - start < 2


def test_a_download_that_stopped_anywhere_is_refused(mistral: LanguageKit, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    file, _ = language_file(mistral, "llama", "Q8_0", path, *tokenizer(*vocabulary()))
    whole = file.read_bytes()
    for share in range(1, 20):
        file.write_bytes(whole[: len(whole) * share // 20])
        with pytest.raises(CheckpointError, match="cut short"):
            load_text_encoders([file])
