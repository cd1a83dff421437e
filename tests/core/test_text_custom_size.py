"""A language model of a size that nobody published is an experiment, not a stranger."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError, FamilyMismatchError
from glassbox.flux_core.families import LANGUAGE_MODELS, QWEN3_4B
from glassbox.flux_core.weights.checkpoint import open_checkpoint
from glassbox.flux_core.weights.text_keys import LanguageModelKeys, language_model_keys
from glassbox.tests.graph import tiny, tiny_flux2

WIDTH = tiny_flux2.WIDTH


def part(folder: Path, state: dict[str, Tensor]) -> LanguageModelKeys:
    path = tiny.save(state, folder / "own.safetensors")
    return language_model_keys(open_checkpoint(path), "model.", LANGUAGE_MODELS)


def test_its_sizes_are_read_from_the_file_and_the_rest_is_its_kins(tmp_path: Path) -> None:
    found = part(tmp_path, tiny_flux2.language_state(QWEN3_4B, 300, seed=1))
    assert (found.spec.hidden, found.spec.ffn) == (WIDTH, 2 * WIDTH)
    assert (found.spec.heads, found.spec.kv_heads) == (1, 1)
    assert (found.spec.layers, found.spec.prefix) == (QWEN3_4B.layers, QWEN3_4B.prefix)
    assert f"custom size ({WIDTH} wide)" in found.spec.title


def test_a_tensor_that_does_not_fit_the_others_is_named(tmp_path: Path) -> None:
    state = tiny_flux2.language_state(QWEN3_4B, 300, seed=1)
    name = "model.layers.7.self_attn.o_proj.weight"
    with pytest.raises(CheckpointError, match=r"layers\.7\.self_attn\.o_proj"):
        part(tmp_path, {**state, name: torch.zeros(WIDTH, 64)})
    state.pop("model.layers.0.self_attn.k_proj.weight")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj"):
        part(tmp_path, state)


def test_where_one_model_is_wanted_no_other_size_will_do(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    tiny.save(tiny_flux2.language_state(QWEN3_4B, 300, seed=1), path)
    with pytest.raises(FamilyMismatchError, match=f"a model {WIDTH} wide"):
        language_model_keys(open_checkpoint(path), "model.", (QWEN3_4B,))
