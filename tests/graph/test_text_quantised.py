"""Quantised text encoders in a running ComfyUI, and against ComfyUI's own reading of them."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from torch import Tensor

from glassbox.tests.core.checkpoints import write
from glassbox.tests.core.quantised_files import as_bytes, gguf_bytes, nvfp4, scaled_float8
from glassbox.tests.core.quantised_files import write_bytes as write_file
from glassbox.tests.core.test_weights_gguf import entries_of as transformer_entries
from glassbox.tests.core.text_gguf_files import (
    CONTROL,
    WORD,
    entries_of,
    gguf_file,
    said,
    tokenizer,
)
from glassbox.tests.graph import tiny, tiny_flux2
from glassbox.tests.graph.graphs import Pipeline
from glassbox.tests.graph.probe import run_probe
from glassbox.tests.graph.server import ComfyError

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph
PROMPT = "make the circle red"
HEAD = 128  # rows of one head of the tiny language models


def test_comfyuis_own_layers_and_clip_compute_with_the_numbers_that_we_read() -> None:
    answer = run_probe("probe_text_quantised")
    errors = answer["layers"]
    assert len(errors) == 8
    assert max(errors.values()) <= 1e-6, errors
    # Its CLIP, which keeps the weights small, in Encode Text: the way out that refusals name.
    assert answer["features"]["apart"] <= 1e-6, answer
    assert answer["features"]["from_plain"] > 1e-2


def is_matrix(key: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.shape[1] % 16 == 0


def run(
    comfy: "Comfy", model: str, autoencoder: str, *encoders: str, prompt: str = PROMPT
) -> tuple[str, bytes]:
    """The loader's report, and the picture that the encoders lead to."""
    graph = Pipeline()
    network, decoder = graph.model(model), graph.autoencoder(autoencoder)
    loaded = graph.encoders(*encoders)
    report = graph.show(graph.out(loaded[0], 1))
    conditioning = graph.conditioning(graph.text(loaded, prompt))
    noise = graph.noise(network)
    sampled = graph.sample(network, conditioning, noise, graph.sigmas(network, noise))
    graph.save(graph.decode(decoder, sampled))
    answer = comfy.run(graph.nodes)
    (picture,) = comfy.images(answer)
    pixels = Image.open(io.BytesIO(picture)).tobytes()  # the file names its graph as well
    return answer["outputs"][report]["text"][0], pixels


def test_a_t5_of_a_gguf_file_is_listed_here_alone_and_makes_the_same_picture(
    tiny_comfy: "Comfy",
) -> None:
    folder = tiny_comfy.models_dir / "text_encoders" / "quantised"
    folder.mkdir(exist_ok=True)
    entries, plain = entries_of(tiny.t5_state(), "t5encoder", "Q8_0")
    name = "quantised/t5-v1_1-xxl-encoder-Q8_0.gguf"
    gguf_file(folder.parent / name, entries, said("general.architecture", "t5encoder"))
    write(folder / "plain_t5.safetensors", plain)
    places = (tiny.KONTEXT_FILE, tiny.AUTOENCODER_FILE, tiny.CLIP_FILE)
    report, picture = run(tiny_comfy, *places, name)
    count = sum(entry[0] == 8 for entry in entries.values())
    assert f"dequantised from Q8_0 to float32: {count} tensors, " in report
    assert "GB in memory that are" in report
    _, expected = run(tiny_comfy, *places, "quantised/plain_t5.safetensors")
    assert picture == expected
    assert picture != run(tiny_comfy, *places, name, prompt="blue")[1]
    info = tiny_comfy.object_info()
    inputs = info["GlassboxLoadTextEncoders"]["input"]["required"]
    assert all(name in inputs[one][1]["options"] for one in ("file", "file_2"))
    listed = str(info["CLIPLoader"]["input"]["required"]["clip_name"])
    assert tiny.T5_FILE in listed
    assert "gguf" not in listed


def test_qwen3_in_mixed_float8_and_nvfp4_and_in_a_gguf_file_makes_the_same_picture(
    flux2_comfy: "Comfy",
) -> None:
    folder = flux2_comfy.models_dir / "text_encoders"
    state = tiny_flux2.language_state(tiny_flux2.QWEN3_4B, tiny_flux2.QWEN_VOCABULARY, seed=4)
    wide = {key: tensor.float() for key, tensor in state.items()}
    stored, plain = mixed(wide)
    write(folder / "qwen_3_4b_fp4_flux2.safetensors", stored)
    write(folder / "plain_qwen.safetensors", plain)
    places = (tiny_flux2.KLEIN_FILE, tiny_flux2.AUTOENCODER_FILE)
    report, picture = run(flux2_comfy, *places, "qwen_3_4b_fp4_flux2.safetensors", "none")
    assert "dequantised from scaled float8_e4m3fn to float32: 1 tensors" in report
    assert "dequantised from nvfp4 to float32: " in report
    assert picture == run(flux2_comfy, *places, "plain_qwen.safetensors", "none")[1]
    entries, plain = entries_of(wide, "qwen3", "Q4_0")
    gguf_file(folder / "Qwen3-4B-Q4_0.gguf", entries, said("general.architecture", "qwen3"))
    write(folder / "plain_gguf_qwen.safetensors", plain)
    report, picture = run(flux2_comfy, *places, "Qwen3-4B-Q4_0.gguf", "none")
    assert "dequantised from Q4_0 to float32: " in report
    assert picture == run(flux2_comfy, *places, "plain_gguf_qwen.safetensors", "none")[1]
    assert picture != run(flux2_comfy, *places, "Qwen3-4B-Q4_0.gguf", "none", prompt="blue")[1]


