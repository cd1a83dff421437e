"""FLUX.2 handed what is not its own, or more than it takes: words on the right node."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from glassbox.tests.graph import tiny, tiny_flux2
from glassbox.tests.graph.graphs import Graph, Link, Pipeline
from glassbox.tests.graph.server import ComfyError

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph

KLEIN, KONTEXT = "FLUX.2 [klein] 4B", "FLUX.1 Kontext [dev]"
SAMPLER, ENCODE = "GlassboxSampleGuided", "GlassboxEncodeText"


@pytest.fixture(autouse=True, scope="module")
def _the_next_prompt_runs(flux2_comfy: "Comfy") -> Iterator[None]:
    """After all that was refused here, an edit still runs."""
    yield
    assert len(flux2_comfy.images(flux2_comfy.run(edit(steps=1).nodes))) == 1


def refused(comfy: "Comfy", graph: Graph, node_type: str, *words: str) -> str:
    """Run a graph that must fail on a node of this type with these words."""
    with pytest.raises(ComfyError) as error:
        comfy.run(graph.nodes)
    details = error.value.details
    assert details.get("node_type") == node_type, str(error.value)
    message = details["exception_message"]
    for word in ("Needed:", "Fix:", *words):
        assert word in message, message
    return message


def told(comfy: "Comfy", graph: Graph) -> str:
    """Run a graph: the notes that its nodes showed."""
    messages = list(comfy.watch(graph.nodes))
    texts = [one for one in messages if isinstance(one, bytes) and one[:4] == b"\0\0\0\3"]
    ends = [one["type"] for one in messages if isinstance(one, dict)]
    assert ends[-1] == "execution_success"
    return b"\n".join(texts).decode(errors="replace")


def edit(*, references: int = 1, steps: int = 4, seed: int = 3, **sampler: str) -> Pipeline:
    """An edit with the tiny klein, from files to a saved picture."""
    graph = Pipeline()
    model, encoders, autoencoder = graph.klein()
    wired = [
        graph.tokens(autoencoder, graph.picture(64, 64, color=0x102030 * (i + 1)))
        for i in range(references)
    ]
    conditioning = graph.conditioning(graph.text(encoders), *wired, guidance=1, placement="index")
    finish(graph, model, conditioning, autoencoder, steps=steps, seed=seed, **sampler)
    return graph


def finish(
    graph: Pipeline,
    model: Link,
    conditioning: Link,
    autoencoder: Link,
    *,
    steps: int = 4,
    seed: int = 3,
    **sampler: str,
) -> Pipeline:
    noise = graph.noise(model, seed=seed)
    wires = {"model": model, "conditioning": conditioning, "noise": noise}
    settings = {"sigmas": graph.sigmas(model, noise, steps), "solver": "euler", **sampler}
    sampled = graph.out(graph.add(SAMPLER, **wires, **settings))
    graph.save(graph.decode(autoencoder, sampled))
    return graph


# ---- parts of the other generation


def test_a_reference_from_the_other_autoencoder_names_both(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, encoders, autoencoder = graph.klein()
    reference = graph.tokens(graph.autoencoder(), graph.picture())
    finish(graph, model, graph.conditioning(graph.text(encoders), reference), autoencoder)
    refused(flux2_comfy, graph, SAMPLER, "Reference 1 holds FLUX.1 tokens", KLEIN, "autoencoder")
    graph = Pipeline()
    reference = graph.tokens(graph.autoencoder(tiny_flux2.AUTOENCODER_FILE), graph.picture())
    conditioning = graph.conditioning(graph.text(graph.encoders()), reference)
    finish(graph, graph.model(), conditioning, graph.autoencoder())
    refused(flux2_comfy, graph, SAMPLER, "Reference 1 holds FLUX.2 tokens", KONTEXT, "autoencoder")


@pytest.mark.parametrize(
    ("made_by", "decoded_by"),
    [
        (tiny.AUTOENCODER_FILE, tiny_flux2.AUTOENCODER_FILE),
        (tiny_flux2.AUTOENCODER_FILE, tiny.AUTOENCODER_FILE),
    ],
)
def test_decoding_with_the_other_autoencoder_names_both(
    flux2_comfy: "Comfy", made_by: str, decoded_by: str
) -> None:
    graph = Pipeline()
    tokens = graph.tokens(graph.autoencoder(made_by), graph.picture())
    graph.save(graph.decode(graph.autoencoder(decoded_by), tokens))
    message = refused(flux2_comfy, graph, "GlassboxUnpackAndDecode", "FLUX.1", "FLUX.2")
    found = "FLUX.1" if made_by == tiny.AUTOENCODER_FILE else "FLUX.2"
    assert f"holds {found} tokens" in message


def test_text_of_the_other_encoders_names_both(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, _, autoencoder = graph.klein()
    finish(graph, model, graph.conditioning(graph.text(graph.encoders())), autoencoder)
    refused(flux2_comfy, graph, SAMPLER, "CLIP-L and T5", KLEIN, "Load Text Encoders")
    graph = Pipeline()
    _, encoders, _ = graph.klein()
    finish(graph, graph.model(), graph.conditioning(graph.text(encoders)), graph.autoencoder())
    refused(flux2_comfy, graph, SAMPLER, "Qwen3", KONTEXT, "Load Text Encoders")


def test_noise_of_the_other_model_names_both(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, _, _ = graph.klein()
    graph.show(graph.sigmas(model, graph.noise(graph.model())))
    refused(flux2_comfy, graph, "GlassboxSchedule", "FLUX.1 tokens", "FLUX.2 tokens")


@pytest.mark.parametrize(
    ("source", "latent_format", "other"),
    [
        ("EmptySD3LatentImage", "FLUX.2", "FLUX.1"),
        ("EmptyFlux2LatentImage", "FLUX.1", "FLUX.2"),
    ],
)
def test_a_latent_of_the_other_generation_names_both(
    flux2_comfy: "Comfy", source: str, latent_format: str, other: str
) -> None:
    graph = Pipeline()
    latent = graph.out(graph.add(source, width=64, height=64, batch_size=1))
    tokens = graph.add("GlassboxPackLatent", latent=latent, latent_format=latent_format)
    graph.save(graph.decode(graph.autoencoder(), graph.out(tokens)))
    words = (f"for {latent_format}", f"as those of {other}")
    refused(flux2_comfy, graph, "GlassboxPackLatent", *words)


def test_comfyuis_latent_of_flux2_comes_through_bit_for_bit(flux2_comfy: "Comfy") -> None:
    values = torch.randn(2, 128, 4, 6, generator=torch.Generator().manual_seed(1)) * 1e3
    version = {"latent_format_version_0": torch.tensor([])}
    save_file({"latent_tensor": values, **version}, str(flux2_comfy.input_dir / "f2.latent"))
    graph = Graph()
    loaded = graph.out(graph.add("LoadLatent", latent="f2.latent"))
    tokens = graph.out(graph.add("GlassboxPackLatent", latent=loaded, latent_format="FLUX.2"))
    latent = graph.out(graph.add("GlassboxUnpackLatent", tokens=tokens))
    graph.add("SaveLatent", samples=latent, filename_prefix="f2")
    flux2_comfy.run(graph.nodes)
    (file,) = flux2_comfy.output_dir.rglob("f2_*.latent")
    assert torch.equal(load_file(str(file))["latent_tensor"], values)


# ---- files


@pytest.mark.parametrize(("half", "node"), [("encoder", "Encode"), ("decoder", "Decode")])
def test_an_autoencoder_that_gives_nan_is_named_on_the_node_that_used_it(
    flux2_comfy: "Comfy", half: str, node: str
) -> None:
    state = tiny_flux2.autoencoder_state()
    state[f"{half}.conv_in.bias"].fill_(float("nan"))
    name = f"nan_{half}.safetensors"
    tiny.save(state, flux2_comfy.models_dir / "vae" / name)
    graph = Pipeline()
    autoencoder = graph.autoencoder(name)
    tokens = graph.tokens(autoencoder, graph.picture(64, 64))
    image = graph.add("GlassboxUnpackAndDecode", autoencoder=autoencoder, tokens=tokens)
    graph.add("PreviewImage", images=graph.out(image))
    types = {"Encode": "GlassboxEncodeAndPack", "Decode": "GlassboxUnpackAndDecode"}
    refused(flux2_comfy, graph, types[node], f"{node.lower()}d image", "Load Autoencoder (FLUX)")


@pytest.mark.parametrize(
    ("loader", "folder", "state", "words"),
    [
        (
            "model",
            "diffusion_models",
            {"early_stream_modulations.image.lin.weight": torch.zeros(4, 4)},
            "FLUX.3",
        ),
        ("autoencoder", "vae", {"double_stream_modulation_img.lin.weight": torch.zeros(4, 4)}, ""),
        ("model", "diffusion_models", {"bn.running_mean": torch.zeros(128)}, "FLUX.2 autoencoder"),
        (
            "model",
            "diffusion_models",
            {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 4)},
            "LoRA",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(
    flux2_comfy: "Comfy", loader: str, folder: str, state: dict[str, torch.Tensor], words: str
) -> None:
    name = f"other_{loader}_{next(iter(state))}.safetensors"
    tiny.save(state, flux2_comfy.models_dir / folder / name)
    graph = Pipeline()
    link = graph.model(name) if loader == "model" else graph.autoencoder(name)
    graph.show(graph.out(link[0], 1))
    node = "GlassboxLoadModel" if loader == "model" else "GlassboxLoadAutoencoder"
    refused(flux2_comfy, graph, node, name, words or "FLUX.2 transformer")


@pytest.mark.parametrize(
    ("file", "family", "words"),
    [
        (tiny_flux2.KLEIN_FILE, "flux1-kontext", ("FLUX.1 Kontext", "128 channels", "64 out")),
        (tiny_flux2.KLEIN_FILE, "flux2-dev", ("FLUX.2 [dev]", "no guidance input")),
        (tiny_flux2.DEV_FILE, "flux2-klein-4b", (KLEIN, "a guidance input")),
        (tiny.KONTEXT_FILE, "flux2-klein-4b", (KLEIN, "64 channels")),
    ],
)
def test_a_family_the_file_cannot_be_is_refused(
    flux2_comfy: "Comfy", file: str, family: str, words: tuple[str, ...]
) -> None:
    graph = Pipeline()
    graph.show(graph.out(graph.model(file, family)[0], 1))
    refused(flux2_comfy, graph, "GlassboxLoadModel", file, *words)


def test_text_encoders_of_two_generations_are_refused_together(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    graph.show(graph.out(graph.encoders(tiny_flux2.QWEN_4B_FILE, tiny.T5_FILE)[0], 1))
    words = (tiny_flux2.QWEN_4B_FILE, "Qwen3", "FLUX.1", "FLUX.2")
    refused(flux2_comfy, graph, "GlassboxLoadTextEncoders", *words)


# ---- references


@pytest.mark.parametrize("size", ["FLUX.2 one reference", "FLUX.2 several references"])
@pytest.mark.parametrize(
    ("width", "height", "words"),
    [(63, 300, "63x300: too small"), (1000, 64, "15.6 times as long")],
)
def test_a_picture_that_is_no_reference_is_refused_in_fit_image(
    flux2_comfy: "Comfy", size: str, width: int, height: int, words: str
) -> None:
    graph = Pipeline()
    settings = {"size": size, "width": 64, "height": 64, "method": "crop"}
    picture = graph.picture(width, height)
    graph.save(graph.out(graph.add("GlassboxFitImage", image=picture, **settings)))
    refused(flux2_comfy, graph, "GlassboxFitImage", words, "at least 64 px", "8 times")


@pytest.mark.parametrize(("width", "height"), [(48, 64), (64, 16), (1024, 64)])
def test_a_reference_that_came_round_fit_image_is_refused_where_it_is_placed(
    flux2_comfy: "Comfy", width: int, height: int
) -> None:
    graph = Pipeline()
    model, encoders, autoencoder = graph.klein()
    reference = graph.tokens(autoencoder, graph.picture(width, height))
    finish(graph, model, graph.conditioning(graph.text(encoders), reference), autoencoder)
    words = (f"Reference 1 is {width}x{height}", "at least 64 px")
    refused(flux2_comfy, graph, "GlassboxReferenceConditioner", *words)


def test_the_autoencoder_never_resizes_by_itself(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    autoencoder = graph.autoencoder(tiny_flux2.AUTOENCODER_FILE)
    graph.save(graph.decode(autoencoder, graph.tokens(autoencoder, graph.picture(72, 64))))
    refused(flux2_comfy, graph, "GlassboxEncodeAndPack", "72x64", "16", "'Fit Image (FLUX)'")


def test_more_references_than_it_was_trained_with_run_and_are_said(flux2_comfy: "Comfy") -> None:
    notes = told(flux2_comfy, edit(references=5, seed=61))
    assert "5 references; FLUX.2 [klein] 4B was made for at most 4" in notes


def test_keeping_references_on_a_plain_klein_is_refused(flux2_comfy: "Comfy") -> None:
    for mode in ("kept", "this run"):
        graph = edit(seed=62, reference_kv=mode)
        refused(flux2_comfy, graph, SAMPLER, mode, KLEIN, "9B KV", "'every step'")


# ---- text


def test_a_prompt_over_512_tokens_says_what_was_cut(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    _, encoders, _ = graph.klein()
    node = graph.text(encoders, "a red circle on blue, " * 200 + "and the last word")[0]
    report = graph.show(graph.out(node, 1))
    history = flux2_comfy.run(graph.nodes)
    (count,) = history["outputs"][node]["glassbox_text"]
    assert (count["used"], count["limit"]) == (512, 512)
    assert count["cut"].endswith("and the last word")
    assert "512 of 512" in history["outputs"][report]["text"][0]
    assert "and the last word" in history["outputs"][report]["text"][0]


def test_a_second_prompt_is_not_dropped_in_silence(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    _, encoders, _ = graph.klein()
    node = graph.text(encoders, "make it red", prompt_2="and round")[0]
    report = graph.show(graph.out(node, 1))
    history = flux2_comfy.run(graph.nodes)
    assert "prompt_2 was not read" in history["outputs"][report]["text"][0]


def test_guidance_and_steps_that_klein_does_not_take_are_said(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, encoders, autoencoder = graph.klein()
    conditioning = graph.conditioning(graph.text(encoders), guidance=3.0)
    notes = told(flux2_comfy, finish(graph, model, conditioning, autoencoder, steps=7, seed=63))
    assert "guidance 3 is ignored" in notes
    assert "distilled to 4" in notes
