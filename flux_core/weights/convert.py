"""The dtype that each tensor of a module gets, and which weights stay quantised in memory.

Parameters have one dtype, the one asked for or most of the file's own. Buffers, such as FLUX.2's
batch statistics, keep the dtype their module gives them. Layers that hold quantised weights
dequantise them whenever they are used; see `operations.py` for the keys they read.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint, dtype_name
from .dequantise import Quantisation, dequantise_float8, dequantise_nvfp4, tiled_shape
from .files import ANOTHER_FILE
from .key_map import KeyMap, KeyRule
from .quantised import FLOAT8, PLAIN_FILE

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# ComfyUI loads layers of up to 16 KiB whole, without what would be added to them as they are used.
_SMALLEST = 16 * 1024 + 1
_PRECISION = 2.0**-8  # of a rounded scale: bfloat16's is 2**-9


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """One weight that stays quantised in memory."""

    layer: str  # our name, without ".weight"
    key: str  # its key in the file
    format: str  # in ComfyUI's words: "float8_e4m3fn", "float8_e5m2" or "nvfp4"
    quantisation: Quantisation
    scales: tuple[Tensor, ...]  # as the file has them

    def tensors(self, raw: Tensor) -> dict[str, Tensor]:
        """Returns what its layer reads, by our names.

        Raises:
            CheckpointError: a scale cannot be, or a value is not finite.
        """
        scales = self.scales
        self.quantisation.check(self.key, raw, scales)
        said = json.dumps({"format": self.format}).encode()
        layer = {"weight": raw, "comfy_quant": torch.tensor(list(said), dtype=torch.uint8)}
        if self.format == "nvfp4":
            blocks, whole, *smoothing = scales
            columns = raw.shape[1] * 2
            layer["weight_scale"] = blocks.reshape(tiled_shape(raw.shape[0], columns))
            layer["weight_scale_2"] = _single(whole)
            if smoothing:
                layer["pre_quant_scale"] = smoothing[0].to(torch.float32).reshape(columns)
        else:
            layer["weight_scale"] = _single(scales[0]) if scales else torch.tensor(1.0)
        return {f"{self.layer}.{name}": tensor for name, tensor in layer.items()}


@dataclass(frozen=True, slots=True)
class Conversion:
    """The dtype of every tensor that a file gives a module."""

    checkpoint: Checkpoint
    key_map: KeyMap
    target: torch.dtype  # of the parameters
    fixed: Mapping[str, torch.dtype]  # of other tensors, by our names
    quantised: Mapping[str, QuantisedWeight]  # weights that stay quantised, by our names
    reasons: Mapping[str, str]  # why others cannot, by the file's keys

    def read(self, device: torch.device | str | None) -> dict[str, Tensor]:
        """Makes our tensors one by one; what needs no change is the file's own memory.

        Weights that stay quantised come with what their layers need beside them.
        """
        rules = self.key_map.rules
        ours = {source: name for name, source in self._sources()}
        state = self._read_quantised(device)
        waiting: dict[str, Tensor] = {}
        for source, tensor in self.checkpoint.stream(ours):
            waiting[source] = tensor
            name = ours[source]
            if all(one in waiting for one in rules[name].sources):
                made = rules[name].apply([waiting.pop(one) for one in rules[name].sources])
                state[name] = made.to(device=device, dtype=self._dtype(name))
        return state

    def notes(self) -> list[str]:
        """Lists what was converted, and what was not."""
        sources = list(self._sources())
        plain = Counter(
            (self.checkpoint.dtypes[source], self._dtype(name), self._why(source))
            for name, source in sources
            if source not in self.checkpoint.quantised
        )
        notes = [*self._quantised_notes(), *self.dequantised_notes()]
        notes += [
            f"converted from {dtype_name(given)} to {dtype_name(made)}{why}: "
            f"{count} of {len(sources) + len(self.quantised)} tensors"
            for (given, made, why), count in plain.most_common()
            if given != made
        ]
        if self.key_map.others:
            notes.append(f"tensors of other parts in the same file, ignored: {self.key_map.others}")
        return notes

    def dequantised_notes(self) -> Iterator[str]:
        """Yields for each format how many tensors were dequantised, why, and what that costs."""
        checkpoint = self.checkpoint
        groups: dict[tuple[str, torch.dtype, str], list[str]] = {}
        for name, source in self._sources():
            quantisation = checkpoint.quantised.get(source)
            if quantisation is not None:
                group = (quantisation.format, self._dtype(name), self._why(source))
                groups.setdefault(group, []).append(source)
        for (form, made, why), keys in groups.items():
            size = sum(math.prod(checkpoint.shapes[key]) for key in keys) * made.itemsize
            before = sum(checkpoint.quantised[key].file_bytes for key in keys)
            yield (
                f"dequantised from {form} to {dtype_name(made)}{why}: {len(keys)} tensors, "
                f"{size / 1e9:.2f} GB in memory that are {before / 1e9:.2f} GB in the file"
            )

    def _quantised_notes(self) -> Iterator[str]:
        """Yields for each format how many tensors stay quantised, and how large they are."""
        quantisations = [one.quantisation for one in self.quantised.values()]
        for name in dict.fromkeys(one.format for one in quantisations):
            sizes = [one.file_bytes for one in quantisations if one.format == name]
            yield (
                f"kept as {name}: {len(sizes)} tensors, {sum(sizes) / 1e9:.2f} GB; each becomes "
                f"{dtype_name(self.target)} when it is used"
            )

    def _read_quantised(self, device: torch.device | str | None) -> dict[str, Tensor]:
        by_key = {one.key: one for one in self.quantised.values()}
        state: dict[str, Tensor] = {}
        for source, raw in self.checkpoint.stream_raw(by_key):
            for name, tensor in by_key[source].tensors(raw).items():
                # What says the format is read on the CPU.
                state[name] = tensor if name.endswith(".comfy_quant") else tensor.to(device=device)
        return state

    def _sources(self) -> Iterator[tuple[str, str]]:
        """Yields (our name, key in the file) of all that does not stay quantised."""
        for name, rule in self.key_map.rules.items():
            if name not in self.quantised:
                yield from ((name, source) for source in rule.sources)

    def _why(self, source: str) -> str:
        return f", {self.reasons[source]}" if source in self.reasons else ""

    def _dtype(self, name: str) -> torch.dtype:
        return self.fixed.get(name, self.target)


def plan_conversion(
    checkpoint: Checkpoint,
    key_map: KeyMap,
    asked: torch.dtype | None,
    fixed: Mapping[str, torch.dtype] | None = None,
    *,
    keep_quantised: bool = False,
    fix: str = PLAIN_FILE,
) -> Conversion:
    """Chooses one dtype for all parameters: what is asked for, or what most of the file has.

    Args:
        checkpoint, key_map: the file.
        asked: None keeps the file's own, with float8 and quantised weights widened to bfloat16.
        fixed: dtypes of the module's buffers, by our names.
        keep_quantised: weights stay quantised where a layer can hold them so.
        fix: of the error.

    Raises:
        CheckpointError: weights are stored as whole numbers.
    """
    fixed = fixed or {}
    counts: Counter[torch.dtype] = Counter()
    for name, rule in key_map.rules.items():
        for source in rule.sources:
            dtype = checkpoint.dtypes[source]
            is_count = name in fixed and not fixed[name].is_floating_point
            if source in checkpoint.quantised:
                dtype = torch.bfloat16
            if not dtype.is_floating_point and not is_count:
                raise CheckpointError(
                    f"{checkpoint.path.name} stores weights as {dtype_name(dtype)}.",
                    "weights as bfloat16, float16, float32 or float8.",
                    fix,
                )
            if name not in fixed:
                counts[dtype] += math.prod(checkpoint.shapes[source])
    target = asked
    if target is None:
        target = counts.most_common(1)[0][0]
        if target not in _FLOATS:  # float8 widens to bfloat16 exactly
            target = torch.float32 if target == torch.float64 else torch.bfloat16
    quantised, reasons = (
        _stay_quantised(checkpoint, key_map, target) if keep_quantised else ({}, {})
    )
    return Conversion(checkpoint, key_map, target, fixed, quantised, reasons)


def check_statistics(checkpoint: Checkpoint, mean: Tensor, variance: Tensor) -> None:
    """Refuses statistics that no image can have given, and that would spoil every latent.

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


