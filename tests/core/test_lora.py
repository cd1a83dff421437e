"""LoRAs of every format against W + strength * (alpha / rank) * B A, in double precision."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.transformer.flux import Flux
from glassbox.flux_core.weights.lora import Lora, load_lora, merge_lora
from glassbox.flux_core.weights.lora_strengths import parse_strengths
from glassbox.flux_core.weights.transformer_keys import to_diffusers, transformer_key_map
from glassbox.tests.core import loras
from glassbox.tests.core.loras import GENERATIONS, Maker

STRENGTH = 0.7
ONE_NAME_A_LAYER: dict[str, tuple[Callable[[Mapping[str, Tensor]], Maker], str]] = {
    "kohya": (loras.kohya, "kohya"),
    "ai-toolkit FLUX.2": (
        lambda state: loras.with_prefix(state, "diffusion_model."),
        "ComfyUI's own (ai-toolkit)",
    ),
    "PEFT": (lambda state: loras.with_prefix(state, "base_model.model."), "PEFT"),
    "BFL": (lambda state: loras.with_prefix(state, ""), "BFL's names"),
    "XLabs": (loras.xlabs, "XLabs"),
    "LoKr": (loras.lokr, "LoKr (LyCORIS)"),
}

pytestmark = pytest.mark.parametrize("generation", GENERATIONS)


@pytest.fixture
def network(generation: str) -> Flux:
    return loras.network(generation)


def load(path: Path, network: Flux) -> Lora:
    return load_lora(path, network.family, network.spec)


def merge(network: Flux, *loaded: Lora, strength: float = STRENGTH, blocks: str = "") -> None:
    factors = parse_strengths(blocks, network.spec)
    merge_lora(network, [part for one in loaded for part in one.scaled(strength, factors)])


def furthest(network: Flux, expected: Mapping[str, Tensor]) -> float:
    """The largest difference of any weight; every tensor counts."""
    state = loras.state_of(network)
    assert state.keys() == expected.keys()
    return max(float((state[key] - expected[key]).abs().max()) for key in state)


def with_deltas(
    state: Mapping[str, Tensor], deltas: Mapping[str, Tensor], strength: float = STRENGTH
) -> dict[str, Tensor]:
    expected = {key: tensor.double() for key, tensor in state.items()}
    for layer, delta in deltas.items():
        key = f"{layer}.weight"
        expected[key] = expected[key] + strength * loras.fitted(delta, len(state[key]))
    return expected


@pytest.mark.parametrize("name", ONE_NAME_A_LAYER)
def test_a_patched_weight_is_the_weight_plus_the_scaled_product(
    name: str, network: Flux, tmp_path: Path
) -> None:
    make, writer = ONE_NAME_A_LAYER[name]
    before = loras.state_of(network)
    maker = make(before)
    lora = load(maker.write(tmp_path), network)
    merge(network, lora)
    assert furthest(network, with_deltas(before, maker.deltas)) <= 1e-6
    assert lora.report.writer == writer
    assert len(lora.report.matched) == len(maker.file)
    assert lora.report.unmatched == ()
    assert lora.report.layers == len(maker.deltas)


@pytest.mark.parametrize(
    ("prefix", "writer"), [("transformer.", "diffusers"), ("", "diffusers without a prefix")]
)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_split_layers_land_on_the_rows_they_are_of_with_alpha_from_the_header(
    prefix: str, writer: str, alpha: float | None, network: Flux, tmp_path: Path
) -> None:
    """The oracle adds to the weights in diffusers' own layout, and converts those."""
    before = loras.state_of(network)
    theirs = to_diffusers(before)
    maker = loras.with_prefix(theirs, prefix)
    metadata = None
    if alpha is not None:
        said = {"transformer.r": loras.RANK, "transformer.lora_alpha": alpha}
        metadata = {"lora_adapter_metadata": json.dumps(said)}
    lora = load(maker.write(tmp_path, metadata), network)
    merge(network, lora)
    strength = STRENGTH * (1.0 if alpha is None else alpha / loras.RANK)
    expected = published(with_deltas(theirs, maker.deltas, strength))
    assert furthest(network, expected) <= 1e-6
    assert lora.report.writer == writer
    assert len(lora.report.matched) == len(maker.file)


