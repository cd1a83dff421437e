"""Checkpoint files: a single file, a folder, or a set of shards, as one set of tensors.

Opening reads headers only. safetensors and GGUF are read: a pickled file can run code.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .gguf_file import GgufTensor, is_gguf, map_tensors, open_gguf
from .header import ANOTHER_FILE, NEEDED, read_header
from .names import check_path, shorten
from .quantised import Quantised
from .shards import files_of


class _Tensors(AbstractContextManager[object], Protocol):
    """An open file, as the safetensors library gives it."""

    def get_tensor(self, name: str, /) -> Tensor:
        """Map one tensor into memory."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of one file, or of one set of shards, as the headers describe them."""

    path: Path  # as asked for: a file or a folder
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]
    places: dict[str, Path]  # which file holds each key
    quantised: dict[str, Quantised] = field(default_factory=dict[str, Quantised])  # by key
    gguf: dict[str, GgufTensor] = field(default_factory=dict[str, GgufTensor])  # by key

    @property
    def files(self) -> tuple[Path, ...]:
        """The files behind it, in order of name."""
        return tuple(sorted(set(self.places.values())))

    def read(self, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Map tensors into memory; None means all of them.

        Returns:
            CPU tensors that share the file's pages: nothing is copied until it is used.

        Raises:
            CheckpointError: a key is not there, or the file changed since it was opened.
        """
        return dict(self.stream(self.shapes if keys is None else keys))

    def stream(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor) file by file, for work that holds one tensor at a time.

        Quantised tensors come as the numbers they stand for, in float32.
        """
        keys = list(keys)
        needed = [
            name for key in keys if key in self.quantised for name in self.quantised[key].scales
        ]
        scales = dict(self.stored(needed))
        for key, stored in self.stored(keys):
            how = self.quantised.get(key)
            if how is not None:
                stored = how.restore(key, stored, [scales[name] for name in how.scales])
            yield key, stored

    def stored(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor) as the file has them; the keys of scales are known here as well."""
        wanted: dict[Path, list[str]] = {}
        for key in keys:
            if key not in self.places:
                raise CheckpointError(
                    f"{self.path.name} holds no tensor '{shorten(key)}'.", NEEDED, ANOTHER_FILE
                )
            wanted.setdefault(self.places[key], []).append(key)
        for file, names in wanted.items():
            try:
                if self.gguf:
                    yield from map_tensors(file, {name: self.gguf[name] for name in names})
                    continue
                tensors = cast(_Tensors, safe_open(str(file), framework="pt", device="cpu"))
                with tensors:
                    yield from ((name, tensors.get_tensor(name)) for name in names)
            except (OSError, SafetensorError) as error:
                # Not chained: the library repeats names of the file as they are.
                reason = shorten(str(error).replace(str(file), file.name), 200)
                raise CheckpointError(
                    f"{file.name} could not be read after it was opened ({reason}).",
                    "a file that stays in place while it is loaded.",
                    ANOTHER_FILE,
                ) from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a file, of a folder, or of the whole set one shard belongs to.

    Args:
        path: a .safetensors or .gguf file; one shard of a set; an index file; or a folder that
            holds one of these, such as the transformer folder of a diffusers model.

    Raises:
        CheckpointError: nothing is there, a part is missing, or a file is neither safetensors nor
            GGUF, cut short or malformed, or has a path that is not text; or a GGUF file cannot
            be read without its library.
    """
    files, index = files_of(path)
    if len(files) == 1 and is_gguf(files[0]):
        return _with_tensors(_open_gguf(path, files[0]))
    checkpoint = Checkpoint(path, {}, {}, {}, {})
    for file in files:
        check_path(file)
        header = read_header(file)
        for key in header.shapes:
            if key in checkpoint.places:
                raise CheckpointError(
                    f"'{shorten(key)}' is both in {checkpoint.places[key].name} and in "
                    f"{file.name}.",
                    "shards that belong together, each tensor in one of them.",
                    ANOTHER_FILE,
                )
            checkpoint.places[key] = file
        checkpoint.shapes.update(header.shapes)
        checkpoint.dtypes.update(header.dtypes)
        checkpoint.metadata.update(header.metadata)
    lost = [key for key, file in index.items() if checkpoint.places.get(key) != file]
    if lost:
        raise CheckpointError(
            f"The index of {path.name} names {len(lost)} tensors that are not in the shards it "
            f"names for them, first '{shorten(lost[0])}'.",
            "the index and the shards of the same download.",
            ANOTHER_FILE,
        )
    return _with_tensors(checkpoint)


def _with_tensors(checkpoint: Checkpoint) -> Checkpoint:
    if not checkpoint.shapes:
        raise CheckpointError(f"{checkpoint.path.name} holds no tensors.", NEEDED, ANOTHER_FILE)
    return checkpoint


def _open_gguf(path: Path, file: Path) -> Checkpoint:
    check_path(file)
    found = open_gguf(file)
    return Checkpoint(
        path,
        shapes={key: one.shape for key, one in found.tensors.items()},
        dtypes={key: one.dtype for key, one in found.tensors.items()},
        metadata=found.metadata,
        places=dict.fromkeys(found.tensors, file),
        quantised=found.quantised,
        gguf=found.tensors,
    )
