"""Probe: one LoRA file through ComfyUI's own loader on its own network, and through ours.

Both start from the same tiny weights, and every patched weight is compared.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import probe

Answer = dict[str, Any]
Named = Callable[[str], str]
AB, DOWN_UP = ("lora_A", "lora_B"), ("lora_down", "lora_up")
# How a layer is written, in whose names, with which endings, and whether with an alpha.
FORMATS: dict[str, tuple[Named, str, tuple[str, str], bool]] = {
    "kohya": (lambda name: f"lora_unet_{name.replace('.', '_')}", "BFL", DOWN_UP, True),
    "ai-toolkit": (lambda name: f"diffusion_model.{name}", "BFL", AB, False),
    "diffusers": (lambda name: f"transformer.{name}", "diffusers", AB, False),
    "OneTrainer": (
        lambda name: f"lora_transformer_{name.replace('.', '_')}",
        "diffusers",
        DOWN_UP,
        True,
    ),
}


def main(folder: Path) -> Answer:
    probe.load_pack()
    families = _module("flux_core.families")
    answer: Answer = {}
    for family in (families.FLUX1_DEV, families.FLUX2_DEV):
        network, state = _network(family)
        for form in (*FORMATS, "LoKr"):
            path = _write(folder, form, state)
            name = f"{family.latent.name} {form}"
            answer[name] = _compare(family, network.spec, state, path)
    return answer


def _module(name: str) -> Any:
    return importlib.import_module(f"{probe.PACK}.{name}")


def _network(family: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    size = {"hidden": 256, "double_blocks": 2, "single_blocks": 2}
    spec = replace(family.transformer, **size)
    network = _module("flux_core.transformer.flux").build_flux(family, spec)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    state = {**network.modulation.state_dict(), **network.blocks.state_dict()}
    return network, {key: tensor.clone() for key, tensor in state.items()}


def _write(folder: Path, form: str, state: dict[str, Any]) -> Path:
    import torch
    from safetensors.torch import save_file

    written, names, ends, has_alpha = FORMATS.get(form, FORMATS["kohya"])
    if names == "diffusers":
        state = _module("flux_core.weights.transformer_keys").to_diffusers(state)
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Any:
        return 0.1 * torch.randn(shape, generator=generator)

    tensors: dict[str, Any] = {}
    for key, weight in state.items():
        if weight.ndim != 2:
            continue
        name, (outputs, inputs) = written(key.removesuffix(".weight")), weight.shape
        if form == "LoKr":
            tensors[f"{name}.lokr_w1"] = draw(4, 2)
            tensors[f"{name}.lokr_w2_a"] = draw(outputs // 4, 3)
            tensors[f"{name}.lokr_w2_b"] = draw(3, inputs // 2)
        else:
            tensors[f"{name}.{ends[0]}.weight"] = draw(3, inputs)
            tensors[f"{name}.{ends[1]}.weight"] = draw(outputs, 3)
        if has_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    path = folder / "style.safetensors"
    save_file(tensors, str(path))
    return path


def _compare(family: Any, spec: Any, state: dict[str, Any], path: Path) -> Answer:
    """Patch ComfyUI's network with its loader, and ours with ours."""
    import comfy.lora
    import comfy.sd
    import comfy.utils

    native = comfy.sd.load_diffusion_model_state_dict(
        {key: one.clone() for key, one in state.items()}
    )
    file = comfy.utils.load_torch_file(str(path), safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(native, None, file, 0.5, 0)
    lora = _module("flux_core.weights.lora").load_lora(path, family, spec)
    blocks = _module("flux_core.weights.lora_strengths").parse_strengths("", spec)
    parts = lora.scaled(0.5, blocks)
    add = _module("flux_core.weights.lora").patched
    furthest, missed = 0.0, list[str]()
    for key, weight in state.items():
        ours = add(weight, [part for part in parts if part.key == key])
        patches = patched.patches.get(f"diffusion_model.{key}")
        if patches is None:
            if not ours.equal(weight):
                missed.append(key)
            continue
        theirs = comfy.lora.calculate_weight(patches, weight.clone(), key)
        furthest = max(furthest, float((ours - theirs).abs().max()))
    return {"furthest": furthest, "only ours": missed, "patched": len(patched.patches)}


if __name__ == "__main__":
    probe.run(main)