def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    key_map = transformer_key_map(state)
    assert key_map is not None
    return {
        key: rule.apply([state[part] for part in rule.sources])
        for key, rule in key_map.rules.items()
    }


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lycoris_"])
def test_underscores_in_diffusers_names_mean_the_same(
    prefix: str, network: Flux, tmp_path: Path
) -> None:
    before = loras.state_of(network)
    theirs = to_diffusers(before)
    maker = Maker()
    for layer, size in loras.linear(theirs).items():
        maker.pair(layer, size, prefix + layer.replace(".", "_"), loras.DOWN_UP, alpha=2.0)
    merge(network, load(maker.write(tmp_path), network))
    assert furthest(network, published(with_deltas(theirs, maker.deltas))) <= 1e-6


def test_a_block_sparse_qkv_of_kohya_is_three_loras_in_one(network: Flux, tmp_path: Path) -> None:
    """What sd-scripts writes for split_qkv: stacked downs, and ups on the diagonal."""
    before = loras.state_of(network)
    key = "double_blocks.1.txt_attn.qkv.weight"
    hidden = before[key].shape[1]
    maker, rank = Maker(), loras.RANK
    pairs = [(maker.draw(hidden, rank), maker.draw(rank, hidden)) for _ in range(3)]
    name = "lora_unet_double_blocks_1_txt_attn_qkv"
    maker.file = {
        f"{name}.lora_up.weight": torch.block_diag(*(up for up, _ in pairs)),
        f"{name}.lora_down.weight": torch.cat([down for _, down in pairs]),
        f"{name}.alpha": torch.tensor(float(3 * rank)),
    }
    merge(network, load(maker.write(tmp_path), network), strength=1.0)
    expected = {one: tensor.double() for one, tensor in before.items()}
    expected[key] = expected[key] + torch.cat([up.double() @ down.double() for up, down in pairs])
    assert furthest(network, expected) <= 1e-6


def test_several_loras_add_up_and_none_of_strength_0_changes_a_bit(
    network: Flux, tmp_path: Path
) -> None:
    before = loras.state_of(network)
    first, second = loras.kohya(before), loras.xlabs(before)
    loaded = [load(one.write(tmp_path / str(i)), network) for i, one in enumerate((first, second))]
    merge(network, *loaded, strength=0.0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in loras.state_of(network).items())
    merge(network, *loaded)
    once = with_deltas(before, first.deltas)
    assert furthest(network, with_deltas(once, second.deltas)) <= 1e-6


def test_each_block_has_its_own_strength(network: Flux, tmp_path: Path) -> None:
    before = loras.state_of(network)
    maker = loras.kohya(before)
    lora = load(maker.write(tmp_path), network)
    merge(network, lora, strength=1.0, blocks="double 0: 0.5; single 1-2: 0\nother: 2; single 2: 3")
    factors = {"double_blocks.0.": 0.5, "double_blocks.1.": 1, "single_blocks.0.": 1}
    factors |= {"single_blocks.1.": 0, "single_blocks.2.": 3}
    deltas = {
        layer: delta
        * next((factor for stem, factor in factors.items() if layer.startswith(stem)), 2)
        for layer, delta in maker.deltas.items()
    }
    # Up to 3 times as large as a weight's own change, and so is its last bit in float32.
    assert furthest(network, with_deltas(before, deltas, 1.0)) <= 3e-6


def test_bfloat16_weights_are_rounded_once(network: Flux, tmp_path: Path) -> None:
    maker = loras.kohya(loras.state_of(network))
    network.to(torch.bfloat16)
    before = loras.state_of(network)
    loaded = load(maker.write(tmp_path), network)
    merge(network, loaded, loaded)
    key = "single_blocks.1.linear1.weight"
    exact = before[key].double() + 2 * STRENGTH * maker.deltas["single_blocks.1.linear1"]
    rounded = exact.to(torch.bfloat16)
    now = loras.state_of(network)[key]
    assert now.dtype == torch.bfloat16
    assert float((now != rounded).float().mean()) < 1e-3  # ties of float32's own rounding
