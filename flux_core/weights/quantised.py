"""Which weights of a safetensors file are quantised, and how: read from names, types and shapes.

Two forms: older files have `scaled_fp8` and `….scale_weight`, newer ones `….weight_scale` and say
each layer's format in `….comfy_quant` or in the header's `_quantization_metadata`.

Source: Comfy-Org/ComfyUI 0.30.0 QUANTIZATION.md and comfy/utils.py `convert_old_quants`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from ..errors import CheckpointError, shorten
from .checkpoint import Checkpoint, dtype_name, open_checkpoint
from .dequantise import (
    BLOCK,
    Quantisation,
    dequantise_float8,
    dequantise_nvfp4,
    tiled_shape,
)
from .files import ANOTHER_FILE
from .transformer_keys import PREFIXES

_NEEDED = "float8 with scales or nvfp4 as ComfyUI writes them, GGUF, or bfloat16."
PLAIN_FILE = "choose the bfloat16 file of this model."
_METADATA = "_quantization_metadata"
_SCALES = (".weight_scale", ".scale_weight")  # new and old name
_SECOND, _SMOOTHING, _SAID = ".weight_scale_2", ".pre_quant_scale", ".comfy_quant"
_INPUT = (".input_scale", ".scale_input")  # for quantised activations, which are not used here
_ENDINGS = (*_SCALES, _SECOND, _SMOOTHING, _SAID, *_INPUT)
_OTHER_PARTS = ("text_encoders.", "cond_stage_model.")  # of a whole checkpoint
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LONGEST_SAID = 4096  # bytes of what one layer says of its format

_Parts = Mapping[str, str]  # ending → key in the file


def open_dequantised(
    path: Path, *, others: tuple[str, ...] = _OTHER_PARTS, unscaled: tuple[str, ...] = ()
) -> Checkpoint:
    """Opens a file as `open_checkpoint` does, with quantised weights in the shapes they stand for.

    Args:
        path: as there.
        others: prefixes of the parts of a whole checkpoint that are ignored.
        unscaled: endings of weights whose scale is 1 where a file that calls them float8 has none.

    Raises:
        CheckpointError: as there; or a format is not known, or a scale is missing or misshapen.
    """
    checkpoint = open_checkpoint(path)
    keys = checkpoint.shapes
    marks = {
        key
        for key in keys
        if key.endswith(("scaled_fp8", *_ENDINGS)) and not key.startswith(others)
    }
    if not marks and _METADATA not in checkpoint.metadata:
        return checkpoint
    layers: dict[str, dict[str, str]] = {}
    for key in marks:
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), "")
        if key.removesuffix(ending) + ".weight" in keys:
            layers.setdefault(key.removesuffix(ending), {})[ending] = key
    said = _said_in_header(checkpoint, others) | _said_by_layers(checkpoint, layers)
    shapes = dict(keys)
    quantised: dict[str, Quantisation] = {}
    for layer in said.keys() | layers.keys():
        parts, weight = layers.get(layer, {}), layer + ".weight"
        quantisation = _quantisation(checkpoint, weight, parts, said.get(layer), unscaled)
        if quantisation is not None:
            _check_all_used(checkpoint, weight, parts, quantisation)
            quantised[weight] = quantisation
            if quantisation.compute is dequantise_nvfp4:
                shapes[weight] = (keys[weight][0], keys[weight][1] * 2)
        for key in parts.values():
            del shapes[key]
    for key in marks:
        if key.endswith("scaled_fp8"):
            shapes.pop(key, None)
    dtypes = {key: checkpoint.dtypes[key] for key in shapes}
    rest = {key: text for key, text in checkpoint.metadata.items() if key != _METADATA}
    return replace(checkpoint, shapes=shapes, dtypes=dtypes, metadata=rest, quantised=quantised)


def _said_in_header(checkpoint: Checkpoint, others: tuple[str, ...]) -> dict[str, str]:
    """Reads each layer's format from the metadata, where they have them."""
    text = checkpoint.metadata.get(_METADATA)
    if text is None:
        return {}
    layers = _table(checkpoint, text).get("layers")
    if not isinstance(layers, dict):
        raise _unreadable(checkpoint)
    formats: dict[str, str] = {}
    for name, settings in cast("dict[str, object]", layers).items():
        # Names are those of the keys, or, where a prefix was put before the keys, without it.
        layer = next((p + name for p in PREFIXES if p + name + ".weight" in checkpoint.shapes), "")
        if layer and not layer.startswith(others):
            formats[layer] = _format(checkpoint, settings)
    return formats


def _said_by_layers(checkpoint: Checkpoint, layers: Mapping[str, _Parts]) -> dict[str, str]:
    """Reads each layer's format from the text beside its weight, where there is one."""
    keys = {parts[_SAID]: layer for layer, parts in layers.items() if _SAID in parts}
    for key in keys:
        if checkpoint.dtypes[key] != torch.uint8 or _bytes(checkpoint, key) > _LONGEST_SAID:
            raise _unreadable(checkpoint)
    return {
        keys[key]: _format(checkpoint, _table(checkpoint, tensor.numpy().tobytes()))
        for key, tensor in checkpoint.read(keys).items()
    }


