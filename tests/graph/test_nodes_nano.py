"""The embedded model beside others: native loaders see it, and its parts fit no other family."""

from typing import TYPE_CHECKING

import pytest

from glassbox.tests.graph import tiny
from glassbox.tests.graph.graphs import Graph, Link, Pipeline
from glassbox.tests.graph.server import ComfyError

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph

FILE = "glassbox_nano_kontext.safetensors"


def nano(graph: Graph) -> tuple[Link, Link, Link]:
    node = graph.add("GlassboxLoadNano", name="kontext")
    return graph.out(node, 0), graph.out(node, 1), graph.out(node, 2)


def refused(comfy: "Comfy", graph: Graph, node_type: str, *words: str) -> None:
    with pytest.raises(ComfyError) as error:
        comfy.run(graph.nodes)
    assert error.value.details["node_type"] == node_type
    for word in words:
        assert word in error.value.details["exception_message"]


def finish(graph: Pipeline, model: Link, encoders: Link, autoencoder: Link, out: Link) -> Pipeline:
    """Sample from a reference, and decode with `out`."""
    reference = graph.tokens(autoencoder, graph.picture(96, 96))
    conditioning = graph.conditioning(graph.text(encoders), reference, guidance=1.0)
    noise = graph.noise(model, 96, 96)
    sampled = graph.sample(model, conditioning, noise, graph.sigmas(model, noise, 2))
    graph.save(graph.decode(out, sampled))
    return graph


def test_comfyuis_own_loader_opens_the_embedded_transformer(comfy: "Comfy") -> None:
    options = comfy.object_info("UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"]
    assert FILE in str(options)
    graph = Graph()
    native = graph.add("UNETLoader", unet_name=FILE, weight_dtype="default")
    steps = {"scheduler": "simple", "steps": 4, "denoise": 1.0}
    sigmas = graph.add("BasicScheduler", model=graph.out(native), **steps)
    graph.add("PreviewAny", source=graph.out(sigmas))
    comfy.run(graph.nodes)


def test_load_model_knows_the_embedded_transformer_by_itself(comfy: "Comfy") -> None:
    graph = Pipeline()
    model = graph.model(FILE)
    text = graph.show(graph.out(model[0], 1))
    _, encoders, autoencoder = nano(graph)
    finish(graph, model, encoders, autoencoder, autoencoder)
    history = comfy.run(graph.nodes)
    assert "nano" in history["outputs"][text]["text"][0]
    assert "guessed" not in history["outputs"][text]["text"][0]
    assert len(comfy.images(history)) == 1


def test_parts_of_two_families_are_refused_where_they_meet(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, encoders, autoencoder = nano(graph)
    finish(graph, model, encoders, autoencoder, graph.autoencoder())
    refused(tiny_comfy, graph, "GlassboxUnpackAndDecode", "FLUX.1 nano", "one family")
    graph = Pipeline()
    model, encoders, autoencoder = nano(graph)
    finish(graph, model, encoders, graph.autoencoder(), autoencoder)
    refused(tiny_comfy, graph, "GlassboxSampleGuided", "Reference 1", "autoencoder")
    graph = Pipeline()
    model, encoders, autoencoder = nano(graph)
    finish(graph, model, graph.encoders(), autoencoder, autoencoder)
    refused(tiny_comfy, graph, "GlassboxSampleGuided", "text encoders")


def test_a_family_the_embedded_file_says_it_is_not_is_refused(comfy: "Comfy") -> None:
    graph = Pipeline()
    graph.model(FILE, "flux1-kontext")
    graph.show(graph.out("1", 1))
    refused(comfy, graph, "GlassboxLoadModel", FILE, "auto")


def test_noise_of_one_model_is_refused_by_another(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, encoders, autoencoder = nano(graph)
    noise = graph.noise(graph.model(tiny.KONTEXT_FILE))
    conditioning = graph.conditioning(graph.text(encoders))
    graph.save(
        graph.decode(
            autoencoder, graph.sample(model, conditioning, noise, graph.sigmas(model, noise))
        )
    )
    refused(tiny_comfy, graph, "GlassboxSchedule", "FLUX.1 tokens", "FLUX.1 nano")