def _stay_quantised(
    checkpoint: Checkpoint, key_map: KeyMap, target: torch.dtype
) -> tuple[dict[str, QuantisedWeight], dict[str, str]]:
    """Chooses the weights that can stay quantised.

    Returns:
        By our name those that can, and by the file's key why others that are quantised cannot.
    """
    sources = [source for rule in key_map.rules.values() for source in rule.sources]
    quantised = checkpoint.quantised
    needed = [name for one in sources if one in quantised for name in quantised[one].scales]
    scales = dict(checkpoint.stream_raw(needed))
    chosen: dict[str, QuantisedWeight] = {}
    reasons: dict[str, str] = {}
    for name, rule in key_map.rules.items():
        for source in rule.sources:
            quantisation = _quantisation(checkpoint, source)
            if quantisation is None:
                continue
            mine = tuple(scales[one] for one in quantisation.scales)
            why = _why_not(rule, checkpoint.shapes[source], quantisation, mine, target)
            if why:
                reasons[source] = why
                continue
            is_nvfp4 = quantisation.compute is dequantise_nvfp4
            form = "nvfp4" if is_nvfp4 else dtype_name(checkpoint.dtypes[source])
            layer = name.removesuffix(".weight")
            chosen[name] = QuantisedWeight(layer, source, form, quantisation, mine)
    return chosen, reasons


