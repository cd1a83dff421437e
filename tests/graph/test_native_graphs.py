"""Graphs made of ComfyUI's own parts alone make the pictures of the same graphs made of ours."""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from glassbox.tests.graph import native_files, tiny_flux2
from glassbox.tests.graph.graphs import Link, Pipeline
from glassbox.tests.graph.workflows import api_form, pixels

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph
Json = dict[str, Any]
# ComfyUI's loader: ours, its inputs by the other's names, and what else ours asks for.
_OURS: dict[str, tuple[str, dict[str, str], Json]] = {
    "UNETLoader": ("GlassboxLoadModel", {"unet_name": "file"}, {"family": "auto", "dtype": "auto"}),
    "DualCLIPLoader": (
        "GlassboxLoadTextEncoders",
        {"clip_name1": "file", "clip_name2": "file_2"},
        {"dtype": "auto"},
    ),
    "CLIPLoader": (
        "GlassboxLoadTextEncoders",
        {"clip_name": "file"},
        {"file_2": "none", "dtype": "auto"},
    ),
    "VAELoader": ("GlassboxLoadAutoencoder", {"vae_name": "file"}, {"dtype": "auto"}),
}
_FILES = {name for _, names, _ in _OURS.values() for pair in names.items() for name in pair}
_FILES |= {"image", "lora_name", "control_net_name"}
_SMALL = {"DualCLIPLoader": "TestLoadTinyPair", "CLIPLoader": "TestLoadTinyQwen"}


@pytest.fixture(scope="module")
def server(comfy: "Comfy") -> "Comfy":
    """ComfyUI with a file for every loader."""
    native_files.make_native_files(comfy.models_dir, comfy.input_dir)
    return comfy


def native(graph: Json) -> Json:
    """The same graph with small text encoders."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        node["class_type"] = _SMALL.get(node["class_type"], node["class_type"])
    return graph


def ours(graph: Json) -> Json:
    """The same graph with this pack's loaders."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        if node["class_type"] in _OURS:
            kind, names, more = _OURS[node["class_type"]]
            given = {new: node["inputs"][old] for old, new in names.items()}
            node |= {"class_type": kind, "inputs": given | more}
    return graph


def picture(comfy: "Comfy", graph: Json) -> Any:
    """The picture of a graph that names files as if they lay in ComfyUI's folders."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        for name, value in node["inputs"].items():
            if name in _FILES and isinstance(value, str) and value != "none":
                node["inputs"][name] = f"{native_files.FOLDER}/{value}"
    (made,) = comfy.images(comfy.run(graph))
    return pixels(made)


def furthest(*pictures: Any) -> int:
    """The largest difference of the first picture, which shows something, to the others."""
    assert np.ptp(pictures[0]) > 100
    return max(int(np.abs(pictures[0] - other).max()) for other in pictures[1:])


def test_the_saved_edit_with_comfyuis_parts_is_the_one_with_ours(server: "Comfy") -> None:
    """Scaled float8 weights, CLIP-L and T5, FLUX.1's VAE at its full size."""
    graph = api_form("15_native_parts_edit")
    graph["6"]["inputs"]["size"] = "keep"  # else a small picture becomes one of a megapixel
    graph["10"]["inputs"]["steps"] = 4
    assert furthest(picture(server, ours(graph)), picture(server, native(graph))) <= 1


def test_the_saved_klein_graph_in_comfyuis_sampler_is_our_sampler_with_our_parts(
    server: "Comfy",
) -> None:
    """Qwen3, FLUX.2's VAE at its full size, Flux2Scheduler; the second place moved by hand, too."""
    made: list[Any] = []
    for column in (0, 40):
        graph = api_form("16_native_klein_ksampler")
        graph["12"]["inputs"]["column"] = column
        other = ours(graph)
        sizes = {side: other["20"]["inputs"][side] for side in ("width", "height")}
        noise = {"model": ["1", 0], **sizes, "seed": 1, "batch_size": 1}
        other["20"] |= {"class_type": "GlassboxNoise", "inputs": noise}
        wires = {"conditioning": ["13", 0], "noise": ["20", 0], "sigmas": ["19", 0]}
        sampler = {"model": ["1", 0], **wires, "solver": "euler"}
        other["21"] |= {"class_type": "GlassboxSampleGuided", "inputs": sampler}
        for number in ("14", "15", "16", "17", "18"):
            del other[number]
        made += [picture(server, one) for one in (other, native(graph))]
        assert furthest(*made[-2:]) <= 1
    assert furthest(*made[::2]) > 1


