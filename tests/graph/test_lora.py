"""LoRAs in ComfyUI: put on and taken off shared weights, and refused in words that help."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from glassbox.flux_core.weights.transformer_keys import to_diffusers
from glassbox.tests.graph import tiny
from glassbox.tests.graph.graphs import Link, Pipeline
from glassbox.tests.graph.probe import run_probe
from glassbox.tests.graph.server import ComfyError

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph

STYLE, KLEIN = "tiny-style.safetensors", "klein-style.safetensors"


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_probe("probe_lora")


def test_a_model_beside_its_patched_twins_stays_as_it_is(seen: dict[str, Any]) -> None:
    """Used in turn with one LoRA, with two, with one of strength 0, and alone again."""
    assert seen["again_equal"]
    assert seen["weights_equal"]
    assert seen["lora_differ"]
    assert seen["lora_equal"]


def test_a_patched_model_samples_as_one_whose_weights_were_changed(seen: dict[str, Any]) -> None:
    assert seen["far"] > 0.01
    assert seen["merged"] < 1e-6
    assert seen["two_merged"] < 1e-6


def test_changes_reach_weights_that_wait_beside_a_small_device(seen: dict[str, Any]) -> None:
    assert seen["partly_waiting"] > 0
    assert seen["partly"] < 1e-5


def test_kept_references_are_not_reused_under_another_lora_or_strength(
    seen: dict[str, Any],
) -> None:
    """The model, a LoRA, both again (reused), half its strength (computed), none of it (reused)."""
    assert seen["kept_passes"] == [1, 1, 0, 0, 1, 0]
    assert seen["kept_equal"]
    assert seen["kept_differ"]


def test_a_patched_model_holds_its_weights_and_frees_them(seen: dict[str, Any]) -> None:
    assert seen["life_held"] == [True, True]
    assert seen["life_freed"] == [True] * 5


def test_the_native_loader_changes_native_weights_by_the_same() -> None:
    """ComfyUI 0.30.0 leaves out seven layers of FLUX.2 in diffusers' names, and reads the rest."""
    native = run_probe("probe_lora_native")
    assert max(one["furthest"] for one in native.values()) <= 1e-6
    counts = {name: [one["patched"], len(one["only ours"])] for name, one in native.items()}
    formats = ("kohya", "ai-toolkit", "diffusers", "OneTrainer", "LoKr")
    assert counts == {f"FLUX.1 {name}": [36, 0] for name in formats} | {
        f"FLUX.2 {name}": [24, 7] if name in ("diffusers", "OneTrainer") else [31, 0]
        for name in formats
    }


@pytest.fixture(scope="module")
def lora_comfy(tiny_comfy: "Comfy") -> "Comfy":
    """ComfyUI with a LoRA for the tiny model, and one for klein 4B."""
    folder = tiny_comfy.models_dir / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    write_style(folder / STYLE)
    shapes = {"lora_A": (8, 3072), "lora_B": (27648, 8)}
    name = "diffusion_model.single_blocks.19.linear1"
    klein = {f"{name}.{end}.weight": torch.zeros(shape) for end, shape in shapes.items()}
    tiny.save(klein, folder / KLEIN)
    return tiny_comfy


def write_style(path: Path) -> None:
    """Write a LoRA in diffusers' names for every layer, and one key of a text encoder."""
    generator = torch.Generator().manual_seed(9)
    state: dict[str, Tensor] = {"lora_te1_text_model_layers_0.alpha": torch.tensor(1.0)}
    for key, weight in to_diffusers(tiny.transformer_state()).items():
        if weight.ndim == 2:
            sizes = {"lora_A": (2, weight.shape[1]), "lora_B": (weight.shape[0], 2)}
            for end, size in sizes.items():
                name = f"transformer.{key.removesuffix('weight')}{end}.weight"
                state[name] = 0.1 * torch.randn(size, generator=generator)
    tiny.save(state, path)


def apply(graph: Pipeline, model: Link, file: str, **settings: Any) -> str:
    return graph.add("GlassboxApplyLoRA", model=model, file=file, strength=1.0, **settings)


def picture(graph: Pipeline, model: Link) -> str:
    """Sample without references; gives the node that saves."""
    conditioning = graph.conditioning(graph.text(graph.encoders()))
    noise = graph.noise(model)
    sampled = graph.sample(model, conditioning, noise, graph.sigmas(model, noise))
    return graph.save(graph.decode(graph.autoencoder(), sampled))


def pixels(comfy: "Comfy", history: dict[str, Any]) -> list[bytes]:
    """The pictures without the graph that each file carries."""
    return [Image.open(io.BytesIO(one)).tobytes() for one in comfy.images(history)]


def test_one_graph_shows_a_model_with_and_without_loras(lora_comfy: "Comfy") -> None:
    """Beside the changed one, and with all blocks at 0, it makes the picture it made before."""
    alone = Pipeline()
    picture(alone, alone.model())
    (before,) = pixels(lora_comfy, lora_comfy.run(alone.nodes))

    graph = Pipeline()
    plain = graph.model()
    changed = apply(graph, plain, STYLE)
    report = graph.show(graph.out(changed, 1))
    none = apply(graph, plain, STYLE, block_strengths="double: 0; single: 0; other: 0")
    for model in (graph.out(changed), plain, graph.out(none)):
        picture(graph, model)
    history = lora_comfy.run(graph.nodes)
    images = pixels(lora_comfy, history)
    assert [one == before for one in images].count(True) == 2
    assert len(images) == 3
    (said,) = history["outputs"][report]["text"]
    assert "format: diffusers" in said
    assert "rank 2, alpha / rank 1" in said
    assert "unmatched: 1 keys" in said
    assert "a text encoder, left alone: lora_te1_text_model_layers_0.alpha" in said


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        (KLEIN, {}, ("FLUX.2 [klein] 4B", "Needed: a LoRA for FLUX.1 Kontext [dev]")),
        (STYLE, {"block_strengths": "double 0-9: 1"}, ("double blocks 0-9", "from 0 to 0")),
    ],
)
def test_what_cannot_be_applied_is_said_on_the_node(
    file: str, settings: dict[str, Any], words: tuple[str, ...], lora_comfy: "Comfy"
) -> None:
    graph = Pipeline()
    picture(graph, graph.out(apply(graph, graph.model(), file, **settings)))
    with pytest.raises(ComfyError) as error:
        lora_comfy.run(graph.nodes)
    assert error.value.details["node_type"] == "GlassboxApplyLoRA"
    message = error.value.details["exception_message"]
    assert all(word in message for word in (*words, "Fix: "))
