"""Quantised weights that stay as they are stored, in layers that hold them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glassbox.flux_core.errors import CheckpointError
from glassbox.flux_core.weights.dequantise import Quantisation, dequantise_float8, dequantise_nvfp4
from glassbox.flux_core.weights.load import load_flux
from glassbox.flux_core.weights.lora import AddedAtUse, Full, LoraPart, LowRank, patched
from glassbox.flux_core.weights.transformer_keys import to_diffusers
from glassbox.tests.core.checkpoints import flux1_state, flux2_state, write
from glassbox.tests.core.quantised_files import gguf_bytes, nvfp4, scaled_float8, write_bytes
from glassbox.tests.core.test_weights_gguf import entries_of

State = dict[str, Tensor]
LAYER = "double_blocks.0.img_attn.qkv"


class HoldingLinear(nn.Module):
    """As ComfyUI's: without a weight until it is loaded, with what lies beside it."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.device, self.said, self.held = device, "", State()
        made = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", made)

    def _load_from_state_dict(self, state_dict: State, prefix: str, *rest: Any) -> None:
        for name in [key for key in state_dict if key.startswith(prefix) and "bias" not in key]:
            self.held[name.removeprefix(prefix)] = state_dict.pop(name)
        if "comfy_quant" in self.held:
            self.said = json.loads(self.held.pop("comfy_quant").numpy().tobytes())["format"]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def numbers(self) -> Tensor:
        """What the weight stands for, in float32."""
        weight = self.held["weight"]
        if not self.said:
            return weight.float()
        if self.said != "nvfp4":
            return dequantise_float8(weight, [self.held["weight_scale"]])
        names = ("weight_scale", "weight_scale_2", "pre_quant_scale")
        return dequantise_nvfp4(weight, [self.held[one] for one in names if one in self.held])


class Holding:
    """A namespace of layers that hold quantised weights."""

    Linear = HoldingLinear
    Conv2d = GroupNorm = LayerNorm = Embedding = None


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, HoldingLinear], str]:
    """Load a file with layers that hold; its layers by name, and the report."""
    holding: Any = Holding
    network, report = load_flux(path, dtype=dtype, quantised_operations=holding)
    layers = {
        name: layer
        for part in (network.modulation, network.blocks)
        for name, layer in part.named_modules()
        if isinstance(layer, HoldingLinear)
    }
    return layers, str(report)


def check(layers: dict[str, HoldingLinear], plain: State) -> None:
    """Each weight stands for its numbers; those that may be kept are small."""
    assert len(layers) == sum(key.endswith(".weight") for key in plain)
    for name, layer in layers.items():
        assert (layer.numbers() - plain[f"{name}.weight"]).abs().max() <= 1e-6, name
        if layer.bias is not None:
            assert torch.equal(layer.bias, plain[f"{name}.bias"])


@pytest.mark.parametrize("form", ["old", "layers", "metadata", "bare"])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [(flux1_state, torch.float8_e4m3fn), (flux2_state, torch.float8_e5m2)],
)
def test_scaled_float8_stays_as_it_is(
    tmp_path: Path, make: Callable[[], State], form: str, dtype: torch.dtype
) -> None:
    stored, metadata, plain = scaled_float8(make(), form, dtype)
    layers, report = load(write(tmp_path / "a.safetensors", stored, metadata))
    check(layers, plain)
    said = str(dtype).removeprefix("torch.")
    kept = [layer for layer in layers.values() if layer.said]
    assert {layer.said for layer in kept} == {said}
    assert {layer.held["weight"].dtype for layer in kept} == {dtype}
    assert all("blocks." in name for name, layer in layers.items() if layer.said)
    assert f"kept as scaled {said}: {len(kept)} tensors" in report
    assert "dequantised" not in report