def _quantisation(checkpoint: Checkpoint, key: str) -> Quantisation | None:
    """Returns how a tensor is quantised; float8 without scales counts where it is a matrix."""
    if key in checkpoint.quantised:
        return checkpoint.quantised[key]
    dtype, shape = checkpoint.dtypes[key], checkpoint.shapes[key]
    if dtype not in FLOAT8 or len(shape) != 2:
        return None
    return Quantisation(dtype_name(dtype), math.prod(shape), dequantise_float8)


def _why_not(
    rule: KeyRule,
    shape: Sequence[int],
    quantisation: Quantisation,
    scales: Sequence[Tensor],
    target: torch.dtype,
) -> str:
    """Returns why a weight cannot stay quantised; empty if it can."""
    is_nvfp4 = quantisation.compute is dequantise_nvfp4
    is_float8 = quantisation.compute is dequantise_float8
    if not is_nvfp4 and not is_float8:
        return "since only float8 and nvfp4 can be kept as stored"
    if len(rule.sources) > 1:
        return "since the file keeps apart what is one layer here"
    if rule.change != "none" or len(shape) != 2:
        return "since the file has them in another order"
    if is_float8 and scales and scales[0].numel() > 1:
        return "since each row has a scale of its own"
    if quantisation.file_bytes < _SMALLEST:
        return "since they are small"
    # nvfp4's scales of blocks are float8, which every dtype holds; smoothing is divided by.
    _, *numbers = scales if is_nvfp4 else ((), *scales)
    is_divisible = all(bool((one > 0).all()) for one in numbers[1:])
    if not is_divisible or not all(_fits(one, target) for one in numbers):
        return f"since {dtype_name(target)} cannot hold their scales"
    return ""


def _fits(scale: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a dtype holds scales about as precisely as bfloat16 does."""
    exact = scale.to(torch.float64)
    return bool(((exact.to(dtype).to(torch.float64) - exact).abs() <= exact * _PRECISION).all())


def _single(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).reshape(())
