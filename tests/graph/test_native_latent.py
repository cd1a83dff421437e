"""ComfyUI's own LATENT on our token sockets is what Pack Latent makes of it."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from glassbox.tests.graph.graphs import Link, Pipeline
from glassbox.tests.graph.test_bad_input_values import refused
from glassbox.tests.graph.test_nodes import pixels

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph


def native(graph: Pipeline, tokens: Link) -> Link:
    return graph.out(graph.add("GlassboxUnpackLatent", tokens=tokens))


def empty(graph: Pipeline, kind: str) -> Link:
    return graph.out(graph.add(kind, width=64, height=64, batch_size=1))


def test_an_edit_with_latents_as_references_makes_the_same_pixels(tiny_comfy: "Comfy") -> None:
    """Two references, one of them placed by hand, and the sampled latent decoded."""
    graph = Pipeline()
    model, autoencoder = graph.model(), graph.autoencoder()
    text = graph.text(graph.encoders())
    noise = graph.noise(model, 64, 48)
    sigmas = graph.sigmas(model, noise)
    tokens = [graph.tokens(autoencoder, graph.picture(w, 32, color=w * 999)) for w in (32, 64)]
    place = {"index": 2.0, "row": 1.0, "column": -3.0}
    for is_native in (False, True):
        first, second = [native(graph, one) for one in tokens] if is_native else tokens
        moved = graph.out(graph.add("GlassboxPositionIds", tokens=second, **place))
        conditioning = graph.conditioning(text, first, moved, placement="as wired")
        sampled = graph.sample(model, conditioning, noise, sigmas)
        graph.save(graph.decode(autoencoder, native(graph, sampled) if is_native else sampled))
    ours, theirs = pixels(tiny_comfy, tiny_comfy.run(graph.nodes))
    assert np.ptp(ours) > 0
    assert np.array_equal(ours, theirs)


def test_inspect_tokens_counts_a_latent_as_the_target(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    conditioning = graph.conditioning(graph.text(graph.encoders()))
    target = empty(graph, "EmptySD3LatentImage")
    node = graph.add("GlassboxInspectTokens", conditioning=conditioning, noise=target)
    (report,) = tiny_comfy.run(graph.nodes)["outputs"][node]["glassbox_tokens"]
    assert [one["count"] for one in report["segments"][1:]] == [16]


def test_128_channels_are_flux2s(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    _, _, autoencoder = graph.klein()
    latent = empty(graph, "EmptyFlux2LatentImage")
    packed = graph.add("GlassboxPackLatent", latent=latent, latent_format="FLUX.2")
    place = {"index": 10.0, "row": 0.0, "column": 0.0}
    placed = graph.add("GlassboxPositionIds", tokens=latent, **place)
    for one in (latent, graph.out(packed), graph.out(placed)):
        graph.save(graph.decode(autoencoder, one))
    first, second, third = pixels(flux2_comfy, flux2_comfy.run(graph.nodes))
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)


def _reference(graph: Pipeline, latent: Link) -> None:
    conditioning = graph.conditioning(graph.text(graph.encoders()), latent)
    graph.add("GlassboxInspectTokens", conditioning=conditioning)


def _decoded(graph: Pipeline, latent: Link) -> None:
    graph.save(graph.decode(graph.autoencoder(), latent))


@pytest.mark.parametrize(
    ("use", "node"),
    [(_reference, "GlassboxReferenceConditioner"), (_decoded, "GlassboxUnpackAndDecode")],
)
def test_a_latent_of_another_model_or_with_a_mask_is_refused(
    tiny_comfy: "Comfy", use: Any, node: str
) -> None:
    graph = Pipeline()
    use(graph, empty(graph, "EmptyLatentImage"))
    needed = "FLUX.1's, with 16 channels or FLUX.2's, with 128 channels"
    refused(tiny_comfy, graph, node, "(1, 4, 8, 8)", needed)
    graph = Pipeline()
    mask = graph.add("SolidMask", value=1.0, width=64, height=64)
    masked = graph.add(
        "SetLatentNoiseMask", samples=empty(graph, "EmptySD3LatentImage"), mask=graph.out(mask)
    )
    use(graph, graph.out(masked))
    refused(tiny_comfy, graph, node, "noise mask", "Set Latent Noise Mask")


def test_the_other_generations_latent_is_named(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    graph.save(graph.decode(graph.autoencoder(), empty(graph, "EmptyFlux2LatentImage")))
    refused(tiny_comfy, graph, "GlassboxUnpackAndDecode", "FLUX.2 tokens", "FLUX.1 tokens")
