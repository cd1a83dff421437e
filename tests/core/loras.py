"""Small LoRAs in every way of writing them, with random values."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from glassbox.flux_core.families import FLUX1_DEV, FLUX2_DEV
from glassbox.flux_core.specs import FluxFamily
from glassbox.flux_core.transformer.flux import Flux, build_flux
from glassbox.tests.core.checkpoints import TINY_FLUX1, TINY_FLUX2, randomise, write

RANK = 4
State = dict[str, Tensor]
GENERATIONS = {"FLUX.1": (FLUX1_DEV, TINY_FLUX1), "FLUX.2": (FLUX2_DEV, TINY_FLUX2)}


def network(generation: str) -> Flux:
    family, spec = GENERATIONS[generation]
    made = build_flux(family, spec)
    randomise(made.modulation, made.blocks)
    return made


def state_of(made: Flux) -> State:
    return {
        key: tensor.clone()
        for part in (made.modulation, made.blocks)
        for key, tensor in part.state_dict().items()
    }


def family_of(generation: str) -> FluxFamily:
    return GENERATIONS[generation][0]


def linear(state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Every layer with a matrix: its outputs and inputs."""
    return {
        key.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for key, tensor in state.items()
        if tensor.ndim == 2 and key.endswith(".weight")
    }


class Maker:
    """Draws matrices, and remembers what they change: name of the layer to B A."""

    def __init__(self, seed: int = 1) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.file: State = {}
        self.deltas: State = {}

    def draw(self, *shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=self._generator)

    def pair(
        self,
        layer: str,
        size: tuple[int, int],
        name: str,
        ends: tuple[str, str],
        alpha: float | None = None,
        rank: int = RANK,
    ) -> None:
        up, down = self.draw(size[0], rank), self.draw(rank, size[1])
        self.file |= {name + ends[0]: down, name + ends[1]: up}
        if alpha is not None:
            self.file[name + ".alpha"] = torch.tensor(alpha)
        delta = (1.0 if alpha is None else alpha / rank) * (up.double() @ down.double())
        self.deltas[layer] = delta

    def write(self, folder: Path, metadata: dict[str, str] | None = None) -> Path:
        return write(folder / "style.safetensors", self.file, metadata)


AB = (".lora_A.weight", ".lora_B.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")


def kohya(state: Mapping[str, Tensor]) -> Maker:
    maker = Maker()
    for layer, size in linear(state).items():
        maker.pair(layer, size, "lora_unet_" + layer.replace(".", "_"), DOWN_UP, alpha=3.0)
    return maker


def with_prefix(state: Mapping[str, Tensor], prefix: str) -> Maker:
    maker = Maker()
    for layer, size in linear(state).items():
        maker.pair(layer, size, prefix + layer, AB)
    return maker


def xlabs(state: Mapping[str, Tensor]) -> Maker:
    names = {
        "img_attn.qkv": "qkv_lora1",
        "txt_attn.qkv": "qkv_lora2",
        "img_attn.proj": "proj_lora1",
        "txt_attn.proj": "proj_lora2",
        "linear1": "qkv_lora",
        "linear2": "proj_lora",
    }
    maker = Maker()
    for layer, (outputs, inputs) in linear(state).items():
        kind, number, rest = (*layer.split(".", 2), "", "")[:3]
        if rest in names:
            rows = 3 * inputs if rest == "linear1" else outputs
            name = f"{kind}.{number}.processor.{names[rest]}"
            maker.pair(layer, (rows, inputs), name, (".down.weight", ".up.weight"))
    return maker


def lokr(state: Mapping[str, Tensor]) -> Maker:
    """Both matrices whole in some layers, the larger one a product in others."""
    maker = Maker()
    for number, (layer, (outputs, inputs)) in enumerate(linear(state).items()):
        name = "lycoris_" + layer.replace(".", "_")
        first = maker.draw(4, 2)
        second = maker.draw(outputs // 4, inputs // 2)
        maker.file[name + ".lokr_w1"] = first
        scale = 1.0
        if number % 2:
            left, right = maker.draw(outputs // 4, RANK), maker.draw(RANK, inputs // 2)
            maker.file |= {name + ".lokr_w2_a": left, name + ".lokr_w2_b": right}
            second, scale = left.double() @ right.double(), 2.0 / RANK
        else:
            maker.file[name + ".lokr_w2"] = second
        maker.file[name + ".alpha"] = torch.tensor(2.0)
        maker.deltas[layer] = scale * torch.kron(first.double(), second.double())
    return maker


def fitted(delta: Tensor, rows: int) -> Tensor:
    """Rows that a LoRA leaves alone, as zeros below."""
    return torch.cat([delta, delta.new_zeros(rows - delta.shape[0], delta.shape[1])])
