"""The header of a GGUF file: names, types, shapes and places of its tensors, checked.

Read here and not by the library, which believes every length that a file states.

Source: ggml-org/ggml docs/gguf.md, versions 2 and 3.
"""

import math
import mmap
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from .header import ANOTHER_FILE, NEEDED
from .names import is_text, shorten

_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
_INT32, _TEXT, _ARRAY = 5, 8, 9
_LONGEST_TEXT = 1_000_000  # bytes
_MOST_TEXTS = 1_000_000  # in all arrays; the largest vocabularies have a quarter of it
_MOST_KEPT = 64 << 20  # bytes of the arrays that are kept
_MOST_ENTRIES = 100_000  # tensors, or metadata
_MOST_AXES = 8
_LEAST_ENTRY = {"tensors": 24, "metadata": 13}  # bytes that one takes at least
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor, as the header describes it."""

    type: int
    shape: tuple[int, ...]  # the longest stride first, as PyTorch counts
    count: int  # of numbers
    offset: int  # of its first byte in the file


@dataclass(slots=True)
class GgufHeader:
    """What one file says of itself."""

    entries: dict[str, Entry] = field(default_factory=dict[str, Entry])
    texts: dict[str, str] = field(default_factory=dict[str, str])  # metadata that are text
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    words: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # arrays kept
    numbers: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    alignment: int = 32
    size: int = 0  # of the file

    def types(self) -> set[int]:
        """Number the formats of its tensors."""
        return {one.type for one in self.entries.values()}

    def check_places(self, lengths: Mapping[str, int], file: Path) -> None:
        """See that every tensor lies in the file and none in another.

        Raises:
            CheckpointError: the file is cut short, or tensors overlap.
        """
        end = 0
        for name, one in sorted(self.entries.items(), key=lambda item: item[1].offset):
            if one.offset < end:
                raise _damaged(file, f"'{shorten(name)}' overlaps the tensor before it")
            end = one.offset + lengths[name]
        if end > self.size:
            raise CheckpointError(
                f"{file.name} is cut short: it is {self.size:,} bytes long and its header "
                f"promises {end:,}.",
                "the complete file.",
                "download the file again: the last download did not finish.",
            )


def read_gguf_header(file: Path, keep: Collection[str] = ()) -> GgufHeader:
    """Read and check the header of one file; no weight is read.

    Args:
        file: which is GGUF.
        keep: arrays of text or of 32-bit numbers that are kept, and not only passed over.

    Raises:
        CheckpointError: the file is gone, cut short, malformed or of another version.
    """
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Reader(data, file, keep).header()
    except OSError as error:
        raise CheckpointError(
            f"{file.name} cannot be opened ({error.strerror}).", NEEDED, ANOTHER_FILE
        ) from error


class _Reader:
    """Reads the header from its beginning; no length is believed before it fits the file."""

    def __init__(self, data: mmap.mmap, file: Path, keep: Collection[str]) -> None:
        self.data, self.file, self.keep = data, file, keep
        self.at = 4  # behind "GGUF"
        self.texts_seen = 0

    def header(self) -> GgufHeader:
        version = self.number("<I")
        if version not in _VERSIONS:
            big = version % 65536 == 0 and version > 0
            raise CheckpointError(
                f"{self.file.name} is GGUF "
                + ("for machines of the other byte order." if big else f"of version {version:,}."),
                f"version {' or '.join(map(str, _VERSIONS))} with the lowest byte first.",
                ANOTHER_FILE,
            )
        found = GgufHeader(size=len(self.data))
        tensors, entries = self.number("<Q"), self.number("<Q")
        self.require(tensors, "tensors")
        self.require(entries, "metadata")
        for _ in range(entries):
            self.metadata(found)
        rows = [self.tensor() for _ in range(tensors)]
        start = -(-self.at // found.alignment) * found.alignment
        for name, kind, shape, offset in rows:
            if name in found.entries:
                raise _damaged(self.file, f"'{shorten(name)}' stands twice in its header")
            if offset % found.alignment:
                raise _damaged(self.file, f"'{shorten(name)}' does not begin where it may")
            found.entries[name] = Entry(kind, shape, math.prod(shape), start + offset)
        return found

    def metadata(self, found: GgufHeader) -> None:
        """Read one name and its value; most values are only passed over."""
        name, kind = self.text(), self.number("<I")
        if kind == _TEXT:
            found.texts[name] = self.text()
        elif kind == _ARRAY:
            self.array(found, name)
        elif kind == 4 and name == _ALIGNMENT:
            found.alignment = self.number("<I")
            if found.alignment < 8 or found.alignment & (found.alignment - 1):
                raise _damaged(self.file, f"its tensors lie {found.alignment:,} bytes apart")
        else:
            self.skip(self.size_of(kind))

    def array(self, found: GgufHeader, name: str) -> None:
        """Pass over an array, or keep it; a short one of 32-bit numbers may be a shape."""
        kind, count = self.number("<I"), self.number("<Q")
        is_kept, begin = name in self.keep, self.at
        if kind == _TEXT:
            self.texts_seen += count
            if self.texts_seen > _MOST_TEXTS:
                raise _damaged(self.file, f"its header lists {self.texts_seen:,} words")
            self.skip_texts(count)
        else:
            self.skip(count * self.size_of(kind))
        end = self.at
        if is_kept and end - begin > _MOST_KEPT:
            raise _damaged(self.file, f"'{shorten(name)}' is {end - begin:,} bytes long")
        if is_kept and kind == _TEXT:
            self.at = begin
            found.words[name] = [self.text() for _ in range(count)]
        elif kind == _INT32 and (is_kept or count <= _MOST_AXES):
            numbers = struct.unpack_from(f"<{count}i", self.data, begin)
            if is_kept:
                found.numbers[name] = numbers
            elif numbers:
                found.shapes[name] = numbers

    def skip_texts(self, count: int) -> None:
        """Pass over words; vocabularies have hundreds of thousands of them."""
        length_at, end, at = struct.Struct("<Q").unpack_from, len(self.data), self.at
        for _ in range(count):
            if at + 8 > end:
                self.skip(end)  # more than there is
            at += 8 + length_at(self.data, at)[0]
        self.skip(at - self.at)

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, axes = self.text(), self.number("<I")
        if axes > _MOST_AXES:
            raise _damaged(self.file, f"'{shorten(name)}' has {axes:,} axes")
        sides = [self.number("<Q") for _ in range(axes)]
        if any(side >= 2**48 for side in sides):
            raise _damaged(self.file, f"'{shorten(name)}' is {max(sides):,} long")
        return name, self.number("<I"), tuple(reversed(sides)), self.number("<Q")

    def number(self, code: str) -> int:
        size = struct.calcsize(code)
        begin = self.at
        self.skip(size)
        return struct.unpack_from(code, self.data, begin)[0]

    def text(self) -> str:
        length, begin = self.number("<Q"), self.at
        if length > _LONGEST_TEXT:
            raise _damaged(self.file, f"a word in its header is {length:,} bytes long")
        self.skip(length)
        try:
            text = self.data[begin : self.at].decode("utf-8")
        except UnicodeDecodeError:
            text = "\ud800"
        if not is_text(text):
            raise _damaged(self.file, "a name in its header is not text")
        return text

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.file.name} is cut short: it ends in its header, after "
                f"{len(self.data):,} bytes.",
                "the complete file.",
                "download the file again: the last download did not finish.",
            )
        self.at += count

    def require(self, count: int, what: str) -> None:
        """Refuse a count that cannot be before anything is counted up to it."""
        if count > _MOST_ENTRIES:
            raise _damaged(self.file, f"its header promises {count:,} {what}")
        if count * _LEAST_ENTRY[what] > len(self.data):
            self.skip(len(self.data))

    def size_of(self, kind: int) -> int:
        size = _SIZES.get(kind)
        if size is None:
            raise _damaged(self.file, f"its header has a value of unknown type {kind:,}")
        return size


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file.name} is damaged: {what}.", "a well-formed GGUF file.", ANOTHER_FILE
    )
