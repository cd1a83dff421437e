"""Models with quantised weights that stay in memory as they are stored.

Numbers are made of a weight whenever its layer is used, and changes are added to those numbers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import host

if TYPE_CHECKING:
    from ...flux_core.weights.lora import LoraPart

# Bytes for each number while it is made: its place in nvfp4's table, and a change of it with the
# number itself in float32.
_PLACES, _CHANGES = 5, 8


def changed_at_use(patcher: Any, parts: Sequence["LoraPart"]) -> Any:
    """Clone a patcher with changes, as `host.changed` does, exactly where weights are quantised.

    ComfyUI would quantise a changed weight again. So the changes of such weights are added
    whenever they are used, and taken off when another clone is loaded.
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
        clone.add_patches({})  # gives it a uuid of its own, without which it is not loaded anew
    return clone


def made_bytes(*patchers: Any) -> int:
    """Estimate what the largest quantised weight takes while it is numbers."""
    return max(
        (
            _made_bytes(layer.weight, f"{name}.weight" in patcher.weight_wrapper_patches)
            for patcher in patchers
            for name, layer in host.quantised_layers(patcher.model).items()
        ),
        default=0,
    )


def _made_bytes(weight: Any, is_changed: bool) -> int:
    """Count numbers before and after scaling, or scaled ones and what is added to them."""
    size = weight.dtype.itemsize
    making = 2 * size + (_PLACES if weight.storage_dtype == torch.uint8 else 0)
    return weight.numel() * max(making, size + _CHANGES if is_changed else 0)
