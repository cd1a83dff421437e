"""GGUF files: the header, the tensors by name, and the library that dequantises them.

The library is optional: nothing but a GGUF file needs it. The header is read here: the library
makes an array of every word of a vocabulary, which takes seconds.

Source: ggml-org/ggml docs/gguf.md, versions 2 and 3.
"""

import math
import mmap
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, shorten
from .dequantise import Quantisation
from .files import ANOTHER_FILE, NEEDED

_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
_UINT32, _INT32, _TEXT, _ARRAY = 4, 5, 8, 9
_MOST_AXES = 8
_ALIGNMENT = "general.alignment"
_PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_SHAPES = "comfy.gguf.orig_shape."  # where a converter folded axes, it notes the real ones


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: which bytes of the file it is, and what they hold."""

    offset: int  # of its first byte in the file
    raw_shape: tuple[int, ...]  # of what lies in the file, as `dtype`
    dtype: torch.dtype  # uint8 where it is quantised
    shape: tuple[int, ...]  # of the numbers

    @property
    def size(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.raw_shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The tensors of one file."""

    tensors: dict[str, GgufTensor]
    quantised: dict[str, Quantisation]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor, as the header describes it."""

    format: int
    shape: tuple[int, ...]  # the longest stride first, as PyTorch counts
    offset: int  # of its first byte in the file


@dataclass(slots=True)
class GgufHeader:
    """What one file says of itself."""

    entries: dict[str, _Entry] = field(default_factory=dict[str, _Entry])
    texts: dict[str, str] = field(default_factory=dict[str, str])  # metadata that are text
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    words: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # arrays asked for
    numbers: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    alignment: int = 32
    size: int = 0  # of the file


def open_gguf(file: Path) -> GgufFile:
    """Reads the header of a GGUF file; no weight is read.

    Raises:
        CheckpointError: the file is cut short or malformed, holds a format that cannot be read,
            or the library is missing.
    """
    library = _library()
    header = read_gguf_header(file)
    numbers = {one.format for one in header.entries.values()}
    formats = {number: _format(library, number, file) for number in numbers}
    opened = GgufFile({}, {}, header.texts)
    for name, entry in header.entries.items():
        label, block, size = formats[entry.format]
        shape, row = entry.shape, entry.shape[-1] if entry.shape else 1
        if row % block:
            raise _damaged(file, f"the rows of '{shorten(name)}' are {row:,} long, not {block}s")
        plain = _PLAIN.get(label)
        raw_shape = shape if plain else (*shape[:-1], row // block * size)
        real = header.shapes.get(_SHAPES + name, shape)
        if math.prod(real) != math.prod(shape) or min(real, default=0) < 0:
            real = shape
        tensor = GgufTensor(entry.offset, raw_shape, plain or torch.uint8, real)
        if tensor.offset + tensor.size > header.size:
            raise _cut_short(file, header.size)
        opened.tensors[name] = tensor
        if plain is None:
            compute = partial(_dequantise, library, entry.format, real)
            opened.quantised[name] = Quantisation(label, tensor.size, compute)
    return opened


def map_tensors(file: Path, tensors: Mapping[str, GgufTensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields tensors as they lie in the file; they share its pages.

    Raises:
        OSError: the file is gone, or shorter than it was.
    """
    size = file.stat().st_size
    if any(one.offset + one.size > size for one in tensors.values()):
        raise OSError("it is shorter than it was")
    pages = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    for name, one in tensors.items():
        raw = pages[one.offset : one.offset + one.size].view(one.dtype)
        yield name, raw.view(one.raw_shape if one.dtype == torch.uint8 else one.shape)


def read_gguf_header(file: Path, arrays: Collection[str] = ()) -> GgufHeader:
    """Reads and checks the header of one file; no weight is read.

    Args:
        file: which is GGUF.
        arrays: names of arrays of text or of 32-bit numbers that are read, not skipped.

    Raises:
        CheckpointError: the file is gone, cut short, malformed or of another version.
    """
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Reader(data, file, arrays).header()
    except OSError as error:
        raise CheckpointError(
            f"{file.name} cannot be opened ({error.strerror}).", NEEDED, ANOTHER_FILE
        ) from error


