"""LoRAs on ComfyUI's own MODEL: on a clone of it, as ComfyUI's own loader puts them.

ComfyUI calls our tensors by our names behind one prefix. `Any` stands for its own classes, which
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
_RESHAPE = 5  # of a LoRA's parts in ComfyUI's words: the size it gives the weight


def native_with_changes(
    patcher: Any, parts: Sequence["LoraPart"], norms: Sequence[tuple[str, Tensor]] = ()
) -> Any:
    """Give a clone of a MODEL with changes on it, beside those that it has.

    The clone is of the MODEL's own class, which patches quantised weights in its own way. Norms
    take the place of its own, at any strength, and img_in is made as wide as its change first:
    only Canny's and Depth's LoRAs bring norms.

    Raises:
        SettingError: the MODEL has no tensor of a name that its network should have, or a LoRA on
            it has made a changed one larger.
    """
    enlarged = [part.key for part in parts if _PREFIX + part.key in larger_weights(patcher)]
    if enlarged:
        raise SettingError(
            f"A LoRA on the MODEL, as Canny's and Depth's do, makes '{enlarged[0]}' larger, which "
            "this LoRA changes as it was.",
            "this LoRA before the other one.",
            "wire 'Apply LoRA (FLUX)' before the node that puts on the other LoRA.",
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
            "take the node that changes or compiles the network's layers off this model, and "
            "unload the models once.",
        )
    return clone


def _widened(patcher: Any, parts: Iterable["LoraPart"]) -> Any:
    """Give a clone whose img_in has as many columns as its change, those added of zeros."""
    clone = patcher.clone()
    for part in parts:
        if part.key == _INPUT:
            zeros = torch.zeros_like(part.change.delta(torch.device("cpu")))
            clone.add_patches({_PREFIX + part.key: ("diff", (zeros, {"pad_weight": True}))})
    return clone


def larger_weights(patcher: Any) -> dict[str, list[int]]:
    """Name the weights that a LoRA on a MODEL makes larger, with the sizes they get.

    BFL's Canny and Depth LoRAs do it to img_in, which then takes a second picture's channels.
    """
    return {
        key: size
        for key, patches in patcher.patches.items()
        for size in map(_size_given, patches)
        if size
    }


def _size_given(patch: tuple[Any, ...]) -> list[int]:
    """Tell the size a patch gives its weight; [] when it leaves it."""
    change = patch[1]
    parts = getattr(change, "weights", ())
    size = parts[_RESHAPE] if len(parts) == _RESHAPE + 1 else None  # GLoRA has a tensor there
    if isinstance(size, list | tuple) and size:
        return list(size)
    if not isinstance(change, tuple) or change[0] != "diff":
        return []
    values: Any = change[1]
    return list(values[0].shape) if len(values) > 1 and values[1].get("pad_weight") else []
