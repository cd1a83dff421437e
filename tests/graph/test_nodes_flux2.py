"""The same nodes with FLUX.2: sizes, places, order, lengths and previews as it was published."""

import io
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from glassbox.tests.graph import tiny_flux2
from glassbox.tests.graph.graphs import Link, Pipeline

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph

ONE, SEVERAL = "FLUX.2 one reference", "FLUX.2 several references"


def pixels(comfy: "Comfy", history: dict[str, Any]) -> list[np.ndarray]:
    """The saved pictures in the order of their nodes, whichever ran first."""
    ordered = dict(sorted(history["outputs"].items(), key=lambda item: int(item[0])))
    files = comfy.images({"outputs": ordered})
    return [np.asarray(Image.open(io.BytesIO(one))) for one in files]


def shown(history: dict[str, Any], node: str) -> str:
    return history["outputs"][node]["text"][0]


def fit(graph: Pipeline, image: Link, size: str, method: str) -> str:
    settings = {"size": size, "width": 1024, "height": 1024, "method": method}
    return graph.add("GlassboxFitImage", image=image, **settings)


def edit(graph: Pipeline, *references: Link, seed: int = 1, steps: int = 4) -> Link:
    """Edit with the tiny klein: the sampled tokens."""
    model, encoders, _ = graph.klein()
    text = graph.text(encoders, "make it red")
    conditioning = graph.conditioning(text, *references, guidance=1, placement="index")
    noise = graph.noise(model, 96, 64, seed=seed)
    return graph.sample(model, conditioning, noise, graph.sigmas(model, noise, steps))


@pytest.mark.parametrize(
    ("width", "height", "size", "method", "fitted", "match"),
    [
        (1500, 1000, SEVERAL, "crop", (1248, 832), (1488, 992)),
        (1500, 1000, SEVERAL, "stretch", (1248, 832), (1488, 992)),
        (1500, 1000, ONE, "crop", (1488, 992), (1488, 992)),
        (2600, 2000, ONE, "pad", (2304, 1760), (2592, 2000)),
        (100, 70, ONE, "crop", (96, 64), (96, 64)),
        (1500, 1000, "preferred", "stretch", (1248, 832), (1488, 992)),
        (15, 15, "exact", "stretch", (1024, 1024), (16, 16)),
    ],
)
def test_fit_image_follows_flux2s_rule_and_gives_the_size_the_picture_came_in(
    flux2_comfy: "Comfy",
    width: int,
    height: int,
    size: str,
    method: str,
    fitted: tuple[int, int],
    match: tuple[int, int],
) -> None:
    graph = Pipeline()
    node = fit(graph, graph.picture(width, height), size, method)
    sides = [graph.show(graph.out(node, slot)) for slot in (2, 3, 4, 5)]
    graph.save(graph.out(node, 0))
    history = flux2_comfy.run(graph.nodes)
    found = tuple(int(shown(history, side)) for side in sides)
    assert found == (*fitted, *match)
    assert pixels(flux2_comfy, history)[0].shape[:2] == fitted[::-1]


