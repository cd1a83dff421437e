"""ComfyUI's model management: modules wrapped, changed, loaded and unloaded.

`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.quant_ops
import comfy.weight_adapter
import torch
from torch import nn

if TYPE_CHECKING:
    from ...flux_core.weights.lora import LoraPart

# ComfyUI's classic patcher, to subclass. `wrap` uses the class that ComfyUI chose at its start.
Patcher = comfy.model_patcher.ModelPatcher


def wrap(module: nn.Module, devices: tuple[torch.device, torch.device]) -> Any:
    """Hands a module to ComfyUI's model management; returns its patcher."""
    module.eval().requires_grad_(False)
    mm.archive_model_dtypes(module)
    held: Any = module
    for layer in quantised_layers(module).values():  # so that ComfyUI reserves room to dequantise
        held.manual_cast_dtype = layer.weight.dtype
    # Looked up here: ComfyUI binds another class to this name when it starts with DynamicVRAM.
    return comfy.model_patcher.CoreModelPatcher(
        module, load_device=devices[0], offload_device=devices[1]
    )


def changed(patcher: Any, parts: Sequence["LoraPart"]) -> Any:
    """Returns a clone of a patcher with those changes that belong to its model.

    ComfyUI adds them to the weights when it loads the clone, in its own dtype for LoRAs: float32,
    or float16 on GPUs that compute well in it. It removes them when another clone is loaded.
    """
    clone = patcher.clone()
    state = patcher.model.state_dict()
    # One call of add_patches takes one strength, and each slice once.
    calls: dict[float, list[dict[object, Any]]] = {}
    for part in parts:
        if part.key not in state:
            continue
        target = part.key if part.whole else (part.key, (0, part.start, part.rows))
        groups = calls.setdefault(part.scale, [])
        group = next((one for one in groups if target not in one), None)
        if group is None:
            group = {}
            groups.append(group)
        group[target] = _patch(part)
    for scale, groups in calls.items():
        for group in groups:
            clone.add_patches(group, scale)
    return clone


def quantised_layers(module: nn.Module) -> dict[str, Any]:
    """The layers whose weights stay quantised, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "weight", None), comfy.quant_ops.QuantizedTensor)
    }


def _patch(part: "LoraPart") -> Any:
    """Converts a change to one of ComfyUI's own adapters."""
    from ...flux_core.weights.lora import Kronecker, LowRank

    change = part.change
    if isinstance(change, LowRank):
        weights = (change.up, change.down, None, None, None, None)
        return comfy.weight_adapter.LoRAAdapter(set(), weights)
    if isinstance(change, Kronecker):
        factors = (change.first, change.second, *[None] * 7)
        return comfy.weight_adapter.LoKrAdapter(set(), factors)
    return ("diff", (change.values,))


def load(patchers: Sequence[Any], activations: int) -> torch.device:
    """Loads models onto their devices, with room for so many bytes of activations."""
    mm.load_models_gpu(list(patchers), memory_required=activations)
    return patchers[0].load_device


def load_whole(patcher: Any) -> None:
    """Loads a model with parameters outside ComfyUI's layers, such as T5's norms.

    ComfyUI leaves those behind when it loads a model in part; they are small, so they follow.
    """
    device = load([patcher], 0)
    for module in patcher.model.modules():
        if not hasattr(module, "comfy_cast_weights"):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)


def unload(patcher: Any) -> None:
    """Unloads one model, and leaves every other one loaded."""
    if patcher.is_dynamic():  # keeps its pinned copy in RAM, so that it loads fast
        patcher.partially_unload(patcher.offload_device, patcher.loaded_size())
        return
    loaded = mm.current_loaded_models
    if any(one.model is patcher for one in loaded):
        others = [one for one in loaded if one.model is not patcher]
        mm.free_memory(1e30, patcher.load_device, keep_loaded=others)
