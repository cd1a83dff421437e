"""Quantised text encoders of the published sizes are accepted up to their weights, in a second."""

import json
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from glassbox.flux_core.families import MISTRAL_SMALL_3, QWEN3_4B, QWEN3_8B
from glassbox.flux_core.specs import LanguageModelSpec
from glassbox.flux_core.text.modules import T5_XXL
from glassbox.flux_core.types import Shapes
from glassbox.flux_core.weights import gguf_text, load_text
from glassbox.flux_core.weights.checkpoint import Checkpoint
from glassbox.flux_core.weights.load_text import load_text_encoders, open_text
from glassbox.tests.core.quantised_files import text
from glassbox.tests.core.test_weights_gguf import Kind
from glassbox.tests.core.text_gguf_files import ARCHITECTURES, listed, numbered, said
from glassbox.tests.parity import text_language_samples as samples

MODELS = (
    (MISTRAL_SMALL_3, "llama", 40, 131_072, 17_343_754_240),
    (QWEN3_8B, "qwen3", 36, 151_936, 5_831_883_520),
    (QWEN3_4B, "qwen3", 36, 151_936, 3_114_088_192),
)
by_model = pytest.mark.parametrize(
    ("spec", "architecture", "depth", "words", "numbers"), MODELS, ids=[m[0].title for m in MODELS]
)
_FP8 = "F8_E4M3"


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read every weight as nothing, so that files may be holes."""

    def empty(file: Checkpoint, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            dtype = torch.float32 if key in file.quantised else file.dtypes[key]
            yield key, torch.empty(file.shapes[key], dtype=dtype, device="meta")

    monkeypatch.setattr(Checkpoint, "stream", empty)


@by_model
@pytest.mark.usefixtures("weightless")
def test_gguf_files_as_they_are_published(
    spec: LanguageModelSpec,
    architecture: str,
    depth: int,
    words: int,
    numbers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With their vocabularies of hundreds of thousands of words and as many merges."""
    shapes = {"model." + name: s for name, s in samples.full_shapes(spec, depth, words).items()}
    shapes["lm_head.weight"] = (words, spec.hidden)
    file = hollow_gguf(tmp_path / "model-Q4_K_M.gguf", shapes, architecture, words)
    start = time.process_time()
    found = open_text(file)
    assert time.process_time() - start < 1
    assert found.shapes == shapes
    assert gguf_text.is_interleaved(found) == (architecture == "llama")
    tokenizer = samples.write_qwen_tokenizer(tmp_path / "qwen")
    monkeypatch.setattr(load_text, "load_gguf_tokenizer", lambda _: None)
    encoder = load_text_encoders([file], qwen_tokenizer=tokenizer, dtype=torch.bfloat16)
    assert encoder.text == spec
    read = [name for name in encoder.modules[0].state_dict() if "norm" not in name]
    assert f", {numbers / 1e6:,.1f} M parameters, bfloat16" in encoder.report
    assert f"dequantised from Q4_K to bfloat16: {len(read)} tensors, " in encoder.report


@pytest.mark.parametrize("architecture", ["t5", "t5encoder"])
def test_t5_xxl_as_it_is_published(architecture: str, tmp_path: Path) -> None:
    shapes = {"encoder." + name: shape for name, shape in T5_XXL.shapes().items()}
    shapes["shared.weight"] = shapes.pop("encoder.embed_tokens.weight")
    file = hollow_gguf(tmp_path / "t5-v1_1-xxl-encoder-Q4_K_M.gguf", shapes, architecture, 32_128)
    assert open_text(file).shapes == shapes


def hollow_gguf(path: Path, shapes: Shapes, architecture: str, words: int) -> Path:
    """A header with a vocabulary, and a hole instead of weights."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], 64)
    metadata = [
        said("general.architecture", architecture),
        said("tokenizer.ggml.model", "gpt2"),
        said("tokenizer.ggml.pre", "tekken" if architecture == "llama" else "qwen2"),
        listed("tokenizer.ggml.tokens", [f"word{number}" for number in range(words)]),
        listed("tokenizer.ggml.merges", [f"a{number} b{number}" for number in range(2 * words)]),
        numbered("tokenizer.ggml.token_type", [1] * words),
    ]
    entries, end = b"", 0
    for key, shape in shapes.items():
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None, key
        kind = Kind.Q4_K if len(shape) == 2 and shape[1] % 256 == 0 else Kind.F32
        block, size = gguf.GGML_QUANT_SIZES[kind]
        sides = b"".join(struct.pack("<Q", side) for side in reversed(shape))
        entries += text(name) + struct.pack("<I", len(shape)) + sides
        entries += struct.pack("<IQ", kind.value, end)
        end += -(-torch.Size(shape).numel() // block * size // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata))
    head += b"".join(metadata) + entries
    with path.open("wb") as out:
        out.write(head)
        out.truncate(-(-len(head) // 32) * 32 + end)
    return path


@by_model
@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize("form", ["nvfp4", "float8_e4m3fn"])
def test_comfyuis_files_as_they_are_published(
    spec: LanguageModelSpec,
    architecture: str,
    depth: int,
    words: int,
    numbers: int,
    form: str,
    tmp_path: Path,
) -> None:
    """Layers in one format, and the table in float8 with one scale."""
    shapes = {"model." + name: s for name, s in samples.full_shapes(spec, depth, words).items()}
    file = hollow_safetensors(tmp_path / f"model_{form}.safetensors", shapes, form)
    start = time.process_time()
    found = open_text(file)
    assert time.process_time() - start < 1
    assert found.shapes == shapes
    (tmp_path / "tekken.json").write_bytes(samples.tekken())
    tokenizer = samples.write_qwen_tokenizer(tmp_path / "qwen")
    encoder = load_text_encoders([file], qwen_tokenizer=tokenizer)
    assert encoder.text == spec
    assert f", {numbers / 1e6:,.1f} M parameters, bfloat16" in encoder.report
    layers = 7 * max(spec.layers)
    name = "nvfp4" if form == "nvfp4" else "scaled float8_e4m3fn"
    count = layers if form == "nvfp4" else layers + 1
    assert f"dequantised from {name} to bfloat16: {count} tensors, " in encoder.report


def hollow_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], form: str) -> Path:
    """A header that says each layer's format, and a hole instead of weights."""
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    layers: dict[str, object] = {}
    for key, shape in shapes.items():
        layer = key.removesuffix(".weight")
        if len(shape) != 2:
            entries.append((key, "BF16", shape))
            continue
        is_packed = form == "nvfp4" and "embed_tokens" not in key
        layers[layer] = {"format": "nvfp4" if is_packed else "float8_e4m3fn"}
        rows, columns = shape
        if is_packed:
            tiles = (-(-rows // 128) * 128, -(-columns // 64) * 4)
            entries += [(key, "U8", (rows, columns // 2)), (layer + ".weight_scale", _FP8, tiles)]
            entries.append((layer + ".weight_scale_2", "F32", ()))
        else:
            entries += [(key, _FP8, shape), (layer + ".weight_scale", "F32", ())]
    sizes = {"BF16": 2, "U8": 1, _FP8: 1, "F32": 4}
    said_layers = json.dumps({"format_version": "1.0", "layers": layers})
    header: dict[str, object] = {"__metadata__": {"_quantization_metadata": said_layers}}
    end = 0
    for key, dtype, shape in entries:
        size = sizes[dtype] * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    words = json.dumps(header).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(words)) + words)
        out.truncate(8 + len(words) + end)
    return path