class _Reader:
    """Reads the header from its beginning; every step stays inside the file."""

    def __init__(self, data: mmap.mmap, file: Path, arrays: Collection[str]) -> None:
        self.data, self.file, self.arrays = data, file, arrays
        self.at = 4  # after "GGUF"

    def header(self) -> GgufHeader:
        version = self.number("<I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{self.file.name} is GGUF of version {version:,}.",
                f"version {' or '.join(map(str, _VERSIONS))}, lowest byte first.",
                ANOTHER_FILE,
            )
        header = GgufHeader(size=len(self.data))
        tensors, entries = self.number("<Q"), self.number("<Q")
        for _ in range(entries):
            self.metadata(header)
        rows = [self.tensor() for _ in range(tensors)]
        start = -(-self.at // header.alignment) * header.alignment
        for name, kind, shape, offset in rows:
            if name in header.entries:
                raise _damaged(self.file, f"'{shorten(name)}' stands twice in its header")
            if offset % header.alignment:
                raise _damaged(self.file, f"'{shorten(name)}' does not begin where it may")
            header.entries[name] = _Entry(kind, shape, start + offset)
        return header

    def metadata(self, header: GgufHeader) -> None:
        """Reads one name and its value; most values are skipped."""
        name, kind = self.text(), self.number("<I")
        if kind == _TEXT:
            header.texts[name] = self.text()
        elif kind == _ARRAY:
            self.array(header, name)
        elif kind == _UINT32 and name == _ALIGNMENT:
            header.alignment = self.number("<I")
            if header.alignment < 8 or header.alignment & (header.alignment - 1):
                raise _damaged(self.file, f"its tensors lie {header.alignment:,} bytes apart")
        else:
            self.skip(self.size_of(kind))

    def array(self, header: GgufHeader, name: str) -> None:
        """Skips an array, unless it is asked for; a short one of 32-bit numbers may be a shape."""
        kind, count = self.number("<I"), self.number("<Q")
        is_wanted, begin = name in self.arrays, self.at
        if kind == _TEXT and is_wanted:
            header.words[name] = [self.text() for _ in range(count)]
        elif kind == _TEXT:
            self.skip_texts(count)
        else:
            self.skip(count * self.size_of(kind))
        if kind == _INT32 and (is_wanted or count <= _MOST_AXES):
            numbers = struct.unpack_from(f"<{count}i", self.data, begin)
            if is_wanted:
                header.numbers[name] = numbers
            elif numbers:
                header.shapes[name] = numbers

    def skip_texts(self, count: int) -> None:
        """Skips words; vocabularies have hundreds of thousands of them."""
        length_at, end, at = struct.Struct("<Q").unpack_from, len(self.data), self.at
        for _ in range(count):
            if at + 8 > end:
                raise _cut_short(self.file, end)
            at += 8 + length_at(self.data, at)[0]
        self.skip(at - self.at)

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, axes = self.text(), self.number("<I")
        sides = [self.number("<Q") for _ in range(axes)]
        return name, self.number("<I"), tuple(reversed(sides)), self.number("<Q")

    def number(self, code: str) -> int:
        begin = self.at
        self.skip(struct.calcsize(code))
        return struct.unpack_from(code, self.data, begin)[0]

    def text(self) -> str:
        length, begin = self.number("<Q"), self.at
        self.skip(length)
        try:
            return self.data[begin : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged(self.file, "a name in its header is not text") from None

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise _cut_short(self.file, len(self.data))
        self.at += count

    def size_of(self, kind: int) -> int:
        size = _SIZES.get(kind)
        if size is None:
            raise _damaged(self.file, f"its header has a value of unknown type {kind:,}")
        return size


def _dequantise(
    library: Any, number: int, shape: tuple[int, ...], raw: Tensor, scales: Sequence[Tensor]
) -> Tensor:
    """Returns the numbers of a quantised tensor, whose scales lie in it."""
    if not raw.numel():  # which the library cannot
        return torch.zeros(shape)
    values = library.dequantize(raw.numpy(), library.GGMLQuantizationType(number))
    return torch.from_numpy(values).view(shape)


def _format(library: Any, number: int, file: Path) -> tuple[str, int, int]:
    """Returns the name of a format, and how many numbers lie in how many bytes.

    Raises:
        CheckpointError: the library cannot dequantise it.
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


def _cut_short(file: Path, size: int) -> CheckpointError:
    return CheckpointError(
        f"{file.name} is cut short: it is {size:,} bytes long, and its header promises more.",
        "the complete file.",
        "download the file again: the last download did not finish.",
    )


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file.name} is damaged: {what}.", "a well-formed GGUF file.", ANOTHER_FILE
    )
