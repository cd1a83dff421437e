"""Probe: plain native FLUX graphs without the pack, with it, and after each of its nodes.

Argument "without" or "with". Every latent comes back as a digest of its bits. A node that has no
run, or no bad input, here makes the probe fail.
"""

import asyncio
import copy
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
import probe_absent_runs

NANO = probe.ROOT / "flux_core" / "nano" / "diffusion_models"
KONTEXT, KLEIN = "glassbox_nano_kontext.safetensors", "glassbox_nano_klein.safetensors"
TEXT = {KONTEXT: (20, 192, 128), KLEIN: (24, None, 0)}  # tokens, width, pooled
LATENT = {KONTEXT: (1, 16, 8, 8), KLEIN: (1, 128, 4, 4)}
METHODS = {
    KONTEXT: ("offset", "index", "uxo/uno"),
    KLEIN: ("offset", "index", "uxo/uno", "index_timestep_zero"),
}
LAYER = "single_blocks.0.linear1"
Answer = dict[str, Any]


def main(scratch: Path) -> Answer:
    import folder_paths

    folder_paths.add_model_folder_path("loras", str(scratch))
    if sys.argv[1] == "without":
        folder_paths.add_model_folder_path("diffusion_models", str(NANO))
        return {"all": Native(scratch).all_graphs()}
    return _with_the_pack(scratch)


def _with_the_pack(scratch: Path) -> Answer:
    import nodes

    before = _registries()
    assert asyncio.run(nodes.load_custom_node(str(probe.ROOT)))
    after = _registries()
    native = Native(scratch)
    answer: Answer = {"all": native.all_graphs(), "registries": _difference(before, after)}
    runs = probe_absent_runs.Runs(native.models[KONTEXT], scratch)
    after, small = _registries(), native.two_graphs()
    answer["nodes"], answer["changed"] = sorted(runs.nodes), list[str]()
    for kind, uses in (("ran", runs.good()), ("raised", runs.bad())):
        said = answer[kind] = dict[str, str]()
        for name, use in uses.items():
            said[name] = _raised(use)
            if native.two_graphs() != small:
                answer["changed"].append(f"{name}, {kind}")
    answer["after"] = native.all_graphs()
    answer["loaded_anew"] = Native(scratch).all_graphs()
    answer["registries_after"] = _difference(after, _registries())
    return answer


def _raised(use: Callable[[], Any]) -> str:
    """The exception of a use, "" for none; ComfyUI's interruption is no Exception."""
    import comfy.model_management as mm

    try:
        use()
    except mm.InterruptProcessingException:
        return "InterruptProcessingException"
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _registries() -> dict[str, Any]:
    """What ComfyUI knows: nodes, folders and the endings of files in them."""
    import folder_paths

    import nodes

    found: dict[str, Any] = {
        f"node {name}": id(one) for name, one in nodes.NODE_CLASS_MAPPINGS.items()
    }
    found |= {f"name {name}": one for name, one in nodes.NODE_DISPLAY_NAME_MAPPINGS.items()}
    found |= {
        f"folder {name}": copy.deepcopy([one[0], sorted(one[1])])
        for name, one in folder_paths.folder_names_and_paths.items()
    }
    found["endings"] = sorted(folder_paths.supported_pt_extensions)
    return found


def _difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = sorted({*before, *after})
    return [name for name in names if before.get(name) != after.get(name)]