def test_the_fit_of_a_reference_is_undone(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    autoencoder = graph.autoencoder(tiny_flux2.AUTOENCODER_FILE)
    picture = graph.picture(100, 70)
    for method in ("stretch", "crop"):
        node = fit(graph, picture, ONE, method)
        tokens = edit(graph, graph.tokens(autoencoder, graph.out(node)))
        graph.save(graph.decode(autoencoder, tokens, graph.out(node, 1)))
    stretched, cropped = pixels(flux2_comfy, flux2_comfy.run(graph.nodes))
    assert stretched.shape == (70, 100, 3)
    assert cropped.shape == (64, 96, 3)


@pytest.mark.parametrize(
    ("file", "kinds"),
    [
        (tiny_flux2.KLEIN_FILE, ["text", "target", "reference", "reference"]),
        (tiny_flux2.KV_FILE, ["text", "reference", "reference", "target"]),
    ],
)
def test_inspect_shows_the_order_and_the_places_of_the_model(
    flux2_comfy: "Comfy", file: str, kinds: list[str]
) -> None:
    graph = Pipeline()
    model, autoencoder = graph.model(file), graph.autoencoder(tiny_flux2.AUTOENCODER_FILE)
    references = [graph.tokens(autoencoder, graph.picture(side, 64)) for side in (64, 96)]
    text = graph.text(graph.encoders(tiny_flux2.QWEN_4B_FILE, "none"), t5_tokens=40)
    conditioning = graph.conditioning(text, *references, placement="index")
    wires = {"conditioning": conditioning, "noise": graph.noise(model, 80, 64), "model": model}
    node = graph.add("GlassboxInspectTokens", **wires)
    report = graph.show(graph.out(node))
    history = flux2_comfy.run(graph.nodes)
    (sequence,) = history["outputs"][node]["glassbox_tokens"]
    assert [one["kind"] for one in sequence["segments"]] == kinds
    found = {
        one["name"]: (one["count"], dict(map(_range, one["ids"]))) for one in sequence["segments"]
    }
    assert found["text"] == (40, _ids(0, 0, 0, (0, 39)))
    assert found["target"] == (20, _ids(0, (0, 3), (0, 4), 0))
    assert found["reference 1"] == (16, _ids(10, (0, 3), (0, 3), 0))
    assert found["reference 2"] == (24, _ids(20, (0, 3), (0, 5), 0))
    is_kv = file == tiny_flux2.KV_FILE
    assert ("references see themselves alone" in shown(history, report)) == is_kv


def _range(entry: tuple[str, float, float]) -> tuple[str, tuple[float, float]]:
    return entry[0], (entry[1], entry[2])


def _ids(*places: Any) -> dict[str, tuple[float, float]]:
    axes = ("index", "row", "column", "text")
    spans = [one if isinstance(one, tuple) else (one, one) for one in places]
    return dict(zip(axes, spans, strict=True))


def test_loaders_report_what_they_found_and_what_they_guessed(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    links = [
        graph.model(tiny_flux2.BASE_FILE),
        graph.model(tiny_flux2.KV_FILE, "flux2-klein-9b-kv"),
        graph.encoders(tiny_flux2.MISTRAL_FILE, "none"),
        graph.autoencoder(tiny_flux2.AUTOENCODER_FILE),
    ]
    nodes = [graph.show(graph.out(link[0], 1)) for link in links]
    history = flux2_comfy.run(graph.nodes)
    base, kv, text, autoencoder = (shown(history, one) for one in nodes)
    assert "FLUX.2 [klein] base 4B (guessed" in base
    assert "FLUX.2 [klein] 9B KV (chosen by hand" in kv
    assert "Mistral" in text
    assert "30 of 30 layers" in text
    assert "FLUX.2" in autoencoder


def test_order_of_references_changes_the_picture(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    autoencoder = graph.autoencoder(tiny_flux2.AUTOENCODER_FILE)
    one, other = (
        graph.tokens(autoencoder, graph.picture(64, 64, color=color)) for color in (0xFF0000, 0xFF)
    )
    for references in itertools.permutations((one, other)):
        graph.save(graph.decode(autoencoder, edit(graph, *references)))
    graph.save(graph.decode(autoencoder, edit(graph, one, other)))
    first, swapped, again = pixels(flux2_comfy, flux2_comfy.run(graph.nodes))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, swapped)


def test_every_step_shows_a_preview_of_flux2s_latent(flux2_comfy: "Comfy") -> None:
    graph = Pipeline()
    autoencoder = graph.autoencoder(tiny_flux2.AUTOENCODER_FILE)
    graph.save(graph.decode(autoencoder, edit(graph, seed=77)))
    messages = list(flux2_comfy.watch(graph.nodes))
    previews = [one for one in messages if isinstance(one, bytes) and one[:4] == b"\0\0\0\1"]
    assert len(previews) == 4
    with Image.open(io.BytesIO(previews[-1][8:])) as preview:
        assert len(preview.convert("RGB").getcolors(1 << 20) or []) > 1
