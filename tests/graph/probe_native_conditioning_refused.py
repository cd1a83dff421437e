"""Probe: what our nodes say to a CONDITIONING they cannot follow, and to none at all."""

import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
from probe_native_conditioning import GUIDED, BenchConditioning

RAW = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def main(scratch: Path) -> dict[str, Any]:
    bench = BenchRefused(scratch)
    answer = {"carried": bench.carried(), "foreign": bench.foreign()}
    answer |= {"rubbish": bench.rubbish(), "conditioner": bench.on_reference_conditioner()}
    return answer


class BenchRefused(BenchConditioning):
    """Every wrong use, and the message it gets; a raw error begins with its class."""

    def sampled_with(self, **settings: Any) -> str:
        return self.message(self.native("FLUX.1", 1, **settings))

    def message(self, conditioning: Any, generation: str = "FLUX.1") -> str:
        return _said(lambda: self.made(self.ours[generation], generation, conditioning))

    def carried(self) -> dict[str, str]:
        """What nodes of ComfyUI put beside the text."""
        import torch

        nodes, plain = self.native_nodes, self.native("FLUX.1")
        mask = nodes.ConditioningSetMask().append(plain, torch.ones(8, 8), "default", 1.0)[0]
        area = nodes.ConditioningSetArea().append(plain, 64, 64, 0, 0, 1.0)[0]
        weak = nodes.ConditioningSetAreaStrength().append(plain, 0.5)[0]
        ranged = nodes.ConditioningSetTimestepRange().set_range(plain, 0.0, 0.5)[0]
        both = nodes.ConditioningCombine().combine(plain, self.native("FLUX.1", seed=5))[0]
        unclip = nodes.unCLIPConditioning().apply_adm(plain, object(), 1.0, 0.0)[0]
        said = {
            "mask": self.message(mask),
            "area": self.message(area),
            "strength": self.message(weak),
            "range": self.message(ranged),
            "combined": self.message(both),
            "unclip": self.message(unclip),
            "both": self.sampled_with(mask=torch.ones(8, 8), control=object()),
        }
        for key in ("control", "gligen", "hooks", "concat_latent_image", "default"):
            said[key] = self.sampled_with(**{key: object()})
        said["style"] = self.sampled_with(attention_mask_img_shape=(1, 1))
        said["unknown"] = self.sampled_with(**{"a" * 200: 1, "b\n": 2, "c": 3, "d": 4})
        for method in ("uxo", "index_timestep_zero", "none\x00such"):
            said[method] = self.sampled_with(reference_latents_method=method)
        off = self.native(GUIDED, guidance=None)
        said["off"] = self.message(off, GUIDED)
        said["negative"] = _said(lambda: self.cfg_apart("FLUX.1", plain, mask, "batched"))
        return said

    def foreign(self) -> dict[str, str]:
        """Text and references of other models, with a model and without."""
        import torch

        texts = {
            "SDXL": (2048, 1280, {"width": 1024, "height": 1024}),
            "SD 1.5": (768, 768, {}),
            "SD 3": (4096, 2048, {}),
            "T5": (4096, 0, {}),
            "Qwen": (3584, 0, {}),
            "klein 9B": (12288, 0, {}),
        }
        said: dict[str, str] = {}
        for name, (width, pooled, settings) in texts.items():
            if pooled:
                settings = {**settings, "pooled_output": torch.zeros(1, pooled)}
            wrong = [[torch.zeros(1, 8, width), settings]]
            said[name] = self.message(wrong)
            said[f"{name} without a model"] = _said(
                lambda wrong=wrong: self.run("InspectTokens", conditioning=wrong)
            )
        alone = self.native("FLUX.1")
        del alone[0][1]["pooled_output"]
        said["T5 alone on nano"] = self.message(alone)
        said["other generation"] = self.message(self.native("FLUX.2"))
        said["native MODEL"] = _said(
            lambda: self.made(self.natives["FLUX.1"], "FLUX.1", self.native("FLUX.2"))
        )
        other = self.native("FLUX.2", 1)[0][1]["reference_latents"]
        said["reference"] = self.sampled_with(reference_latents=other)
        said["SDXL reference"] = self.sampled_with(reference_latents=[torch.zeros(1, 4, 8, 8)])
        said["video reference"] = self.sampled_with(reference_latents=[torch.zeros(1, 16, 1, 8, 8)])
        return said

    def rubbish(self) -> dict[str, str]:
        """Hand-made values on every socket; only those that got no error of ours are given."""
        said: dict[str, str] = {}
        for name, made in self.hand_made().items():
            for node, use in self.sockets(made).items():
                said[f"{name} on {node}"] = _said(use)
        return said

    def sockets(self, made: Any) -> dict[str, Any]:
        noise, sigmas = self.inputs("FLUX.1")
        plain = self.native("FLUX.1")
        wires = {"noise": noise, "sigmas": sigmas, "solver": "euler", "cfg": 3.0}
        window = {"start": 0.0, "end": 1.0, "passes": "batched", **wires}
        ours, native = self.ours["FLUX.1"], self.natives["FLUX.1"]
        cfg = {"model": ours, **window}
        return {
            "guided": lambda: self.made(ours, "FLUX.1", made),
            "native MODEL": lambda: self.made(native, "FLUX.1", made),
            "positive": lambda: self.run("SampleTrueCFG", positive=made, negative=plain, **cfg),
            "negative": lambda: self.run("SampleTrueCFG", positive=plain, negative=made, **cfg),
            "inspect": lambda: self.run("InspectTokens", conditioning=made),
            "to conditioning": lambda: self.run("ToConditioning", conditioning=made),
            "apply": lambda: self.run("ApplyToModel", model=native, conditioning=made),
            "text": lambda: self.wired(made),
        }

    def hand_made(self) -> dict[str, Any]:
        """What a workflow written by hand, or a broken pack, may put on the wire."""
        import torch

        txt, settings = self.native("FLUX.1")[0]
        wrong: dict[str, Any] = {
            "nothing": None,
            "a number": 7,
            "words": "a red circle",
            "a dict": {"samples": torch.zeros(1, 16, 8, 8)},
            "an empty list": [],
            "an empty entry": [[]],
            "a flat list": [txt, settings],
            "three parts": [[txt, settings, 1]],
            "no settings": [[txt, None]],
            "no text": [[None, settings]],
            "numbers for text": [[[1.0, 2.0], settings]],
            "nested too deep": [[[txt, settings]]],
            "a second entry": [[txt, settings], "x"],
            "text of 2 axes": [[txt[0], settings]],
            "text of 4 axes": [[txt[None], settings]],
            "text without tokens": [[txt[:, :0], settings]],
            "text without a batch": [[txt[:0], settings]],
            "text of NaN": [[torch.full_like(txt, torch.nan), settings]],
            "text of whole numbers": [[torch.ones_like(txt, dtype=torch.long), settings]],
            "text without values": [[txt.to("meta"), settings]],
            "sparse text": [[txt.to_sparse(), settings]],
            "complex text": [[txt.to(torch.complex64), settings]],
            "keys of all kinds": [[txt, {**settings, 3: 4, (1, 2): "x", b"k": 1, "\ud800": 1}]],
        }
        inside: dict[str, dict[str, Any]] = {
            "pooled text as a list": {"pooled_output": [1.0]},
            "pooled text of 1 axis": {"pooled_output": settings["pooled_output"][0]},
            "pooled text of infinity": {"pooled_output": settings["pooled_output"] + torch.inf},
            "a batch of pooled text": {"pooled_output": settings["pooled_output"].repeat(3, 1)},
            "guidance as words": {"guidance": "3.5"},
            "guidance of NaN": {"guidance": float("nan")},
            "huge guidance": {"guidance": 10**400},
            "endless guidance": {"guidance": 10**5000},
            "guidance below 0": {"guidance": -1},
            "guidance as a tensor": {"guidance": torch.tensor([3.5, 4.0])},
            "guidance as yes": {"guidance": True},
            "strength as a tensor": {"strength": torch.ones(3)},
            "strength as words": {"strength": "1.0"},
            "references as a tensor": {"reference_latents": torch.zeros(1, 16, 8, 8)},
            "references as a dict": {"reference_latents": {"samples": 1}},
            "no latent among references": {"reference_latents": [None]},
            "a masked LATENT among references": {
                "reference_latents": [
                    {"samples": torch.zeros(1, 16, 8, 8), "noise_mask": torch.ones(1, 8, 8)}
                ]
            },
            "a reference of 3 axes": {"reference_latents": [torch.zeros(16, 8, 8)]},
            "an empty reference": {"reference_latents": [torch.zeros(1, 16, 0, 8)]},
            "a reference without a batch": {"reference_latents": [torch.zeros(0, 16, 8, 8)]},
            "a reference of NaN": {"reference_latents": [torch.full((1, 16, 8, 8), torch.nan)]},
            "a reference of whole numbers": {
                "reference_latents": [torch.zeros(1, 16, 8, 8, dtype=torch.long)]
            },
            "a method of all kinds": {
                "reference_latents": [torch.zeros(1, 16, 8, 8)],
                "reference_latents_method": ["index"],
            },
        }
        return wrong | {name: [[txt, {**settings, **one}]] for name, one in inside.items()}

    def on_reference_conditioner(self) -> dict[str, str]:
        """References beside the text, and sizes that only the sampler knows to be wrong."""
        import torch

        batch = self.native("FLUX.1")
        batch[0][0] = batch[0][0].repeat(3, 1, 1)
        pictures = self.native("FLUX.1", reference_latents=[torch.zeros(3, 16, 8, 8)])
        huge = self.native("FLUX.1")
        huge[0][0] = huge[0][0] * 1e38
        return {
            "references": _said(lambda: self.wired(self.native("FLUX.1", 2))),
            "batch of 3": self.message(batch),
            "references of 3": self.message(pictures),
            "huge text": self.message(huge),
            "latent for noise": _said(
                lambda: self.run(
                    "Schedule",
                    model=self.ours["FLUX.1"],
                    noise={"samples": torch.zeros(1, 4, 8, 8)},
                    steps=3,
                    kind="flux",
                    sigmas="",
                )
            ),
            "no latent for noise": _said(
                lambda: self.run(
                    "Schedule",
                    model=self.ours["FLUX.1"],
                    noise=types.SimpleNamespace(),
                    steps=3,
                    kind="flux",
                    sigmas="",
                )
            ),
        }


def _said(use: Any) -> str:
    """The message of a refused use, with the class of its error before it."""
    try:
        use()
    except RAW as error:
        return f"{type(error).__module__}.{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    probe.run(main)
