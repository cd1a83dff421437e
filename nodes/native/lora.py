"""LoRAs on ComfyUI's own MODEL: patches on a clone of it, as ComfyUI's own loader adds them.

ComfyUI's names of the tensors are ours after a prefix. `Any` stands for its own classes, which
carry no usable types.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...flux_core.errors import SettingError
from .. import host

if TYPE_CHECKING:
    from ...flux_core.weights.lora import LoraPart

_PREFIX = "diffusion_model."
_INPUT = "img_in.weight"
_RESHAPE = 5  # index of `reshape`, the new size of the weight, in ComfyUI's LoRA weights


def native_with_changes(
    patcher: Any, parts: Sequence["LoraPart"], norms: Sequence[tuple[str, Tensor]] = ()
) -> Any:
    """Returns a clone of a MODEL with a LoRA's changes added to the patches that it has.

    The clone is of the MODEL's own class, which patches quantised weights in its own way. Norms
    replace the model's, whatever the strength, and img_in is first widened to the size of its
    change: only Canny's and Depth's LoRAs have norms.

    Raises:
        SettingError: the MODEL lacks a tensor that its network should have, or another LoRA has
            enlarged one that this LoRA changes.
    """
    enlarged = [part.key for part in parts if _PREFIX + part.key in larger_weights(patcher)]
    if enlarged:
        raise SettingError(
            f"A LoRA on the MODEL, as Canny's and Depth's do, makes '{enlarged[0]}' larger, which "
            "this LoRA changes as it was.",
            "this LoRA before the other one.",
            "wire [LoRA loader] before the node that applies the other LoRA.",
        )
    wide = _widened(patcher, parts) if norms else patcher
    clone = host.changed(wide, [replace(part, key=_PREFIX + part.key) for part in parts])
    lost = [part.key for part in parts if _PREFIX + part.key not in clone.patches]
    for key, values in norms:
        # Versions of ComfyUI differ in what they call them.
        names = (_PREFIX + key.removesuffix("scale") + "weight", _PREFIX + key)
        taken = clone.add_patches(dict.fromkeys(names, ("set", (values,))))
        lost += [] if taken else [key]
    if lost:
        raise SettingError(
            f"The MODEL's network has no '{lost[0]}' ({len(lost)} tensors are not found).",
            "ComfyUI's own names of the weights.",
            "remove the node that changes or compiles the network's layers from this model, and "
            "unload the models once.",
        )
    return clone


def _widened(patcher: Any, parts: Iterable["LoraPart"]) -> Any:
    """Returns a clone whose img_in is padded with zero columns to the size of its change."""
    clone = patcher.clone()
    for part in parts:
        if part.key == _INPUT:
            zeros = torch.zeros_like(part.change.delta(torch.device("cpu")))
            clone.add_patches({_PREFIX + part.key: ("diff", (zeros, {"pad_weight": True}))})
    return clone


def larger_weights(patcher: Any) -> dict[str, list[int]]:
    """Returns the weights that LoRAs on a MODEL enlarge, with their new sizes.

    BFL's Canny and Depth LoRAs enlarge img_in, which then takes a second image's channels.
    """
    return {
        key: size
        for key, patches in patcher.patches.items()
        for size in map(_new_size, patches)
        if size
    }


def _new_size(patch: tuple[Any, ...]) -> list[int]:
    """Returns the size to which a patch enlarges its weight; [] if it does not."""
    change = patch[1]
    parts = getattr(change, "weights", ())
    size = parts[_RESHAPE] if len(parts) == _RESHAPE + 1 else None  # GLoRA has a tensor there
    if isinstance(size, list | tuple) and size:
        return list(size)
    if not isinstance(change, tuple) or change[0] != "diff":
        return []
    values: Any = change[1]
    return list(values[0].shape) if len(values) > 1 and values[1].get("pad_weight") else []
