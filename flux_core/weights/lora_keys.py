"""The keys of a LoRA: from the names every trainer writes to rows of our tensors.

Every trainer writes its own prefix, dots or underscores, and endings; the layers between them have
the published names or diffusers'. Our tensors are the published, fused ones. diffusers' layers are
slices of their rows (q, k, v and the mlp), and so is XLabs' one of a single block, which does not
change the mlp. diffusers holds the halves of the last modulation the other way round.

Source: ComfyUI 0.30.0 comfy/lora.py and comfy/weight_adapter; huggingface/diffusers 0.42.1
loaders/lora_conversion_utils.py and lora_base.py; huggingface/peft LoraConfig.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, cast

from ..errors import CheckpointError
from ..types import Shapes
from .checkpoint import Checkpoint
from .transformer_keys import FINAL_MODULATION, diffusers_rows

CHOOSE = "choose another file in [LoRA loader]."

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
# XLabs names the processor of an attention: 1 is the image's, 2 the text's.
_XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear1": "processor.qkv_lora",
    "linear2": "processor.proj_lora",
}
_WEIGHT = ".weight"
_CONFIG_KEY = "lora_adapter_metadata"


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """What a file holds for one layer."""

    name: str  # as the file writes it, without the ending
    keys: dict[Role, str] = field(default_factory=dict[Role, str])
    others: list[str] = field(default_factory=list[str])  # kinds of what is not computed here

    def size(self, shapes: Shapes) -> tuple[int, int]:
        """Returns the layer's outputs and inputs; 0 where the file does not tell."""
        if "full" in self.keys:
            return _pair(shapes[self.keys["full"]])
        if "down" in self.keys or "up" in self.keys:
            outputs = _pair(shapes[self.keys["up"]])[0] if "up" in self.keys else 0
            return outputs, _pair(shapes[self.keys["down"]])[1] if "down" in self.keys else 0
        first, second = (self._factor(which, shapes) for which in ("first", "second"))
        return first[0] * second[0], first[1] * second[1]

    def rank(self, shapes: Shapes) -> int:
        """Returns the layer's rank; 0 where it has none.

        LoKr has a rank where one of its two matrices is a product.
        """
        roles: tuple[Role, ...] = ("down", "second b", "first b")
        return next((shapes[self.keys[role]][0] for role in roles if role in self.keys), 0)

    def _factor(self, which: Literal["first", "second"], shapes: Shapes) -> tuple[int, int]:
        keys = self.keys
        if which in keys:
            return _pair(shapes[keys[which]])
        left: Role = "first a" if which == "first" else "second a"
        right: Role = "first b" if which == "first" else "second b"
        outputs = _pair(shapes[keys[left]])[0] if left in keys else 0
        return outputs, _pair(shapes[keys[right]])[1] if right in keys else 0


@dataclass(frozen=True, slots=True)
class LoraKeys:
    """The keys of a LoRA by layer, and those of no layer."""

    layers: dict[str, LoraLayer]  # by name without prefix, words joined by underscores
    text: tuple[str, ...]  # keys of text encoders
    unknown: tuple[str, ...]  # keys that are no part of any layer
    duplicates: tuple[str, ...]  # keys that say again what another says
    writer: str  # which program's way of naming it is


def sort_keys(keys: Iterable[str]) -> LoraKeys:
    """Sorts the keys of a file by layer."""
    layers: dict[str, LoraLayer] = {}
    text: list[str] = []
    unknown: list[str] = []
    duplicates: list[str] = []
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
                duplicates.append(key)
            names.append(name)
    return LoraKeys(layers, tuple(text), tuple(unknown), tuple(duplicates), _writer(names, layers))


def plain_name(name: str) -> str:
    """Strips the prefix of a layer's name, and joins its words by underscores."""
    prefix = _PREFIX.match(name)
    return name[prefix.end() if prefix else 0 :].replace(".", "_")


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """The rows of one of our tensors that a layer changes."""

    key: str
    start: int
    rows: int
    columns: int
    swapped: bool = False  # the LoRA's halves are the other way round

    def agrees(self, size: tuple[int, int]) -> bool:
        """Returns whether a layer's outputs and inputs, 0 where unknown, are these."""
        return size[0] in (0, self.rows) and size[1] in (0, self.columns)


