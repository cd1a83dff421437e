"""Which model a LoRA was made for, by the names and sizes of the layers it changes."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from ..families import FAMILIES
from ..specs import FluxFamily
from ..transformer.flux import build_flux
from .choose import join_titles
from .layout import Shapes
from .lora_layers import Target, targets_of
from .lora_names import LoraNames, sort_names

_BLOCK = re.compile(r"(?P<stem>(?P<single>single_)?\w*blocks_)(?P<number>\d{1,5})(?P<rest>_.+)")
# Names of layers that only another model has.
_STRANGERS = (
    ("distilled_guidance_layer_", "Chroma"),
    ("joint_blocks_", "Stable Diffusion 3"),
    ("input_blocks_", "Stable Diffusion 1.5 or XL"),
    ("down_blocks_", "Stable Diffusion 1.5 or XL"),
    ("transformer_blocks_0_img_mlp_", "Qwen-Image"),
    ("transformer_blocks_0_attn1_", "LTX-Video"),
    ("blocks_0_self_attn_", "Wan"),
    ("blocks_0_cross_attn_", "Wan"),
)


class _Layers:
    """The layers a LoRA changes: outputs and inputs (0: not told), and how many blocks it needs."""

    def __init__(self, names: LoraNames, shapes: Shapes) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}  # every block's as block 0's
        self.doubles = self.singles = 0
        self.agree = True
        for name, layer in names.layers.items():
            size = layer.size(shapes)
            if any(size):
                self._add(self._as_first(name), size)

    def fit(self, known: Mapping[str, Target], family: FluxFamily) -> bool:
        """Tell whether a family has all of these layers, in these sizes."""
        spec = family.transformer
        return (
            self.agree
            and self.doubles <= spec.double_blocks
            and self.singles <= spec.single_blocks
            and all(
                given in (0, needed)
                for name, size in self.sizes.items()
                for given, needed in zip(size, (known[name].rows, known[name].columns), strict=True)
            )
        )

    def _as_first(self, name: str) -> str:
        block = _BLOCK.fullmatch(name)
        if block is None:
            return name
        count = int(block["number"]) + 1
        if block["single"]:
            self.singles = max(self.singles, count)
        else:
            self.doubles = max(self.doubles, count)
        return f"{block['stem']}0{block['rest']}"

    def _add(self, name: str, size: tuple[int, int]) -> None:
        before = self.sizes.get(name, (0, 0))
        pairs = list(zip(before, size, strict=True))
        self.agree = self.agree and all(0 in pair or pair[0] == pair[1] for pair in pairs)
        self.sizes[name] = (max(pairs[0]), max(pairs[1]))


def lora_title(shapes: Shapes) -> str:
    """Say for which models a LoRA is, as far as its layers tell."""
    layers = _Layers(sort_names(shapes), shapes)
    if not layers.sizes:
        return "a LoRA"
    known = {name: _layers_of(family) for name, family in FAMILIES.items()}
    named = [
        family for name, family in FAMILIES.items() if layers.sizes.keys() <= known[name].keys()
    ]
    fitting = [family for family in named if layers.fit(known[family.name], family)]
    if fitting:
        return f"a LoRA for {join_titles(fitting)}"
    if len({family.transformer.shares_modulation for family in named}) == 1:
        return f"a LoRA for a {named[-1].latent.name} transformer of another size"
    for mark, title in _STRANGERS:
        if any(name.startswith(mark) for name in layers.sizes):
            return f"a LoRA for {title}"
    return "a LoRA"


@cache
def _layers_of(family: FluxFamily) -> dict[str, Target]:
    """List the layers of a family in every way of naming, with one block of each kind."""
    spec = replace(family.transformer, double_blocks=1, single_blocks=1)
    network = build_flux(family, spec, device="meta")
    return targets_of(
        {
            key: tuple(tensor.shape)
            for part in (network.modulation, network.blocks)
            for key, tensor in part.state_dict().items()
        }
    )
