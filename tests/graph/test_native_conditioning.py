"""ComfyUI's own CONDITIONING in our samplers computes what it does in ComfyUI's."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from glassbox.tests.graph.graphs import Graph, Link, Pipeline
from glassbox.tests.graph.probe import run_probe
from glassbox.tests.graph.test_bad_input_values import refused
from glassbox.tests.graph.test_nodes_nano import FILE, nano
from glassbox.tests.graph.workflows import pixels

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def sampled() -> dict[str, Any]:
    return run_probe("probe_native_conditioning", "sampled")


@pytest.fixture(scope="module")
def guided() -> dict[str, Any]:
    return run_probe("probe_native_conditioning", "guided")


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, Any]:
    return run_probe("probe_native_conditioning", "elsewhere")


def test_our_sampler_agrees_with_comfyuis_for_0_to_3_references_and_every_method(
    sampled: dict[str, Any],
) -> None:
    """On our network and on a native MODEL; odd sides, text lengths and formats too."""
    apart = sampled["apart"]
    assert len(apart) == 31
    assert {name: one for name, one in apart.items() if one > 1e-5} == {}


def test_guidance_is_comfyuis_where_it_is_set_unset_and_not_read(guided: dict[str, Any]) -> None:
    guidance = guided["guidance"]
    matters = {name for name in guidance if name.endswith("matters")}
    assert min(guidance[name] for name in matters) > 0.1
    assert {name for name, one in guidance.items() if one > 1e-5} == matters


def test_true_cfg_agrees_with_ksampler_for_every_kind_of_negative(guided: dict[str, Any]) -> None:
    assert len(guided["cfg"]) == 6
    assert max(guided["cfg"].values()) <= 1e-5


def test_our_conditioning_comes_back_from_to_conditioning_as_it_was(
    elsewhere: dict[str, Any],
) -> None:
    assert len(elsewhere["round_trip"]) == 16
    assert set(elsewhere["round_trip"].values()) == {0.0}


def test_to_conditioning_and_apply_to_model_leave_a_native_run_as_it_is(
    elsewhere: dict[str, Any],
) -> None:
    assert len(elsewhere["again"]) == 10
    assert set(elsewhere["again"].values()) == {0.0}


def test_reference_conditioner_takes_the_text_of_a_conditioning(elsewhere: dict[str, Any]) -> None:
    """Its own text at once; a short one of FLUX.2 as ComfyUI reads it."""
    assert elsewhere["conditioner"]["FLUX.1"] == elsewhere["conditioner"]["FLUX.2"] == 0.0
    assert elsewhere["conditioner"]["FLUX.2 short"] <= 1e-5


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("unset", "sets no guidance: 3.5 is taken, as ComfyUI does"),
        ("unset native", "sets no guidance: 3.5 is taken, as ComfyUI does"),
        ("odd", "reference 1 does not divide into tokens"),
        ("unset to conditioning", "no guidance is set: ComfyUI takes 3.5"),
        ("replaced", "guidance 2 of the CONDITIONING is replaced by guidance 1.5"),
        ("switched off", "'FluxDisableGuidance' is replaced by guidance 1.5"),
    ],
)
def test_what_one_may_not_expect_is_said_on_the_node(
    elsewhere: dict[str, Any], use: str, words: str
) -> None:
    assert words in "\n".join(elsewhere["told"][use])


def test_nothing_is_said_of_guidance_that_is_not_read_or_is_the_same(
    elsewhere: dict[str, Any],
) -> None:
    assert elsewhere["told"]["kept"] == []
    assert "3.5" not in "\n".join(elsewhere["told"]["not read"])


def test_schedule_counts_the_tokens_of_a_latent(elsewhere: dict[str, Any]) -> None:
    assert len(elsewhere["schedule"]) == 6
    assert all(elsewhere["schedule"].values())


def test_inspect_tokens_shows_comfyuis_places_and_its_empty_tokens(
    elsewhere: dict[str, Any],
) -> None:
    shown = elsewhere["inspected"]
    assert "text: 20 tokens" in shown["FLUX.1"]
    assert "reference 2: 35 tokens = 5 rows x 7 columns; index 1, row 4 to 8" in shown["FLUX.1"]
    assert "text: 512 tokens" in shown["FLUX.2"]
    assert "reference 2: 35 tokens = 5 rows x 7 columns; index 20, row 0 to 4" in shown["FLUX.2"]


def native_edit(graph: Pipeline, conditioning: Link, autoencoder: Link) -> Link:
    """Two references, their method and guidance, put there by ComfyUI's own nodes."""
    native = graph.out(graph.add("GlassboxToConditioning", conditioning=conditioning))
    native = graph.out(graph.add("FluxGuidance", conditioning=native, guidance=1.5))
    for color in (0xFF0000, 0x0000FF):
        tokens = graph.tokens(autoencoder, graph.picture(64, 96, color=color))
        latent = graph.out(graph.add("GlassboxUnpackLatent", tokens=tokens))
        native = graph.out(graph.add("ReferenceLatent", conditioning=native, latent=latent))
    return graph.out(
        graph.add(
            "FluxKontextMultiReferenceLatentMethod",
            conditioning=native,
            reference_latents_method="index",
        )
    )