def targets_of(shapes: Shapes) -> dict[str, LoraTarget]:
    """Lists all names a layer can have, with the rows it changes.

    Args:
        shapes: of a transformer's tensors, by published name.

    Returns:
        By name without prefix, words joined by underscores.
    """
    targets: dict[str, LoraTarget] = {}
    for key, rows in diffusers_rows(shapes):
        if not key.endswith(_WEIGHT):
            continue
        start, columns = 0, shapes[key][1]
        swapped = key.startswith(FINAL_MODULATION)
        for part, count in rows.items():
            targets[_joined(part)] = LoraTarget(key, start, count, columns, swapped)
            start += count
    for key, shape in shapes.items():
        if key.endswith(_WEIGHT):
            targets[_joined(key)] = LoraTarget(key, 0, shape[0], shape[1])
            xlabs = _xlabs_name(key)
            if xlabs:
                rows_changed = 3 * shape[1] if xlabs.endswith("processor_qkv_lora") else shape[0]
                targets[xlabs] = LoraTarget(key, 0, rows_changed, shape[1])
    return targets


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of a PEFT configuration that changes the arithmetic."""

    alpha: float | None = None
    alphas: tuple[tuple[str, float], ...] = ()  # the end of a layer's plain name, its alpha
    is_rank_stabilised: bool = False  # alpha is divided by the root of the rank

    def scale(self, name: str, rank: int) -> float:
        """Returns alpha / rank of a layer by its plain name; 1 where nothing is said."""
        alpha = self.alpha
        for end, said in self.alphas:
            if name == end or name.endswith("_" + end):
                alpha = said
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def read_config(checkpoint: Checkpoint) -> AdapterConfig:
    """Reads the configuration in a file's header, of the transformer's part.

    Raises:
        CheckpointError: it cannot be read, or asks for another kind of adapter.
    """
    text = checkpoint.metadata.get(_CONFIG_KEY)
    if text is None:
        return AdapterConfig()
    try:
        table: object = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise _unreadable(checkpoint, "is not a JSON object")
    said = {
        key.removeprefix("transformer."): value
        for key, value in cast("dict[str, object]", table).items()
    }
    if said.get("use_dora"):
        raise CheckpointError(
            f"{checkpoint.path.name} is a DoRA, as its header says.",
            "a LoRA or a LoKr.",
            CHOOSE,
        )
    alpha = said.get("lora_alpha")
    patterns: object = said.get("alpha_pattern", {})
    if not isinstance(patterns, dict):
        raise _unreadable(checkpoint, "has an alpha_pattern that is no table")
    return AdapterConfig(
        None if alpha is None else _number(checkpoint, alpha),
        tuple(
            (plain_name(key.lstrip("^")), _number(checkpoint, value))
            for key, value in cast("dict[str, object]", patterns).items()
        ),
        bool(said.get("use_rslora")),
    )


def _role_of(key: str) -> tuple[str, Role | None, str]:
    """Splits a key into the layer's name, the role, and the kind that is not computed here."""
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


def _xlabs_name(key: str) -> str:
    kind, _, rest = key.removesuffix(_WEIGHT).partition(".")
    number, _, layer = rest.partition(".")
    return f"{kind}.{number}.{_XLABS[layer]}".replace(".", "_") if layer in _XLABS else ""


def _joined(key: str) -> str:
    return key.removesuffix(_WEIGHT).replace(".", "_")


def _number(checkpoint: Checkpoint, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise _unreadable(checkpoint, "has an alpha that is no number")
    return float(value)


def _unreadable(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(
        f"The {_CONFIG_KEY} in the header of {checkpoint.path.name} {what}.",
        "a header as diffusers writes it.",
        CHOOSE,
    )
