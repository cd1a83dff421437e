"""Quantised text encoders in ComfyUI's forms give the numbers they stand for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError
from glassbox.flux_core.text.encoders import LanguageModelEncoder
from glassbox.flux_core.weights.load_text import open_text
from glassbox.tests.core.checkpoints import write
from glassbox.tests.core.quantised_files import State, as_bytes, nvfp4, scaled_float8
from glassbox.tests.parity import text_language_samples as samples
from glassbox.tests.parity import text_samples
from glassbox.tests.parity.text_language_samples import LanguageKit
from glassbox.tests.parity.text_samples import Kit

Made = tuple[State, dict[str, str], State]
PROMPT = "make the circle red"


def is_matrix(key: str, tensor: Tensor) -> bool:
    """All that ComfyUI quantises in a text encoder: layers' weights, and here the table as well."""
    return tensor.ndim == 2 and key.endswith(".weight") and tensor.shape[1] % 16 == 0


def is_matrix_of_a_layer(key: str, tensor: Tensor) -> bool:
    return is_matrix(key, tensor) and ("layers." in key or "block." in key)


def mixed(state: State) -> Made:
    """Float8 with nvfp4 between, as in ComfyUI's files called fp8mixed and fp4mixed."""
    first, _, plain = scaled_float8(state, "layers", chosen=_is(("embed_tokens", "q_proj", "k.w")))
    second, header, wide = nvfp4(
        {key: state[key] for key in state if torch.equal(first[key].float(), state[key].float())},
        _is(("mlp.", "wi_", "wo.")),
    )
    layers = json.loads(header["_quantization_metadata"])["layers"]
    said = {layer + ".comfy_quant": as_bytes(form) for layer, form in layers.items()}
    return first | second | said, {}, plain | wide


def _is(parts: tuple[str, ...]) -> Callable[[str, Tensor], bool]:
    return lambda key, tensor: is_matrix(key, tensor) and any(part in key for part in parts)


FORMS: dict[str, Callable[[State], Made]] = {
    "float8, older form": lambda state: scaled_float8(state, "old", chosen=is_matrix),
    "float8, each layer says it": lambda state: scaled_float8(state, "layers", chosen=is_matrix),
    "float8, the header says it": lambda state: scaled_float8(state, "metadata", chosen=is_matrix),
    "float8 of the wider range": lambda state: scaled_float8(
        state, "layers", torch.float8_e5m2, chosen=is_matrix
    ),
    "nvfp4": lambda state: nvfp4(state, is_matrix_of_a_layer),
    "nvfp4, the table too": lambda state: nvfp4(state, is_matrix),
    "mixed": mixed,
}
by_form = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS.keys())


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageKit]:
    folder = tmp_path_factory.mktemp("kits")
    return {"qwen": samples.qwen_kit(folder), "mistral": samples.mistral_kit(folder)}


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return text_samples.make_kit(tmp_path_factory.mktemp("tokenizers"))


@by_form
@pytest.mark.parametrize("name", ["qwen", "mistral"])
def test_a_language_model_computes_what_its_dequantised_self_does(
    kits: dict[str, LanguageKit], name: str, make: Callable[[State], Made], tmp_path: Path
) -> None:
    kit = kits[name]
    stored, header, plain = make({"model." + key: one for key, one in kit.state.items()})
    packed = write(tmp_path / "packed.safetensors", stored | kit.extras, header)
    spread = write(tmp_path / "spread.safetensors", plain | kit.extras)
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = kit.load(packed, dtype=dtype), kit.load(spread, dtype=dtype)
        assert_equal_modules(ours, theirs)
        assert torch.equal(ours.encode(PROMPT).txt, theirs.encode(PROMPT).txt)
    assert kit.load(packed).modules[0].state_dict()["embed_tokens.weight"].dtype == torch.bfloat16
    assert "dequantised from" in ours.report
    assert "dequantised" not in theirs.report


def assert_equal_modules(one: LanguageModelEncoder, other: LanguageModelEncoder) -> None:
    state, same = (encoder.modules[0].state_dict() for encoder in (one, other))
    assert state.keys() == same.keys()
    assert [key for key in state if not torch.equal(state[key], same[key])] == []


