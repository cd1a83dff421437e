"""Quantised files in a running ComfyUI, and against ComfyUI's own reading of them."""

from typing import TYPE_CHECKING

import pytest

from glassbox.tests.core.checkpoints import write
from glassbox.tests.core.quantised_files import (
    gguf_bytes,
    header,
    is_quantised,
    nvfp4,
    scaled_float8,
    write_bytes,
)
from glassbox.tests.core.test_weights_gguf import entries_of
from glassbox.tests.graph import tiny
from glassbox.tests.graph.graphs import Pipeline, edit
from glassbox.tests.graph.probe import run_probe
from glassbox.tests.graph.server import ComfyError

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph


def test_comfyuis_own_layers_hold_the_numbers_that_we_read() -> None:
    errors = run_probe("probe_quantised")
    assert len(errors) == 7
    assert max(errors.values()) <= 1e-6, errors


def report(comfy: "Comfy", name: str, weights: str = "as stored") -> str:
    graph = Pipeline()
    graph.nodes[graph.model(name, "auto")[0]]["inputs"]["weights"] = weights
    text = graph.show(graph.out("1", 1))
    return comfy.run(graph.nodes)["outputs"][text]["text"][0]


def test_a_gguf_file_is_listed_here_alone_and_makes_a_picture(tiny_comfy: "Comfy") -> None:
    entries, _ = entries_of(tiny.transformer_state(seed=1), "Q8_0")
    folder = tiny_comfy.models_dir / "diffusion_models" / "quantised"
    folder.mkdir()
    write_bytes(folder / "kontext-Q8_0.gguf", gguf_bytes(entries))
    name = "quantised/kontext-Q8_0.gguf"
    said = report(tiny_comfy, name)
    count = sum(entry[0] == 8 for entry in entries.values())
    why = "since only float8 and nvfp4 can be kept as stored"
    assert f"dequantised from Q8_0 to float32, {why}: {count} tensors" in said
    assert "Kontext" in said
    (picture,) = tiny_comfy.images(tiny_comfy.run(edit(model=name).nodes))
    assert picture
    info = tiny_comfy.object_info()
    assert name in info["GlassboxLoadModel"]["input"]["required"]["file"][1]["options"]
    listed = str(info["UNETLoader"]["input"]["required"]["unet_name"])
    assert tiny.KONTEXT_FILE in listed
    assert "gguf" not in listed


def test_scaled_float8_and_nvfp4_files_load_and_a_broken_one_says_why(
    tiny_comfy: "Comfy",
) -> None:
    folder = tiny_comfy.models_dir / "diffusion_models"
    state = tiny.transformer_state(seed=1)
    stored, metadata, _ = scaled_float8(state, "metadata")
    write(folder / "fp8-kontext.safetensors", stored, metadata)
    assert "kept as scaled float8_e4m3fn" in report(tiny_comfy, "fp8-kontext.safetensors")
    assert "dequantised from scaled float8_e4m3fn to float32: " in report(
        tiny_comfy, "fp8-kontext.safetensors", "plain"
    )
    stored, metadata, _ = nvfp4(state)
    write(folder / "nvfp4-kontext.safetensors", stored, metadata)
    name = "nvfp4-kontext.safetensors"
    assert "kept as nvfp4" in report(tiny_comfy, name)
    assert "dequantised from nvfp4 to float32: " in report(tiny_comfy, name, "plain")
    layers = {
        key.removesuffix(".weight"): {"format": "int4_x"}
        for key, tensor in state.items()
        if is_quantised(key, tensor)
    }
    write(folder / "odd-kontext.safetensors", stored, header(layers))
    with pytest.raises(ComfyError, match="quantised to int4_x") as error:
        report(tiny_comfy, "odd-kontext.safetensors")
    assert error.value.details["node_type"] == "GlassboxLoadModel"
