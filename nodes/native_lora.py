"""LoRAs on ComfyUI's own MODEL: on a clone of it, as ComfyUI's own loader puts them.

ComfyUI calls our tensors by our names behind one prefix. `Any` stands for its own classes, which
carry no usable types.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..flux_core.errors import SettingError
from . import host

if TYPE_CHECKING:
    from ..flux_core.weights.lora_parts import LoraPart

_PREFIX = "diffusion_model."


def native_with_changes(patcher: Any, parts: Sequence["LoraPart"]) -> Any:
    """Give a clone of a MODEL with changes on it, beside those that it has.

    The clone is of the MODEL's own class, which patches quantised weights in its own way.

    Raises:
        SettingError: the MODEL has no tensor of a name that its network should have.
    """
    clone = host.changed(patcher, [replace(part, key=_PREFIX + part.key) for part in parts])
    lost = [part.key for part in parts if _PREFIX + part.key not in clone.patches]
    if lost:
        raise SettingError(
            f"The MODEL's network has no '{lost[0]}' ({len(lost)} tensors are not found).",
            "ComfyUI's own names of the weights.",
            "take the node that changes or compiles the network's layers off this model, and "
            "unload the models once.",
        )
    return clone
