"""Bad values on wires and widgets: words on the right node, and a ComfyUI that works on."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from glassbox.tests.graph import tiny
from glassbox.tests.graph.graphs import Graph, Pipeline, edit
from glassbox.tests.graph.server import ComfyError

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph


@pytest.fixture(autouse=True, scope="module")
def _the_next_prompt_runs(tiny_comfy: "Comfy") -> Iterator[None]:
    """After all that was refused here, an edit still runs."""
    yield
    fresh = edit(size=32, steps=1, seed=1000)  # nothing of it is cached
    assert len(tiny_comfy.images(tiny_comfy.run(fresh.nodes))) == 1


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


def invalid(comfy: "Comfy", graph: Graph, node_type: str, kind: str, name: str) -> None:
    """Queue a graph that ComfyUI must not accept, for one input of one node."""
    with pytest.raises(ComfyError) as error:
        comfy.queue(graph.nodes)
    node = next(
        one for one in error.value.details["node_errors"].values() if one["class_type"] == node_type
    )
    assert [(one["type"], one["extra_info"]["input_name"]) for one in node["errors"]] == [
        (kind, name)
    ]


def encoding(width: int, height: int) -> Pipeline:
    graph = Pipeline()
    autoencoder = graph.autoencoder()
    tokens = graph.tokens(autoencoder, graph.picture(width, height))
    graph.save(graph.decode(autoencoder, tokens))
    return graph


# ---- pictures


@pytest.mark.parametrize(("width", "height"), [(65, 64), (64, 72), (1, 1), (1, 64)])
def test_a_picture_of_an_illegal_size_names_fit_image(
    tiny_comfy: "Comfy", width: int, height: int
) -> None:
    words = (f"{width}x{height}", "multiples of", "'Fit Image (FLUX)'")
    refused(tiny_comfy, encoding(width, height), "GlassboxEncodeAndPack", *words)


def test_a_picture_beyond_memory_is_refused_before_it_is_encoded(tiny_comfy: "Comfy") -> None:
    words = ("8000x8000", "GB", "'Fit Image (FLUX)'")
    refused(tiny_comfy, encoding(8000, 8000), "GlassboxEncodeAndPack", *words)


def test_a_picture_8000_pixels_wide_runs_when_it_fits(tiny_comfy: "Comfy") -> None:
    assert len(tiny_comfy.images(tiny_comfy.run(encoding(8000, 16).nodes))) == 1


@pytest.mark.parametrize("size", ["preferred", "keep", "exact"])
def test_one_pixel_can_be_fitted(tiny_comfy: "Comfy", size: str) -> None:
    graph = Pipeline()
    settings = {"size": size, "width": 32, "height": 32, "method": "pad"}
    graph.save(graph.out(graph.add("GlassboxFitImage", image=graph.picture(1, 1), **settings)))
    assert len(tiny_comfy.images(tiny_comfy.run(graph.nodes))) == 1


def test_one_pixel_cannot_be_cropped_to_its_own_size(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    settings = {"size": "keep", "width": 32, "height": 32, "method": "crop"}
    graph.save(graph.out(graph.add("GlassboxFitImage", image=graph.picture(1, 1), **settings)))
    refused(tiny_comfy, graph, "GlassboxFitImage", "1x1", "pad")


def with_alpha(graph: Pipeline) -> list[Any]:
    mask = graph.add("SolidMask", value=0.5, width=64, height=64)
    joined = graph.add("JoinImageWithAlpha", image=graph.picture(), alpha=graph.out(mask))
    return graph.out(joined)


def test_a_picture_with_alpha_is_refused_by_both_nodes_that_take_one(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    settings = {"size": "keep", "width": 32, "height": 32, "method": "pad"}
    graph.save(graph.out(graph.add("GlassboxFitImage", image=with_alpha(graph), **settings)))
    refused(tiny_comfy, graph, "GlassboxFitImage", "4 channels", "alpha")
    graph = Pipeline()
    autoencoder = graph.autoencoder()
    graph.save(graph.decode(autoencoder, graph.tokens(autoencoder, with_alpha(graph))))
    refused(tiny_comfy, graph, "GlassboxEncodeAndPack", "4 channels", "alpha")


def test_batches_that_do_not_go_together_are_named(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, autoencoder = graph.model(), graph.autoencoder()
    reference = graph.tokens(autoencoder, graph.picture(batch=2))
    conditioning = graph.conditioning(graph.text(graph.encoders()), reference)
    noise = graph.noise(model, batch=3)
    sampled = graph.sample(model, conditioning, noise, graph.sigmas(model, noise))
    graph.save(graph.decode(autoencoder, sampled))
    refused(tiny_comfy, graph, "GlassboxSampleGuided", "reference 1", "batch of 2", "3")


def test_a_fit_of_another_size_is_named(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    autoencoder = graph.autoencoder()
    settings = {"size": "keep", "width": 1024, "height": 1024, "method": "pad"}
    fit = graph.add("GlassboxFitImage", image=graph.picture(32, 32), **settings)
    tokens = graph.tokens(autoencoder, graph.picture(64, 64))
    graph.save(graph.decode(autoencoder, tokens, graph.out(fit, 1)))
    refused(tiny_comfy, graph, "GlassboxUnpackAndDecode", "64x64", "32x32")


# ---- references


def test_a_hundred_references_run(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, autoencoder = graph.model(), graph.autoencoder()
    reference = graph.tokens(autoencoder, graph.picture(32, 32))
    conditioning = graph.conditioning(graph.text(graph.encoders()), *[reference] * 100)
    noise = graph.noise(model)
    sampled = graph.sample(model, conditioning, noise, graph.sigmas(model, noise))
    graph.save(graph.decode(autoencoder, sampled))
    node = graph.add("GlassboxInspectTokens", conditioning=conditioning, noise=noise)
    (report,) = tiny_comfy.run(graph.nodes)["outputs"][node]["glassbox_tokens"]
    assert len(report["segments"]) == 102


def test_a_hundred_large_references_are_refused_until_memory_says_yes(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model = graph.model()
    latent = graph.add("EmptySD3LatentImage", width=4096, height=4096, batch_size=1)
    tokens = graph.add("GlassboxPackLatent", latent=graph.out(latent), latent_format="FLUX.1")
    references = [graph.out(tokens)] * 100
    conditioning = graph.conditioning(graph.text(graph.encoders()), *references)
    noise = graph.noise(model)
    sampled = graph.sample(model, conditioning, noise, graph.sigmas(model, noise))
    graph.save(graph.decode(graph.autoencoder(), sampled))
    refused(tiny_comfy, graph, "GlassboxSampleGuided", "100 references", "GB", "fewer")


@pytest.mark.parametrize("passes", ["in turn", "batched"])
def test_large_references_of_the_negative_alone_are_refused_too(
    tiny_comfy: "Comfy", passes: str
) -> None:
    graph = Pipeline()
    model, text = graph.model(), graph.text(graph.encoders())
    latent = graph.add("EmptySD3LatentImage", width=4096, height=4096, batch_size=1)
    tokens = graph.add("GlassboxPackLatent", latent=graph.out(latent), latent_format="FLUX.1")
    positive = graph.conditioning(text)
    negative = graph.conditioning(text, *[graph.out(tokens)] * 100)
    noise = graph.noise(model)
    wires = {"model": model, "positive": positive, "negative": negative, "noise": noise}
    window = {"cfg": 2.0, "start": 0.0, "end": 1.0, "passes": passes, "solver": "euler"}
    sigmas = graph.sigmas(model, noise)
    sampled = graph.add("GlassboxSampleTrueCFG", **wires, sigmas=sigmas, **window)
    graph.save(graph.decode(graph.autoencoder(), graph.out(sampled)))
    refused(tiny_comfy, graph, "GlassboxSampleTrueCFG", "100 references", "GB", "fewer")


@pytest.mark.parametrize("name", ["references", "references.reference_101", "references.first"])
def test_references_wired_by_hand_to_no_input_are_refused(tiny_comfy: "Comfy", name: str) -> None:
    graph = edit(references=1, seed=62)
    for node in graph.nodes.values():
        if node["class_type"] == "GlassboxReferenceConditioner":
            node["inputs"][name] = node["inputs"].pop("references.reference_1")
    words = ("references holds", "references.reference_1")
    refused(tiny_comfy, graph, "GlassboxReferenceConditioner", *words)


def test_two_references_with_placement_single_are_refused(tiny_comfy: "Comfy") -> None:
    graph = edit(references=2, placement="single")
    refused(tiny_comfy, graph, "GlassboxReferenceConditioner", "2 references", "'offset'")


def test_tokens_of_another_latent_are_named(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, autoencoder = graph.model(), graph.autoencoder()
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    nano = graph.add("GlassboxPackLatent", latent=graph.out(latent), latent_format="FLUX.1 nano")
    conditioning = graph.conditioning(graph.text(graph.encoders()), graph.out(nano))
    noise = graph.noise(model)
    sampled = graph.sample(model, conditioning, noise, graph.sigmas(model, noise))
    graph.save(graph.decode(autoencoder, sampled))
    refused(tiny_comfy, graph, "GlassboxSampleGuided", "Reference 1", "FLUX.1 nano", "autoencoder")
    graph = Pipeline()
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    nano = graph.add("GlassboxPackLatent", latent=graph.out(latent), latent_format="FLUX.1 nano")
    graph.save(graph.decode(graph.autoencoder(), graph.out(nano)))
    refused(tiny_comfy, graph, "GlassboxUnpackAndDecode", "FLUX.1 nano", "Load Autoencoder")


# ---- text


def test_an_empty_prompt_runs(tiny_comfy: "Comfy") -> None:
    assert len(tiny_comfy.images(tiny_comfy.run(edit(prompt="").nodes))) == 1


def test_five_thousand_characters_run_and_say_what_was_cut(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    node = graph.text(graph.encoders(), ("a red circle on blue, " * 300)[:5000])[0]
    graph.show(graph.out(node, 1))
    counts = tiny_comfy.run(graph.nodes)["outputs"][node]["glassbox_text"]
    assert [(one["used"], one["limit"]) for one in counts] == [(77, 77), (512, 512)]
    assert all(len(one["cut"]) > 1000 for one in counts)


def test_text_of_other_encoders_is_named(tiny_comfy: "Comfy") -> None:
    spec = tiny.replace(tiny.T5, width=128)
    name = "wide_t5.safetensors"
    tiny.save(tiny.t5_state(spec), tiny_comfy.models_dir / "text_encoders" / name)
    graph = Pipeline()
    model = graph.model()
    conditioning = graph.conditioning(graph.text(graph.encoders(file_2=name)))
    noise = graph.noise(model)
    sampled = graph.sample(model, conditioning, noise, graph.sigmas(model, noise))
    graph.save(graph.decode(graph.autoencoder(), sampled))
    refused(tiny_comfy, graph, "GlassboxSampleGuided", "128", "64", "text encoders")


# ---- sampling


def test_no_steps_are_refused_and_one_step_runs(tiny_comfy: "Comfy") -> None:
    invalid(tiny_comfy, edit(steps=0), "GlassboxSchedule", "value_smaller_than_min", "steps")
    assert len(tiny_comfy.images(tiny_comfy.run(edit(steps=1).nodes))) == 1


def test_guidance_on_schnell_is_said_to_be_ignored(tiny_comfy: "Comfy") -> None:
    graph = edit(model=tiny.SCHNELL_FILE, references=0, guidance=3.0, seed=31)
    messages = list(tiny_comfy.watch(graph.nodes))
    texts = [one for one in messages if isinstance(one, bytes) and one[:4] == b"\0\0\0\3"]
    assert any(b"guidance 3 is ignored" in one for one in texts)
    assert "guidance 3 is ignored" in tiny_comfy.log()


@pytest.mark.parametrize("passes", ["batched", "in turn"])
def test_a_reversed_cfg_window_is_refused(tiny_comfy: "Comfy", passes: str) -> None:
    graph = Pipeline()
    model, encoders = graph.model(), graph.encoders()
    sides = [graph.conditioning(graph.text(encoders, one)) for one in ("red", "blue")]
    noise = graph.noise(model)
    settings = {"cfg": 3.0, "start": 0.8, "end": 0.2, "passes": passes, "solver": "euler"}
    wires = {"model": model, "noise": noise, "sigmas": graph.sigmas(model, noise)}
    node = graph.add(
        "GlassboxSampleTrueCFG", positive=sides[0], negative=sides[1], **wires, **settings
    )
    graph.save(graph.decode(graph.autoencoder(), graph.out(node)))
    refused(tiny_comfy, graph, "GlassboxSampleTrueCFG", "reversed", "0.8", "0.2")


def test_sigmas_of_another_kind_of_model_are_refused(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model = graph.model()
    karras = graph.add("KarrasScheduler", steps=4, sigma_max=14.6, sigma_min=0.03, rho=7.0)
    conditioning = graph.conditioning(graph.text(graph.encoders()))
    sampled = graph.sample(model, conditioning, graph.noise(model), graph.out(karras))
    graph.save(graph.decode(graph.autoencoder(), sampled))
    refused(tiny_comfy, graph, "GlassboxSampleGuided", "14.6", "'Schedule (FLUX)'")


@pytest.mark.parametrize(
    ("by_hand", "words"), [("", "empty"), ("1, x, 0", "'x'"), ("1, 0.5", "end in"), ("0, 1", "")]
)
def test_sigmas_by_hand_are_checked(tiny_comfy: "Comfy", by_hand: str, words: str) -> None:
    graph = Pipeline()
    model = graph.model()
    sigmas = graph.sigmas(model, graph.noise(model), 2, "by hand", by_hand)
    graph.show(sigmas)
    refused(tiny_comfy, graph, "GlassboxSchedule", words)


@pytest.mark.parametrize(("width", "height"), [(72, 64), (64, 100)])
def test_noise_of_an_illegal_size_is_refused(tiny_comfy: "Comfy", width: int, height: int) -> None:
    graph = Pipeline()
    graph.show(
        graph.out(
            graph.add("GlassboxUnpackLatent", tokens=graph.noise(graph.model(), width, height))
        )
    )
    refused(tiny_comfy, graph, "GlassboxNoise", f"{width}x{height}", "16")


# ---- latents


def given(comfy: "Comfy", graph: Pipeline, values: torch.Tensor, name: str) -> list[Any]:
    """A native LATENT with these values."""
    version = {"latent_format_version_0": torch.tensor([])}
    save_file({"latent_tensor": values, **version}, str(comfy.input_dir / name))
    return graph.out(graph.add("LoadLatent", latent=name))


def packing(graph: Pipeline, latent: list[Any]) -> Pipeline:
    tokens = graph.add("GlassboxPackLatent", latent=latent, latent_format="FLUX.1")
    graph.save(graph.decode(graph.autoencoder(), graph.out(tokens)))
    return graph


def test_nan_in_a_latent_is_named(tiny_comfy: "Comfy") -> None:
    values = torch.zeros(1, 16, 8, 8)
    values[0, 3, 2, 1] = torch.nan
    graph = Pipeline()
    packing(graph, given(tiny_comfy, graph, values, "nan.latent"))
    refused(tiny_comfy, graph, "GlassboxPackLatent", "latent", "NaN", "1 values")


def test_a_latent_with_a_noise_mask_is_refused(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    latent = graph.out(graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1))
    mask = graph.out(graph.add("SolidMask", value=1.0, width=64, height=64))
    packing(graph, graph.out(graph.add("SetLatentNoiseMask", samples=latent, mask=mask)))
    refused(tiny_comfy, graph, "GlassboxPackLatent", "noise mask")


@pytest.mark.parametrize(
    "shape", [(1, 4, 8, 8), (1, 16, 7, 8), (1, 16, 8, 9), (1, 16, 1, 8, 8), (1, 128, 4, 4)]
)
def test_a_latent_of_another_shape_is_refused(tiny_comfy: "Comfy", shape: tuple[int, ...]) -> None:
    graph = Pipeline()
    name = "x".join(map(str, shape)) + ".latent"
    packing(graph, given(tiny_comfy, graph, torch.zeros(shape), name))
    refused(tiny_comfy, graph, "GlassboxPackLatent")


def test_a_choice_that_does_not_exist_is_refused(tiny_comfy: "Comfy") -> None:
    graph = edit(placement="everywhere")
    kind = "value_not_in_list"
    invalid(tiny_comfy, graph, "GlassboxReferenceConditioner", kind, "placement")


def test_a_latent_is_no_noise_to_a_sampler(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, autoencoder = graph.model(), graph.autoencoder()
    latent = graph.out(graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1))
    conditioning = graph.conditioning(graph.text(graph.encoders()))
    made = graph.sample(model, conditioning, latent, graph.sigmas(model, latent))
    graph.save(graph.decode(autoencoder, made))
    invalid(tiny_comfy, graph, "GlassboxSampleGuided", "return_type_mismatch", "noise")
