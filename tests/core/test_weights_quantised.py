import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError
from glassbox.flux_core.transformer.flux import Flux
from glassbox.flux_core.weights.load import load_autoencoder, load_flux
from glassbox.flux_core.weights.quantised import open_dequantised
from glassbox.flux_core.weights.transformer_keys import to_diffusers
from glassbox.tests.core.checkpoints import autoencoder_state, flux1_state, flux2_state, write
from glassbox.tests.core.quantised_files import as_bytes, header, nvfp4, scaled_float8

State = dict[str, Tensor]
LAYER = "double_blocks.0.img_attn.qkv"
PREFIX = "model.diffusion_model."


def state_of(network: Flux) -> State:
    return network.modulation.state_dict() | network.blocks.state_dict()


def largest_error(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


@pytest.mark.parametrize("form", ["old", "layers", "metadata", "bare"])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [(flux1_state, torch.float8_e4m3fn), (flux2_state, torch.float8_e5m2)],
)
def test_scaled_float8_equals_what_it_stands_for(
    tmp_path: Path, make: Callable[[], State], form: str, dtype: torch.dtype
) -> None:
    stored, metadata, plain = scaled_float8(make(), form, dtype)
    file = write(tmp_path / "a.safetensors", stored, metadata)
    network, report = load_flux(file, dtype=torch.float32)
    assert largest_error(state_of(network), plain) <= 1e-6
    name = str(dtype).removeprefix("torch.")
    assert f"dequantised from scaled {name} to float32: " in str(report)
    kept = load_flux(write(tmp_path / "b.safetensors", plain))[0]
    assert largest_error(state_of(network), state_of(kept)) <= 1e-6


def test_prefixes_and_diffusers_names_are_read_in_quantised_files(tmp_path: Path) -> None:
    for form in ("old", "layers", "metadata"):
        stored, metadata, plain = scaled_float8(flux1_state(), form, prefix=PREFIX)
        network, report = load_flux(write(tmp_path / "a.safetensors", stored, metadata))
        assert report.prefix == PREFIX
        rounded = {key: tensor.bfloat16() for key, tensor in plain.items()}
        assert report.dtype == torch.bfloat16
        assert largest_error(state_of(network), rounded) == 0
    # Metadata may name the layers without the prefix that was put before the keys.
    bare = {key.removeprefix(PREFIX): one for key, one in json_layers(metadata).items()}
    assert (
        len(open_dequantised(write(tmp_path / "a.safetensors", stored, header(bare))).quantised) > 0
    )
    # Of layers that are fused here, each part has a scale of its own.
    stored, _, plain = scaled_float8(to_diffusers(flux1_state()), "layers")
    network, report = load_flux(write(tmp_path / "b.safetensors", stored), dtype=torch.float32)
    assert report.layout == "diffusers"
    assert largest_error(to_diffusers(state_of(network)), plain) <= 1e-6


def json_layers(metadata: dict[str, str]) -> dict[str, object]:
    return json.loads(metadata["_quantization_metadata"])["layers"]


@pytest.mark.parametrize("make", [flux1_state, flux2_state])
def test_nvfp4_equals_what_it_stands_for(tmp_path: Path, make: Callable[[], State]) -> None:
    stored, metadata, plain = nvfp4(make())
    file = write(tmp_path / "a.safetensors", stored, metadata)
    network, report = load_flux(file, dtype=torch.float32)
    assert largest_error(state_of(network), plain) <= 1e-6
    assert report.parameters == sum(tensor.numel() for tensor in plain.values())
    by_byte = {
        key: one.view(torch.uint8) if key.endswith(".weight_scale") else one
        for key, one in stored.items()
    }
    file = write(tmp_path / "b.safetensors", by_byte, metadata)
    assert largest_error(state_of(load_flux(file, dtype=torch.float32)[0]), plain) <= 1e-6


def test_an_nvfp4_layer_that_smooths_its_input_takes_the_factors_into_its_weight(
    tmp_path: Path,
) -> None:
    stored, metadata, plain = nvfp4(flux1_state())
    factors = torch.linspace(0.5, 2, 128)
    stored[LAYER + ".pre_quant_scale"] = factors
    network, _ = load_flux(write(tmp_path / "a.safetensors", stored, metadata), dtype=torch.float32)
    plain[LAYER + ".weight"] = plain[LAYER + ".weight"] * factors
    assert largest_error(state_of(network), plain) <= 1e-6


