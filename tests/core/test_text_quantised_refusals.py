"""Text encoders that are quantised in other ways, or broken, are refused by name with a way out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError
from glassbox.flux_core.weights.checkpoint import Checkpoint
from glassbox.flux_core.weights.load_text import load_text_encoders
from glassbox.tests.core.checkpoints import write
from glassbox.tests.core.quantised_files import State, as_bytes, scaled_float8
from glassbox.tests.core.test_text_quantised import is_matrix
from glassbox.tests.parity import text_samples
from glassbox.tests.parity.text_language_samples import LanguageKit

LAYER = "model.layers.0.mlp.up_proj"


Change = Callable[[State], object]
REFUSED: tuple[tuple[str, Change, str], ...] = (
    (
        "int8",
        lambda state: state.update(
            {LAYER + ".comfy_quant": as_bytes({"format": "int8_tensorwise"})}
        ),
        "quantised to int8_tensorwise",
    ),
    (
        "mxfp8",
        lambda state: state.update({LAYER + ".comfy_quant": as_bytes({"format": "mxfp8"})}),
        "quantised to mxfp8",
    ),
    (
        "nf4",
        lambda state: state.update({LAYER + ".weight.absmax": torch.ones(4)}),
        r"quantised by bitsandbytes \(nf4 or int8\)",
    ),
    (
        "blocks",
        lambda state: state.update({LAYER + ".weight_scale_inv": torch.ones(1, 1)}),
        "float8 with a scale for each block",
    ),
    (
        "vllm",
        lambda state: state.update({LAYER + ".weight_packed": torch.ones(4, 4).byte()}),
        "packed by compressed-tensors",
    ),
    (
        "mlx",
        lambda state: state.update({LAYER.replace("up", "gate") + ".scales": torch.ones(4, 4)}),
        "quantised by MLX",
    ),
    (
        "awq",
        lambda state: state.update({LAYER + ".qweight": torch.ones(4, 4).int()}),
        "quantised by SVDQuant, AWQ or GPTQ",
    ),
    (
        "plain int8",
        lambda state: (
            state.pop(LAYER + ".comfy_quant"),
            state.pop(LAYER + ".weight_scale"),
            state.update({LAYER + ".weight": torch.ones(64, 32).to(torch.int8)}),
        ),
        "stores weights as int8",
    ),
    (
        "scales of columns",
        lambda state: state.update({LAYER + ".weight_scale": torch.ones(32)}),
        r"has scales of \(32,\)",
    ),
    (
        "whole numbers as scales",
        lambda state: state.update({LAYER + ".weight_scale": torch.ones(1).int()}),
        r"has scales of \(1,\) int32",
    ),
    (
        "two kinds of scales",
        lambda state: state.update({LAYER + ".weight_scale_2": torch.ones(1)}),
        "does not use",
    ),
)


@pytest.mark.parametrize(
    ("change", "said"), [one[1:] for one in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_what_is_not_read_is_named_with_the_ways_out(
    qwen: LanguageKit,
    change: Change,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = quantised(qwen)
    change(stored)
    file = write(tmp_path / "a.safetensors", stored)
    forbid_weights(monkeypatch)
    with pytest.raises(CheckpointError, match=said) as caught:
        qwen.load(file)
    assert "a.safetensors" in caught.value.found
    assert caught.value.settings == ("text encoder loader", "text encoding")


def quantised(kit: LanguageKit) -> State:
    state = {"model." + key: one for key, one in kit.state.items()}
    return scaled_float8(state, "layers", chosen=is_matrix)[0]


def forbid_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Checkpoint.stream

    def stream(file: Checkpoint, keys: object) -> object:
        assert isinstance(keys, (list, dict))
        assert all(str(key).endswith(".comfy_quant") for key in keys), "weights were read"
        return read(file, keys)

    monkeypatch.setattr(Checkpoint, "stream", stream)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("weight_scale", None, "no scale for its quantised 'model.layers.0.mlp.up_proj.weight'"),
        ("comfy_quant", torch.zeros(9, dtype=torch.uint8), "does not say in words"),
        ("weight", torch.zeros(64, 32), "as float32 and calls it float8_e4m3fn"),
    ],
)
def test_a_damaged_file_is_refused_by_its_header(
    qwen: LanguageKit,
    name: str,
    change: Tensor | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = quantised(qwen)
    key = f"{LAYER}.{name}"
    if change is None:
        del stored[key]
    else:
        stored[key] = change
    file = write(tmp_path / "a.safetensors", stored)
    forbid_weights(monkeypatch)
    with pytest.raises(CheckpointError, match=said) as caught:
        qwen.load(file)
    assert caught.value.fix[0].islower()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_cannot_be_is_refused_with_its_weight(
    qwen: LanguageKit, number: float, tmp_path: Path
) -> None:
    stored = quantised(qwen)
    stored[LAYER + ".weight_scale"] = torch.tensor(number)
    with pytest.raises(
        CheckpointError, match=r"scales of 'model\.layers\.0\.mlp\.up_proj\.weight'"
    ):
        qwen.load(write(tmp_path / "a.safetensors", stored))


def test_a_file_cut_short_is_refused(qwen: LanguageKit, tmp_path: Path) -> None:
    whole = write(tmp_path / "a.safetensors", quantised(qwen)).read_bytes()
    for share in range(1, 10):
        file = tmp_path / "b.safetensors"
        file.write_bytes(whole[: len(whole) * share // 10])
        with pytest.raises(CheckpointError, match="no whole safetensors file"):
            load_text_encoders([file])


def test_a_quantised_t5_of_another_library_is_named_though_no_weight_has_its_name(
    tmp_path: Path,
) -> None:
    """Nunchaku's AWQ file of T5-XXL."""
    kit = text_samples.make_kit(tmp_path)
    stored = {key.replace(".weight", ".qweight"): one.int() for key, one in kit.t5.items()}
    file = write(tmp_path / "awq.safetensors", stored)
    clip = text_samples.save(kit.clip, tmp_path / "clip.safetensors", "text_model.")
    with pytest.raises(CheckpointError, match=r"awq\.safetensors is quantised by SVDQuant, AWQ"):
        kit.load(clip, file)
