"""LoRAs that cannot be applied: said by name, from the header, before a weight is read."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glassbox.flux_core.errors import CheckpointError, FamilyMismatchError, SettingError
from glassbox.flux_core.families import (
    FLUX1_DEV,
    FLUX1_KONTEXT,
    FLUX1_SCHNELL,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
)
from glassbox.flux_core.specs import FluxFamily
from glassbox.flux_core.weights.checkpoint import Checkpoint
from glassbox.flux_core.weights.lora import Lora, load_lora
from glassbox.flux_core.weights.lora_strengths import parse_strengths
from glassbox.tests.core.checkpoints import TINY_FLUX1, write
from glassbox.tests.core.loras import State

LAYER = "single_blocks.0.linear2"  # of the tiny model: 128 outputs, 640 inputs
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


def good() -> State:
    return {A: torch.ones(4, 640), B: torch.ones(128, 4)}


def load(folder: Path, state: State, metadata: dict[str, str] | None = None) -> Lora:
    return load_lora(write(folder / "style.safetensors", state, metadata), FLUX1_DEV, TINY_FLUX1)


def published(folder: Path, layers: dict[str, tuple[int, int]]) -> Path:
    """Write a LoRA of rank 1 on layers of a model in its published size."""
    state = {
        f"diffusion_model.{name}.{end}.weight": torch.zeros(shape)
        for name, (outputs, inputs) in layers.items()
        for end, shape in (("lora_A", (1, inputs)), ("lora_B", (outputs, 1)))
    }
    return write(folder / "style.safetensors", state)


KLEIN_4B_LAYER = {"single_blocks.19.linear1": (27648, 3072)}
KLEIN_9B_LAYER = {"single_blocks.23.linear2": (4096, 16384)}
FLUX1_LAYER = {"double_blocks.18.img_attn.qkv": (9216, 3072)}
FLUX2_DEV_LAYER = {"double_blocks.7.img_mlp.0": (36864, 6144)}


@pytest.mark.parametrize(
    ("layers", "made_for", "model"),
    [
        (KLEIN_4B_LAYER, "FLUX.2 [klein] 4B", FLUX2_KLEIN_9B),
        (KLEIN_9B_LAYER, "FLUX.2 [klein] 9B", FLUX2_KLEIN_4B),
        (FLUX1_LAYER, "FLUX.1 Kontext [dev]", FLUX2_KLEIN_4B),
        (FLUX2_DEV_LAYER, "FLUX.2 [dev]", FLUX1_KONTEXT),
        (FLUX1_LAYER, "FLUX.1 [dev]", FLUX2_DEV),
        ({"input_blocks.1.1.proj_in": (320, 320)}, "Stable Diffusion 1.5 or XL", FLUX1_DEV),
    ],
)
def test_another_models_lora_is_refused_at_once_with_both_names_and_no_weight_read(
    layers: dict[str, tuple[int, int]],
    made_for: str,
    model: FluxFamily,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "stream", read)
    file = published(tmp_path, layers)
    start = time.process_time()
    with pytest.raises(FamilyMismatchError) as error:
        load_lora(file, model, model.transformer)
    assert time.process_time() - start < 1
    assert made_for in error.value.found
    assert error.value.settings == ("LoRA loader",)
    assert model.title in error.value.needed


def test_a_guidance_layer_is_left_out_where_the_model_has_no_such_input(tmp_path: Path) -> None:
    layers = {**FLUX1_LAYER, "guidance_in.in_layer": (3072, 256)}
    file = published(tmp_path, layers)
    lora = load_lora(file, FLUX1_SCHNELL, FLUX1_SCHNELL.transformer)
    assert len(lora.report.matched) == len(lora.report.absent) == 2
    assert "layers that this model does not have: diffusion_model.guidance_in" in str(lora.report)


def control() -> State:
    return {
        **good(),
        "img_in.lora_A.weight": torch.ones(4, 128),
        "img_in.lora_B.weight": torch.ones(128, 4),
        "img_in.lora_B.bias": torch.ones(128),
        "single_blocks.0.norm.key_norm.scale": torch.ones(128),
        "single_blocks.0.norm.query_norm.scale": torch.ones(128),
    }


def wide_without_biases() -> State:
    """As a LoRA of FLUX.2, whose input is as wide, would be with norms."""
    return {key: tensor for key, tensor in control().items() if not key.endswith(".bias")}


def changed(**state: torch.Tensor) -> Callable[[], State]:
    """A good LoRA with other tensors; "down", "up" and so on stand for the layer's."""
    ends = {"down": A, "up": B, "second": f"{LAYER}.lokr_w2", "first_a": f"{LAYER}.lokr_w1_a"}
    named = {ends.get(key, f"{LAYER}.{key}"): tensor for key, tensor in state.items()}
    return lambda: {**good(), **named}


