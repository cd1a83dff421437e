"""References kept across runs in a running ComfyUI: prompts, /free, cancel, and a cold start."""

import io
import struct
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from glassbox.tests.graph import tiny_flux2
from glassbox.tests.graph.graphs import Pipeline
from glassbox.tests.graph.server import Comfy, ComfyError

pytestmark = pytest.mark.graph

TEXT_MESSAGE = b"\0\0\0\3"  # what a node shows about itself
RED, GREEN, BLUE = 0xC02010, 0x10A040, 0x2040C0


class Ran(NamedTuple):
    """What a run made, and the last words of its sampler."""

    pixels: np.ndarray
    told: str


@pytest.fixture(scope="module")
def kv_comfy(comfy: Comfy) -> Comfy:
    tiny_flux2.make_published(comfy.models_dir)
    return comfy


def edit(
    *colors: int,
    prompt: str = "make it red",
    seed: int = 7,
    size: tuple[int, int] = (64, 64),
    steps: int = 4,
    file: str = tiny_flux2.KV_FILE,
    **settings: Any,
) -> Pipeline:
    """An edit with references of these colours, the first half as wide as the second."""
    graph = Pipeline()
    family = {tiny_flux2.KV_FILE: "flux2-klein-9b-kv"}.get(file, "auto")
    model = graph.model(file, family)
    autoencoder = graph.autoencoder(tiny_flux2.AUTOENCODER_FILE)
    text = graph.text(graph.encoders(tiny_flux2.QWEN_8B_FILE, "none"), prompt, t5_tokens=24)
    pictures = [graph.picture(64 * i, 64, color=color) for i, color in enumerate(colors, 1)]
    references = [graph.tokens(autoencoder, picture) for picture in pictures]
    conditioning = graph.conditioning(text, *references, placement="index")
    noise = graph.noise(model, *size, seed)
    sampled = graph.sample(model, conditioning, noise, graph.sigmas(model, noise, steps))
    graph.nodes[sampled[0]]["inputs"] |= settings
    graph.save(graph.decode(autoencoder, sampled))
    return graph


def run(comfy: Comfy, graph: Pipeline) -> Ran:
    """Run a graph to its picture and the sampler's notes."""
    told, prompt_id = "", ""
    for message in comfy.watch(graph.nodes):
        if isinstance(message, dict):
            prompt_id = message["data"].get("prompt_id", prompt_id)
            continue
        if message[:4] == TEXT_MESSAGE:
            (length,) = struct.unpack(">I", message[4:8])
            node, text = message[8 : 8 + length].decode(), message[8 + length :].decode()
            if graph.nodes[node]["class_type"] == "GlassboxSampleGuided":
                told = text
    (file,) = comfy.images(comfy.wait(prompt_id))
    return Ran(np.asarray(Image.open(io.BytesIO(file))), told)


def same(*runs: Ran) -> bool:
    return all(np.array_equal(runs[0].pixels, one.pixels) for one in runs)


@pytest.fixture
def emptied(kv_comfy: Comfy) -> Comfy:
    """ComfyUI without models and cached results."""
    free(kv_comfy)
    return kv_comfy


def free(comfy: Comfy, *, free_memory: bool = True) -> None:
    """Have models unloaded, and cached results forgotten, before anything else runs.

    ComfyUI does it after the prompt that it takes up next, if that one is quick to come.
    """
    comfy.post("/free", {"unload_models": True, "free_memory": free_memory})
    other = Pipeline()
    other.save(other.picture(16, 16))
    comfy.run(other.nodes)


