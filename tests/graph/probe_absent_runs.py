"""One good run and one bad input for each of the pack's nodes, for probe_absent."""

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import probe

Run = Callable[[], Any]
SIDES = {"width": 64, "height": 64, "seed": 1, "batch_size": 1}
WINDOW = {"cfg": 2.0, "start": 0.0, "end": 1.0, "passes": "in turn", "solver": "euler"}
PICTURE = {"posterior": "mode", "seed": 0}
PLACE = {"index": 1.0, "row": 0.0, "column": 0.0}


class Runs:
    """The nodes as ComfyUI has registered them, and what goes into them.

    Args:
        native: a MODEL that plain graphs use too.
        scratch: a folder for files.
    """

    def __init__(self, native: Any, scratch: Path) -> None:
        import nodes

        known = nodes.NODE_CLASS_MAPPINGS.items()
        self.nodes = {
            name.removeprefix("Glassbox"): one for name, one in known if name.startswith("Glassbox")
        }
        self.package = self.nodes["LoadNano"].__module__.removesuffix(".nodes.loaders")
        self.native = native
        self._make_files(scratch)
        self.model, self.encoders, self.autoencoder = self.run("LoadNano", name="kontext")
        self.klein = self.run("LoadNano", name="klein")
        self.text = self._text(self.encoders)
        self.tokens = self._tokens()
        self.one = self._conditioning(self.tokens)
        self.noise = self.run("Noise", model=self.native, **SIDES)
        self.sigmas = self._schedule("flux")

    def _make_files(self, scratch: Path) -> None:
        """Tiny models of every kind, and files that are none."""
        import folder_paths

        probe.load_glassbox()
        from glassbox.tests.graph import tiny

        tiny.make_models(scratch)
        for folder in ("diffusion_models", "text_encoders", "vae"):
            (scratch / folder / "none.safetensors").write_bytes(b"no model")
            folder_paths.add_model_folder_path(folder, str(scratch / folder))

    def run(self, name: str, /, **inputs: Any) -> Any:
        """Run a node; its one output, or all."""
        result = self.nodes[name].execute(**inputs).result
        return result[0] if len(result) == 1 else result

    def _text(self, encoders: Any) -> Any:
        settings = {"prompt_2": "", "t5_tokens": 0}
        return self.run("EncodeText", text_encoders=encoders, prompt="red", **settings)[0]

    def _tokens(self, width: int = 64) -> Any:
        import torch

        image = torch.rand(1, 64, width, 3)
        wires = {"autoencoder": self.autoencoder, "image": image}
        return self.run("EncodeAndPack", **wires, **PICTURE)

    def _conditioning(self, *references: Any, placement: str = "as wired") -> Any:
        wired = {f"reference_{number}": one for number, one in enumerate(references, 1)}
        settings = {"guidance": 1.0, "placement": placement, "references": wired}
        return self.run("ReferenceConditioner", text=self.text, **settings)

    def _schedule(self, kind: str) -> Any:
        wires = {"model": self.native, "noise": self.noise}
        return self.run("Schedule", **wires, steps=2, kind=kind, sigmas="")

    def _guided(self, model: Any, conditioning: Any) -> Any:
        wires = {"noise": self.noise, "sigmas": self.sigmas, "solver": "euler"}
        return self.run("SampleGuided", model=model, conditioning=conditioning, **wires)

    def _cfg(self, model: Any, **changed: Any) -> Any:
        wires = {"noise": self.noise, "sigmas": self.sigmas, **WINDOW, **changed}
        sides = {"positive": self.one, "negative": self.one}
        return self.run("SampleTrueCFG", model=model, **sides, **wires)

    def _lora(self, file: str, model: Any) -> Any:
        return self.run("ApplyLoRA", model=model, file=file, strength=1.0)

    def _load(self, kind: str, file: str, **more: Any) -> Any:
        return self.run(f"Load{kind}", file=file, dtype="auto", **more)

    def _latent(self, channels: int) -> Any:
        import torch

        return {"samples": torch.zeros(1, channels, 8, 8)}

    def good(self) -> dict[str, Run]:
        """Each node at work; those that take a MODEL with the one that plain graphs use."""
        import torch

        kontext, t5 = "glassbox_nano_kontext.safetensors", "tiny_t5.safetensors"
        clip, native = "tiny_clip_l.safetensors", self.native
        fit = {"size": "keep", "width": 64, "height": 64, "method": "pad"}
        shown = {"conditioning": self.one, "noise": self.noise, "model": native}
        return {
            "LoadNano": lambda: self.run("LoadNano", name="klein"),
            "LoadModel": lambda: self._load("Model", kontext, family="auto"),
            "LoadTextEncoders": lambda: self._load("TextEncoders", clip, file_2=t5),
            "LoadAutoencoder": lambda: self._load("Autoencoder", "tiny_ae.safetensors"),
            "EncodeText": lambda: [self._text(one) for one in (self.encoders, self.klein[1])],
            "FitImage": lambda: self.run("FitImage", image=torch.rand(1, 50, 60, 3), **fit),
            "EncodeAndPack": self._tokens,
            "PositionIds": lambda: self.run("PositionIds", tokens=self.tokens, **PLACE),
            "ReferenceConditioner": lambda: self._conditioning(self.tokens, self.tokens),
            "Noise": lambda: self.run("Noise", model=native, **SIDES),
            "Schedule": lambda: self._schedule("flux"),
            "SampleGuided": lambda: [
                self._guided(one, self.one)
                for one in (native, self.model, self._lora(f"lora_{kontext}", self.model)[0])
            ],
            "SampleTrueCFG": lambda: [self._cfg(one) for one in (native, self.model)],
            "UnpackAndDecode": lambda: self.run(
                "UnpackAndDecode", autoencoder=self.autoencoder, tokens=self.tokens
            ),
            "PackLatent": lambda: self._pack(16),
            "UnpackLatent": lambda: self.run("UnpackLatent", tokens=self.tokens),
            "InspectTokens": lambda: self.run("InspectTokens", **shown),
            "ToConditioning": lambda: self.run("ToConditioning", conditioning=self.one),
            "ApplyToModel": lambda: self._apply_and_sample(self.one),
            "ApplyLoRA": lambda: self._lora(f"lora_{kontext}", self.model),
            "Guider": lambda: [self._guide(one, channels=16) for one in (native, self.model)],
        }

    def _guide(self, model: Any, *, channels: int) -> Any:
        """ComfyUI's own sampler on our guider."""
        from comfy_extras import nodes_custom_sampler as custom

        guider = self.run("Guider", model=model, conditioning=self.one)
        sampler = custom.KSamplerSelect.execute("dpmpp_2m").result[0]
        noise, latent = custom.RandomNoise.execute(7).result[0], self._latent(channels)
        latent["samples"][:] = 0.5  # of an empty one ComfyUI exchanges the channels
        return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, self.sigmas, latent)

    def _pack(self, channels: int) -> Any:
        return self.run("PackLatent", latent=self._latent(channels), latent_format="FLUX.1")

    def _apply_and_sample(self, conditioning: Any) -> Any:
        """Our places on a clone, and ComfyUI's own sampler behind it."""
        import nodes

        model = self.run("ApplyToModel", model=self.native, conditioning=conditioning)
        text = self.run("ToConditioning", conditioning=self.one)[0]
        settings = (7, 2, 1.0, "euler", "simple", text, text, self._latent(16))
        return nodes.KSampler().sample(model, *settings)

    def bad(self) -> dict[str, Run]:
        """Each node with an input it refuses, then failures in the middle of a run."""
        import torch

        values = sys.modules[f"{self.package}.flux_core.values"]
        none, native, klein = "none.safetensors", self.native, self.klein[0]
        other = self.run("Noise", model=klein, **SIDES)
        text_2 = replace(self.one, text=self._text(self.klein[1]))
        huge = replace(self.tokens, values=torch.zeros(1, 1, 64).expand(1, 10**7, 64))
        huge = replace(huge, ids=torch.zeros(1, 3).expand(10**7, 3))
        refused: dict[str, Run] = {
            "LoadNano": lambda: self.run("LoadNano", name="none"),
            "LoadModel": lambda: self._load("Model", none, family="auto"),
            "LoadTextEncoders": lambda: self._load("TextEncoders", none, file_2="none"),
            "LoadAutoencoder": lambda: self._load("Autoencoder", none),
            "EncodeText": lambda: self.run(
                "EncodeText", text_encoders=self.encoders, prompt="", prompt_2="", t5_tokens=900
            ),
            "FitImage": lambda: self.run(
                "FitImage", image=torch.rand(1, 64, 64, 4), size="keep", method="pad", **_sides()
            ),
            "EncodeAndPack": lambda: self._tokens(65),
            "PositionIds": lambda: self.run("PositionIds", tokens=self._latent(4), **PLACE),
            "ReferenceConditioner": lambda: self._conditioning(
                self.tokens, self.tokens, placement="single"
            ),
            "Noise": lambda: self.run("Noise", model=native, **{**SIDES, "width": 72}),
            "Schedule": lambda: self._schedule("by hand"),
            "SampleGuided": lambda: self._guided(native, text_2),
            "SampleTrueCFG": lambda: self._cfg(native, start=0.8, end=0.2),
            "UnpackAndDecode": lambda: self.run(
                "UnpackAndDecode", autoencoder=self.autoencoder, tokens=other
            ),
            "PackLatent": lambda: self._pack(4),
            "UnpackLatent": lambda: self.run("UnpackLatent", tokens=self._latent(16)),
            "InspectTokens": lambda: self.run(
                "InspectTokens", conditioning=self.one, model=types.SimpleNamespace()
            ),
            "ToConditioning": lambda: self.run("ToConditioning", conditioning=values.Fit),
            "ApplyToModel": lambda: self._apply_and_sample(self._conditioning(other)),
            "ApplyLoRA": lambda: self._lora("lora_glassbox_nano_klein.safetensors", self.model),
            "Guider": lambda: self._guide(self.model, channels=128),
        }
        refused |= {
            "another reference under KSampler": lambda: self._apply_and_sample(
                self._conditioning(self.tokens, self.tokens)
            ),
            "more than memory holds": lambda: self._guided(
                native, replace(self.one, references=(values.Reference(tokens=huge),))
            ),
        }
        for place, model in (("native", native), ("ours", self.model)):
            refused[f"a cancel, {place}"] = lambda one=model: self._failing(one, "cancel")
        refused["no memory left"] = lambda: self._failing(native, "memory")
        return refused

    def _failing(self, model: Any, how: str) -> Any:
        """Fail in the middle of a run: cancelled after its first step, or out of memory in it."""
        import comfy.model_management as mm
        import comfy.utils
        import torch

        def cancel(*_: Any, **__: Any) -> None:
            mm.interrupt_current_processing(True)

        def fill(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("no memory left")

        if how == "memory":
            model = model.clone()
            model.set_model_attn1_patch(fill)
            return self._guided(model, self.one)
        comfy.utils.set_progress_bar_global_hook(cancel)
        try:
            return self._guided(model, self.one)
        finally:
            comfy.utils.set_progress_bar_global_hook(None)


def _sides() -> dict[str, int]:
    return {"width": 64, "height": 64}
