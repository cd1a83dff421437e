"""Which number types a module's tensors get, and the reading of them from a file.

Parameters have one type, the one asked for or most of the file's own. Buffers, such as FLUX.2's
batch statistics, keep the type their module gives them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import Checkpoint
from .header import ANOTHER_FILE
from .layout import Layout
from .report import dtype_name
from .stored import Kept, choose_kept, read_kept

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Conversion:
    """The type of every tensor that a file gives a module."""

    checkpoint: Checkpoint
    layout: Layout
    target: torch.dtype  # of the parameters
    fixed: Mapping[str, torch.dtype]  # of the buffers, by our names
    kept: Mapping[str, Kept]  # weights that stay as they are stored, by our names
    reasons: Mapping[str, str]  # why others cannot, by the file's keys

    def read(self, device: torch.device | str | None) -> dict[str, Tensor]:
        """Make our tensors one by one; what needs no change is the file's own memory.

        Weights that are kept come with what their layers need beside them.
        """
        uses = {
            part: key
            for key, one in self.layout.recipes.items()
            for part in one.parts
            if key not in self.kept
        }
        state = read_kept(self.checkpoint, self.kept.values(), device)
        waiting: dict[str, Tensor] = {}
        for part, tensor in self.checkpoint.stream(uses):
            waiting[part] = tensor
            key, recipe = uses[part], self.layout.recipes[uses[part]]
            if all(one in waiting for one in recipe.parts):
                made = recipe.make([waiting.pop(one) for one in recipe.parts])
                state[key] = made.to(device=device, dtype=self._type(key))
        return state

    def notes(self) -> list[str]:
        """Tell what was converted, and what was left alone."""
        quantised = self.checkpoint.quantised
        stored = [
            (part, self._type(key))
            for key, recipe in self.layout.recipes.items()
            for part in recipe.parts
            if key not in self.kept
        ]
        plain = Counter(
            (self.checkpoint.dtypes[part], made, self._why(part))
            for part, made in stored
            if part not in quantised
        )
        notes = [*self._kept()]
        notes += describe_dequantised(self.checkpoint, stored, self._why)
        notes += [
            f"converted from {dtype_name(given)} to {dtype_name(made)}{why}: "
            f"{count} of {len(stored) + len(self.kept)} tensors"
            for (given, made, why), count in plain.most_common()
            if given != made
        ]
        if self.layout.others:
            others = self.layout.others
            notes.append(f"tensors of other parts in the same file, left alone: {others}")
        return notes

    def _kept(self) -> Iterator[str]:
        """Tell for each format how many tensors stay as they are, and how large they are."""
        for name in dict.fromkeys(one.how.format for one in self.kept.values()):
            sizes = [one.how.stored_bytes for one in self.kept.values() if one.how.format == name]
            yield (
                f"kept as {name}: {len(sizes)} tensors, {sum(sizes) / 1e9:.2f} GB; each becomes "
                f"{dtype_name(self.target)} when it is used"
            )

    def _why(self, part: str) -> str:
        return f", {self.reasons[part]}" if part in self.reasons else ""

    def _type(self, key: str) -> torch.dtype:
        return self.fixed.get(key, self.target)


def describe_dequantised(
    checkpoint: Checkpoint,
    parts: Iterable[tuple[str, torch.dtype]],
    why: Callable[[str], str] = lambda _: "",
) -> Iterator[str]:
    """Tell for each format how many tensors were made plain, why, and what that costs.

    Args:
        checkpoint: the file.
        parts: keys of tensors, and what became of them; plain ones are passed over.
        why: ends the line's first half, by the key.
    """
    groups: dict[tuple[str, torch.dtype, str], list[str]] = {}
    for part, made in parts:
        how = checkpoint.quantised.get(part)
        if how is not None:
            groups.setdefault((how.format, made, why(part)), []).append(part)
    for (name, made, reason), keys in groups.items():
        size = sum(math.prod(checkpoint.shapes[key]) for key in keys) * made.itemsize
        before = sum(checkpoint.quantised[key].stored_bytes for key in keys)
        yield (
            f"dequantised from {name} to {dtype_name(made)}{reason}: {len(keys)} tensors, "
            f"{size / 1e9:.2f} GB in memory that are {before / 1e9:.2f} GB in the file"
        )


def plan_conversion(
    checkpoint: Checkpoint,
    layout: Layout,
    asked: torch.dtype | None,
    fixed: Mapping[str, torch.dtype],
    *,
    as_stored: bool = False,
) -> Conversion:
    """Choose one dtype for all parameters: what is asked for, or what most of the file has.

    Args:
        checkpoint, layout: the file.
        asked: None keeps the file's own, with float8 and quantised weights widened to bfloat16.
        fixed: types of the module's buffers, by our names.
        as_stored: keep quantised weights as they are stored, where a layer can hold them.

    Raises:
        CheckpointError: what is to be a fraction is stored as something else.
    """
    weights: Counter[torch.dtype] = Counter()
    for key, recipe in layout.recipes.items():
        for part in recipe.parts:
            dtype = checkpoint.dtypes[part]
            is_count = key in fixed and not fixed[key].is_floating_point
            if part in checkpoint.quantised:
                dtype = torch.bfloat16
            if not dtype.is_floating_point and not is_count:
                raise CheckpointError(
                    f"{checkpoint.path.name} stores weights as {dtype_name(dtype)}.",
                    "weights as bfloat16, float16, float32 or float8.",
                    "choose the bfloat16 file of this model.",
                )
            if key not in fixed:
                weights[dtype] += math.prod(checkpoint.shapes[part])
    target = asked
    if target is None:
        target = weights.most_common(1)[0][0]
        if target not in _FLOATS:  # float8 widens to bfloat16 exactly
            target = torch.float32 if target == torch.float64 else torch.bfloat16
    kept, reasons = choose_kept(checkpoint, layout, target) if as_stored else ({}, {})
    return Conversion(checkpoint, layout, target, fixed, kept, reasons)


def check_statistics(checkpoint: Checkpoint, mean: Tensor, variance: Tensor) -> None:
    """Refuse statistics that no picture can have given, and that would spoil every latent.

    Raises:
        CheckpointError: a mean is not finite, or a variance not finite and above 0.
    """
    means = int((~mean.isfinite()).sum())
    variances = int((~variance.isfinite() | (variance <= 0)).sum())
    if means or variances:
        raise CheckpointError(
            f"{checkpoint.path.name} holds {means} means (bn.running_mean) and {variances} "
            f"variances (bn.running_var) of {mean.numel()} that cannot be.",
            "finite means, and finite variances above 0.",
            ANOTHER_FILE,
        )
