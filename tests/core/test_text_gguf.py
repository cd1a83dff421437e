"""Text encoders in GGUF files: T5, Qwen3 and Mistral compute what their dequantised selves do."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError
from glassbox.flux_core.families import MISTRAL_SMALL_3
from glassbox.flux_core.text.modules import T5Spec
from glassbox.flux_core.text.tekken import read_tekken
from glassbox.flux_core.text.tokenizers import ChatTokenizer
from glassbox.flux_core.weights.gguf_text import in_halves
from glassbox.flux_core.weights.load_text import open_text
from glassbox.tests.core.checkpoints import write
from glassbox.tests.core.quantised_files import State
from glassbox.tests.core.text_gguf_files import (
    HEAD,
    entries_of,
    gguf_file,
    language_file,
    said,
    tokenizer,
    vocabulary,
)
from glassbox.tests.parity import text_language_samples as samples
from glassbox.tests.parity import text_samples
from glassbox.tests.parity.text_language_samples import LanguageKit
from glassbox.tests.parity.text_samples import Kit

T5 = T5Spec(width=64, layers=2, ffn=96, vocabulary=320, heads=4, head_dim=16)
PROMPT = "make the circle red"


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    generator = torch.Generator().manual_seed(7)
    t5 = {
        "encoder." + name: ("norm" in name) + 0.2 * torch.randn(shape, generator=generator)
        for name, shape in T5.shapes().items()
    }
    t5["shared.weight"] = t5.pop("encoder.embed_tokens.weight")
    return replace(text_samples.make_kit(tmp_path_factory.mktemp("tokenizers")), t5=t5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16", "F32"])
def test_qwen3_computes_what_its_dequantised_self_does(
    qwen: LanguageKit, kind: str, tmp_path: Path
) -> None:
    file, plain = language_file(qwen, "qwen3", kind, tmp_path / "Qwen3-4B.gguf")
    same_features(qwen, file, plain, tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "mistral3"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16", "F32"])
def test_mistral_computes_what_its_dequantised_self_does_with_the_tokenizer_of_its_file(
    mistral: LanguageKit, architecture: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "Mistral-Small-3.2.gguf"
    file, plain = language_file(mistral, architecture, kind, path, *tokenizer(*vocabulary()))
    same_features(mistral, file, plain, tmp_path)


def same_features(kit: LanguageKit, file: Path, plain: State, folder: Path) -> None:
    spread = replace(kit, state=plain).write(folder / "plain.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = kit.load(file, dtype=dtype), kit.load(spread, dtype=dtype)
        state, same = ours.modules[0].state_dict(), theirs.modules[0].state_dict()
        assert state.keys() == same.keys()
        assert [key for key in state if not torch.equal(state[key], same[key])] == []
        assert torch.equal(ours.encode(PROMPT).txt, theirs.encode(PROMPT).txt)


@pytest.mark.parametrize("architecture", ["t5", "t5encoder"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_t5_computes_what_its_dequantised_self_does(
    kit: Kit, architecture: str, kind: str, tmp_path: Path
) -> None:
    state = dict(kit.t5)
    if architecture == "t5":  # with its other half, which is not read
        state["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(64, 64)
        state["decoder.final_layer_norm.weight"] = torch.zeros(64)
        state["lm_head.weight"] = torch.zeros(320, 64)
    entries, plain = entries_of(state, architecture, kind)
    form = said("general.architecture", architecture)
    packed = gguf_file(tmp_path / "t5-v1_1-xxl-encoder.gguf", entries, form)
    spread = write(tmp_path / "t5.safetensors", {key: plain[key] for key in kit.t5})
    clip = text_samples.save(kit.clip, tmp_path / "clip.safetensors", "text_model.")
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = kit.load(packed, clip, dtype=dtype), kit.load(clip, spread, dtype=dtype)
        assert torch.equal(ours.encode(PROMPT).txt, theirs.encode(PROMPT).txt)
        assert torch.equal(ours.encode(PROMPT).pooled, theirs.encode(PROMPT).pooled)
    made = f"dequantised from {kind} to bfloat16: 15 tensors"
    assert (made in ours.report) == (kind != "F16")
    assert "T5: t5-v1_1-xxl-encoder.gguf, 2 layers, width 64" in ours.report


def test_attention_is_the_same_in_llama_cpps_order_and_in_ours() -> None:
    """Scores as llama.cpp turns its rows, against scores as transformers turns what we make."""
    generator = torch.Generator().manual_seed(3)
    queries, keys = (torch.randn(HEAD, 16, generator=generator).double() for _ in range(2))
    streams = torch.randn(5, 16, generator=generator).double()
    places = torch.arange(5).double()[:, None]
    angles = places * 1e4 ** -(torch.arange(0, HEAD, 2).double() / HEAD)  # (5, HEAD / 2)
    cos, sin = angles.cos(), angles.sin()

    def by_neighbours(rows: Tensor) -> Tensor:
        one, other = rows[:, 0::2], rows[:, 1::2]
        return torch.stack((one * cos - other * sin, one * sin + other * cos), -1).flatten(1)

    def by_halves(rows: Tensor) -> Tensor:
        one, other = rows.chunk(2, 1)
        return torch.cat((one * cos - other * sin, other * cos + one * sin), 1)

    theirs = by_neighbours(streams @ queries.T) @ by_neighbours(streams @ keys.T).T
    ours = [in_halves("a.self_attn.q_proj.weight", one, HEAD) for one in (queries, keys)]
    scores = by_halves(streams @ ours[0].T) @ by_halves(streams @ ours[1].T).T
    assert float((scores - theirs).abs().max()) <= 1e-12
    unturned = by_halves(streams @ queries.T) @ by_halves(streams @ keys.T).T
    assert float((unturned - theirs).abs().max()) > 0.1


@pytest.mark.parametrize("prompt", samples.PROMPTS)
def test_the_tokenizer_of_a_gguf_file_gives_the_ids_of_tekken(
    mistral: LanguageKit, prompt: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.gguf"
    file, _ = language_file(mistral, "llama", "F32", path, *tokenizer(*vocabulary()))
    ours = mistral.load(file).tokenizer
    theirs = ChatTokenizer("tekken", read_tekken(samples.tekken()))
    one, other = (each.encode(prompt, MISTRAL_SMALL_3) for each in (ours, theirs))
    assert torch.equal(one.ids, other.ids)
    assert one.count == other.count


def test_a_tokenizer_beside_a_mistral_that_carries_none_is_used(
    mistral: LanguageKit, tmp_path: Path
) -> None:
    file, _ = language_file(mistral, "llama", "F32", tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="tokenizer folder of Mistral") as caught:
        mistral.load(file)
    assert "mistral_3_small_flux2" in caught.value.fix
    (tmp_path / "tekken.json").write_bytes(samples.tekken())
    carried = replace(mistral).write(tmp_path / "carried.safetensors")
    features = [
        mistral.load(one, dtype=torch.float32).encode(PROMPT).txt for one in (file, carried)
    ]
    assert torch.equal(*features)


def test_a_file_of_the_librarys_own_writer_is_read(mistral: LanguageKit, tmp_path: Path) -> None:
    """With metadata of every type a converter writes."""
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("Mistral Small")
    writer.add_head_count(4)
    writer.add_rope_freq_base(1e9)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    words, kinds = vocabulary()
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{word} {word}" for word in words[:50]])
    writer.add_add_bos_token(True)
    state = {"model." + key: one for key, one in mistral.state.items()}
    entries, plain = entries_of(state, "llama", "Q8_0")
    for name, (kind, shape, data) in entries.items():
        bits = np.frombuffer(data, dtype=np.uint8 if kind == 8 else np.float32)
        sides = (*shape[:-1], -1)
        writer.add_tensor(name, bits.reshape(sides), raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    same_features(mistral, file, {k.removeprefix("model."): v for k, v in plain.items()}, tmp_path)


def test_every_tensor_has_its_name(qwen: LanguageKit, tmp_path: Path) -> None:
    file, plain = language_file(qwen, "qwen3", "Q8_0", tmp_path / "a.gguf")
    found = open_text(file)
    assert found.shapes == {"model." + key: tuple(one.shape) for key, one in plain.items()}
    assert found.quantised.keys() <= found.shapes.keys()


def test_files_in_transformers_names_are_read_as_they_are(kit: Kit, tmp_path: Path) -> None:
    """As converters for ComfyUI write them, CLIP-L among them."""
    files: list[Path] = []
    for name, state in (("clip", kit.clip), ("t5", kit.t5)):
        entries = {key: (0, tuple(one.shape), one.numpy().tobytes()) for key, one in state.items()}
        files.append(
            gguf_file(tmp_path / f"{name}.gguf", entries, said("general.architecture", "pig"))
        )
    clip = text_samples.save(kit.clip, tmp_path / "clip.safetensors")
    t5 = text_samples.save(kit.t5, tmp_path / "t5.safetensors")
    ours, theirs = kit.load(*files).encode(PROMPT), kit.load(clip, t5).encode(PROMPT)
    assert torch.equal(ours.txt, theirs.txt)
    assert torch.equal(ours.pooled, theirs.pooled)