def test_the_report_tells_what_dequantising_costs(tmp_path: Path) -> None:
    stored, metadata, plain = nvfp4(flux1_state())
    file = write(tmp_path / "a.safetensors", stored, metadata)
    _, report = load_flux(file, dtype=torch.bfloat16)
    (line,) = (line for line in report.notes if "dequantised" in line)
    blocks = [one for key, one in plain.items() if "blocks." in key and one.ndim == 2]
    size = sum(one.numel() for one in blocks) * 2
    assert line.startswith(f"dequantised from nvfp4 to bfloat16: {len(blocks)} tensors, ")
    assert f"{size / 1e9:.2f} GB in memory" in line
    found = open_dequantised(file)
    held = sum(one.numel() * one.element_size() for key, one in stored.items() if "blocks." in key)
    alone = sum(one.numel() * 4 for key, one in plain.items() if "blocks." in key and one.ndim == 1)
    assert sum(one.file_bytes for one in found.quantised.values()) == held - alone


def test_scales_may_be_one_for_each_row(tmp_path: Path) -> None:
    stored, metadata, plain = scaled_float8(flux1_state(), "bare")
    rows = torch.linspace(0.5, 2, 384)[:, None]
    plain[LAYER + ".weight"] = stored[LAYER + ".weight"].float() * rows
    stored[LAYER + ".weight_scale"] = rows
    network, _ = load_flux(write(tmp_path / "a.safetensors", stored, metadata), dtype=torch.float32)
    assert largest_error(state_of(network), plain) <= 1e-6


def test_a_file_marked_as_scaled_may_hold_float8_without_scales(tmp_path: Path) -> None:
    stored, _, plain = scaled_float8(flux1_state(), "old")
    del stored[LAYER + ".scale_weight"], stored[LAYER + ".scale_input"]
    plain[LAYER + ".weight"] = stored[LAYER + ".weight"].float()
    network, report = load_flux(write(tmp_path / "a.safetensors", stored), dtype=torch.float32)
    assert largest_error(state_of(network), plain) <= 1e-6
    assert "converted from float8_e4m3fn to float32: 1 of" in str(report)


def test_an_autoencoder_may_be_scaled_float8(tmp_path: Path) -> None:
    state = autoencoder_state()
    key = "decoder.conv_in.weight"
    stored = state | {key: (state[key] / 2).to(torch.float8_e4m3fn)}
    stored["decoder.conv_in.weight_scale"] = torch.tensor([2.0])
    module, report = load_autoencoder(
        write(tmp_path / "a.safetensors", stored), dtype=torch.float32
    )
    state[key] = stored[key].float() * 2
    assert largest_error(module.state_dict(), state) == 0
    assert "dequantised" in str(report)


def test_what_belongs_to_a_checkpoints_text_encoder_is_left_alone(tmp_path: Path) -> None:
    stored, _, plain = scaled_float8(flux1_state(), "layers", prefix=PREFIX)
    text = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    stored[text + ".weight"] = torch.zeros(4, 4, dtype=torch.int8)
    stored[text + ".weight_scale"] = torch.ones(4)
    stored[text + ".comfy_quant"] = as_bytes({"format": "int8_tensorwise"})
    stored["text_encoders.t5xxl.scaled_fp8"] = torch.zeros(1)
    network, report = load_flux(write(tmp_path / "a.safetensors", stored), dtype=torch.float32)
    assert largest_error(state_of(network), plain) <= 1e-6
    assert "tensors of other parts in the same file, ignored: 4" in report.notes


def test_a_scale_may_lie_in_another_shard_than_its_weight(tmp_path: Path) -> None:
    stored, metadata, plain = nvfp4(flux1_state())
    for number, is_here in ((1, str.endswith), (2, lambda key, ending: not key.endswith(ending))):
        part = {key: one for key, one in stored.items() if is_here(key, ".weight")}
        write(tmp_path / f"model-0000{number}-of-00002.safetensors", part, metadata)
    network, report = load_flux(tmp_path, dtype=torch.float32)
    assert report.files == 2
    assert largest_error(state_of(network), plain) <= 1e-6


def test_a_plain_file_is_opened_as_it_is(tmp_path: Path) -> None:
    found = open_dequantised(write(tmp_path / "a.safetensors", flux1_state()))
    assert not found.quantised
    assert "quantised" not in str(load_flux(tmp_path / "a.safetensors")[1])


