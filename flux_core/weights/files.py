"""Checkpoint files: a single file, a folder, or a set of shards, as one set of tensors.

Opening reads headers only. Only safetensors are read: a pickled file can run code.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .header import (
    ANOTHER_FILE,
    HEADER_LIMIT,
    NEEDED,
    check_names,
    malformed,
    parse_table,
    read_bytes,
    read_header,
)
from .names import check_path, is_text, shorten

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_INDEX_ENDING = ".safetensors.index.json"
_USUAL_STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers write


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
        """Yield (key, tensor) file by file, for work that holds one tensor at a time."""
        wanted: dict[Path, list[str]] = {}
        for key in keys:
            if key not in self.places:
                raise CheckpointError(
                    f"{self.path.name} holds no tensor '{shorten(key)}'.", NEEDED, ANOTHER_FILE
                )
            wanted.setdefault(self.places[key], []).append(key)
        for file, names in wanted.items():
            try:
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
        path: a .safetensors file; one shard of a set; an index file; or a folder that holds
            one of these, such as the transformer folder of a diffusers model.

    Raises:
        CheckpointError: nothing is there, a part is missing, or a file is not safetensors,
            cut short or malformed, or has a path that is not text.
    """
    files, index = _files_of(path)
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
    if not checkpoint.shapes:
        raise CheckpointError(f"{path.name} holds no tensors.", NEEDED, ANOTHER_FILE)
    return checkpoint


def _files_of(path: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """Find the files that belong to a path, and which of them its index names for each key."""
    check_path(path)
    if not os.path.exists(path):  # Path.exists raises where a name is too long
        raise CheckpointError(f"{shorten(path.name)} is not there any more.", NEEDED, ANOTHER_FILE)
    if path.is_dir():
        path = _choose_in_folder(path)
    shard = _SHARD.fullmatch(path.name)
    if shard is not None:
        index = path.with_name(shard["stem"] + _INDEX_ENDING)
        if not index.exists():
            return _numbered_shards(path, shard), {}
        path = index
    if path.name.endswith(_INDEX_ENDING):
        places = _read_index(path)
        return tuple(sorted(set(places.values()))), places
    return (path,), {}


def _choose_in_folder(folder: Path) -> Path:
    """Find the one model in a folder: an index, a single file, or the first of its shards."""
    models: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shard = _SHARD.fullmatch(file.name)
        models.setdefault(shard["stem"] if shard else file.name[: -len(".safetensors")], file)
    for index in folder.glob("*" + _INDEX_ENDING):
        models[index.name.removesuffix(_INDEX_ENDING)] = index
    if len(models) == 1:
        return next(iter(models.values()))
    for stem in _USUAL_STEMS:
        if stem in models:
            return models[stem]
    inside = sorted({file.parent.name for file in folder.glob("*/*.safetensors")})
    raise CheckpointError(
        f"The folder {folder.name} holds {len(models)} models"
        + (f" ({', '.join(map(shorten, sorted(models)[:4]))})" if models else "")
        + (
            f"; there are models in its folders {', '.join(map(shorten, inside[:9]))}."
            if inside
            else "."
        ),
        "a folder with one model in .safetensors files.",
        "choose the file itself, or the folder of one part, in the loader.",
    )


def _numbered_shards(path: Path, shard: re.Match[str]) -> tuple[Path, ...]:
    total, number = int(shard["total"]), int(shard["number"])
    if not 1 <= number <= total:
        raise CheckpointError(
            f"{path.name} calls itself number {number} of {total}.",
            "shards numbered from 1 on.",
            ANOTHER_FILE,
        )
    stem = shard["stem"]
    names = [f"{stem}-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    _check_present(path.parent, names)
    return tuple(path.with_name(name) for name in names)


def _read_index(index: Path) -> dict[str, Path]:
    """Read which shard holds each tensor; all shards lie beside their index."""
    weights = parse_table(read_bytes(index, HEADER_LIMIT), index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise malformed(index, "it has no weight_map")
    names: dict[str, str] = {}
    for key, name in cast("dict[str, object]", weights).items():
        if not isinstance(name, str) or not _is_plain_name(name):
            said = f"'{shorten(name)}'" if isinstance(name, str) else "something without a name"
            raise CheckpointError(
                f"{index.name} names {said} as a shard.",
                "names of .safetensors files in the same folder.",
                ANOTHER_FILE,
            )
        names[key] = name
    check_names(names, index)
    shards = sorted(set(names.values()))
    _check_present(index.parent, shards)
    paths = {name: index.with_name(name) for name in shards}
    return {key: paths[name] for key, name in names.items()}


def _is_plain_name(name: str) -> bool:
    return (
        is_text(name)
        and not any(mark in name for mark in "/\\:\0")
        and name.endswith(".safetensors")
    )


def _check_present(folder: Path, names: list[str]) -> None:
    """Refuse a set with missing shards; the folder is looked at once, however many it names."""
    try:
        there = set(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"The folder {folder.name} cannot be looked into ({error.strerror}).",
            "every shard of the set in a folder that can be read.",
            "let ComfyUI read the folder, or choose another file in the loader.",
        ) from None
    missing = [name for name in names if name not in there]
    if missing:
        raise CheckpointError(
            f"{len(missing):,} of {len(names):,} shards are not there: "
            f"{', '.join(map(shorten, missing[:3]))}.",
            "every shard of the set in the same folder.",
            "download the missing shards beside the others.",
        )