def without(key: str) -> Callable[[], State]:
    return lambda: {one: tensor for one, tensor in good().items() if one != key}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without(A), r"single_blocks\.0\.linear2.*lora_B.weight is there without its other half"),
        (without(B), r"single_blocks\.0\.linear2.*lora_A.weight is there without its other half"),
        (changed(second=torch.ones(32, 320)), "two factors of a LoKr is there without the other"),
        (changed(first_a=torch.ones(4, 2)), "lokr_w1_a is there without its other half"),
        (changed(diff=torch.ones(128, 640)), "lora_A.weight and .*diff both say what the change"),
        (
            changed(second=torch.ones(32, 320), lokr_w1=torch.ones(4, 2)),
            "lora_A.weight and .*lokr_w1 both say",
        ),
        (lambda: {f"{LAYER}.alpha": torch.ones(())}, "nothing is there but alpha"),
        (changed(up=torch.ones(128, 5)), "ranks of the two matrices are 4 and 5"),
        (
            lambda: {A: torch.ones(5000, 640), B: torch.ones(128, 5000)},
            "rank is 5,000, and the layer no wider than 640",
        ),
        (
            lambda: {A: torch.ones(0, 640), B: torch.ones(128, 0)},
            "(0x640|128x0), which is no matrix",
        ),
        (changed(down=torch.ones(4, 640, 1, 1)), "4x640x1x1, which is no matrix"),
        (changed(down=torch.ones(4, 640, dtype=torch.int8)), "stored as int8"),
        (changed(alpha=torch.ones(2)), "alpha is 2 and not one number"),
        (changed(alpha=torch.tensor(float("nan"))), "1 values that are not numbers in .*alpha"),
        (changed(alpha=torch.tensor(1e20)), "times as strong as it was trained"),
        (changed(down=torch.full((4, 640), float("inf"))), "2,560 values that are not numbers"),
        (changed(dora_scale=torch.ones(128)), "is a DoRA"),
        (changed(hada_w1_a=torch.ones(128)), "is a LoHa"),
        (lambda: {**good(), f"lora_unet_{A}": good()[A]}, "says 1 things twice"),
        (control, "Canny or Depth LoRA: it makes the model take 128 channels"),
        (wide_without_biases, "replaces 2 norms"),
        (
            lambda: {**good(), "single_blocks.0.norm.key_norm.scale": torch.ones(128)},
            "replaces 1 norms",
        ),
        (lambda: {"lora_te1_x.lora_down.weight": torch.ones(4, 4)}, "LoRA for a text encoder"),
        (lambda: {"double_blocks.0.img_mod.lin.weight": torch.ones(4)}, "a transformer, not a"),
        (lambda: {"x": torch.ones(4)}, "holds no LoRA"),
    ],
)
def test_what_is_no_whole_lora_is_refused_by_name(
    make: Callable[[], State], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words) as error:
        load(tmp_path, make())
    assert "style.safetensors" in error.value.found


def test_a_size_the_model_does_not_have_is_told_with_both(tmp_path: Path) -> None:
    state = {A: torch.ones(4, 641), B: torch.ones(128, 4)}
    with pytest.raises(FamilyMismatchError, match="is 128x641 and not 128x640") as error:
        load(tmp_path, state)
    assert "a custom size: width 128" in error.value.needed


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "style.safetensors", good())
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        load_lora(file, FLUX1_DEV, TINY_FLUX1)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("{", "is not a JSON object"),
        ("[" * 100_000, "is not a JSON object"),
        ('["r"]', "is not a JSON object"),
        ('{"lora_alpha": "16"}', "alpha that is no number"),
        ('{"lora_alpha": NaN}', "alpha that is no number"),
        ('{"alpha_pattern": [1]}', "alpha_pattern that is no table"),
        ('{"transformer.use_dora": true}', "is a DoRA"),
    ],
)
def test_a_header_that_cannot_be_understood_is_refused(
    said: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path, good(), {"lora_adapter_metadata": said})


@pytest.mark.parametrize(
    ("said", "scale"),
    [
        ({}, 1.0),
        ({"transformer.lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"0.linear2": 2, "1.linear2": 32}}, 0.5),
    ],
)
def test_alpha_comes_from_the_header(said: object, scale: float, tmp_path: Path) -> None:
    lora = load(tmp_path, good(), {"lora_adapter_metadata": json.dumps(said)})
    assert [part.scale for part in lora.parts] == [scale]
    assert lora.report.scales == (scale,)


def test_a_bias_is_added_and_float8_is_read(tmp_path: Path) -> None:
    state = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in good().items()}
    lora = load(tmp_path, {**state, f"{LAYER}.lora_B.bias": torch.ones(128)})
    assert [part.key for part in lora.parts] == [f"{LAYER}.weight", f"{LAYER}.bias"]
    assert lora.report.unmatched == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("double", "says 'double'"),
        ("triple: 1", "says 'triple: 1'"),
        ("double 0-2: 1", "double blocks 0-2"),
        ("single 2-1: 1", "single blocks 2-1"),
        ("single 0,,1: 1", "single blocks '0,,1'"),
        ("double 0: nan", "no number from -100 to 100"),
        ("double 0: 1e9", "no number from -100 to 100"),
        ("other 3: 1", "'other' has no blocks"),
        ("double 0: 1; " * 2000, "26,000 characters"),
    ],
)
def test_block_strengths_that_cannot_be_read_are_refused(text: str, words: str) -> None:
    with pytest.raises(SettingError, match=words) as error:
        parse_strengths(text, TINY_FLUX1)
    assert error.value.settings == ("block_strengths",)


def test_block_strengths_take_ranges_lists_and_lines() -> None:
    strengths = parse_strengths("Double: 0.5\nsingle 0, 2 = -1;; other:0\ndouble 1: 2", TINY_FLUX1)
    assert strengths.double == (0.5, 2.0)
    assert strengths.single == (-1.0, 1.0, -1.0)
    assert strengths.of("img_in.weight") == 0.0
    assert parse_strengths("", TINY_FLUX1).of("single_blocks.1.linear1.weight") == 1.0