Change = Callable[[State], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: state.pop(LAYER + ".weight_scale"),
            f"no scale for its quantised '{LAYER}.weight'.*'{LAYER}.weight_scale' beside it",
        ),
        (
            lambda state: state.update({LAYER + ".weight_scale": torch.ones(3)}),
            r"has scales of \(3,\) float32 numbers",
        ),
        (
            lambda state: state.update({LAYER + ".weight_scale": torch.ones(1).int()}),
            r"has scales of \(1,\) int32 numbers",
        ),
        (
            lambda state: state.update({LAYER + ".weight": torch.ones(384, 128)}),
            "as float32 and calls it float8_e4m3fn",
        ),
        (
            lambda state: state.update({LAYER + ".weight_scale_2": torch.ones(1)}),
            "which scaled float8_e4m3fn does not use",
        ),
        (
            lambda state: state.update({LAYER + ".comfy_quant": as_bytes({"format": "int5_odd"})}),
            "is quantised to int5_odd.*bfloat16",
        ),
        (
            lambda state: state.update({LAYER + ".comfy_quant": as_bytes(["nvfp4"])}),
            "does not say in words",
        ),
        (
            lambda state: state.update({LAYER + ".comfy_quant": as_bytes("x" * 5000)}),
            "does not say in words",
        ),
        (
            lambda state: state.update({LAYER + ".comfy_quant": torch.zeros(9)}),
            "does not say in words",
        ),
        (
            lambda state: state.update(
                {LAYER + ".comfy_quant": torch.tensor(list(b"[" * 4000), dtype=torch.uint8)}
            ),
            "does not say in words",
        ),
    ],
)
def test_a_scaled_float8_file_that_is_wrong_is_refused(
    tmp_path: Path, change: Change, said: str
) -> None:
    stored, _, _ = scaled_float8(flux1_state(), "layers")
    change(stored)
    file = write(tmp_path / "a.safetensors", stored)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=said) as caught:
        load_flux(file)
    assert time.process_time() - start < 1
    assert caught.value.fix[0].islower()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop(LAYER + ".weight_scale"), "no scale for its quantised"),
        (lambda state: state.pop(LAYER + ".weight_scale_2"), f"'{LAYER}.weight_scale_2' beside"),
        (
            lambda state: state.update({LAYER + ".weight_scale": torch.ones(384, 8)}),
            "by 3,072 numbers of float32 and not by 3,072 of float8",
        ),
        (
            lambda state: state.update(
                {LAYER + ".weight_scale": torch.ones(8, 8).to(torch.float8_e4m3fn)}
            ),
            "by 64 numbers of float8_e4m3fn and not by 3,072 of float8",
        ),
        (
            lambda state: state.update({LAYER + ".weight": torch.ones(384, dtype=torch.uint8)}),
            r"nvfp4 weight '.*' of \(384,\) bytes",
        ),
        (
            lambda state: state.update({LAYER + ".weight": torch.ones(384, 0, dtype=torch.uint8)}),
            r"nvfp4 weight '.*' of \(384, 0\) bytes",
        ),
        (
            lambda state: state.update({LAYER + ".pre_quant_scale": torch.ones(3)}),
            r"has scales of \(3,\) float32 numbers",
        ),
    ],
)
def test_an_nvfp4_file_that_is_wrong_is_refused(tmp_path: Path, change: Change, said: str) -> None:
    stored, metadata, _ = nvfp4(flux1_state())
    change(stored)
    with pytest.raises(CheckpointError, match=said):
        load_flux(write(tmp_path / "a.safetensors", stored, metadata))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_cannot_be_is_refused_with_its_weight(tmp_path: Path, value: float) -> None:
    for make, ending in (
        (lambda state: scaled_float8(state, "metadata"), ".weight_scale"),
        (nvfp4, ".weight_scale_2"),
    ):
        stored, metadata, _ = make(flux1_state())
        stored[LAYER + ending] = torch.tensor(value)
        with pytest.raises(CheckpointError, match=rf"1 of the 1 scales of '{LAYER}\.weight'"):
            load_flux(write(tmp_path / "a.safetensors", stored, metadata))
    if value != float("inf"):  # which float8_e4m3fn has not
        stored, metadata, _ = nvfp4(flux1_state())
        blocks = stored[LAYER + ".weight_scale"].float()
        blocks[5] = value
        stored[LAYER + ".weight_scale"] = blocks.to(torch.float8_e4m3fn)
        with pytest.raises(CheckpointError, match="8 of the 3,072 scales"):
            load_flux(write(tmp_path / "a.safetensors", stored, metadata))


def test_float8_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    stored, metadata, _ = scaled_float8(flux1_state(), "metadata")
    stored[LAYER + ".weight"].view(torch.uint8)[3, 5] = 0x7F  # NaN
    with pytest.raises(CheckpointError, match=f"'{LAYER}.weight' holds numbers as scaled float8"):
        load_flux(write(tmp_path / "a.safetensors", stored, metadata))


def test_nvfp4_that_does_not_say_how_it_is_packed_is_refused(tmp_path: Path) -> None:
    stored, _, _ = nvfp4(flux1_state())  # other tools have the same names with another order
    with pytest.raises(CheckpointError, match="do not say in which order they are packed"):
        load_flux(write(tmp_path / "a.safetensors", stored))


@pytest.mark.parametrize("said", ["{", "[]", '{"layers": 3}', f'{{"layers": {{"{LAYER}": {{}}}}}}'])
def test_metadata_that_cannot_be_read_are_refused(tmp_path: Path, said: str) -> None:
    stored, _, _ = scaled_float8(flux1_state(), "metadata")
    file = write(tmp_path / "a.safetensors", stored, {"_quantization_metadata": said})
    with pytest.raises(CheckpointError, match="does not say in words that can be read"):
        load_flux(file)