def with_comfyui(graph: Graph, guider: str, sigmas: Link, target: Link, autoencoder: Link) -> str:
    sampler = graph.add("KSamplerSelect", sampler_name="euler")
    noise = graph.add("RandomNoise", noise_seed=7)
    inputs = {"noise": noise, "guider": guider, "sampler": sampler}
    wires = {name: graph.out(node) for name, node in inputs.items()}
    latent = graph.add("SamplerCustomAdvanced", sigmas=sigmas, latent_image=target, **wires)
    packed = graph.add("GlassboxPackLatent", latent=graph.out(latent), latent_format="FLUX.1 nano")
    inside = {"autoencoder": autoencoder, "tokens": graph.out(packed)}
    return graph.add("GlassboxUnpackAndDecode", **inside)


def test_the_same_graph_gives_the_same_pictures_in_both_samplers(comfy: "Comfy") -> None:
    """Guided, and with an emptied negative prompt; Schedule takes the sampler's own LATENT."""
    graph = Pipeline()
    model, encoders, autoencoder = nano(graph)
    text = graph.text(encoders, "make the circle red")
    positive = native_edit(graph, graph.conditioning(text, guidance=1.0), autoencoder)
    negative = graph.out(graph.add("ConditioningZeroOut", conditioning=positive))
    target = graph.out(graph.add("EmptySD3LatentImage", width=96, height=64, batch_size=1))
    noise, sigmas = graph.noise(model, 96, 64), graph.sigmas(model, target, 3)
    made = graph.sample(model, positive, noise, sigmas)
    saved = [graph.save(graph.decode(autoencoder, made))]
    sides = {"model": model, "positive": positive, "negative": negative, "noise": noise}
    window = {"cfg": 2.0, "start": 0.0, "end": 1.0, "passes": "batched", "solver": "euler"}
    made = graph.out(graph.add("GlassboxSampleTrueCFG", sigmas=sigmas, **sides, **window))
    saved.append(graph.save(graph.decode(autoencoder, made)))
    native = graph.out(graph.add("UNETLoader", unet_name=FILE, weight_dtype="default"))
    guiders = [
        graph.add("BasicGuider", model=native, conditioning=positive),
        graph.add("CFGGuider", model=native, positive=positive, negative=negative, cfg=2.0),
    ]
    for guider in guiders:
        decoded = with_comfyui(graph, guider, sigmas, target, autoencoder)
        saved.append(graph.save(graph.out(decoded)))
    outputs = comfy.run(graph.nodes)["outputs"]
    guided, away, guided_there, away_there = (
        pixels(comfy.images({"outputs": {one: outputs[one]}})[0]) for one in saved
    )
    assert np.ptp(guided) > 50
    assert np.abs(guided - away).max() > 10
    assert np.abs(guided - guided_there).max() <= 1  # of 255: one may be rounded the other way
    assert np.abs(away - away_there).max() <= 1


@pytest.mark.parametrize(
    ("wired", "words"), [("mask", "carries a mask"), ({"a": 1}, "a value of type dict")]
)
def test_a_graph_with_what_cannot_be_followed_stops_at_the_sampler(
    comfy: "Comfy", wired: Any, words: str
) -> None:
    graph = Pipeline()
    model, encoders, autoencoder = nano(graph)
    given = graph.out(
        graph.add("GlassboxToConditioning", conditioning=graph.conditioning(graph.text(encoders)))
    )
    if wired == "mask":
        mask = graph.out(graph.add("SolidMask", value=1.0, width=64, height=64))
        settings = {"mask": mask, "strength": 1.0, "set_cond_area": "default"}
        wired = graph.out(graph.add("ConditioningSetMask", conditioning=given, **settings))
    noise = graph.noise(model)
    made = graph.sample(model, wired, noise, graph.sigmas(model, noise))
    graph.save(graph.decode(autoencoder, made))
    refused(comfy, graph, "GlassboxSampleGuided", words)