@pytest.mark.parametrize("smooth", [False, True])
def test_nvfp4_stays_as_it_is(tmp_path: Path, smooth: bool) -> None:
    stored, metadata, plain = nvfp4(flux2_state())
    if smooth:
        factors = stored[LAYER + ".pre_quant_scale"] = torch.linspace(0.5, 2, 128)
        plain[LAYER + ".weight"] = plain[LAYER + ".weight"] * factors
    layers, report = load(write(tmp_path / "a.safetensors", stored, metadata))
    check(layers, plain)
    assert layers[LAYER].said == "nvfp4"
    assert layers[LAYER].held["weight"].shape == (384, 64)
    assert layers[LAYER].held["weight_scale"].shape == (384, 8)
    assert ("pre_quant_scale" in layers[LAYER].held) == smooth
    small = [
        name
        for name, layer in layers.items()
        if "blocks." in name and layer.held["weight"].numel() == 16 * 1024
    ]
    assert small
    assert not any(layers[name].said for name in small)
    assert f"dequantised from nvfp4 to float32, since they are small: {len(small)} " in report


def test_float8_without_scales_stays_too(tmp_path: Path) -> None:
    stored = {
        key: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
        for key, tensor in flux1_state().items()
    }
    layers, report = load(write(tmp_path / "a.safetensors", stored))
    check(layers, {key: tensor.float() for key, tensor in stored.items()})
    assert layers[LAYER].said == "float8_e4m3fn"
    assert "kept as float8_e4m3fn: " in report
    assert "converted from float8_e4m3fn to float32, since they are small: " in report


def test_a_plain_file_gets_plain_layers(tmp_path: Path) -> None:
    layers, report = load(write(tmp_path / "a.safetensors", flux1_state()))
    assert not layers
    assert "kept" not in report


def test_the_report_counts_the_bytes_in_memory(tmp_path: Path) -> None:
    stored, metadata, plain = scaled_float8(flux2_state(), "metadata")
    file = write(tmp_path / "a.safetensors", stored, metadata)
    holding: Any = Holding
    report = load_flux(file, dtype=torch.float32, quantised_operations=holding)[1]
    assert abs(report.size - file.stat().st_size) < 0.02 * report.size
    assert report.tensors == len(plain)
    assert report.parameters == sum(tensor.numel() for tensor in plain.values())
    assert f"{report.size / 1e9:.2f} GB" in str(report)
    assert load_flux(file, dtype=torch.float32)[1].size > 2 * report.size


def test_what_cannot_stay_becomes_plain_and_the_report_says_why(tmp_path: Path) -> None:
    stored, _, plain = scaled_float8(to_diffusers(flux1_state()), "layers")
    layers, report = load(write(tmp_path / "a.safetensors", stored))
    assert not layers[LAYER].said
    assert layers["double_blocks.0.img_mlp.0"].said
    assert "to float32, since the file keeps apart what is one layer here: " in report
    rows = torch.linspace(0.5, 2, 384)[:, None]
    stored, metadata, plain = scaled_float8(flux1_state(), "bare")
    plain[LAYER + ".weight"] = stored[LAYER + ".weight"].float() * rows
    stored[LAYER + ".weight_scale"] = rows
    layers, report = load(write(tmp_path / "b.safetensors", stored, metadata))
    check(layers, plain)
    assert not layers[LAYER].said
    assert "to float32, since each row has a scale of its own: 1 tensors" in report
    file = write_bytes(tmp_path / "c.gguf", gguf_bytes(entries_of(flux1_state(), "Q8_0")[0]))
    layers, report = load(file)
    assert not layers
    assert "from Q8_0 to float32, since only float8 and nvfp4 can be kept as stored: " in report


