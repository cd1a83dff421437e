"""GGUF files: their tensors by name, and the library that knows their formats.

The library is optional: nothing but a GGUF file needs it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .gguf_header import read_gguf_header
from .header import ANOTHER_FILE, read_bytes
from .names import shorten
from .quantised import Quantised

_PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_SHAPES = "comfy.gguf.orig_shape."  # where a converter folded axes, it notes the real ones


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies, and what it is."""

    offset: int  # of its first byte in the file
    stored: tuple[int, ...]  # shape of what is stored, as `dtype`
    dtype: torch.dtype  # uint8 where it is quantised
    shape: tuple[int, ...]  # of the numbers


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The tensors of one file."""

    tensors: dict[str, GgufTensor]
    quantised: dict[str, Quantised]
    metadata: dict[str, str]


def is_gguf(file: Path) -> bool:
    """Tell by its first bytes whether a file is GGUF, whatever it is called."""
    return read_bytes(file, 4) == b"GGUF"


def open_gguf(file: Path) -> GgufFile:
    """Read the header of a GGUF file; no weight is read.

    Raises:
        CheckpointError: the file is cut short or malformed, holds a format that cannot be read,
            or the library is missing.
    """
    library = _library()
    header = read_gguf_header(file)
    formats = {number: _format(library, number, file) for number in header.types()}
    found = GgufFile({}, {}, header.texts)
    for name, entry in header.entries.items():
        label, block, size = formats[entry.type]
        shape, row = entry.shape, entry.shape[-1] if entry.shape else 1
        if row % block:
            raise CheckpointError(
                f"{file.name} is damaged: the rows of '{shorten(name)}' are {row:,} long.",
                f"a multiple of {block}, as {label} has.",
                ANOTHER_FILE,
            )
        plain = _PLAIN.get(label)
        stored = shape if plain else (*shape[:-1], row // block * size)
        real = header.shapes.get(_SHAPES + name, shape)
        if math.prod(real) != entry.count or min(real, default=0) < 0:
            real = shape
        found.tensors[name] = GgufTensor(entry.offset, stored, plain or torch.uint8, real)
        if plain is None:
            restore = partial(_restore, library, entry.type, real)
            found.quantised[name] = Quantised(label, entry.count // block * size, restore)
    header.check_places({name: _length(one) for name, one in found.tensors.items()}, file)
    return found


def map_tensors(file: Path, tensors: Mapping[str, GgufTensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as they are stored; they share the file's pages.

    Raises:
        OSError: the file is gone, or shorter than it was.
    """
    size = file.stat().st_size
    if any(one.offset + _length(one) > size for one in tensors.values()):
        raise OSError("it is shorter than it was")
    pages = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    for name, one in tensors.items():
        part = pages[one.offset : one.offset + _length(one)]
        yield name, part.view(one.dtype).view(one.stored if one.dtype == torch.uint8 else one.shape)


def _length(one: GgufTensor) -> int:
    return math.prod(one.stored) * one.dtype.itemsize


def _restore(
    library: Any, number: int, shape: tuple[int, ...], stored: Tensor, scales: Sequence[Tensor]
) -> Tensor:
    """Make the numbers that a quantised tensor stands for; its scales lie in it."""
    if not stored.numel():  # which the library cannot
        return torch.zeros(shape)
    made = library.dequantize(stored.numpy(), library.GGMLQuantizationType(number))
    return torch.from_numpy(made).view(shape)


def _format(library: Any, number: int, file: Path) -> tuple[str, int, int]:
    """Give the name of a format, and how many numbers lie in how many bytes.

    Raises:
        CheckpointError: the library cannot make numbers of it.
    """
    try:
        kind = library.GGMLQuantizationType(number)
        block, size = library.GGML_QUANT_SIZES[kind]
        label = str(kind.name)
        if label not in _PLAIN:
            library.dequantize(torch.zeros(1, size, dtype=torch.uint8).numpy(), kind)
    except (KeyError, ValueError, NotImplementedError):
        known = [one for one in library.GGMLQuantizationType if one.value == number]
        label = f"{known[0].name}" if known else f"type {number}"
        raise CheckpointError(
            f"{file.name} holds tensors as {label}, which the gguf library cannot read.",
            "formats such as Q4_K, Q5_K, Q6_K, Q8_0, BF16 or F16.",
            "choose another GGUF file of this model, or update the library with `pip install -U "
            "gguf`.",
        ) from None
    return label, block, size


def _library() -> Any:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            "A GGUF file needs the Python library gguf, which is not installed here "
            f"({shorten(str(error))}).",
            "the library, or a .safetensors file.",
            "run `pip install gguf` with the Python that runs ComfyUI, and start it again.",
        ) from None
