"""What people wire by mistake from ComfyUI's own nodes: the right node says it, at once.

CLIPs of other models are in test_native_text, CONDITIONINGs in test_native_conditioning_refused.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from glassbox.flux_core.families import FLUX1_DEV
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.tests.core.quantised_files import gguf_bytes
from glassbox.tests.graph import tiny
from glassbox.tests.graph.graphs import Link, Pipeline
from glassbox.tests.graph.test_bad_input_values import refused
from glassbox.tests.graph.test_nodes import pixels

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph

NANO = "glassbox_nano_kontext.safetensors"
BOTH = "FLUX.1 or FLUX.2"
MOST_S = 1.0
SAMPLER, APPLY = "GlassboxSampleGuided", "GlassboxApplyToModel"


def at_once(comfy: "Comfy", graph: Pipeline, node: str, *words: str) -> str:
    """The words of a node, which take no second once what comes before it is there."""
    message = refused(comfy, graph, node, *words)
    start = time.monotonic()
    assert refused(comfy, graph, node, *words) == message
    assert time.monotonic() - start < MOST_S
    return message


def native(graph: Pipeline, name: str = NANO) -> Link:
    return graph.out(graph.add("UNETLoader", unet_name=name, weight_dtype="default"))


def nano_inputs(graph: Pipeline) -> tuple[Link, Link, Link]:
    """Conditioning, noise and sigmas that fit the nano's MODEL."""
    nano = graph.add("GlassboxLoadNano", name="kontext")
    conditioning = graph.conditioning(graph.text(graph.out(nano, 1)))
    noise = graph.noise(graph.out(nano))
    return conditioning, noise, graph.sigmas(graph.out(nano), noise)


def sampling(graph: Pipeline, model: Link) -> Pipeline:
    conditioning, noise, sigmas = nano_inputs(graph)
    sampled = graph.sample(model, conditioning, noise, sigmas)
    graph.add("SaveLatent", samples=latent_of(graph, sampled), filename_prefix="bad")
    return graph


def latent_of(graph: Pipeline, tokens: Link) -> Link:
    return graph.out(graph.add("GlassboxUnpackLatent", tokens=tokens))


def applying(graph: Pipeline, model: Link) -> Pipeline:
    """Our places for a MODEL that KSampler gets."""
    conditioning, _, _ = nano_inputs(graph)
    placed = graph.out(graph.add(APPLY, model=model, conditioning=conditioning))
    text = graph.out(graph.add("GlassboxToConditioning", conditioning=conditioning))
    settings = {"seed": 5, "steps": 1, "cfg": 1.0, "denoise": 1.0}
    settings |= {"sampler_name": "euler", "scheduler": "simple"}
    empty = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    wires = {"positive": text, "negative": text, "latent_image": graph.out(empty)}
    sampled = graph.add("KSampler", model=placed, **wires, **settings)
    graph.add("SaveLatent", samples=graph.out(sampled), filename_prefix="bad")
    return graph


USES = [(sampling, SAMPLER), (applying, APPLY)]


# ---- MODEL


@pytest.fixture(scope="module")
def models(tiny_comfy: "Comfy") -> Path:
    """Files that ComfyUI's own loader takes, and that are not what our nodes need."""
    folder = tiny_comfy.models_dir / "diffusion_models"
    state = tiny.transformer_state()
    rows = state["img_in.weight"].shape[0]
    for name, channels in (("bad-fill", 384), ("bad-canny", 128)):
        wider = {**state, "img_in.weight": torch.zeros(rows, channels)}
        tiny.save(wider, folder / f"{name}.safetensors")
    joint = "joint_blocks.0.context_block.attn.qkv.weight"
    sd3 = {joint: torch.zeros(192, 64), "x_embedder.proj.weight": torch.zeros(64, 16, 2, 2)}
    tiny.save(sd3, folder / "bad-sd3.safetensors")
    context = {"txt_in.weight": torch.zeros(rows, 3584)}
    left_out = ("guidance_in", "vector_in")
    long_cat = {key: one for key, one in state.items() if not key.startswith(left_out)}
    tiny.save({**long_cat, **context}, folder / "bad-longcat.safetensors")
    return folder


@pytest.mark.parametrize(("use", "node"), USES)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad-sd3", ("The MODEL is SD3 around", BOTH, "'Load Diffusion Model'")),
        ("bad-longcat", ("The MODEL is LongCatImage around", BOTH, "'Load Diffusion Model'")),
        ("bad-fill", ("384 channels", "inpaint", "without Fill, Canny or Depth")),
        ("bad-canny", ("128 channels", "control", "without Fill, Canny or Depth")),
    ],
)
def test_a_model_of_another_kind_is_refused_by_what_it_is(
    tiny_comfy: "Comfy", models: Path, use: Any, node: str, name: str, words: tuple[str, ...]
) -> None:
    graph = Pipeline()
    file = f"{name}.safetensors"
    assert (models / file).is_file()
    at_once(tiny_comfy, use(graph, native(graph, file)), node, *words)


