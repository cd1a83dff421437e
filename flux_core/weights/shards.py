"""Which files belong to a path: a single file, a folder, an index, or the shards of one model."""

import os
import re
from pathlib import Path
from typing import cast

from ..errors import CheckpointError
from .header import (
    ANOTHER_FILE,
    HEADER_LIMIT,
    NEEDED,
    check_names,
    malformed,
    parse_table,
    read_bytes,
)
from .names import check_path, is_text, shorten

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_INDEX_ENDING = ".safetensors.index.json"
_USUAL_STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers write


def files_of(path: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
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
