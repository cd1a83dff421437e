"""Every layout language models are published in gives the same weights; only what is read loads."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError, NonFiniteError, SettingError
from glassbox.flux_core.families import (
    LANGUAGE_MODELS,
    MISTRAL_SMALL_3,
    QWEN3_4B,
    QWEN3_8B,
)
from glassbox.flux_core.specs import LanguageModelSpec
from glassbox.flux_core.text.encoders import LanguageModelEncoder
from glassbox.flux_core.weights.checkpoint import Checkpoint
from glassbox.flux_core.weights.load_text import load_text_encoders
from glassbox.tests.core.quantised_files import as_bytes
from glassbox.tests.parity import text_language_samples as samples
from glassbox.tests.parity.text_language_samples import LanguageKit
from glassbox.tests.parity.text_samples import meta_file, save

PREFIXES = (
    "model.",
    "",
    "language_model.model.",
    "model.language_model.",
    "language_model.",
    "text_encoders.qwen3_4b.transformer.model.",
)
BESIDE = {
    "lm_head.weight": torch.zeros(3, 3),
    "language_model.lm_head.weight": torch.zeros(2, 2),
    "vision_tower.transformer.layers.0.attention.q_proj.weight": torch.zeros(2, 2),
    "multi_modal_projector.linear_1.weight": torch.zeros(2, 2),
    "some.note": torch.zeros(1),
}


def needed(kit: LanguageKit) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in kit.state.items()
        if not name.startswith("layers.3.") and name != "norm.weight"
    }


def assert_same_weights(encoder: LanguageModelEncoder, kit: LanguageKit) -> None:
    """Bit for bit, nothing left on the meta device, nothing that trains."""
    module = encoder.modules[0]
    state = module.state_dict()
    assert state.keys() == needed(kit).keys()
    assert all(torch.equal(state[name], value) for name, value in needed(kit).items())
    assert not module.training
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert not any(weight.requires_grad for weight in module.parameters())
    assert torch.isfinite(encoder.encode("make the circle red").txt).all()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_gives_the_same_weights(
    qwen: LanguageKit, mistral: LanguageKit, prefix: str, tmp_path: Path
) -> None:
    for kit in (qwen, mistral):
        kit = replace(kit, extras=kit.extras | BESIDE)
        assert_same_weights(kit.load(kit.write(tmp_path / "model.safetensors", prefix)), kit)


@pytest.mark.parametrize("kind", ["qwen", "mistral"])
def test_only_what_is_run_is_read(
    qwen: LanguageKit,
    mistral: LanguageKit,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers behind the last one read, the norm, the head and the pictures' tower stay on disk."""
    kit = qwen if kind == "qwen" else mistral
    asked: set[str] = set()
    stream = Checkpoint.stream

    def record(file: Checkpoint, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        asked.update(keys := list(keys))
        return stream(file, keys)

    monkeypatch.setattr(Checkpoint, "stream", record)
    kit = replace(kit, extras=kit.extras | BESIDE)
    kit.load(kit.write(tmp_path / "model.safetensors"))
    carried = {"tekken_model"} if kind == "mistral" else set()
    assert asked == {"model." + name for name in needed(kit)} | carried


def test_layers_behind_the_last_one_read_may_be_missing(
    mistral: LanguageKit, tmp_path: Path
) -> None:
    """ComfyUI's pruned Mistral ends early; no published file has to hold what is not run."""
    kit = replace(mistral, state=needed(mistral))
    encoder = kit.load(kit.write(tmp_path / "pruned.safetensors"))
    assert_same_weights(encoder, mistral)
    assert "3 of 3 layers" in encoder.report
    whole = mistral.load(mistral.write(tmp_path / "whole.safetensors"))
    assert "3 of 4 layers" in whole.report


def test_folders_of_shards_load_with_the_tokenizer_beside_them(
    mistral: LanguageKit, tmp_path: Path
) -> None:
    """As in Hugging Face's model, and as in the two folders of diffusers'."""
    folder = tmp_path / "text_encoder"
    names = sorted(mistral.state)
    places: dict[str, str] = {}
    for number, half in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save({"model.language_model." + n: mistral.state[n] for n in half}, folder / shard)
        places |= dict.fromkeys(("model.language_model." + n for n in half), shard)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json or tekken\.json"):
        mistral.load(folder)
    beside = tmp_path / "tokenizer"
    samples.published_mistral_tokenizer(beside)
    assert_same_weights(mistral.load(folder), mistral)
    tokenizer = samples.published_mistral_tokenizer(tmp_path / "json")
    tokenizer.save_pretrained(folder)
    encoder = mistral.load(folder / "model-00002-of-00002.safetensors")
    assert encoder.tokenizer.name == "text_encoder"
    assert_same_weights(encoder, mistral)
    carried = mistral.load(mistral.write(tmp_path / "single.safetensors"))
    assert torch.equal(carried.encode("a red star").txt, encoder.encode("a red star").txt)


def test_qwen_finds_its_tokenizer_beside_it_too(qwen: LanguageKit, tmp_path: Path) -> None:
    folder = samples.write_qwen_tokenizer(tmp_path / "qwen")
    encoder = qwen.load(qwen.write(folder / "model.safetensors"), qwen_tokenizer=None)
    assert_same_weights(encoder, qwen)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_file_is_kept(
    qwen: LanguageKit, stored: torch.dtype, tmp_path: Path
) -> None:
    state = {name: value.to(stored) for name, value in qwen.state.items()}
    state["layers.1.input_layernorm.weight"] = qwen.state["layers.1.input_layernorm.weight"]
    kit = replace(qwen, state=state)
    encoder = kit.load(kit.write(tmp_path / "model.safetensors"))
    assert encoder.encode("a red star").txt.dtype == stored
    assert {weight.dtype for weight in encoder.modules[0].parameters()} == {stored}
    frequencies = dict(encoder.modules[0].named_buffers())
    assert {value.dtype for value in frequencies.values()} == {torch.float32}
    asked = kit.load(tmp_path / "model.safetensors", dtype=torch.bfloat16)
    assert asked.encode("a red star").txt.dtype == torch.bfloat16


@pytest.mark.parametrize("ending", [None, "scale_weight", "weight_scale"])
@pytest.mark.parametrize("by_row", [False, True])
def test_fp8_files_become_bfloat16(
    qwen: LanguageKit, ending: str | None, by_row: bool, tmp_path: Path
) -> None:
    """Plain 8-bit weights, and those with a scale, the token table's among them."""
    state: dict[str, Tensor] = {}
    for name, value in qwen.state.items():
        if value.dim() == 1:
            state[name] = value.bfloat16()
            continue
        scale = torch.ones(())
        if ending:
            scale = value.abs().amax(1, keepdim=True) if by_row else value.abs().max()
            scale = scale / 448
            state[name.removesuffix("weight") + ending] = scale
            state[name.removesuffix("weight") + "input_scale"] = torch.ones(())
            state[name.removesuffix("weight") + "comfy_quant"] = as_bytes(
                {"format": "float8_e4m3fn"}
            )
        state[name] = (value / scale).to(torch.float8_e4m3fn)
    kit = replace(qwen, state=state)
    encoder = kit.load(kit.write(tmp_path / "model.safetensors"))
    for name, value in encoder.modules[0].state_dict().items():
        assert value.dtype == torch.bfloat16
        if ending is None:
            assert torch.equal(value, state[name].bfloat16())
        published = qwen.state[name]
        error = (value.float() - published).abs().max() / published.abs().max()
        assert error < 0.07, name
    assert torch.isfinite(encoder.encode("a red star").txt).all()


FULL = (
    (MISTRAL_SMALL_3, 40, 131072, 271, 30, 17_343_754_240),
    (QWEN3_8B, 36, 151936, 298, 27, 5_831_883_520),
    (QWEN3_4B, 36, 151936, 298, 27, 3_114_088_192),
)


@pytest.mark.parametrize(("spec", "depth", "vocabulary", "tensors", "layers", "numbers"), FULL)
def test_full_size_files_are_told_apart_and_accepted_up_to_their_weights(
    spec: LanguageModelSpec,
    depth: int,
    vocabulary: int,
    tensors: int,
    layers: int,
    numbers: int,
    qwen: LanguageKit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def empty(file: Checkpoint, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            yield key, torch.empty(file.shapes[key], dtype=file.dtypes[key], device="meta")

    monkeypatch.setattr(Checkpoint, "stream", empty)
    shapes = samples.full_shapes(spec, depth, vocabulary)
    file = meta_file(shapes, tmp_path / "model.safetensors", "model.")
    samples.published_mistral_tokenizer(tmp_path)
    encoder = load_text_encoders([file], qwen_tokenizer=qwen.qwen_tokenizer)
    assert isinstance(encoder, LanguageModelEncoder)
    assert encoder.text is spec
    state = encoder.modules[0].state_dict()
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == numbers
    assert f"{layers} of {depth} layers" in encoder.report
    assert spec.title in encoder.report


def test_a_size_that_nobody_published_is_an_experiment(qwen: LanguageKit, tmp_path: Path) -> None:
    spec = replace(QWEN3_4B, hidden=48, ffn=80, heads=2, kv_heads=1)
    shapes = samples.full_shapes(spec, 27, samples.VOCABULARY)
    state = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    kit = replace(qwen, state=state)
    encoder = kit.load(kit.write(tmp_path / "custom.safetensors"), text=None)
    assert encoder.text == replace(spec, title="Qwen3 4B in a custom size (48 wide)")
    assert "27 of 27 layers, width 48" in encoder.report
    assert encoder.encode("a red star").txt.shape == (1, 512, 3 * 48)


def test_the_three_models_differ_in_width() -> None:
    assert len({one.hidden for one in LANGUAGE_MODELS}) == len(LANGUAGE_MODELS) == 3


@pytest.mark.parametrize("tokens", [0, -3, 513])
def test_a_length_outside_the_bounds_is_refused(
    qwen: LanguageKit, tokens: int, tmp_path: Path
) -> None:
    encoder = qwen.load(qwen.write(tmp_path / "model.safetensors"))
    with pytest.raises(SettingError, match="1 to 512"):
        encoder.encode("red", tokens=tokens)


def test_a_second_prompt_is_not_dropped_in_silence(qwen: LanguageKit, tmp_path: Path) -> None:
    encoder = qwen.load(qwen.write(tmp_path / "model.safetensors"))
    assert encoder.encode("a red star").notes == ()
    assert encoder.encode("a red star", "a red star").notes == ()
    features = encoder.encode("a red star", "a blue star")
    assert features.notes == ("prompt_2 was not read: Qwen3 4B takes one prompt.",)
    assert torch.equal(features.txt, encoder.encode("a red star").txt)
    assert features.source == "Qwen3 4B"


def test_the_host_is_asked_before_the_module_runs(qwen: LanguageKit, tmp_path: Path) -> None:
    encoder = qwen.load(qwen.write(tmp_path / "model.safetensors"))
    calls: list[str] = []
    encoder.ready = lambda: calls.append("ready")
    encoder.modules[0].register_forward_pre_hook(lambda *_: calls.append("run"))
    encoder.encode("red")
    assert calls == ["ready", "run"]


def test_a_tokenizer_with_more_ids_than_the_encoder_has_rows_is_refused(
    qwen: LanguageKit, tmp_path: Path
) -> None:
    table = qwen.state["embed_tokens.weight"][:300].clone()
    encoder = qwen.load(qwen.write(tmp_path / "small.safetensors", embed_tokens__weight=table))
    with pytest.raises(CheckpointError, match="its encoder has 300 rows"):
        encoder.encode("red")


def test_weights_that_are_not_numbers_are_reported(qwen: LanguageKit, tmp_path: Path) -> None:
    broken = torch.full_like(qwen.state["embed_tokens.weight"], torch.nan)
    encoder = qwen.load(qwen.write(tmp_path / "nan.safetensors", embed_tokens__weight=broken))
    with pytest.raises(NonFiniteError, match="Qwen3 4B gave NaN"):
        encoder.encode("red")
