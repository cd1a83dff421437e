"""Probe: a whole edit through the nodes in one process, with everything watched.

It compares ComfyUI's modules before and after, and sees models and plans being freed.
"""

import gc
import importlib
import sys
import weakref
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe

WATCHED = (
    "comfy.ldm.flux",
    "comfy.ldm.flux.model",
    "comfy.ldm.flux.layers",
    "comfy.ldm.flux.math",
    "comfy.samplers",
    "comfy.model_base",
    "comfy.model_sampling",
    "comfy.conds",
    "comfy.sd",
    "comfy.lora",
    "comfy.weight_adapter",
    "comfy.patcher_extension",
    "comfy.sampler_helpers",
    "comfy.k_diffusion.sampling",
    "comfy.sample",
    "comfy.ops",
    "comfy.model_patcher",
    "comfy.latent_formats",
    "latent_preview",
    "nodes",
)
Answer = dict[str, Any]


def main(scratch: Path) -> Answer:
    for name in WATCHED:  # a running ComfyUI has them all
        importlib.import_module(name)
    gc.disable()  # what is freed below is freed without it
    before = _attributes()
    answer: Answer = {"watched": len(before)}
    nodes = _nodes(scratch)
    answer["pixels"] = list(_edit(nodes).shape)
    answer |= _sharing(nodes) | _cancelling(nodes) | _modulation(nodes)
    answer["folders"] = _folders()
    after = _attributes()
    answer["changed"] = [name for name in before if before[name] is not after.get(name)]
    answer["added"] = sorted(set(after) - set(before))
    return answer


def _attributes() -> dict[str, Any]:
    """Every attribute of the watched modules, and of every class they define."""
    found: dict[str, Any] = {}
    for name in WATCHED:
        module = sys.modules[name]
        for attribute, value in vars(module).items():
            if attribute.startswith("__"):
                continue
            found[f"{name}.{attribute}"] = value
            if isinstance(value, type) and value.__module__ == name:
                for member, part in vars(value).items():
                    found[f"{name}.{attribute}.{member}"] = part
    return found


def _nodes(scratch: Path) -> dict[str, Any]:
    """The pack's nodes by id, with tiny models in ComfyUI's folders."""
    import folder_paths

    probe.load_glassbox()
    from glassbox.tests.graph import tiny

    tiny.make_models(scratch)
    for folder in ("diffusion_models", "text_encoders", "vae"):
        folder_paths.add_model_folder_path(folder, str(scratch / folder))
    return probe.load_nodes()


def _folders() -> list[str]:
    """Where ComfyUI looks for diffusion models, in its order."""
    import folder_paths

    return folder_paths.get_folder_paths("diffusion_models")


def _run(nodes: dict[str, Any], name: str, **inputs: Any) -> Any:
    result = nodes[f"Glassbox{name}"].execute(**inputs).result
    return result[0] if len(result) == 1 else result


def _load_model(nodes: dict[str, Any], file: str = "tiny-kontext.safetensors") -> Any:
    return _run(nodes, "LoadModel", file=file, family="auto", dtype="auto")[0]


def _load_others(nodes: dict[str, Any]) -> tuple[Any, Any]:
    names = {"file": "tiny_clip_l.safetensors", "file_2": "tiny_t5.safetensors"}
    encoders = _run(nodes, "LoadTextEncoders", **names, dtype="auto")[0]
    autoencoder = _run(nodes, "LoadAutoencoder", file="tiny_ae.safetensors", dtype="auto")[0]
    return encoders, autoencoder


