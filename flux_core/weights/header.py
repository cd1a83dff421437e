"""The header of a safetensors file: names, types and shapes of its tensors, checked.

Read here and not by the library, so that a broken file gets words that help its owner.

Source: huggingface/safetensors README, "Format".
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from ..errors import CheckpointError
from .names import is_text, shorten

HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit
NEEDED = "a complete .safetensors file, or a folder of its shards."
ANOTHER_FILE = "download the file again, or choose another in the loader."
_MOST_AXES = 64  # PyTorch's own limit
_LARGEST = 2**63 - 1  # of a length: what the library counts with
_LENGTH_BYTES = 8  # the header's length, little-endian, opens the file
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
_PICKLED = "a pickled PyTorch file, which can run code and is never opened"
_PICKLE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# First bytes of what is often found under a model's name.
_STRANGERS = (
    (b"PK\x03\x04", _PICKLED),
    (b"\x80", _PICKLED),
    (b"GGUF", "a GGUF file among shards, which are safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself"),
    (b"<", "a web page: the download was answered by a login or an error page"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says of itself."""

    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read and check the header of one file; no weight is read.

    Raises:
        CheckpointError: the file is gone, not safetensors, cut short or malformed.
    """
    start = read_bytes(file, 64)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if len(start) < _LENGTH_BYTES or length > HEADER_LIMIT or start[8:9] not in (b"{", b""):
        raise _not_safetensors(file, start)
    text = read_bytes(file, length, _LENGTH_BYTES)
    if len(text) < length:
        raise _cut_short(file, _LENGTH_BYTES + length)
    table = parse_table(text, file)
    metadata = _metadata(_table(table.pop("__metadata__", {}), file), file)
    dtypes: dict[str, torch.dtype] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int]] = []
    check_names(table, file)
    for key, value in table.items():
        dtypes[key], shapes[key], span = _entry(key, _table(value, file), file)
        spans.append(span)
    _check_spans(file, spans, _LENGTH_BYTES + length)
    return Header(dtypes, shapes, metadata)


def read_bytes(file: Path, count: int, skip: int = 0) -> bytes:
    """Read up to `count` bytes, from `skip` on."""
    try:
        with file.open("rb") as stream:
            stream.seek(skip)
            return stream.read(count)
    except OSError as error:
        raise CheckpointError(
            f"{file.name} cannot be opened ({error.strerror}).", NEEDED, ANOTHER_FILE
        ) from error


def parse_table(text: bytes, file: Path) -> dict[str, object]:
    """Parse a JSON object in which no name stands twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise malformed(file, "a name stands twice in its header")
        return found

    try:
        return _table(cast(object, json.loads(text, object_pairs_hook=unique)), file)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise malformed(file, "its header is not JSON") from error


def check_names(table: Iterable[str], file: Path) -> None:
    """Refuse names that no message and no other program could repeat."""
    if not all(map(is_text, table)):
        raise malformed(file, "a tensor's name is not text")


def malformed(file: Path, what: str) -> CheckpointError:
    """Say what is wrong inside a file."""
    return CheckpointError(
        f"{file.name} is damaged: {what}.", "a well-formed safetensors header.", ANOTHER_FILE
    )


def _not_safetensors(file: Path, start: bytes) -> CheckpointError:
    said = "empty" if not start else "not a safetensors file"
    if file.suffix.lower() in _PICKLE_ENDINGS:
        said = _PICKLED
    for magic, name in _STRANGERS:
        if start.startswith(magic):
            said = name
    return CheckpointError(f"{file.name} is {said}.", NEEDED, ANOTHER_FILE)


def _cut_short(file: Path, promised: int) -> CheckpointError:
    return CheckpointError(
        f"{file.name} is cut short: it is {file.stat().st_size:,} bytes long and its header "
        f"promises {promised:,}.",
        "the complete file.",
        "download the file again: the last download did not finish.",
    )


def _check_spans(file: Path, spans: list[tuple[int, int]], start: int) -> None:
    """Check that the tensors fill the file with no gap, overlap or rest."""
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise malformed(file, "its tensors overlap or leave a gap")
        end = stop
    size = file.stat().st_size
    if size < start + end:
        raise _cut_short(file, start + end)
    if size > start + end:
        raise malformed(file, "it is longer than its header says")


def _metadata(table: dict[str, object], file: Path) -> dict[str, str]:
    found = {key: text for key, text in table.items() if isinstance(text, str)}
    if len(found) < len(table) or not all(map(is_text, (*found, *found.values()))):
        raise malformed(file, "its metadata are not text")
    return found


def _table(value: object, file: Path) -> dict[str, object]:
    if not isinstance(value, dict):
        raise malformed(file, "a table is missing in its header")
    return cast("dict[str, object]", value)


def _entry(
    key: str, value: dict[str, object], file: Path
) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    shape, span = _counts(value.get("shape")), _counts(value.get("data_offsets"))
    stored, name = value.get("dtype"), shorten(key)
    if shape is None or span is None or len(span) != 2 or not isinstance(stored, str):
        raise malformed(file, f"the entry of '{name}' is not a tensor")
    dtype = _DTYPES.get(stored)
    if dtype is None:
        raise CheckpointError(
            f"{file.name} stores '{name}' as {shorten(stored)}, which this pack cannot read.",
            "weights as bfloat16, float16, float32 or float8.",
            "choose the bfloat16 file of this model.",
        )
    if span[1] - span[0] != math.prod(shape) * dtype.itemsize:
        raise malformed(file, f"the length of '{name}' does not fit its shape")
    return dtype, shape, (span[0], span[1])


def _counts(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    if len(items) > _MOST_AXES:
        return None
    counts = tuple(item for item in items if type(item) is int and 0 <= item <= _LARGEST)
    return counts if len(counts) == len(items) else None