def mixed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The table in float8 and the layers in nvfp4, each saying so beside its weight."""
    table = {key: one for key, one in state.items() if "embed_tokens" in key}
    rest = {key: one for key, one in state.items() if key not in table}
    stored, _, plain = scaled_float8(table, "layers", chosen=is_matrix)
    packed, header, spread = nvfp4(rest, is_matrix)
    layers = json.loads(header["_quantization_metadata"])["layers"]
    words = {layer + ".comfy_quant": as_bytes(form) for layer, form in layers.items()}
    return {**stored, **packed, **words}, {**plain, **spread}


def test_mistral_of_a_gguf_file_brings_its_tokenizer(flux2_comfy: "Comfy") -> None:
    folder = flux2_comfy.models_dir / "text_encoders"
    state = {key: one.float() for key, one in tiny_flux2.mistral_state().items()}
    carried = {"tekken_model": tiny_flux2.mistral_state()["tekken_model"]}
    del state["tekken_model"]
    words = json.loads(carried["tekken_model"].numpy().tobytes())
    marks = [one["token_str"] for one in words["special_tokens"]]
    letters = spelled_bytes()
    kinds = [CONTROL] * len(marks) + [WORD] * len(letters)
    entries, plain = entries_of(state, "llama", "Q8_0", HEAD)
    metadata = (said("general.architecture", "llama"), *tokenizer([*marks, *letters], kinds))
    gguf_file(folder / "Mistral-Small-3.2-Q8_0.gguf", entries, *metadata)
    write(folder / "plain_mistral.safetensors", plain | carried)
    places = (tiny_flux2.DEV_FILE, tiny_flux2.AUTOENCODER_FILE)
    report, picture = run(flux2_comfy, *places, "Mistral-Small-3.2-Q8_0.gguf", "none")
    assert report.startswith("Mistral Small 3.2 24B in a custom size (32 wide): ")
    assert "dequantised from Q8_0 to float32: " in report
    assert picture == run(flux2_comfy, *places, "plain_mistral.safetensors", "none")[1]
    other = run(flux2_comfy, *places, "Mistral-Small-3.2-Q8_0.gguf", "none", prompt="blue")[1]
    assert picture != other


def spelled_bytes() -> list[str]:
    """The letter of each byte in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [letter for _, letter in sorted(bytes_to_unicode().items())]


def test_each_loader_sends_the_other_ones_gguf_there(tiny_comfy: "Comfy") -> None:
    diffusion, text = (tiny_comfy.models_dir / one for one in ("diffusion_models", "text_encoders"))
    entries, _ = transformer_entries(tiny.transformer_state(seed=1), "Q8_0")
    write_file(text / "flux1-dev.gguf", gguf_bytes(entries))
    refused(tiny_comfy, "flux1-dev.gguf", r"is a transformer\..*'Load Model \(FLUX\)'")
    entries, _ = entries_of(tiny.t5_state(), "t5encoder", "Q8_0")
    form = said("general.architecture", "t5encoder")
    gguf_file(diffusion / "t5.gguf", entries, form)
    graph = Pipeline()
    graph.show(graph.out(graph.model("t5.gguf")[0], 1))
    with pytest.raises(ComfyError, match=r"'Load Text Encoders \(FLUX\)' if it is T5") as caught:
        tiny_comfy.run(graph.nodes)
    assert caught.value.details["node_type"] == "GlassboxLoadModel"
    whole = gguf_file(text / "cut.gguf", entries, form).read_bytes()
    Path(text / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    refused(tiny_comfy, "cut.gguf", "cut short")
    state = tiny.t5_state()
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    state[layer + ".comfy_quant"] = as_bytes({"format": "int8_tensorwise"})
    write(text / "int8.safetensors", state)
    refused(tiny_comfy, "int8.safetensors", r"quantised to int8_tensorwise.*'Encode Text \(FLUX\)'")


def refused(comfy: "Comfy", name: str, match: str) -> None:
    graph = Pipeline()
    graph.show(graph.out(graph.encoders(tiny.CLIP_FILE, name)[0], 1))
    with pytest.raises(ComfyError, match=match) as caught:
        comfy.run(graph.nodes)
    assert caught.value.details["node_type"] == "GlassboxLoadTextEncoders"
