"""The pack breaks nobody else's graph: plain native ones come out bit for bit as without it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from glassbox.tests.graph.graphs import Graph, edit
from glassbox.tests.graph.probe import run_probe
from glassbox.tests.graph.server import ROOT, ComfyError

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph

MODEL = "glassbox_nano_kontext.safetensors"


@pytest.fixture(scope="module")
def without() -> dict[str, str]:
    return run_probe("probe_absent", "without")["all"]


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return run_probe("probe_absent", "with")


def test_plain_native_graphs_are_the_same_bit_for_bit_with_the_pack(
    without: dict[str, str], probe: dict[str, Any]
) -> None:
    """Both generations, both samplers, references by every method, LoRA, EasyCache."""
    assert len(without) == 17
    assert len(set(without.values())) >= 15  # where a method changes nothing
    assert probe["all"] == without


def test_they_stay_so_after_each_node_and_after_each_has_failed(
    without: dict[str, str], probe: dict[str, Any]
) -> None:
    """A cancel and a lack of memory in the middle of a run included; then with new MODELs."""
    assert probe["changed"] == []
    assert probe["after"] == without
    assert probe["loaded_anew"] == without


def test_every_node_of_the_pack_has_run_and_has_failed(probe: dict[str, Any]) -> None:
    assert sorted(probe["ran"]) == probe["nodes"]
    assert {name: one for name, one in probe["ran"].items() if one} == {}
    assert set(probe["nodes"]) < set(probe["raised"])
    assert [name for name, one in probe["raised"].items() if not one] == []


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("a cancel, native", "InterruptProcessingException"),
        ("a cancel, ours", "InterruptProcessingException"),
        ("no memory left", "OutOfMemoryError: no memory left"),
        ("more than memory holds", "MemoryLimitError: Sampling 10000036 tokens"),
        ("another reference under KSampler", "ShapeError: The sampler hands 1 references"),
        ("ApplyLoRA", "FamilyMismatchError: lora_glassbox_nano_klein.safetensors is a LoRA for"),
    ],
)
def test_the_failures_are_those_that_were_meant(
    probe: dict[str, Any], use: str, words: str
) -> None:
    assert probe["raised"][use].startswith(words)


def test_comfyui_knows_the_packs_nodes_and_one_more_folder_and_nothing_else_is_new(
    probe: dict[str, Any],
) -> None:
    own = [f"{kind} Glassbox{one}" for kind in ("name", "node") for one in probe["nodes"]]
    assert probe["registries"] == sorted(["folder diffusion_models", *own])
    assert probe["registries_after"] == []


# ---- in real servers


@pytest.fixture(scope="module")
def bare_comfy() -> Iterator["Comfy"]:
    """A ComfyUI without the pack, with the nano's transformer in its folders."""
    from glassbox.tests.graph.server import FOR_TESTS, Comfy

    with Comfy.start(packs=[FOR_TESTS], is_absent=True) as comfy:
        folder = comfy.models_dir / "diffusion_models"
        folder.mkdir(exist_ok=True)
        (folder / MODEL).symlink_to(ROOT / "flux_core" / "nano" / "diffusion_models" / MODEL)
        yield comfy


def plain_graph(name: str) -> Graph:
    """An edit with ComfyUI's own nodes alone, saved as a latent."""
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=MODEL, weight_dtype="default")
    latents = [
        graph.add("ForTestsLatent", shape="1,16,8,8", seed=seed, kind="plain") for seed in (1, 2)
    ]
    sides = []
    for seed in (3, 4):
        text = graph.add("ForTestsText", tokens=20, width=192, pooled=128, seed=seed)
        guided = graph.add("FluxGuidance", conditioning=graph.out(text), guidance=2.5)
        placed = graph.add(
            "ReferenceLatent", conditioning=graph.out(guided), latent=graph.out(latents[0])
        )
        sides.append(graph.out(placed))
    sampled = graph.add(
        "KSampler",
        model=graph.out(model),
        positive=sides[0],
        negative=sides[1],
        latent_image=graph.out(latents[1]),
        **{"seed": 5, "steps": 3, "cfg": 2.0, "denoise": 0.8},
        **{"sampler_name": "euler", "scheduler": "simple"},
    )
    graph.add("SaveLatent", samples=graph.out(sampled), filename_prefix=name)
    return graph


def made(comfy: "Comfy", name: str) -> torch.Tensor:
    comfy.run(plain_graph(name).nodes)
    (file,) = comfy.output_dir.glob(f"{name}_*.latent")
    return load_file(file)["latent_tensor"]


def test_a_server_without_the_pack_makes_the_same_bits(
    bare_comfy: "Comfy", tiny_comfy: "Comfy"
) -> None:
    """Before our nodes have run, and after: a whole edit, and one that fails in the sampler."""
    assert not [name for name in bare_comfy.object_info() if name.startswith("Glassbox")]
    alone = made(bare_comfy, "alone")
    assert alone.std() > 0.1
    assert torch.equal(made(tiny_comfy, "before"), alone)
    tiny_comfy.run(edit(steps=1, seed=501).nodes)
    failing = edit(references=2, placement="single", seed=502)
    with pytest.raises(ComfyError):
        tiny_comfy.run(failing.nodes)
    tiny_comfy.free()
    assert torch.equal(made(tiny_comfy, "after"), alone)
