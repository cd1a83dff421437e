"""Which model a LoRA was made for, by the names and sizes of the layers it changes.

LoRAs name layers as the published files or as diffusers does, with dots or underscores.
Source: huggingface/diffusers 0.42.1 loaders/lora_conversion_utils.py for the ways of naming.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from ..families import FAMILIES
from ..specs import FluxFamily
from ..transformer.flux import build_flux
from .choose import join_titles
from .layout import Shapes
from .transformer_keys import diffusers_shapes

_PREFIX = re.compile(
    r"(base_model\.model\.|lora_unet_|lora_transformer_|lycoris_|diffusion_model\.|transformer\.)+"
)
_ENDING = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up)(\.default)?\.weight$")
_BLOCK = re.compile(r"(?P<stem>(?P<single>single_)?\w*blocks_)(?P<number>\d{1,5})(?P<rest>_.+)")


class _Layers:
    """The layers a LoRA changes: outputs and inputs (0: not told), and how many blocks it needs."""

    def __init__(self, shapes: Shapes) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}  # every block's as block 0's
        self.doubles = self.singles = 0
        self.agree = True
        for key, shape in shapes.items():
            ending = _ENDING.search(key)
            if ending is not None and len(shape) == 2:
                is_down = ending[1] in ("lora_A", "lora_down")
                size = (0, shape[1]) if is_down else (shape[0], 0)
                self._add(self._as_first(key[: ending.start()]), size)

    def fit(self, known: Mapping[str, tuple[int, ...]], family: FluxFamily) -> bool:
        """Tell whether a family has all of these layers, in these sizes."""
        spec = family.transformer
        return (
            self.agree
            and self.doubles <= spec.double_blocks
            and self.singles <= spec.single_blocks
            and all(
                given in (0, needed)
                for name, size in self.sizes.items()
                for given, needed in zip(size, known[name], strict=True)
            )
        )

    def _as_first(self, name: str) -> str:
        name = _PREFIX.sub("", name, count=1).replace(".", "_")
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
    layers = _Layers(shapes)
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
    return "a LoRA"


def _layers_of(family: FluxFamily) -> dict[str, tuple[int, ...]]:
    """List the layers of a family in both ways of naming, with one block of each kind."""
    spec = replace(family.transformer, double_blocks=1, single_blocks=1)
    network = build_flux(family, spec, device="meta")
    shapes = {
        key: tuple(tensor.shape)
        for part in (network.modulation, network.blocks)
        for key, tensor in part.state_dict().items()
    }
    return {
        key.removesuffix(".weight").replace(".", "_"): shape
        for key, shape in (shapes | diffusers_shapes(shapes)).items()
        if len(shape) == 2
    }