def test_a_new_prompt_seed_and_size_reuse_references_as_a_cold_server_computes_them(
    emptied: Comfy,
) -> None:
    first = run(emptied, edit(RED, GREEN))
    assert "keys and values computed and kept" in first.told
    for change in ({"prompt": "make it blue"}, {"seed": 8}):
        warm = run(emptied, edit(RED, GREEN, **change))
        assert "reused from an earlier run" in warm.told
        assert not same(first, warm)
    last = edit(RED, GREEN, prompt="another", seed=9, size=(96, 48))
    warm = run(emptied, last)
    assert "reused from an earlier run" in warm.told
    with Comfy.start() as cold:
        tiny_flux2.make_published(cold.models_dir)
        anew = run(cold, last)
    assert "keys and values computed and kept" in anew.told
    assert same(warm, anew)


def test_going_back_to_earlier_references_gives_the_earlier_picture(emptied: Comfy) -> None:
    """ComfyUI remembers the results of the last prompt only in part: each run has its own seed."""
    runs = [run(emptied, edit(color, seed=seed)) for color, seed in ((RED, 1), (BLUE, 1), (RED, 2))]
    assert ["reused" in one.told for one in runs] == [False, False, True]
    again = run(emptied, edit(RED, seed=1, reference_kv="every step"))
    assert "computed in every step" in again.told
    assert same(runs[0], again)
    assert not same(runs[0], runs[1])


def test_free_empties_the_store_and_the_picture_stays(emptied: Comfy) -> None:
    first = run(emptied, edit(RED, GREEN))
    free(emptied, free_memory=False)
    unloaded = run(emptied, edit(RED, GREEN, seed=8))
    assert "keys and values computed and kept" in unloaded.told
    free(emptied)
    again = run(emptied, edit(RED, GREEN))
    assert "keys and values computed and kept" in again.told
    assert same(first, again)


def test_references_kept_for_one_run_are_computed_in_the_next(emptied: Comfy) -> None:
    told = [run(emptied, edit(RED, seed=i, reference_kv="this run")).told for i in (1, 2)]
    assert all("computed for this run" in one for one in told)


@pytest.mark.parametrize("mode", ["kept", "this run"])
def test_a_model_not_trained_for_it_refuses_and_says_why(kv_comfy: Comfy, mode: str) -> None:
    graph = edit(RED, file=tiny_flux2.KLEIN_FILE, reference_kv=mode)
    with pytest.raises(ComfyError, match="keys and values change in every step") as caught:
        kv_comfy.run(graph.nodes)
    message = str(caught.value)
    assert f"reference_kv is '{mode}'" in message
    assert "FLUX.2 [klein] 9B KV" in message
    assert "'auto'" in message


@pytest.mark.parametrize("mode", ["auto", "every step"])
def test_a_model_not_trained_for_it_runs_as_ever(kv_comfy: Comfy, mode: str) -> None:
    ran = run(kv_comfy, edit(RED, file=tiny_flux2.KLEIN_FILE, reference_kv=mode, seed=len(mode)))
    assert "keys and values" not in ran.told


def test_a_cancelled_run_leaves_the_server_and_the_references_whole(emptied: Comfy) -> None:
    first = run(emptied, edit(RED, GREEN))
    ended = ""
    for message in emptied.watch(edit(RED, GREEN, steps=1000, seed=8).nodes):
        if isinstance(message, bytes):
            continue
        ended = message["type"]
        if ended == "progress" and message["data"] | {"max": 1000, "value": 2} == message["data"]:
            emptied.interrupt()
    assert ended == "execution_interrupted"
    again = run(emptied, edit(RED, GREEN, seed=9))
    assert "reused from an earlier run" in again.told
    free(emptied)
    assert same(first, run(emptied, edit(RED, GREEN)))


def test_every_step_shows_a_preview_of_the_pictures_proportions(kv_comfy: Comfy) -> None:
    messages = kv_comfy.watch(edit(RED, seed=31, size=(96, 48)).nodes)
    previews = [one for one in messages if isinstance(one, bytes) and one[:4] == b"\0\0\0\1"]
    assert len(previews) == 4
    with Image.open(io.BytesIO(previews[0][8:])) as preview:
        assert preview.size[0] == 2 * preview.size[1]
