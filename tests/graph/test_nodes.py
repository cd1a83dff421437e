"""Every node runs in a real ComfyUI, on its own terms and beside native nodes."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from glassbox.tests.graph import tiny
from glassbox.tests.graph.graphs import Graph, Pipeline, edit

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph


def pixels(comfy: "Comfy", history: dict[str, Any]) -> list[np.ndarray]:
    """The saved pictures in the order of their nodes, whichever ran first."""
    ordered = dict(sorted(history["outputs"].items(), key=lambda item: int(item[0])))
    files = comfy.images({"outputs": ordered})
    return [np.asarray(Image.open(io.BytesIO(one))) for one in files]


def shown(history: dict[str, Any], node: str) -> str:
    return history["outputs"][node]["text"][0]


def test_a_whole_edit_makes_a_picture_of_the_size_asked_for(tiny_comfy: "Comfy") -> None:
    (picture,) = pixels(tiny_comfy, tiny_comfy.run(edit(size=80).nodes))
    assert picture.shape == (80, 80, 3)


def test_a_batch_goes_through_the_whole_graph(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, autoencoder = graph.model(), graph.autoencoder()
    reference = graph.tokens(autoencoder, graph.picture(batch=3))
    conditioning = graph.conditioning(graph.text(graph.encoders()), reference)
    noise = graph.noise(model, batch=3)
    sampled = graph.sample(model, conditioning, noise, graph.sigmas(model, noise))
    graph.save(graph.decode(autoencoder, sampled))
    pictures = pixels(tiny_comfy, tiny_comfy.run(graph.nodes))
    assert len(pictures) == 3
    assert not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize("references", [0, 2])
def test_the_same_seed_gives_the_same_pixels(tiny_comfy: "Comfy", references: int) -> None:
    graph = edit(references=references, seed=11).nodes
    first = pixels(tiny_comfy, tiny_comfy.run(graph))
    tiny_comfy.free()
    second = pixels(tiny_comfy, tiny_comfy.run(graph))
    other = pixels(tiny_comfy, tiny_comfy.run(edit(references=references, seed=12).nodes))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_true_cfg_runs_batched_and_in_turn_alike(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, autoencoder, encoders = graph.model(), graph.autoencoder(), graph.encoders()
    reference = graph.tokens(autoencoder, graph.picture())
    positive = graph.conditioning(graph.text(encoders, "make it red"), reference)
    negative = graph.conditioning(graph.text(encoders, "blurry"), reference)
    noise = graph.noise(model)
    common = {"model": model, "positive": positive, "negative": negative, "noise": noise}
    common |= {"sigmas": graph.sigmas(model, noise, 4), "cfg": 3.0, "start": 0.25, "end": 1.0}
    for passes in ("batched", "in turn"):
        node = graph.add("GlassboxSampleTrueCFG", **common, passes=passes, solver="heun")
        graph.save(graph.decode(autoencoder, graph.out(node)))
    batched, in_turn = pixels(tiny_comfy, tiny_comfy.run(graph.nodes))
    assert np.abs(batched.astype(int) - in_turn).max() <= 1


@pytest.mark.parametrize(
    ("kind", "by_hand", "first"),
    [
        ("flux", "", 1.0),
        ("linear", "", 1.0),
        ("karras", "", 1.0),
        ("exponential", "", 1.0),
        ("by hand", "0.9, 0.5, 0", 0.9),
    ],
)
def test_every_schedule_is_a_native_sigmas(
    tiny_comfy: "Comfy", kind: str, by_hand: str, first: float
) -> None:
    graph = Pipeline()
    model = graph.model()
    noise = graph.noise(model)
    sigmas = graph.sigmas(model, noise, 3, kind, by_hand)
    split = graph.add("SplitSigmas", sigmas=sigmas, step=1)  # a native node reads it
    text = graph.show(graph.out(split, 0))
    assert f"{first:.4f}" in shown(tiny_comfy.run(graph.nodes), text)


def test_a_size_is_fitted_and_the_fit_undone(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, autoencoder = graph.model(), graph.autoencoder()
    settings = {"size": "keep", "width": 1024, "height": 1024, "method": "pad"}
    fit = graph.add("GlassboxFitImage", image=graph.picture(50, 77), **settings)
    reference = graph.tokens(autoencoder, graph.out(fit, 0))
    conditioning = graph.conditioning(graph.text(graph.encoders()), reference)
    sides = {"width": graph.out(fit, 2), "height": graph.out(fit, 3)}
    noise = graph.out(graph.add("GlassboxNoise", model=model, seed=1, batch_size=1, **sides))
    sampled = graph.sample(model, conditioning, noise, graph.sigmas(model, noise))
    graph.save(graph.decode(autoencoder, sampled, graph.out(fit, 1)))
    graph.save(graph.decode(autoencoder, sampled))
    undone, fitted = pixels(tiny_comfy, tiny_comfy.run(graph.nodes))
    assert undone.shape == (77, 50, 3)
    assert fitted.shape == (80, 64, 3)


@pytest.mark.parametrize(
    ("size", "expected"), [("preferred", (1504, 688)), ("exact", (32, 48)), ("keep", (96, 48))]
)
def test_each_way_to_fit_gives_its_size(
    tiny_comfy: "Comfy", size: str, expected: tuple[int, int]
) -> None:
    graph = Pipeline()
    settings = {"size": size, "width": 48, "height": 32, "method": "crop"}
    fit = graph.add("GlassboxFitImage", image=graph.picture(48, 105), **settings)
    graph.save(graph.out(fit, 0))
    height, width = graph.show(graph.out(fit, 3)), graph.show(graph.out(fit, 2))
    history = tiny_comfy.run(graph.nodes)
    assert pixels(tiny_comfy, history)[0].shape[:2] == expected
    assert (int(shown(history, height)), int(shown(history, width))) == expected


def test_a_sampled_posterior_follows_its_seed(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    autoencoder, image = graph.autoencoder(), graph.picture()
    for posterior, seed in (("mode", 0), ("mode", 1), ("sample", 0), ("sample", 1)):
        graph.save(graph.decode(autoencoder, graph.tokens(autoencoder, image, posterior, seed)))
    mode, mode_1, sample, sample_1 = pixels(tiny_comfy, tiny_comfy.run(graph.nodes))
    assert np.array_equal(mode, mode_1)
    assert not np.array_equal(sample, sample_1)
    assert not np.array_equal(mode, sample)


def test_the_text_node_reports_tokens_and_cut_text(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    node = graph.text(graph.encoders(), "word " * 100)[0]
    report = graph.show(graph.out(node, 1))
    history = tiny_comfy.run(graph.nodes)
    clip, t5 = history["outputs"][node]["glassbox_text"]
    assert (clip["encoder"], clip["used"], clip["limit"]) == ("CLIP-L", 77, 77)
    assert clip["cut"].startswith("word")
    assert (t5["limit"], t5["cut"]) == (512, "")
    assert "77 of 77" in shown(history, report)


def test_prompt_2_is_read_by_t5_alone(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    node = graph.text(graph.encoders(), "one", prompt_2="one two three four five", t5_tokens=8)[0]
    graph.show(graph.out(node, 1))
    clip, t5 = tiny_comfy.run(graph.nodes)["outputs"][node]["glassbox_text"]
    assert clip["used"] == 3
    assert t5["used"] > 3
    assert t5["limit"] == 8


def test_inspect_describes_the_sequence(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    model, autoencoder = graph.model(), graph.autoencoder()
    tokens = graph.tokens(autoencoder, graph.picture(32, 48))
    placed = graph.add("GlassboxPositionIds", tokens=tokens, index=3.0, row=2.0, column=5.0)
    text = graph.text(graph.encoders(), t5_tokens=16)
    conditioning = graph.conditioning(text, graph.out(placed), placement="as wired")
    node = graph.add("GlassboxInspectTokens", conditioning=conditioning, noise=graph.noise(model))
    (report,) = tiny_comfy.run(graph.nodes)["outputs"][node]["glassbox_tokens"]
    assert report["total"] == 16 + 16 + 6
    assert [one["kind"] for one in report["segments"]] == ["text", "target", "reference"]
    assert report["segments"][1]["grid"] == [4, 4]
    reference = report["segments"][2]
    assert (reference["name"], reference["count"], reference["grid"]) == ("reference 1", 6, [3, 2])
    assert reference["ids"] == [["index", 3, 3], ["row", 2, 4], ["column", 5, 6]]


def test_loaders_report_what_they_found_and_what_they_guessed(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    nodes = [
        graph.add("GlassboxLoadModel", file=tiny.KONTEXT_FILE, family="auto", dtype="auto"),
        graph.add(
            "GlassboxLoadTextEncoders", file=tiny.T5_FILE, file_2=tiny.CLIP_FILE, dtype="auto"
        ),
        graph.add("GlassboxLoadAutoencoder", file=tiny.AUTOENCODER_FILE, dtype="auto"),
    ]
    reports = [graph.show(graph.out(node, 1)) for node in nodes]
    history = tiny_comfy.run(graph.nodes)
    model, text, autoencoder = (shown(history, one) for one in reports)
    assert "Kontext" in model
    assert "guessed" in model
    assert "CLIP-L" in text
    assert "T5" in text
    assert "autoencoder" in autoencoder


def test_noise_is_the_seed_on_every_machine_and_comes_out_as_a_native_latent(
    tiny_comfy: "Comfy",
) -> None:
    """Sizes from 64 to 2048 px in steps of 16: noise out, native LATENT in and out, bit for bit."""
    sizes = [(64, 64), (80, 2048), (2048, 64), (208, 1104), (1392, 752), (672, 1568), (96, 128)]
    graph = Pipeline()
    model = graph.model()
    for width, height in sizes:
        latent = graph.add("GlassboxUnpackLatent", tokens=graph.noise(model, width, height, 5, 2))
        tokens = graph.add("GlassboxPackLatent", latent=graph.out(latent), latent_format="FLUX.1")
        again = graph.add("GlassboxUnpackLatent", tokens=graph.out(tokens))
        for node in (latent, again):
            graph.add("SaveLatent", samples=graph.out(node), filename_prefix=f"l{width}x{height}")
    tiny_comfy.run(graph.nodes)
    for width, height in sizes:
        generator = torch.Generator().manual_seed(5)
        expected = torch.randn(2, 16, height // 8, width // 8, generator=generator)
        files = sorted(tiny_comfy.output_dir.rglob(f"l{width}x{height}_*.latent"))
        assert len(files) == 2
        for file in files:
            assert torch.equal(load_file(str(file))["latent_tensor"], expected)


def test_a_latent_from_a_file_comes_through_bit_for_bit(tiny_comfy: "Comfy") -> None:
    values = torch.randn(3, 16, 10, 26, generator=torch.Generator().manual_seed(1)) * 1e3
    name = "given.latent"
    version = {"latent_format_version_0": torch.tensor([])}
    save_file({"latent_tensor": values, **version}, str(Path(tiny_comfy.input_dir) / name))
    graph = Pipeline()
    loaded = graph.add("LoadLatent", latent=name)
    tokens = graph.add("GlassboxPackLatent", latent=graph.out(loaded), latent_format="FLUX.1")
    latent = graph.add("GlassboxUnpackLatent", tokens=graph.out(tokens))
    graph.add("SaveLatent", samples=graph.out(latent), filename_prefix="given")
    tiny_comfy.run(graph.nodes)
    (file,) = tiny_comfy.output_dir.rglob("given_*.latent")
    assert torch.equal(load_file(str(file))["latent_tensor"], values)


def test_tokens_and_latents_decode_to_the_same_picture(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    autoencoder = graph.autoencoder()
    tokens = graph.tokens(autoencoder, graph.picture())
    latent = graph.add("GlassboxUnpackLatent", tokens=tokens)
    packed = graph.add("GlassboxPackLatent", latent=graph.out(latent), latent_format="FLUX.1")
    graph.save(graph.decode(autoencoder, tokens))
    graph.save(graph.decode(autoencoder, graph.out(packed)))
    first, second = pixels(tiny_comfy, tiny_comfy.run(graph.nodes))
    assert np.array_equal(first, second)


def test_comfyuis_own_loader_opens_the_same_file(tiny_comfy: "Comfy") -> None:
    graph = Graph()
    native = graph.add("UNETLoader", unet_name=tiny.KONTEXT_FILE, weight_dtype="default")
    steps = {"scheduler": "simple", "steps": 4, "denoise": 1.0}
    sigmas = graph.add("BasicScheduler", model=graph.out(native), **steps)
    text = graph.add("PreviewAny", source=graph.out(sigmas))
    assert "1.0" in shown(tiny_comfy.run(graph.nodes), text)


def test_references_keep_the_order_of_their_names(tiny_comfy: "Comfy") -> None:
    graph = Pipeline()
    autoencoder = graph.autoencoder()
    small, wide = (graph.tokens(autoencoder, graph.picture(w, 32)) for w in (32, 64))
    wired = {"references__reference_10": small, "references__reference_2": wide}
    text = graph.text(graph.encoders())
    common = {"text": text, "guidance": 2.5, "placement": "index"}
    conditioning = graph.add("GlassboxReferenceConditioner", **common, **wired)
    node = graph.add("GlassboxInspectTokens", conditioning=graph.out(conditioning))
    (report,) = tiny_comfy.run(graph.nodes)["outputs"][node]["glassbox_tokens"]
    assert [one["count"] for one in report["segments"][1:]] == [8, 4]


def test_every_step_shows_progress_and_a_preview(tiny_comfy: "Comfy") -> None:
    graph = edit(steps=5, seed=21)
    sampler = next(i for i, n in graph.nodes.items() if n["class_type"] == "GlassboxSampleGuided")
    messages = list(tiny_comfy.watch(graph.nodes))
    progress = [
        one["data"] for one in messages if isinstance(one, dict) and one["type"] == "progress"
    ]
    values = [one["value"] for one in progress if one["node"] == sampler and one["max"] == 5]
    assert sorted(set(values)) == [1, 2, 3, 4, 5]
    previews = [one for one in messages if isinstance(one, bytes) and one[:4] == b"\0\0\0\1"]
    assert len(previews) == 5
    with Image.open(io.BytesIO(previews[0][8:])) as preview:
        assert preview.size[0] > 0
