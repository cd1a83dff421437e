"""Probe: a MODEL that other nodes have changed, in our samplers and in ComfyUI's own.

Every node of ComfyUI that changes a MODEL and needs no part of another, with the nano's; then what
packs put on one. It has to come out alike on both sides, or be refused by name, or fail on both.
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
from model_changes import PackChanges, blind_forward
from probe_native import Bench

Answer = dict[str, Any]
FAMILY = "FLUX.1"
LORA = "changes.safetensors"
LAYER = "single_blocks.0.linear1"
SIGMAS = "1, 0.6, 0"
# Where a node's own defaults change nothing.
EFFECTIVE: dict[str, dict[str, Any]] = {
    "CFGOverride": {"cfg": 7.0},
    "ContextWindowsManual": {"context_length": 1, "context_overlap": 0, "dim": 2},
    "Epsilon Scaling": {"scaling_factor": 1.2},
    "ModelComputeDtype": {"dtype": "bf16"},
    "ModelMergeSimple": {"ratio": 0.5},
    "ModelMergeBlocks": {"input": 0.5, "middle": 0.5, "out": 0.5},
    "ModelMergeFlux1": {"img_in.": 0.5, "final_layer.": 0.0, "single_blocks.0.": 0.5},
    "ModelNoiseScale": {"noise_scale": 2.0},
    "ModelSamplingDiscrete": {"sampling": "v_prediction"},
    "ModelSamplingFlux": {"max_shift": 3.0},
    "ScaleROPE": {"scale_x": 2.0},
    "SkipLayerGuidanceDiT": {"double_layers": "0", "single_layers": "1", "start_percent": 0.0},
    "SkipLayerGuidanceDiTSimple": {"double_layers": "0", "single_layers": "1"},
}


def main(scratch: Path) -> Answer:
    import torch

    torch.compile = _compile
    bench = ChangedBench(scratch)
    answer: Answer = {"nodes": bench.all_nodes(), "packs": bench.packs()}
    answer["left_over"], answer["kv"] = bench.left_over(), bench.kept_by_comfyui()
    answer["shift"] = bench.shift_is_told()
    answer["compiled"] = [bench.outcome(bench.compiled()) for _ in range(2)]
    return answer


class ChangedBench(PackChanges, Bench):
    """The nano's MODEL, changed."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        asyncio.run(self.native_nodes.init_builtin_extra_nodes())
        self.native = self.natives[FAMILY]
        self.network = self.native.model.diffusion_model
        self.positive = self.conditioning(FAMILY, 1, "as wired")
        self.negative = self.conditioning(FAMILY, 1, "as wired", seed=5)
        self._make_lora(scratch)
        self.parts = self._parts()
        self.plain = self.theirs(self.native, 3.0)

    def _make_lora(self, scratch: Path) -> None:
        import folder_paths
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(4)
        rows, columns = self.network.get_submodule(LAYER).weight.shape
        name = f"lora_unet_{LAYER.replace('.', '_')}"
        state = {
            f"{name}.lora_down.weight": torch.randn(4, columns, generator=generator),
            f"{name}.lora_up.weight": 0.1 * torch.randn(rows, 4, generator=generator),
        }
        save_file(state, str(scratch / LORA))
        folder_paths.add_model_folder_path("loras", str(scratch))

    def _parts(self) -> dict[str, Any]:
        """One value of each type that nodes ask for beside the MODEL."""
        import torch

        known = self.native_nodes.NODE_CLASS_MAPPINGS
        sharpen = known["LatentOperationSharpen"]
        operation = sharpen.execute(sharpen_radius=1, sigma=1.0, alpha=0.5).result[0]
        return {
            "MODEL": known["LoraLoaderModelOnly"]().load_lora_model_only(self.native, LORA, 1.0)[0],
            "LATENT_OPERATION": operation,
            "CONDITIONING": self.run("ToConditioning", conditioning=self.negative)[0],
            "IMAGE": torch.zeros(1, 64, 64, 3),
        }

    def all_nodes(self) -> dict[str, Answer]:
        """What becomes of each node of ComfyUI that gives a MODEL."""
        found: dict[str, Answer] = {}
        for name, node in sorted(self.native_nodes.NODE_CLASS_MAPPINGS.items()):
            if "MODEL" not in list(node.RETURN_TYPES) or name.startswith("Glassbox"):
                continue
            bases = [one.__name__ for one in node.__mro__[1:]]
            if "ModelMergeBlocks" in bases and name not in EFFECTIVE:
                found[name] = {"verdict": "as ModelMergeBlocks", "what": ""}
                continue
            inputs, missing = self.inputs_of(name, node)
            found[name] = missing or self.behind(node, inputs)
        return found

    def inputs_of(self, name: str, node: Any) -> tuple[dict[str, Any], Answer]:
        """A node's own defaults, and why it cannot run, if so."""
        asked = node.INPUT_TYPES()
        inputs: dict[str, Any] = {}
        missing: list[str] = []
        parts = {**self.parts, "model": self.native, "model1": self.native, "lora_name": LORA}
        for key, spec in {**asked.get("required", {}), **asked.get("optional", {})}.items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            choices = kind if isinstance(kind, list) else options.get("options", [])
            if key in parts or str(kind) in parts:
                inputs[key] = parts.get(key, parts.get(str(kind)))
            elif "default" in options:
                inputs[key] = options["default"]
            elif choices:
                inputs[key] = choices[0]
            elif key in asked.get("required", {}):
                missing.append(key)
        if "model" not in inputs and "model1" not in inputs:
            return {}, {"verdict": "loads one", "what": ""}
        if missing:
            return {}, {"verdict": "needs a part of another model", "what": ", ".join(missing)}
        return {**inputs, **EFFECTIVE.get(name, {})}, {}

    def behind(self, node: Any, inputs: dict[str, Any]) -> Answer:
        """Run a node; what becomes of the MODEL it gives."""
        try:
            if hasattr(node, "GET_SCHEMA"):
                model = node.execute(**inputs).result[0]
            else:
                model = getattr(node(), node.FUNCTION)(**inputs)[0]
        except (AttributeError, KeyError) as error:  # of a node for another network
            return {"verdict": "its own error", "what": type(error).__name__}
        return self.outcome(model)

    def outcome(self, model: Any) -> Answer:
        """Compare both sides, guided and with a negative prompt."""
        verdict = "changes nothing"
        for cfg in (3.0, None):
            ours = _made(lambda cfg=cfg: self.ours_sampled(model, cfg))
            if type(ours).__module__ == "glassbox":
                return {"verdict": "refused", "what": str(ours)}
            theirs = _made(lambda cfg=cfg: self.theirs(model, cfg))
            failed = [one for one in (ours, theirs) if isinstance(one, Exception)]
            if failed:
                both = "fails on both" if len(failed) == 2 else "SILENT"
                return {"verdict": both, "what": f"{type(failed[0]).__name__}: {failed[0]}"}
            apart = float((ours - theirs).abs().max() / theirs.abs().max())
            if apart > 1e-5:
                return {"verdict": "SILENT", "what": f"cfg {cfg}: {apart:.2g} apart"}
            if float((theirs - self.plain).abs().max()) == 0:
                break
            verdict = "honoured"
        return {"verdict": verdict, "what": ""}

    def inputs(self, generation: str) -> tuple[Any, Any]:
        """Noise and two steps."""
        sides = {"width": 96, "height": 64, "seed": 11, "batch_size": 2}
        noise = self.run("Noise", model=self.ours[generation], **sides)
        curve = {"steps": 2, "kind": "by hand", "sigmas": SIGMAS}
        return noise, self.run("Schedule", model=self.ours[generation], noise=noise, **curve)

    def ours_sampled(self, model: Any, cfg: float | None) -> Any:
        noise, sigmas = self.inputs(FAMILY)
        wires = {"model": model, "noise": noise, "sigmas": sigmas, "solver": "euler"}
        if cfg is None:
            tokens = self.run("SampleGuided", conditioning=self.positive, **wires)
        else:
            sides = {"positive": self.positive, "negative": self.negative}
            window = {"cfg": cfg, "start": 0.0, "end": 1.0, "passes": "in turn"}
            tokens = self.run("SampleTrueCFG", **sides, **window, **wires)
        return self.run("UnpackLatent", tokens=tokens)["samples"]

    def theirs(self, model: Any, cfg: float | None) -> Any:
        placed = self.run("ApplyToModel", model=model, conditioning=self.positive)
        both = (self.positive, self.negative)
        sides = [self.run("ToConditioning", conditioning=one)[0] for one in both]
        _, sigmas = self.inputs(FAMILY)
        if cfg is None:
            return self.sampled(placed, sides[0], sigmas, FAMILY)
        guider = self.custom.CFGGuider.execute(placed, *sides, cfg).result[0]
        sampler = self.custom.KSamplerSelect.execute("euler").result[0]
        noise = self.custom.RandomNoise.execute(11).result[0]
        run = self.custom.SamplerCustomAdvanced.execute
        return run(noise, guider, sampler, sigmas, self.empty(FAMILY)).result[0]["samples"]

    def packs(self) -> dict[str, Answer]:
        """What packs put on a MODEL by other ways than ComfyUI's own nodes."""
        found: dict[str, Answer] = {}
        for name in dir(PackChanges):
            if name.startswith("on_"):
                model = self.native.clone()
                with getattr(self, name)(model):
                    found[name.removeprefix("on_")] = self.outcome(model)
        return found

    def kept_by_comfyui(self) -> dict[str, float]:
        """Flux KV Cache under KSampler: with our conditioning, and with ComfyUI's own."""
        model, one = self.natives["FLUX.2"], self.conditioning("FLUX.2", 1, "index")
        node = self.native_nodes.NODE_CLASS_MAPPINGS["FluxKVCache"]
        latent = self.run("UnpackLatent", tokens=one.references[0].tokens)["samples"]
        ours, _ = self.run("ToConditioning", conditioning=one)
        theirs = [[one.text.txt, {"guidance": one.guidance, "reference_latents": [latent]}]]
        sigmas = self.inputs("FLUX.2")[1]
        made = [
            self.sampled(node.execute(model).result[0], text, sigmas, "FLUX.2")
            for text in (ours, theirs)
        ]
        plain = self.sampled(model, theirs, sigmas, "FLUX.2")
        return {
            "apart": float((made[0] - made[1]).abs().max()),
            "from plain": float((made[1] - plain).abs().max()),
        }

    def left_over(self) -> list[Answer]:
        """A clean MODEL while a clone with a forward of its own is loaded, and after that."""
        import comfy.model_management as mm

        patched = self.native.clone()
        patched.add_object_patch("diffusion_model.forward_orig", blind_forward(self.network))
        native, _ = self.run("ToConditioning", conditioning=self.positive)
        self.sampled(patched, native, self.inputs(FAMILY)[1], FAMILY)
        loaded = self.outcome(self.native)
        self.sampled(patched, native, self.inputs(FAMILY)[1], FAMILY)
        mm.unload_all_models()
        return [loaded, self.outcome(self.native)]

    def compiled(self) -> Any:
        """The whole network behind torch.compile, as an object patch."""
        import torch

        model = self.native.clone()
        whole = torch.compile(self.network)
        model.add_object_patch("diffusion_model", whole)
        return model

    def shift_is_told(self) -> list[list[str]]:
        """What Schedule says of a MODEL with a shift of its own, and of a plain one."""
        node = self.native_nodes.NODE_CLASS_MAPPINGS["ModelSamplingFlux"]
        shifted = node().patch(self.native, 3.0, 0.5, 1024, 1024)[0]
        host = sys.modules[f"{probe.PACK}.nodes.host"]
        noise, _ = self.inputs(FAMILY)
        told: list[list[str]] = []
        tell, host.notify = host.notify, told.append
        for model in (shifted, self.native):
            self.run("Schedule", model=model, noise=noise, steps=2, kind="flux", sigmas="")
        host.notify = tell
        return told


def _compile(model: Any, **_: Any) -> Any:
    """Stand in for torch.compile, which takes minutes: a module around the module, as its own."""
    import torch

    class Compiled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = model

        def forward(self, *args: Any, **more: Any) -> Any:
            return self._orig_mod(*args, **more)

        def __getattr__(self, name: str) -> Any:
            inside = self.__dict__["_modules"]["_orig_mod"]
            return inside if name == "_orig_mod" else getattr(inside, name)

    return Compiled()


def _made(route: Callable[[], Any]) -> Any:
    """A latent, or the exception in its place, of ours or of another node's patch."""
    try:
        return route()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return error


if __name__ == "__main__":
    probe.run(main)
