"""Which files a path means: one file, a folder, an index, or the shards of one model.

Also the words for what is often found under a model's name and is none.
"""

import json
import os
import re
from pathlib import Path
from typing import cast

from ..errors import CheckpointError, shorten

NEEDED = "a complete .safetensors file, or a folder of its shards."
ANOTHER_FILE = "download the file again, or choose another in the loader."
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_INDEX_ENDING = ".safetensors.index.json"
_USUAL_STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers write
_PICKLED = "a pickled PyTorch file, which can run code and is never opened"
_PICKLE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_FIRST_BYTES = (
    (b"PK\x03\x04", _PICKLED),
    (b"\x80", _PICKLED),
    (b"GGUF", "a GGUF file among shards, which are safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself"),
    (b"<", "a web page: the download was answered by a login or an error page"),
)


def files_of(path: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """Returns the files that belong to a path, and for each key the file that its index names.

    Raises:
        CheckpointError: nothing is there, a shard is missing, the index is malformed, or a path
            is not text.
    """
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
        by_key = _read_index(path)
        return tuple(sorted(set(by_key.values()))), by_key
    return (path,), {}


def first_bytes(file: Path, count: int) -> bytes:
    """Returns up to `count` bytes from the start of a file.

    Raises:
        CheckpointError: the file cannot be opened.
    """
    try:
        with file.open("rb") as stream:
            return stream.read(count)
    except OSError as error:
        raise CheckpointError(
            f"{file.name} cannot be opened ({error.strerror}).", NEEDED, ANOTHER_FILE
        ) from error


def not_safetensors(file: Path, reason: str) -> CheckpointError:
    """Builds the error for a file that the safetensors library does not read.

    Args:
        file: the file, whose first bytes may show what it is instead.
        reason: the library's own words.
    """
    start = first_bytes(file, 64)
    found = "empty" if not start else f"no whole safetensors file ({shorten(reason, 200)})"
    if file.suffix.lower() in _PICKLE_ENDINGS:
        found = _PICKLED
    for magic, title in _FIRST_BYTES:
        if start.startswith(magic):
            found = title
    return CheckpointError(f"{file.name} is {found}.", NEEDED, ANOTHER_FILE)


def is_text(name: str) -> bool:
    """Returns whether a name can be encoded as UTF-8, which a lone surrogate cannot."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_path(path: Path) -> None:
    """Refuses a path that the safetensors library cannot open.

    Raises:
        CheckpointError: it holds bytes that are not text in the system's encoding.
    """
    if is_text(str(path)):
        return
    whose, what = "its name", "file" if path.suffix == ".safetensors" else "folder"
    if is_text(path.name):
        whose, what = "the name of a folder above it", "folder"
    raise CheckpointError(
        f"{shorten(path.name)} cannot be read: {whose} holds bytes that are not text.",
        "a name in UTF-8.",
        f"rename the {what}.",
    )


def _choose_in_folder(folder: Path) -> Path:
    """Returns the one model in a folder: an index, a single file, or the first of its shards."""
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
    found = f"The folder {folder.name} holds {len(models)} models"
    if models:
        found += f" ({', '.join(map(shorten, sorted(models)[:4]))})"
    inside = sorted({file.parent.name for file in folder.glob("*/*.safetensors")})
    if inside:
        found += f"; there are models in its folders {', '.join(map(shorten, inside[:9]))}"
    raise CheckpointError(
        f"{found}.",
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
    """Reads which shard holds each tensor; all shards lie beside their index."""
    try:
        table = cast(object, json.loads(index.read_bytes()))
    except (OSError, ValueError, RecursionError):
        table = None
    weights = (
        cast("dict[str, object]", table).get("weight_map") if isinstance(table, dict) else None
    )
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(
            f"{index.name} is damaged: it has no weight_map.",
            "an index as transformers and diffusers write it.",
            ANOTHER_FILE,
        )
    names = cast("dict[str, object]", weights)
    for name in names.values():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise CheckpointError(
                f"{index.name} names '{shorten(str(name))}' as a shard.",
                "names of .safetensors files in the same folder.",
                ANOTHER_FILE,
            )
    shards = sorted(set(cast("dict[str, str]", names).values()))
    _check_present(index.parent, shards)
    paths = {name: index.with_name(name) for name in shards}
    return {key: paths[name] for key, name in cast("dict[str, str]", names).items()}


def _is_plain_name(name: str) -> bool:
    has_folder = any(mark in name for mark in "/\\:\0")
    return is_text(name) and not has_folder and name.endswith(".safetensors")


def _check_present(folder: Path, names: list[str]) -> None:
    """Refuses a set with missing shards; the folder is listed once, however many it names."""
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"The folder {folder.name} cannot be listed ({error.strerror}).",
            "every shard of the set in a folder that can be read.",
            "let ComfyUI read the folder, or choose another file in the loader.",
        ) from None
    missing = [name for name in names if name not in present]
    if missing:
        raise CheckpointError(
            f"{len(missing):,} of {len(names):,} shards are not there: "
            f"{', '.join(map(shorten, missing[:3]))}.",
            "every shard of the set in the same folder.",
            "download the missing shards beside the others.",
        )