def _prepare(nodes: dict[str, Any], model: Any, steps: int = 2) -> dict[str, Any]:
    """All that a sampler takes beside the model."""
    import torch

    encoders, autoencoder = _load_others(nodes)
    settings = {"prompt_2": "", "t5_tokens": 16}
    text = _run(nodes, "EncodeText", text_encoders=encoders, prompt="red", **settings)[0]
    picture = {"image": torch.rand(1, 64, 64, 3), "posterior": "mode", "seed": 0}
    reference = _run(nodes, "EncodeAndPack", autoencoder=autoencoder, **picture)
    wired = {"guidance": 2.5, "placement": "offset", "references": {"reference_1": reference}}
    conditioning = _run(nodes, "ReferenceConditioner", text=text, **wired)
    noise = _run(nodes, "Noise", model=model, width=64, height=64, seed=1, batch_size=1)
    curve = {"steps": steps, "kind": "flux", "sigmas": ""}
    sigmas = _run(nodes, "Schedule", model=model, noise=noise, **curve)
    return {"conditioning": conditioning, "noise": noise, "sigmas": sigmas, "solver": "euler"}


def _edit(nodes: dict[str, Any]) -> Any:
    model = _load_model(nodes)
    inputs = _prepare(nodes, model)
    guided = _run(nodes, "SampleGuided", model=model, **inputs)
    both = {"positive": inputs["conditioning"], "negative": inputs.pop("conditioning")}
    window = {"cfg": 2.0, "start": 0.0, "end": 1.0, "passes": "batched"}
    _run(nodes, "SampleTrueCFG", model=model, **inputs, **both, **window)
    return _run(nodes, "UnpackAndDecode", autoencoder=_load_others(nodes)[1], tokens=guided)


def _sharing(nodes: dict[str, Any]) -> Answer:
    """Two loaders share one model; the last user takes it along."""
    import comfy.model_management as mm

    model, again = _load_model(nodes), _load_model(nodes)
    other = _run(nodes, "LoadModel", file=model_file(), family="auto", dtype="bfloat16")[0]
    answer: Answer = {"shared": model is again, "dtypes_apart": other is not model}
    _run(nodes, "SampleGuided", model=model, **_prepare(nodes, model))
    parts = [model.network.blocks, model.network.modulation, *_load_others(nodes)]
    alive = [weakref.ref(one) for one in (model, model.network, *parts)]
    answer["patchers"] = len(model.get_models())
    del model, again, other, parts
    answer["freed"] = [one() is None for one in alive]
    answer["still_loaded"] = len(mm.current_loaded_models)
    return answer


def model_file() -> str:
    return "tiny-kontext.safetensors"


def _cancelling(nodes: dict[str, Any]) -> Answer:
    """A cancel in the middle of a step ends the run at once and frees the plan."""
    import comfy.model_management as mm
    import torch

    plan_module = importlib.import_module(f"{probe.PACK}.flux_core.transformer.plan")
    model = _load_model(nodes)
    inputs = _prepare(nodes, model, steps=50)
    plans: list[Any] = []
    original, calls = plan_module.Plan.velocity, 0

    def counted(self: Any, x: torch.Tensor, sigma: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        plans.append(weakref.ref(self.txt))
        if calls == 3:
            mm.interrupt_current_processing(True)
        return original(self, x, sigma)

    plan_module.Plan.velocity = counted
    interrupted = False
    try:
        _run(nodes, "SampleGuided", model=model, **inputs)
    except mm.InterruptProcessingException:
        interrupted = True
    finally:
        plan_module.Plan.velocity = original
    freed = all(one() is None for one in plans)
    return {"interrupted": interrupted, "steps_begun": calls, "plans_freed": freed}


def _modulation(nodes: dict[str, Any]) -> Answer:
    """While the blocks run, the modulation is on nobody's list of loaded models."""
    import comfy.model_management as mm

    plan_module = importlib.import_module(f"{probe.PACK}.flux_core.transformer.plan")
    model = _load_model(nodes)
    inputs = _prepare(nodes, model)
    loaded: list[list[str]] = []
    original = plan_module.Plan.velocity

    def watched(self: Any, x: Any, sigma: float) -> Any:
        loaded.append([type(one.model.model).__name__ for one in mm.current_loaded_models])
        return original(self, x, sigma)

    plan_module.Plan.velocity = watched
    _run(nodes, "SampleGuided", model=model, **inputs)
    plan_module.Plan.velocity = original
    return {"loaded_while_sampling": loaded}


if __name__ == "__main__":
    probe.run(main)