class Everything(Pipeline):
    """An edit with two LoRAs and two references, from one set of loaders to decoded tokens."""

    def __init__(self, generation: str, *, is_native: bool) -> None:
        super().__init__()
        self.generation, self.is_native = generation, is_native
        self.is_flux2 = generation == "FLUX.2"
        self.model_, self.text_encoders, self.vae = self.native() if is_native else self.own()
        first, second = (self.picture(64, height, color=height * 70000) for height in (64, 80))
        text = self.text(self.text_encoders, "make it red")
        moved = {"index": 10.0 if self.is_flux2 else 1.0, "row": 2.0, "column": 5.0}
        placed = self.add("GlassboxPositionIds", tokens=self.latent(second), **moved)
        references = self.latent(first), self.out(placed)
        self.wired = self.conditioning(text, *references, placement="as wired")
        self.start = self.noise(self.model_)
        self.levels = self.sigmas(self.model_, self.start, steps=3)

    def native(self) -> tuple[Link, Link, Link]:
        """ComfyUI's loaders, and its LoRA loaders on what they give."""
        file = tiny_flux2.KLEIN_FILE if self.is_flux2 else native_files.KONTEXT_FILE
        model = self.out(self.add("UNETLoader", unet_name=file, weight_dtype="default"))
        style = native_files.LORA_FILES[self.generation]
        model = self.out(
            self.add("LoraLoaderModelOnly", model=model, lora_name=style, strength_model=0.4)
        )
        if self.is_flux2:
            vae = tiny_flux2.AUTOENCODER_FILE
            clip = self.add("TestLoadTinyQwen", clip_name=tiny_flux2.QWEN_4B_FILE, type="flux2")
        else:
            files = {"clip_name1": native_files.CLIP_FILE, "clip_name2": native_files.T5_FILE}
            vae, clip = "ae.safetensors", self.add("TestLoadTinyPair", type="flux", **files)
        strengths = {"strength_model": -0.3, "strength_clip": native_files.CLIP_STRENGTH}
        wires = {"model": model, "clip": self.out(clip)}
        both = self.add("LoraLoader", lora_name=style, **wires, **strengths)
        return self.out(both), self.out(both, 1), self.out(self.add("VAELoader", vae_name=vae))

    def own(self) -> tuple[Link, Link, Link]:
        """Our loaders on the same files; the CLIP's LoRA is in the weights of its file."""
        file = tiny_flux2.KLEIN_FILE if self.is_flux2 else native_files.KONTEXT_FILE
        model, style = self.model(file), native_files.LORA_FILES[self.generation]
        for strength in (0.4, -0.3):
            wires = {"model": model, "file": style, "strength": strength}
            model = self.out(self.add("GlassboxApplyLoRA", **wires))
        if self.is_flux2:
            encoders = self.encoders(tiny_flux2.QWEN_4B_FILE, "none")
            return model, encoders, self.autoencoder(tiny_flux2.AUTOENCODER_FILE)
        encoders = self.encoders(native_files.STYLED_CLIP_FILE, native_files.T5_FILE)
        return model, encoders, self.autoencoder("ae.safetensors")

    def latent(self, image: Link) -> Link:
        """A picture for a reference: a LATENT of ComfyUI's VAE Encode, or our tokens."""
        if not self.is_native:
            return self.tokens(self.vae, image)
        return self.out(self.add("VAEEncode", pixels=image, vae=self.vae))

    def guided(self) -> "Everything":
        """In our sampler."""
        sampled = self.sample(self.model_, self.wired, self.start, self.levels)
        self.save(self.decode(self.vae, sampled))
        return self

    def controlled(self, conditioning: Link, strength: float) -> Link:
        """A tiny ControlNet on it, as people put one there."""
        net = self.add("ControlNetLoader", control_net_name=native_files.CONTROL_FILE)
        sides = {"positive": conditioning, "negative": conditioning, "control_net": self.out(net)}
        hint = self.picture(64, 64, color=0x20A0F0)
        window = {"strength": strength, "start_percent": 0.0, "end_percent": 1.0}
        return self.out(self.add("ControlNetApplyAdvanced", **sides, image=hint, **window))

    def cached(self, kind: str, threshold: float) -> "Everything":
        """With a step cache of ComfyUI's own on the MODEL."""
        window = {"start_percent": 0.0, "end_percent": 1.0, "verbose": False}
        wires = {"model": self.model_, "reuse_threshold": threshold}
        self.model_ = self.out(self.add(kind, **wires, **window))
        return self

    def in_ksampler(self, strength: float | None = None) -> "Everything":
        """In ComfyUI's sampler, its LATENT decoded by our node; with a ControlNet if asked for."""
        conditioning = self.out(self.add("GlassboxToConditioning", conditioning=self.wired))
        if strength is not None:
            conditioning = self.controlled(conditioning, strength)
        wires = {"model": self.model_, "conditioning": self.wired}
        placed = self.out(self.add("GlassboxApplyToModel", **wires))
        guider = self.add("BasicGuider", model=placed, conditioning=conditioning)
        kind = "EmptyFlux2LatentImage" if self.is_flux2 else "EmptySD3LatentImage"
        sampled = self.add(
            "SamplerCustomAdvanced",
            noise=self.out(self.add("RandomNoise", noise_seed=7)),
            guider=self.out(guider),
            sampler=self.out(self.add("KSamplerSelect", sampler_name="euler")),
            sigmas=self.levels,
            latent_image=self.out(self.add(kind, width=64, height=64, batch_size=1)),
        )
        self.save(self.decode(self.vae, self.out(sampled)))
        return self


