"""Which rows of which of our tensors a layer of a LoRA changes, by any of the layer's names.

Our tensors are the published, fused ones. diffusers' layers are slices of their rows (q, k, v and
the mlp), and so is XLabs' one of a single block, which leaves the mlp alone. diffusers holds the
halves of the last modulation the other way round.
Source: huggingface/diffusers 0.42.1 loaders/lora_conversion_utils.py; ComfyUI 0.30.0 comfy/lora.py.
"""

from dataclasses import dataclass

from .layout import Shapes
from .transformer_keys import FINAL_MODULATION, diffusers_rows

# XLabs names the processor of an attention: 1 is the picture's, 2 the text's.
_XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear1": "processor.qkv_lora",
    "linear2": "processor.proj_lora",
}
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Target:
    """Rows of one of our tensors."""

    key: str
    start: int
    rows: int
    columns: int
    swapped: bool = False  # the LoRA's halves are the other way round


def targets_of(shapes: Shapes) -> dict[str, Target]:
    """List all names a layer can have, with what it changes.

    Args:
        shapes: of a transformer's tensors, by published name.

    Returns:
        By name without prefix, words joined by underscores.
    """
    found: dict[str, Target] = {}
    for key, rows in diffusers_rows(shapes):
        if not key.endswith(_WEIGHT):
            continue
        start, columns = 0, shapes[key][1]
        swapped = key.startswith(FINAL_MODULATION)
        for part, count in rows.items():
            found[_name(part)] = Target(key, start, count, columns, swapped)
            start += count
    for key, shape in shapes.items():
        if key.endswith(_WEIGHT):
            found[_name(key)] = Target(key, 0, shape[0], shape[1])
            xlabs = _xlabs_name(key)
            if xlabs:
                rows_changed = 3 * shape[1] if xlabs.endswith("processor_qkv_lora") else shape[0]
                found[xlabs] = Target(key, 0, rows_changed, shape[1])
    return found


def _xlabs_name(key: str) -> str:
    kind, _, rest = key.removesuffix(_WEIGHT).partition(".")
    number, _, layer = rest.partition(".")
    return f"{kind}.{number}.{_XLABS[layer]}".replace(".", "_") if layer in _XLABS else ""


def _name(key: str) -> str:
    return key.removesuffix(_WEIGHT).replace(".", "_")
