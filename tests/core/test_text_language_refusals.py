"""A language model file that is wrong is refused by its header, with words that help."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import (
    CheckpointError,
    FamilyMismatchError,
    GlassboxError,
    SettingError,
)
from glassbox.flux_core.families import FLUX1_TEXT, MISTRAL_SMALL_3, QWEN3_4B, QWEN3_8B
from glassbox.flux_core.specs import LanguageModelSpec
from glassbox.flux_core.text.modules import (
    CLIP_L,
    T5_XXL,
    LanguageModelShape,
    build_language_model,
)
from glassbox.flux_core.types import Shapes
from glassbox.flux_core.weights.checkpoint import Checkpoint
from glassbox.flux_core.weights.load_text import load_text_encoders
from glassbox.tests.parity import text_language_samples as samples
from glassbox.tests.parity import text_samples
from glassbox.tests.parity.text_language_samples import LanguageKit
from glassbox.tests.parity.text_samples import meta_file, save

DEPTHS = {"qwen3": 36, "mistral3": 40}
VOCABULARIES = {"qwen3": 151936, "mistral3": 131072}


@pytest.fixture
def headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    read_through = Checkpoint.stream

    def read(file: Checkpoint, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        keys = list(keys)
        # What a layer says of its format is text, and is read with the header.
        assert all(key.endswith(".comfy_quant") for key in keys), "weights were read"
        return read_through(file, keys)

    monkeypatch.setattr(Checkpoint, "stream", read)


def refuse(
    error: type[GlassboxError],
    match: str,
    *files: Path,
    text: object = None,
    by: tuple[str, ...] = ("text encoder loader",),
) -> str:
    """Load as a file says and in the dtype that ComfyUI chooses: the same is refused."""
    heard: set[str] = set()
    for dtype in (None, torch.float32):
        with pytest.raises(error, match=match) as caught:
            load_text_encoders(files, text=text, dtype=dtype)
        heard.add(str(caught.value))
        assert caught.value.settings == by
    (said,) = heard
    return said


def published(
    spec: LanguageModelSpec, file: Path, extras: Shapes | None = None, **changes: int
) -> Path:
    """Write the header of a full-size file of a model built like spec."""
    like = replace(spec, **changes)
    shapes = samples.full_shapes(like, DEPTHS[spec.architecture], VOCABULARIES[spec.architecture])
    return meta_file(shapes | (extras or {}), file, "model.")


NATIVE = ("text encoder loader", "text encoding")
OTHERS = (
    (QWEN3_8B, {"hidden": 1024, "ffn": 3072}, "Qwen3 0.6B"),
    (QWEN3_8B, {"hidden": 5120, "ffn": 17408}, "Qwen3 14B or 32B"),
    (MISTRAL_SMALL_3, {"hidden": 4096, "ffn": 14336}, "Mistral 7B, Llama 3 8B"),
    (MISTRAL_SMALL_3, {"hidden": 3072, "ffn": 9216}, "Ministral 3 3B"),
    (MISTRAL_SMALL_3, {"hidden": 2048, "ffn": 8192}, "Llama 3.2 1B"),
)


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize(("spec", "changes", "name"), OTHERS)
def test_other_language_models_are_named(
    spec: LanguageModelSpec, changes: dict[str, int], name: str, tmp_path: Path
) -> None:
    file = published(spec, tmp_path / "other.safetensors", **changes)
    said = refuse(FamilyMismatchError, name, file)
    assert "Mistral Small 3.2 24B (5120 wide) or Qwen3 8B (4096 wide) or Qwen3 4B" in said
    assert "FLUX.2" in said


RELATIVES = (
    ("layers.0.self_attn.q_proj.bias", "Qwen2.5"),
    ("layers.0.post_feedforward_layernorm.weight", "Gemma"),
    ("layers.0.mlp.gate.weight", "a mixture of experts"),
    ("layers.0.self_attn.sinks", "GPT-OSS"),
    ("visual.deepstack_merger_list.0.norm.weight", "Qwen3-VL"),
)


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize(("key", "name"), RELATIVES)
def test_models_of_the_right_width_and_another_build_are_named(
    key: str, name: str, tmp_path: Path
) -> None:
    file = published(QWEN3_4B, tmp_path / "other.safetensors", {key: (4,)})
    refuse(FamilyMismatchError, name, file)


@pytest.mark.usefixtures("headers_only")
def test_mistral_nemo_is_told_from_mistral_small_by_its_feed_forward(tmp_path: Path) -> None:
    """Both are 5120 wide with 40 layers, and a wrong one would give wrong pictures."""
    file = published(MISTRAL_SMALL_3, tmp_path / "nemo.safetensors", ffn=14336)
    said = refuse(CheckpointError, "14336x5120 and not 32768x5120", file, by=())
    assert "does not fit Mistral Small 3.2 24B" in said


@pytest.mark.usefixtures("headers_only")
def test_the_model_asked_for_is_the_one_accepted(tmp_path: Path) -> None:
    file = published(QWEN3_4B, tmp_path / "qwen_3_4b.safetensors")
    refuse(FamilyMismatchError, "a model 2560 wide", file, text=QWEN3_8B)


@pytest.mark.usefixtures("headers_only")
def test_two_generations_in_one_loader_are_refused_with_both_names(tmp_path: Path) -> None:
    qwen = published(QWEN3_4B, tmp_path / "qwen_3_4b.safetensors")
    clip = meta_file(CLIP_L.shapes(), tmp_path / "clip_l.safetensors", "text_model.")
    t5 = meta_file(T5_XXL.shapes(), tmp_path / "t5xxl.safetensors", "encoder.")
    for files in ((qwen, clip), (clip, qwen)):
        said = refuse(FamilyMismatchError, "Qwen3 4B of FLUX.2", *files)
        assert "clip_l.safetensors holds CLIP-L, which FLUX.1 reads" in said
    said = refuse(FamilyMismatchError, "holds T5, which FLUX.1 reads", t5, qwen, text=FLUX1_TEXT)
    assert "CLIP-L and T5 for FLUX.1, or one language model for FLUX.2" in said


@pytest.mark.usefixtures("headers_only")
def test_one_half_of_each_generation_is_told_what_a_whole_is(tmp_path: Path) -> None:
    t5 = meta_file(T5_XXL.shapes(), tmp_path / "t5xxl.safetensors", "encoder.")
    refuse(CheckpointError, "CLIP-L is missing", t5)
    lora = save({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    said = refuse(CheckpointError, "lora.safetensors is a LoRA", lora, by=("LoRA loader",))
    assert "CLIP-L and T5-XXL for FLUX.1" in said
    assert "one language model for FLUX.2" in said


@pytest.mark.usefixtures("headers_only")
def test_a_second_file_beside_a_language_model_is_refused(tmp_path: Path) -> None:
    qwen = published(QWEN3_4B, tmp_path / "qwen_3_4b.safetensors")
    larger = published(QWEN3_8B, tmp_path / "qwen_3_8b.safetensors")
    lora = save({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    said = refuse(CheckpointError, r"2 language models were given \(qwen_3_4b", qwen, larger)
    assert "set file_2 to none" in said
    refuse(CheckpointError, "2 language models", qwen, qwen)
    refuse(CheckpointError, "lora.safetensors is a LoRA", qwen, lora)


@pytest.mark.usefixtures("headers_only")
def test_missing_extra_and_misshapen_tensors_are_named(qwen: LanguageKit, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    short = {name: value for name, value in qwen.state.items() if "layers.2" not in name}
    save({"model." + name: value for name, value in short.items()}, file)
    refuse(CheckpointError, r"11 are missing \(model\.layers\.2", file, text=qwen.spec, by=())
    qwen.write(file, layers__1__adapter__weight=torch.zeros(2))
    refuse(CheckpointError, "1 is not known .*adapter", file, text=qwen.spec, by=())
    qwen.write(file, layers__1__self_attn__k_proj__weight=torch.zeros(5, 32))
    refuse(CheckpointError, "is 5x32 and not 16x32", file, text=qwen.spec, by=())
    qwen.write(file, embed_tokens__weight=torch.zeros(7))
    refuse(CheckpointError, "is 7, which is no matrix", file, text=qwen.spec, by=())


@pytest.mark.usefixtures("headers_only")
def test_packed_weights_are_refused(qwen: LanguageKit, tmp_path: Path) -> None:
    packed = qwen.state["layers.0.mlp.up_proj.weight"].to(torch.int8)
    file = qwen.write(tmp_path / "int8.safetensors", layers__0__mlp__up_proj__weight=packed)
    refuse(CheckpointError, "stores weights as int8", file, text=qwen.spec, by=NATIVE)


SWELLING = (torch.ones(9, 1, 1), torch.ones(32), torch.ones(1, 32), torch.ones(65, 1))


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("scale", SWELLING, ids=lambda scale: str(tuple(scale.shape)))
def test_a_scale_that_would_swell_its_weight_is_refused(
    qwen: LanguageKit, scale: Tensor, tmp_path: Path
) -> None:
    packed = qwen.state["layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    file = qwen.write(
        tmp_path / "fp8.safetensors",
        layers__0__mlp__up_proj__weight=packed,
        layers__0__mlp__up_proj__scale_weight=scale,
    )
    match = r"has scales of \(.*up_proj\.scale_weight"
    refuse(CheckpointError, match, file, text=qwen.spec, by=NATIVE)


@pytest.mark.usefixtures("headers_only")
def test_a_file_of_many_models_or_layers_is_not_searched_for_ever(
    qwen: LanguageKit, tmp_path: Path
) -> None:
    mark = ".layers.0.self_attn.q_proj.weight"
    many = {f"{number}{mark}": torch.zeros(1) for number in range(40)}
    refuse(CheckpointError, "40 language models", save(many, tmp_path / "many.safetensors"))
    odd = {"layers." + "9" * 5000 + ".input_layernorm.weight": torch.zeros(1)}
    odd |= {"layers.": torch.zeros(1), "layers.0": torch.zeros(1), "layers.00.x": torch.zeros(1)}
    kit = replace(qwen, state=qwen.state | odd)
    file = kit.write(tmp_path / "odd.safetensors")
    match = r"1 is not known \(model\.layers\.0\)"
    refuse(CheckpointError, match, file, text=qwen.spec, by=())


def test_a_mistral_without_its_tokenizer_says_where_it_is(
    mistral: LanguageKit, tmp_path: Path
) -> None:
    file = replace(mistral, extras={}).write(tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match=r"tokenizer folder of Mistral.*3_small_flux2"):
        load_text_encoders([file], text=mistral.spec)


def test_a_carried_tokenizer_that_is_no_text_or_endless_is_refused(
    mistral: LanguageKit, tmp_path: Path
) -> None:
    for carried, match in (
        (torch.zeros(9), "9 numbers of float32"),
        (torch.zeros(9, dtype=torch.uint8), "tokenizer of Mistral could not be read"),
    ):
        kit = replace(mistral, extras={"tekken_model": carried})
        with pytest.raises(CheckpointError, match=match):
            load_text_encoders([kit.write(tmp_path / "a.safetensors")], text=kit.spec)
    shapes = {"model." + name: tuple(value.shape) for name, value in mistral.state.items()}
    shapes["tekken_model"] = (1 << 30,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "stream", None)
        endless = meta_file(shapes, tmp_path / "endless.safetensors")
        refuse(CheckpointError, "1,073,741,824 numbers", endless, text=mistral.spec)


def test_a_tokenizer_of_another_model_is_noticed_at_the_first_prompt(
    qwen: LanguageKit, tmp_path: Path
) -> None:
    clip = text_samples.write_clip_tokenizer(tmp_path / "clip")
    encoder = qwen.load(qwen.write(tmp_path / "model.safetensors"), qwen_tokenizer=clip)
    with pytest.raises(CheckpointError, match=r"does not know .*<\|im_start\|>.*</think>"):
        encoder.encode("a red star")


def test_an_old_transformers_is_told_which_version_to_get(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ComfyUI accepts transformers 4.50, and Qwen3 came with 4.51."""
    old = SimpleNamespace(__version__="4.50.3", MistralConfig=dict, MistralModel=dict)
    monkeypatch.setitem(sys.modules, "transformers", old)
    tiny = LanguageModelShape(
        architecture="qwen3",
        hidden=32,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn=64,
        vocabulary=300,
        theta=1e6,
        norm_eps=1e-6,
    )
    with pytest.raises(SettingError, match=r"transformers 4\.50\.3 is installed.*4\.51 or newer"):
        build_language_model(tiny, dtype=torch.float32)