@by_form
def test_t5_and_clip_compute_what_their_dequantised_selves_do(
    kit: Kit, make: Callable[[State], Made], tmp_path: Path
) -> None:
    t5, t5_header, t5_plain = make(kit.t5)
    clip, clip_header, clip_plain = make({"text_model." + k: one for k, one in kit.clip.items()})
    packed = (
        write(tmp_path / "clip.safetensors", clip, clip_header),
        write(tmp_path / "t5.safetensors", t5, t5_header),
    )
    spread = (
        write(tmp_path / "clip_plain.safetensors", clip_plain),
        write(tmp_path / "t5_plain.safetensors", t5_plain),
    )
    for dtype in (torch.float32, torch.float16):
        ours, theirs = kit.load(*packed, dtype=dtype), kit.load(*spread, dtype=dtype)
        features, same = ours.encode(PROMPT), theirs.encode(PROMPT)
        assert torch.equal(features.txt, same.txt)
        assert torch.equal(features.pooled, same.pooled)
    wide = ours.modules[1].state_dict()["block.0.layer.1.DenseReluDense.wo.weight"]
    assert wide.dtype == torch.float32  # float16 overflows in it, quantised or not


def test_the_report_says_what_was_dequantised_and_what_it_costs(
    kits: dict[str, LanguageKit], tmp_path: Path
) -> None:
    kit = kits["qwen"]
    stored, header, plain = nvfp4(
        {"model." + key: one for key, one in kit.state.items()}, is_matrix_of_a_layer
    )
    encoder = kit.load(write(tmp_path / "a.safetensors", stored, header), dtype=torch.bfloat16)
    read = [key for key in plain if is_matrix_of_a_layer(key, plain[key]) and ".3." not in key]
    first, line = encoder.report.splitlines()
    assert first.endswith("bfloat16")
    assert line.startswith(f"dequantised from nvfp4 to bfloat16: {len(read)} tensors, ")
    assert f"{sum(plain[key].numel() for key in read) * 2 / 1e9:.2f} GB in memory" in line


def test_a_float8_table_of_tokens_may_have_no_scale(
    kits: dict[str, LanguageKit], tmp_path: Path
) -> None:
    """ComfyUI's layer for it takes 1 then, and no other layer does."""
    kit = kits["qwen"]
    stored = scaled_float8(
        {"model." + key: one for key, one in kit.state.items()}, "layers", chosen=is_matrix
    )[0]
    del stored["model.embed_tokens.weight_scale"]
    encoder = kit.load(write(tmp_path / "a.safetensors", stored), dtype=torch.float32)
    table = encoder.modules[0].state_dict()["embed_tokens.weight"]
    assert torch.equal(table, stored["model.embed_tokens.weight"].float())
    del stored["model.layers.0.mlp.up_proj.weight_scale"]
    with pytest.raises(CheckpointError, match="no scale for its quantised"):
        kit.load(write(tmp_path / "b.safetensors", stored))


def test_of_a_whole_checkpoint_the_transformer_may_be_quantised_as_it_likes(
    kits: dict[str, LanguageKit], tmp_path: Path
) -> None:
    kit = kits["qwen"]
    prefix = "text_encoders.qwen3_4b.transformer.model."
    stored, _, plain = scaled_float8(kit.state, "layers", prefix=prefix, chosen=is_matrix)
    beside = "model.diffusion_model.double_blocks.0.img_attn.qkv"
    stored[beside + ".weight"] = torch.zeros(4, 4, dtype=torch.int8)
    stored[beside + ".weight_scale"] = torch.ones(4)
    stored[beside + ".comfy_quant"] = as_bytes({"format": "int8_tensorwise"})
    stored["model.diffusion_model.single_blocks.0.linear1.weight.absmax"] = torch.ones(4)
    encoder = kit.load(write(tmp_path / "a.safetensors", stored), dtype=torch.float32)
    state = encoder.modules[0].state_dict()
    assert all(torch.equal(state[name], plain[name]) for name in state)


def test_every_tensor_of_a_quantised_file_is_accounted_for(
    kits: dict[str, LanguageKit], tmp_path: Path
) -> None:
    """Scales and words about formats belong to their weights; nothing else goes away."""
    kit = kits["mistral"]
    state = {"model." + key: one for key, one in kit.state.items()}
    for make in FORMS.values():
        stored, header, plain = make(state)
        found = open_text(write(tmp_path / "a.safetensors", stored, header))
        assert found.shapes == {key: tuple(one.shape) for key, one in plain.items()}
        packed = {key for key in plain if not torch.equal(stored[key].float(), plain[key])}
        assert packed <= found.quantised.keys()


def test_nvfp4_may_have_its_scales_as_bytes(kits: dict[str, LanguageKit], tmp_path: Path) -> None:
    kit = kits["qwen"]
    stored, header, plain = nvfp4(
        {"model." + key: one for key, one in kit.state.items()}, is_matrix_of_a_layer
    )
    as_stored = {
        key: one.view(torch.uint8) if key.endswith(".weight_scale") else one
        for key, one in stored.items()
    }
    encoder = kit.load(write(tmp_path / "a.safetensors", as_stored, header), dtype=torch.float32)
    state = encoder.modules[0].state_dict()
    assert all(torch.equal(state[name], plain["model." + name]) for name in state)