@pytest.mark.parametrize("generation", ["FLUX.1", "FLUX.2"])
def test_all_native_parts_together_make_the_picture_of_our_loaders(
    server: "Comfy", generation: str
) -> None:
    """MODEL and CLIP with LoRAs, VAE, and LATENTs as references; our sampler and ComfyUI's."""
    own = Everything(generation, is_native=False).guided()
    guided = Everything(generation, is_native=True).guided()
    in_ksampler = Everything(generation, is_native=True).in_ksampler()
    made = [picture(server, one.nodes) for one in (own, guided, in_ksampler)]
    assert furthest(*made) <= 1
    plain = Everything(generation, is_native=False)
    for node in plain.nodes.values():
        if node["class_type"] == "GlassboxApplyLoRA":
            node["inputs"]["strength"] = 0.0
    assert furthest(made[0], picture(server, plain.guided().nodes)) > 10


def test_a_control_net_and_step_caches_run_beside_our_references(server: "Comfy") -> None:
    """FLUX.1 in ComfyUI's sampler: without effect they change nothing, with effect the picture."""
    plain = picture(server, Everything("FLUX.1", is_native=True).in_ksampler().nodes)
    for kind in ("EasyCache", "LazyCache"):
        idle = Everything("FLUX.1", is_native=True).cached(kind, 0.0).in_ksampler(0.0)
        assert furthest(plain, picture(server, idle.nodes)) == 0
        both = Everything("FLUX.1", is_native=True).cached(kind, 0.0).in_ksampler(0.7)
        alone = Everything("FLUX.1", is_native=True).in_ksampler(0.7)
        controlled = picture(server, alone.nodes)
        assert furthest(controlled, picture(server, both.nodes)) == 0
        assert furthest(plain, controlled) > 1
        skipping = Everything("FLUX.1", is_native=True).cached(kind, 3.0).in_ksampler(0.7)
        assert furthest(controlled, picture(server, skipping.nodes)) > 1
