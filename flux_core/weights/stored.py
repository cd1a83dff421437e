"""Quantised weights that stay in memory as the file has them, for layers that can hold them.

Such layers make numbers of a weight when they use it; see `operations.py` for the keys they read.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .files import Checkpoint
from .layout import Layout, Recipe
from .quantised import Quantised, restore_float8, restore_nvfp4, tiled_shape
from .report import dtype_name

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# ComfyUI brings layers of up to 16 KiB whole, without what would be added to them as they are used.
_SMALLEST = 16 * 1024 + 1
_PRECISION = 2.0**-8  # of a rounded scale: bfloat16's is 2**-9


@dataclass(frozen=True, slots=True)
class Kept:
    """One weight that stays as it is stored."""

    layer: str  # our name, without ".weight"
    part: str  # its key in the file
    format: str  # in ComfyUI's words: "float8_e4m3fn", "float8_e5m2" or "nvfp4"
    how: Quantised
    scales: tuple[Tensor, ...]  # as the file has them

    def tensors(self, stored: Tensor) -> dict[str, Tensor]:
        """Make what a layer reads, by our names.

        Raises:
            CheckpointError: a scale cannot be, or a number it makes is not finite.
        """
        scales = self.scales
        self.how.check(self.part, stored, scales)
        said = json.dumps({"format": self.format}).encode()
        made = {"weight": stored, "comfy_quant": torch.tensor(list(said), dtype=torch.uint8)}
        if self.format == "nvfp4":
            blocks, whole, *smoothing = scales
            columns = stored.shape[1] * 2
            made["weight_scale"] = blocks.reshape(tiled_shape(stored.shape[0], columns))
            made["weight_scale_2"] = _number(whole)
            if smoothing:
                made["pre_quant_scale"] = smoothing[0].to(torch.float32).reshape(columns)
        else:
            made["weight_scale"] = _number(scales[0]) if scales else torch.tensor(1.0)
        return {f"{self.layer}.{name}": tensor for name, tensor in made.items()}


def choose_kept(
    checkpoint: Checkpoint, layout: Layout, target: torch.dtype
) -> tuple[dict[str, Kept], dict[str, str]]:
    """Choose the weights that can stay as they are stored.

    Returns:
        By our key those that can, and by the file's key why others that are quantised cannot.
    """
    kept: dict[str, Kept] = {}
    reasons: dict[str, str] = {}
    scales = _scales(checkpoint, layout.recipes.values())
    for key, recipe in layout.recipes.items():
        for part in recipe.parts:
            how = _how(checkpoint, part)
            if how is None:
                continue
            found = tuple(scales[name] for name in how.scales)
            why = _why_not(recipe, checkpoint.shapes[part], how, found, target)
            if why:
                reasons[part] = why
                continue
            is_nvfp4 = how.how is restore_nvfp4
            form = "nvfp4" if is_nvfp4 else dtype_name(checkpoint.dtypes[part])
            kept[key] = Kept(key.removesuffix(".weight"), part, form, how, found)
    return kept, reasons


def read_kept(
    checkpoint: Checkpoint, kept: Iterable[Kept], device: torch.device | str | None
) -> dict[str, Tensor]:
    """Read weights as they are stored, with what their layers need beside them.

    Raises:
        CheckpointError: a scale cannot be, or a number it makes is not finite.
    """
    by_part = {one.part: one for one in kept}
    state: dict[str, Tensor] = {}
    for part, stored in checkpoint.stored(by_part):
        made = by_part[part].tensors(stored)
        for key, tensor in made.items():  # what says the format is read on the CPU
            state[key] = tensor if key.endswith(".comfy_quant") else tensor.to(device=device)
    return state


def _scales(checkpoint: Checkpoint, recipes: Iterable[Recipe]) -> Mapping[str, Tensor]:
    found = checkpoint.quantised
    parts = [part for recipe in recipes for part in recipe.parts if part in found]
    return dict(checkpoint.stored([name for part in parts for name in found[part].scales]))


def _how(checkpoint: Checkpoint, part: str) -> Quantised | None:
    """Tell how a tensor is stored in fewer bits; float8 without scales counts where it is wide."""
    if part in checkpoint.quantised:
        return checkpoint.quantised[part]
    dtype, shape = checkpoint.dtypes[part], checkpoint.shapes[part]
    if dtype not in _FLOAT8 or len(shape) != 2:
        return None
    return Quantised(dtype_name(dtype), math.prod(shape), restore_float8)


def _why_not(
    recipe: Recipe,
    shape: Sequence[int],
    how: Quantised,
    scales: Sequence[Tensor],
    target: torch.dtype,
) -> str:
    """Say why a weight cannot stay as it is stored; empty if it can."""
    if how.how is not restore_nvfp4 and how.how is not restore_float8:
        return "since only float8 and nvfp4 can be kept as stored"
    if len(recipe.parts) > 1:
        return "since the file keeps apart what is one layer here"
    if recipe.change != "none" or len(shape) != 2:
        return "since the file has them in another order"
    if how.how is restore_float8 and scales and scales[0].numel() > 1:
        return "since each row has a scale of its own"
    if how.stored_bytes < _SMALLEST:
        return "since they are small"
    # nvfp4's scales of blocks are float8, which every dtype holds; smoothing is divided by.
    _, *numbers = scales if how.how is restore_nvfp4 else ((), *scales)
    is_divisible = all(bool((one > 0).all()) for one in numbers[1:])
    if not is_divisible or not all(_fits(one, target) for one in numbers):
        return f"since {dtype_name(target)} cannot hold their scales"
    return ""


def _fits(scale: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a dtype holds scales about as precisely as bfloat16 does."""
    exact = scale.to(torch.float64)
    return bool(((exact.to(dtype).to(torch.float64) - exact).abs() <= exact * _PRECISION).all())


def _number(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).reshape(())