class Native:
    """Graphs of ComfyUI's own nodes alone."""

    def __init__(self, scratch: Path) -> None:
        from comfy_extras import (
            nodes_custom_sampler,
            nodes_easycache,
            nodes_edit_model,
            nodes_flux,
            nodes_model_advanced,
        )

        import nodes

        self.core, self.flux, self.edit = nodes, nodes_flux, nodes_edit_model
        self.custom, self.advanced = nodes_custom_sampler, nodes_model_advanced
        self.easy_cache = nodes_easycache.EasyCacheNode
        self.models = {
            file: nodes.UNETLoader().load_unet(file, "default")[0] for file in (KONTEXT, KLEIN)
        }
        self.loras = {file: self._lora(file, scratch) for file in self.models}

    def _lora(self, file: str, scratch: Path) -> str:
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(4)
        rows, columns = self.models[file].model.diffusion_model.get_submodule(LAYER).weight.shape
        down = torch.randn(4, columns, generator=generator)
        up = 0.1 * torch.randn(rows, 4, generator=generator)
        key = f"diffusion_model.{LAYER}.lora_{{}}.weight"
        name = f"lora_{file}"
        save_file({key.format("A"): down, key.format("B"): up}, str(scratch / name))
        return name

    def text(self, file: str, seed: int, *, references: int) -> Any:
        """A CONDITIONING of random numbers, with references and guidance."""
        import torch

        tokens, width, pooled = TEXT[file]
        width = width or self.models[file].model.diffusion_model.txt_in.in_features
        generator = torch.Generator().manual_seed(seed)
        beside = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        made: Any = [[torch.randn(1, tokens, width, generator=generator), beside]]
        made = self.flux.FluxGuidance.execute(made, 2.0).result[0]
        generator.manual_seed(50)
        for _ in range(references):
            latent = {"samples": torch.randn(LATENT[file], generator=generator)}
            made = self.edit.ReferenceLatent.execute(made, latent).result[0]
        return made

    def empty(self, file: str) -> Any:
        import torch

        return {"samples": torch.zeros(LATENT[file])}

    def ksampler(
        self, model: Any, file: str, *, cfg: float, references: int, steps: int = 2
    ) -> Any:
        sides = [self.text(file, seed, references=references) for seed in (1, 2)]
        sample = self.core.KSampler().sample
        settings = (7, steps, cfg, "euler", "simple", *sides, self.empty(file))
        return sample(model, *settings)[0]["samples"]

    def advanced_sampler(self, model: Any, file: str, sigmas: Any, *, method: str = "") -> Any:
        text = self.text(file, 3, references=1)
        if method:
            node = self.flux.FluxKontextMultiReferenceLatentMethod
            text = node.execute(text, method).result[0]
        guider = self.custom.BasicGuider.execute(model, text).result[0]
        sampler = self.custom.KSamplerSelect.execute("euler").result[0]
        noise = self.custom.RandomNoise.execute(9).result[0]
        run = self.custom.SamplerCustomAdvanced.execute
        return run(noise, guider, sampler, sigmas, self.empty(file)).result[0]["samples"]

    def two_graphs(self) -> list[str]:
        """One of each generation, both with a reference, of one step: they run often."""
        sigmas = self.flux.Flux2Scheduler.execute(1, 64, 64).result[0]
        kontext, klein = self.models[KONTEXT], self.models[KLEIN]
        return [
            _digest(self.ksampler(kontext, KONTEXT, cfg=1.0, references=1, steps=1)),
            _digest(self.advanced_sampler(klein, KLEIN, sigmas)),
        ]

    def all_graphs(self) -> dict[str, str]:
        """KSampler and SamplerCustomAdvanced, with what people put between."""
        made: dict[str, Any] = {}
        for file, model in self.models.items():
            made[f"{file} text"] = self.ksampler(model, file, cfg=1.0, references=0)
            made[f"{file} cfg, two references"] = self.ksampler(model, file, cfg=3.0, references=2)
            load = self.core.LoraLoaderModelOnly().load_lora_model_only
            with_lora = load(model, self.loras[file], 0.8)[0]
            made[f"{file} LoRA"] = self.ksampler(with_lora, file, cfg=1.0, references=1)
            shifted = self.advanced.ModelSamplingFlux().patch(model, 1.15, 0.5, 512, 512)[0]
            basic = self.custom.BasicScheduler.execute(shifted, "simple", 3, 1.0).result[0]
            for method in METHODS[file]:
                name = f"{file} {method}"
                made[name] = self.advanced_sampler(shifted, file, basic, method=method)
            cached = self.easy_cache.execute(model, 0.9, 0.0, 1.0, False).result[0]
            flux2 = self.flux.Flux2Scheduler.execute(6, 64, 64).result[0]
            made[f"{file} EasyCache"] = self.advanced_sampler(cached, file, flux2)
            made[f"{file} Flux2Scheduler"] = self.advanced_sampler(model, file, flux2)
        return {name: _digest(latent) for name, latent in made.items()}


def _digest(latent: Any) -> str:
    assert bool(latent.isfinite().all())
    assert float(latent.std()) > 0.01
    return hashlib.sha256(latent.contiguous().numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    probe.run(main)