@pytest.mark.parametrize(("use", "node"), USES)
def test_sdxl_is_refused_by_its_name(tiny_comfy: "Comfy", use: Any, node: str) -> None:
    graph = Pipeline()
    model = graph.out(graph.add("ForTestsOtherModel"))
    at_once(tiny_comfy, use(graph, model), node, "The MODEL is SDXL around", "UNetModel", BOTH)


@pytest.fixture
def changed(tiny_comfy: "Comfy") -> Iterator["Comfy"]:
    """A ComfyUI whose network tests may change; afterwards it is as it was."""
    yield tiny_comfy
    graph = Pipeline()
    model = graph.out(graph.add("ForTestsModel", model=native(graph), how="as it was"))
    tiny_comfy.run(sampling(graph, model).nodes)


@pytest.mark.parametrize(("use", "node"), USES)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("object patch", ("replaced the network's code: diffusion_model.forward_orig",)),
        ("instance", ("replaced the network's code: forward_orig (from only_for_tests)",)),
        ("class", ("replaced the network's code: forward_orig (from only_for_tests)",)),
        ("hidden", ("nunchaku.ComfyFluxWrapper", "an fp8, NVFP4 or GGUF file of the model")),
    ],
)
def test_a_model_whose_code_was_replaced_or_hidden_is_refused_by_name(
    changed: "Comfy", use: Any, node: str, how: str, words: tuple[str, ...]
) -> None:
    graph = Pipeline()
    model = graph.out(graph.add("ForTestsModel", model=native(graph), how=how))
    message = refused(changed, use(graph, model), node, *words)
    assert "/" not in message


# ---- files


def test_a_fill_file_of_the_published_size_is_refused_with_no_weight_read(
    tiny_comfy: "Comfy",
) -> None:
    """24 GB of nothing."""
    with torch.device("meta"):
        network = build_flux(FLUX1_DEV, FLUX1_DEV.transformer)
    state = {**network.modulation.state_dict(), **network.blocks.state_dict()}
    shapes = {key: list(one.shape) for key, one in state.items()}
    shapes["img_in.weight"][1] = 384
    header: dict[str, Any] = {}
    end = 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = tiny_comfy.models_dir / "diffusion_models" / "flux1-fill-dev.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    graph = Pipeline()
    graph.show(graph.out(graph.model(path.name)[0], 1))
    words = ("FLUX.1 Fill [dev]", "384 channels", "a FLUX.1 model that takes 64", "FLUX.2")
    at_once(tiny_comfy, graph, "GlassboxLoadModel", *words)
    path.unlink()


