"""Models whose weights stay quantised in memory.

A weight is dequantised whenever its layer is used, and changes are added to the result.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import host

if TYPE_CHECKING:
    from ...flux_core.weights.lora import LoraPart

# Bytes per parameter while a weight is dequantised: the index into nvfp4's table; a change and the
# weight it is added to, both float32.
_INDEX_BYTES, _CHANGE_BYTES = 5, 8


def changed_at_use(patcher: Any, parts: Sequence["LoraPart"]) -> Any:
    """Returns a clone of a patcher with changes, as `host.changed` does, but exact when quantised.

    ComfyUI would quantise a changed weight again. So the changes of such weights are added
    whenever they are used, and removed when another clone is loaded.
    """
    from ...flux_core.weights.lora import AddedAtUse

    quantised = host.quantised_layers(patcher.model)
    rest: list[LoraPart] = []
    layers: dict[str, list[LoraPart]] = {}
    for part in parts:
        layer = part.key.removesuffix(".weight")
        here = layers.setdefault(layer, []) if layer in quantised else rest
        here.append(part)
    clone = host.changed(patcher, rest)
    for layer, mine in layers.items():
        smoothing = getattr(quantised[layer], "pre_quant_scale", None)
        key = f"{layer}.weight"
        earlier = [part for one in clone.weight_wrapper_patches.pop(key, []) for part in one.parts]
        clone.add_weight_wrapper(key, AddedAtUse((*earlier, *mine), smoothing))
    if layers:
        clone.add_patches({})  # sets a new uuid, without which ComfyUI would not reload it
    return clone


def dequantised_bytes(*patchers: Any) -> int:
    """Estimates the bytes that the largest quantised weight takes while it is dequantised."""
    return max(
        (
            _dequantised_bytes(layer.weight, f"{name}.weight" in patcher.weight_wrapper_patches)
            for patcher in patchers
            for name, layer in host.quantised_layers(patcher.model).items()
        ),
        default=0,
    )


def _dequantised_bytes(weight: Any, is_changed: bool) -> int:
    """The larger of two needs: values before and after scaling, or scaled values and a change."""
    size = weight.dtype.itemsize
    scaling = 2 * size + (_INDEX_BYTES if weight.storage_dtype == torch.uint8 else 0)
    return weight.numel() * max(scaling, size + _CHANGE_BYTES if is_changed else 0)