def test_scales_that_the_dtype_cannot_hold_make_plain_weights(tmp_path: Path) -> None:
    """float16 is too coarse below 6e-5, and changes are divided by smoothing."""
    stored, metadata, plain = scaled_float8(flux1_state(), "layers", torch.float8_e5m2)
    stored[LAYER + ".weight_scale"] = torch.tensor(3e-7)
    file = write(tmp_path / "a.safetensors", stored, metadata)
    layers, report = load(file, torch.float16)
    assert not layers[LAYER].said
    assert "since float16 cannot hold their scales" in report
    assert load(file, torch.bfloat16)[0][LAYER].said
    stored, metadata, plain = nvfp4(flux1_state())
    factors = stored[LAYER + ".pre_quant_scale"] = torch.linspace(0, 2, 128)
    plain[LAYER + ".weight"] = plain[LAYER + ".weight"] * factors
    layers, report = load(write(tmp_path / "b.safetensors", stored, metadata))
    check(layers, plain)
    assert not layers[LAYER].said
    assert "since float32 cannot hold their scales: 1 tensors" in report


@pytest.mark.parametrize("number", [0x7F, 0xFF])
def test_a_number_that_is_not_finite_is_refused_by_its_name(tmp_path: Path, number: int) -> None:
    stored, metadata, _ = scaled_float8(flux1_state(), "layers")
    stored[LAYER + ".weight"].view(torch.uint8)[3, 5] = number
    with pytest.raises(CheckpointError, match=f"'{LAYER}.weight' holds numbers as scaled float8"):
        load(write(tmp_path / "a.safetensors", stored, metadata))


def test_a_number_beyond_float32_is_refused(tmp_path: Path) -> None:
    stored, metadata, _ = scaled_float8(flux1_state(), "layers")
    stored[LAYER + ".weight_scale"] = torch.tensor(1e37)
    with pytest.raises(CheckpointError, match="that are not finite"):
        load(write(tmp_path / "a.safetensors", stored, metadata))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("ending", [".weight_scale", ".weight_scale_2"])
def test_a_scale_that_cannot_be_is_refused_as_for_plain_weights(
    tmp_path: Path, scale: float, ending: str
) -> None:
    make = scaled_float8(flux1_state(), "layers") if ending == ".weight_scale" else None
    stored, metadata, _ = make or nvfp4(flux1_state())
    stored[LAYER + ending] = torch.tensor(scale)
    with pytest.raises(CheckpointError, match=f"scales of '{LAYER}.weight'.*cannot be"):
        load(write(tmp_path / "a.safetensors", stored, metadata))


def test_changes_are_added_to_rows_of_what_is_made_and_divided_by_smoothing() -> None:
    weight, factors = torch.randn(6, 4), torch.tensor([0.5, 1.0, 2.0, 4.0])
    low, full = LowRank(torch.randn(3, 2), torch.randn(2, 4)), Full(torch.randn(6, 4))
    parts = (LoraPart("a", 3, 3, False, low, 0.5), LoraPart("a", 0, 6, True, full, 2.0))
    expected = weight + 2 * full.values
    expected[3:] += 0.5 * low.up @ low.down
    assert (AddedAtUse(parts)(weight.clone()) - expected).abs().max() <= 1e-6
    made = AddedAtUse(parts, factors)((weight / factors).clone())
    assert (made * factors - expected).abs().max() <= 1e-5


def test_changes_add_up_before_they_are_rounded() -> None:
    weight = torch.randn(6, 4).bfloat16()
    parts = [LoraPart("a", 0, 6, True, Full(torch.randn(6, 4)), 0.1) for _ in range(4)]
    expected = patched(weight, parts)
    assert torch.equal(AddedAtUse(tuple(parts))(weight), expected)


@pytest.mark.parametrize(
    "numbers", [(1.0, -2.0), (2.0, -1.0), (1.0, 2.0), (-1.0, -2.0), (0.0, -0.0)]
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_largest_number_decides_whatever_its_sign(
    numbers: tuple[float, float], dtype: torch.dtype
) -> None:
    """A scale that float32 holds makes a number of it that float32 does not."""
    quantisation = Quantisation("float8", 2, dequantise_float8, ("scale",))
    stored = torch.tensor([numbers]).to(dtype)
    quantisation.check("a", stored, [torch.tensor(1.5e38)])
    if any(numbers):
        with pytest.raises(CheckpointError, match="not finite"):
            quantisation.check("a", stored, [torch.tensor(2e38)])