def test_a_gguf_file_cut_anywhere_is_refused_by_its_name(tiny_comfy: "Comfy") -> None:
    entries = {
        key: (0, tuple(one.shape), one.numpy().tobytes())
        for key, one in tiny.transformer_state().items()
    }
    whole = gguf_bytes(entries)
    folder = tiny_comfy.models_dir / "diffusion_models"
    for tenth in range(10):
        name = f"cut_{tenth}.gguf"
        (folder / name).write_bytes(whole[: max(len(whole) * tenth // 10, 4 * (tenth == 0))])
        graph = Pipeline()
        graph.show(graph.out(graph.model(name)[0], 1))
        at_once(tiny_comfy, graph, "GlassboxLoadModel", name, "cut short")
    (folder / "cut_none.gguf").write_bytes(whole)
    graph = Pipeline()
    graph.show(graph.out(graph.model("cut_none.gguf")[0], 1))
    tiny_comfy.run(graph.nodes)


@pytest.mark.parametrize("is_native", [False, True])
def test_a_lora_with_half_its_keys_is_refused_by_the_first_that_is_missing(
    tiny_comfy: "Comfy", is_native: bool
) -> None:
    """Every second matrix is gone: what stands alone is named."""
    layers = ("single_blocks.0.linear1", "single_blocks.1.linear1")
    rows, columns = tiny.transformer_state()[f"{layers[0]}.weight"].shape
    half = {f"diffusion_model.{one}.lora_A.weight": torch.zeros(2, columns) for one in layers}
    half[f"diffusion_model.{layers[1]}.lora_B.weight"] = torch.zeros(rows, 2)
    folder = tiny_comfy.models_dir / "loras"
    folder.mkdir(exist_ok=True)
    tiny.save(half, folder / "half.safetensors")
    graph = Pipeline()
    model = native(graph, tiny.KONTEXT_FILE) if is_native else graph.model()
    lora = {"file": "half.safetensors", "strength": 1.0}
    graph.show(graph.out(graph.add("GlassboxApplyLoRA", model=model, **lora), 1))
    words = ("half.safetensors", layers[0], "without its other half")
    at_once(tiny_comfy, graph, "GlassboxApplyLoRA", *words)


# ---- LATENT and VAE


def random(graph: Pipeline, shape: str, kind: str = "plain") -> Link:
    return graph.out(graph.add("ForTestsLatent", shape=shape, seed=1, kind=kind))


def placed(graph: Pipeline, latent: Link) -> None:
    place = {"index": 1.0, "row": 0.0, "column": 0.0}
    moved = graph.out(graph.add("GlassboxPositionIds", tokens=latent, **place))
    graph.add("SaveLatent", samples=latent_of(graph, moved), filename_prefix="bad")


def as_reference(graph: Pipeline, latent: Link) -> None:
    conditioning = graph.conditioning(graph.text(graph.encoders()), latent)
    graph.add("GlassboxInspectTokens", conditioning=conditioning)


def inspected(graph: Pipeline, latent: Link) -> None:
    conditioning = graph.conditioning(graph.text(graph.encoders()))
    graph.add("GlassboxInspectTokens", conditioning=conditioning, noise=latent)


def decoded(graph: Pipeline, latent: Link) -> None:
    graph.save(graph.decode(graph.autoencoder(), latent))


def packed(graph: Pipeline, latent: Link) -> None:
    tokens = graph.add("GlassboxPackLatent", latent=latent, latent_format="FLUX.1")
    graph.save(graph.decode(graph.autoencoder(), graph.out(tokens)))


SOCKETS = [
    (placed, "GlassboxPositionIds"),
    (as_reference, "GlassboxReferenceConditioner"),
    (inspected, "GlassboxInspectTokens"),
    (decoded, "GlassboxUnpackAndDecode"),
    (packed, "GlassboxPackLatent"),
]


@pytest.mark.parametrize(("use", "node"), SOCKETS)
@pytest.mark.parametrize(
    ("shape", "kind", "words"),
    [
        ("1,4,8,8", "plain", ("(1, 4, 8, 8)", "16", "FLUX.1")),
        ("1,16,1,8,8", "plain", ("(1, 16, 1, 8, 8)", "FLUX.1")),
        ("1,128,3,4,4", "nested", ("several at once", "videos", "the latent of a picture")),
    ],
)
def test_a_latent_of_another_family_is_refused_on_every_token_socket(
    tiny_comfy: "Comfy", use: Any, node: str, shape: str, kind: str, words: tuple[str, ...]
) -> None:
    graph = Pipeline()
    use(graph, random(graph, shape, kind))
    at_once(tiny_comfy, graph, node, *words)


@pytest.mark.parametrize(("use", "node"), SOCKETS)
def test_a_latent_with_a_mask_is_refused_on_every_token_socket(
    tiny_comfy: "Comfy", use: Any, node: str
) -> None:
    graph = Pipeline()
    mask = graph.out(graph.add("SolidMask", value=1.0, width=64, height=64))
    masked = graph.add("SetLatentNoiseMask", samples=random(graph, "1,16,8,8"), mask=mask)
    use(graph, graph.out(masked))
    at_once(tiny_comfy, graph, node, "noise mask", "'Set Latent Noise Mask'")


def test_a_latent_of_the_nano_as_a_reference_says_how_to_tell_whose_it_is(
    tiny_comfy: "Comfy",
) -> None:
    """Its 16 channels are read as FLUX.1's; Pack Latent says that they are the nano's."""
    for is_told in (False, True):
        graph = Pipeline()
        nano = graph.add("GlassboxLoadNano", name="kontext")
        model, encoders, autoencoder = (graph.out(nano, slot) for slot in range(3))
        latent = latent_of(graph, graph.tokens(autoencoder, graph.picture()))
        if is_told:
            named = {"latent_format": "FLUX.1 nano"}
            latent = graph.out(graph.add("GlassboxPackLatent", latent=latent, **named))
        conditioning = graph.conditioning(graph.text(encoders), latent)
        noise = graph.noise(model)
        sampled = graph.sample(model, conditioning, noise, graph.sigmas(model, noise))
        graph.save(graph.decode(autoencoder, sampled))
        if not is_told:
            words = ("FLUX.1 tokens", "FLUX.1 nano tokens", "'Pack Latent (FLUX)'", "'FLUX.1 nano'")
            at_once(tiny_comfy, graph, SAMPLER, *words)
        else:
            assert len(pixels(tiny_comfy, tiny_comfy.run(graph.nodes))) == 1


@pytest.mark.parametrize("node", ["GlassboxEncodeAndPack", "GlassboxUnpackAndDecode"])
def test_a_vae_that_has_no_latents_is_refused(tiny_comfy: "Comfy", node: str) -> None:
    graph = Pipeline()
    vae = graph.out(graph.add("VAELoader", vae_name="pixel_space"))
    if node == "GlassboxEncodeAndPack":
        tokens = graph.tokens(vae, graph.picture())
        graph.add("SaveLatent", samples=latent_of(graph, tokens), filename_prefix="bad")
    else:
        graph.save(graph.decode(vae, random(graph, "1,16,8,8")))
    words = ("PixelspaceConversionVAE", "FLUX's own autoencoder", "'Load VAE'")
    at_once(tiny_comfy, graph, node, *words)
