"""What the keys of a LoRA mean: which layer each belongs to, and what it is there.

Every trainer writes its own prefix, dots or underscores, and endings; the layers behind them have
the published names or diffusers', see `lora_layers`.
Source: ComfyUI 0.30.0 comfy/lora.py and comfy/weight_adapter; huggingface/diffusers 0.42.1
loaders/lora_conversion_utils.py.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from .layout import Shapes

Role = Literal[
    "down",
    "up",
    "bias",  # of the up layer: it is added to the layer's own
    "alpha",
    "first",  # Kronecker's left factor, or its two factors
    "first a",
    "first b",
    "second",
    "second a",
    "second b",
    "full",  # a change of the whole weight
    "full bias",
    "other",  # of a kind of file that changes weights otherwise
]
_ROLES: dict[str, Role] = {
    **dict.fromkeys(
        (
            "lora_A.weight",
            "lora_A.default.weight",
            "lora_A",
            "lora_down.weight",
            "lora.down.weight",
            "lora_linear_layer.down.weight",
            "down.weight",
        ),
        "down",
    ),
    **dict.fromkeys(
        (
            "lora_B.weight",
            "lora_B.default.weight",
            "lora_B",
            "lora_up.weight",
            "lora.up.weight",
            "lora_linear_layer.up.weight",
            "up.weight",
        ),
        "up",
    ),
    "lora_B.bias": "bias",
    "lora_B.default.bias": "bias",
    "lora_up.bias": "bias",
    "alpha": "alpha",
    "lokr_w1": "first",
    "lokr_w1_a": "first a",
    "lokr_w1_b": "first b",
    "lokr_w2": "second",
    "lokr_w2_a": "second a",
    "lokr_w2_b": "second b",
    "diff": "full",
    "diff_b": "full bias",
}
# Endings of what this pack does not compute, and how people call such files.
_OTHERS = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_magnitude_vector.weight": "a DoRA",
    "lora_magnitude_vector.default.weight": "a DoRA",
    "hada_w1_a": "a LoHa",
    "hada_w2_a": "a LoHa",
    "lora_mid.weight": "a LoCon for convolutions",
    "lokr_t2": "a LoKr for convolutions",
    "oft_blocks": "an OFT",
    "oft_diag": "an OFT",
    "a1.weight": "a GLoRA",
    "reshape_weight": "a LoRA that makes layers larger",
    "set_weight": "a LoRA that replaces whole layers",
    "w_norm": "a LoRA that changes norms",
}
_PREFIX = re.compile(
    r"(base_model\.model\.|lora_unet_|lora_transformer_|lycoris_|diffusion_model\.|model\."
    r"|transformer\.)+"
)
# In the order they are looked for at the start of a name: who writes such files.
_WRITERS = (
    ("lora_unet_", "kohya"),
    ("lora_transformer_", "OneTrainer"),
    ("lycoris_", "LyCORIS"),
    ("base_model.model.", "PEFT"),
    ("diffusion_model.", "ComfyUI's own (ai-toolkit)"),
    ("transformer.", "diffusers"),
)
_TEXT = ("lora_te", "text_encoder", "text_model.", "te1_", "te2_", "te3_", "t5xxl.", "clip_l.")


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """What a file holds for one layer."""

    name: str  # as the file writes it, without the ending
    keys: dict[Role, str] = field(default_factory=dict[Role, str])
    others: list[str] = field(default_factory=list[str])  # kinds of what is not computed here

    def size(self, shapes: Shapes) -> tuple[int, int]:
        """Tell the layer's outputs and inputs; 0 where the file does not."""
        if "full" in self.keys:
            return _pair(shapes[self.keys["full"]])
        if "down" in self.keys or "up" in self.keys:
            outputs = _pair(shapes[self.keys["up"]])[0] if "up" in self.keys else 0
            return outputs, _pair(shapes[self.keys["down"]])[1] if "down" in self.keys else 0
        first, second = (self._factor(which, shapes) for which in ("first", "second"))
        return first[0] * second[0], first[1] * second[1]

    def _factor(self, which: Literal["first", "second"], shapes: Shapes) -> tuple[int, int]:
        keys = self.keys
        if which in keys:
            return _pair(shapes[keys[which]])
        left: Role = "first a" if which == "first" else "second a"
        right: Role = "first b" if which == "first" else "second b"
        outputs = _pair(shapes[keys[left]])[0] if left in keys else 0
        return outputs, _pair(shapes[keys[right]])[1] if right in keys else 0


@dataclass(frozen=True, slots=True)
class LoraNames:
    """The keys of a LoRA, sorted out."""

    layers: dict[str, LoraLayer]  # by name without prefix, words joined by underscores
    text: tuple[str, ...]  # keys of text encoders
    unknown: tuple[str, ...]  # keys that are no part of any layer
    twice: tuple[str, ...]  # keys that say again what another says
    writer: str  # which program's way of naming it is

    @property
    def parts(self) -> int:
        """Count the keys that belong to layers."""
        return sum(len(layer.keys) for layer in self.layers.values())


def sort_names(keys: Iterable[str]) -> LoraNames:
    """Sort out the keys of a file."""
    layers: dict[str, LoraLayer] = {}
    text: list[str] = []
    unknown: list[str] = []
    twice: list[str] = []
    names: list[str] = []
    for key in keys:
        name, role, other = _role_of(key)
        if key.startswith(_TEXT):
            text.append(key)
        elif not role:
            unknown.append(key)
        else:
            layer = layers.setdefault(plain_name(name), LoraLayer(name))
            if other:
                layer.others.append(other)
            elif layer.keys.setdefault(role, key) != key:
                twice.append(key)
            names.append(name)
    return LoraNames(layers, tuple(text), tuple(unknown), tuple(twice), _writer(names, layers))


def plain_name(name: str) -> str:
    """Strip the prefix of a layer's name, and join its words by underscores."""
    prefix = _PREFIX.match(name)
    return name[prefix.end() if prefix else 0 :].replace(".", "_")


def _role_of(key: str) -> tuple[str, Role | None, str]:
    """Split a key into the layer's name, the role, and the kind that is not computed here."""
    parts = key.rsplit(".", 3)
    for start in range(1, len(parts)):
        ending = ".".join(parts[start:])
        name = key[: -len(ending) - 1]
        if ending in _ROLES:
            return name, _ROLES[ending], ""
        if ending in _OTHERS:
            return name, "other", _OTHERS[ending]
    return key, None, ""


def _writer(names: list[str], layers: dict[str, LoraLayer]) -> str:
    said = next((who for mark, who in _WRITERS if any(one.startswith(mark) for one in names)), "")
    if any("first" in role for layer in layers.values() for role in layer.keys):
        return f"LoKr ({said})" if said else "LoKr"
    if any(".processor." in name for name in names):
        return "XLabs"
    is_diffusers = any("transformer_blocks" in name for name in layers)
    return said or ("diffusers without a prefix" if is_diffusers else "BFL's names")


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)