def _table(checkpoint: Checkpoint, text: str | bytes) -> dict[str, object]:
    try:
        table = cast(object, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise _unreadable(checkpoint) from error
    if not isinstance(table, dict):
        raise _unreadable(checkpoint)
    return cast("dict[str, object]", table)


def _format(checkpoint: Checkpoint, settings: object) -> str:
    said = cast("dict[str, object]", settings).get("format") if isinstance(settings, dict) else None
    if not isinstance(said, str):
        raise _unreadable(checkpoint)
    if said not in ("float8_e4m3fn", "float8_e5m2", "nvfp4"):
        raise _refused(checkpoint, f"is quantised to {shorten(said)}")
    return said


def _quantisation(
    checkpoint: Checkpoint,
    weight: str,
    parts: _Parts,
    said: str | None,
    unscaled: tuple[str, ...],
) -> Quantisation | None:
    """Returns how a weight is quantised; None when it is not."""
    dtype = checkpoint.dtypes[weight]
    scale = next((parts[ending] for ending in _SCALES if ending in parts), None)
    if said is None:
        if _SECOND in parts:
            raise _refused(
                checkpoint, "holds nvfp4 weights that do not say in which order they are packed"
            )
        if scale is None and _SMOOTHING not in parts:
            return None  # its activations alone were to be quantised
    fits = dtype == torch.uint8 if said == "nvfp4" else dtype in FLOAT8
    if not fits or not checkpoint.shapes[weight]:
        raise _refused(
            checkpoint,
            f"stores '{shorten(weight)}' as {dtype_name(dtype)} and calls it "
            f"{said or 'scaled float8'}",
        )
    if scale is None and said != "nvfp4" and weight.endswith(unscaled):
        return None
    if scale is None:
        raise _lacks(checkpoint, weight, _SCALES[0])
    if said == "nvfp4":
        return _nvfp4(checkpoint, weight, scale, parts)
    rows = checkpoint.shapes[weight][0]
    by_row = (rows, *(1 for _ in checkpoint.shapes[weight][1:]))
    _check_scale(checkpoint, scale, (), by_row)
    size = _bytes(checkpoint, weight, scale)
    return Quantisation(f"scaled {dtype_name(dtype)}", size, dequantise_float8, (scale,))


def _nvfp4(checkpoint: Checkpoint, weight: str, blocks: str, parts: _Parts) -> Quantisation:
    shape = checkpoint.shapes[weight]
    columns = shape[1] * 2 if len(shape) == 2 else 1
    count = math.prod(tiled_shape(shape[0], columns))
    given = (checkpoint.dtypes[blocks], math.prod(checkpoint.shapes[blocks]))
    if (
        not columns
        or columns % BLOCK
        or given not in ((torch.float8_e4m3fn, count), (torch.uint8, count))
    ):
        raise _refused(
            checkpoint,
            f"scales the nvfp4 weight '{shorten(weight)}' of {shorten(str(shape))} bytes by "
            f"{given[1]:,} numbers of {dtype_name(given[0])} and not by {count:,} of float8",
        )
    if _SECOND not in parts:
        raise _lacks(checkpoint, weight, _SECOND)
    _check_scale(checkpoint, parts[_SECOND], ())
    scales = [blocks, parts[_SECOND]]
    if _SMOOTHING in parts:
        _check_scale(checkpoint, parts[_SMOOTHING], (columns,))
        scales.append(parts[_SMOOTHING])
    size = _bytes(checkpoint, weight, *scales)
    return Quantisation("nvfp4", size, dequantise_nvfp4, tuple(scales))


def _check_all_used(
    checkpoint: Checkpoint, weight: str, parts: _Parts, quantisation: Quantisation
) -> None:
    """Refuses scales that belong to another format: without them the weight would be wrong."""
    silent = (_SAID, *_INPUT)
    for ending, key in parts.items():
        if ending not in silent and key not in quantisation.scales:
            raise _refused(
                checkpoint,
                f"has '{shorten(key)}', which {quantisation.format} does not use, beside "
                f"'{shorten(weight)}'",
            )


def _check_scale(checkpoint: Checkpoint, key: str, *shapes: tuple[int, ...]) -> None:
    """Refuses a scale that is neither one number nor one for each row or column."""
    shape, dtype = checkpoint.shapes[key], checkpoint.dtypes[key]
    is_single = () in shapes and math.prod(shape) == 1
    if dtype not in _SCALE_TYPES or not (is_single or shape in shapes):
        raise _refused(
            checkpoint,
            f"has scales of {shorten(str(shape))} {dtype_name(dtype)} numbers ({shorten(key)})",
        )


def _bytes(checkpoint: Checkpoint, *keys: str) -> int:
    return sum(math.prod(checkpoint.shapes[key]) * checkpoint.dtypes[key].itemsize for key in keys)


def _lacks(checkpoint: Checkpoint, weight: str, ending: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path.name} holds no scale for its quantised '{shorten(weight)}'.",
        f"'{shorten(weight.removesuffix('.weight') + ending)}' beside it.",
        ANOTHER_FILE,
    )


def _refused(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.path.name} {what}.", _NEEDED, PLAIN_FILE)


def _unreadable(checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path.name} does not say in words that can be read how it is quantised.",
        "each layer's format, as ComfyUI writes it.",
        ANOTHER_FILE,
    )
