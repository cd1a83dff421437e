"""Checkpoint files: a single file, a folder, or a set of shards, opened as one set of tensors.

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

from ..errors import CheckpointError, shorten
from .dequantise import Quantisation
from .files import ANOTHER_FILE, NEEDED, check_path, files_of, first_bytes, not_safetensors
from .gguf import GgufTensor, map_tensors, open_gguf

# The library tells dtypes by these names. It also reads types of less than a byte, which nothing
# computes with: NVFP4 weights lie in files as U8.
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


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class _OpenFile(AbstractContextManager["_OpenFile"], Protocol):
    """What the safetensors library, which has no annotations, makes of a file."""

    def keys(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_slice(self, name: str, /) -> _Slice: ...
    def get_tensor(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of one file, or of one set of shards, as the headers describe them."""

    path: Path  # as asked for: a file or a folder
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]
    file_of: dict[str, Path]  # by key
    quantised: dict[str, Quantisation] = field(default_factory=dict[str, Quantisation])  # by key
    gguf: dict[str, GgufTensor] = field(default_factory=dict[str, GgufTensor])  # by key

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold its tensors, in order of name."""
        return tuple(sorted(set(self.file_of.values())))

    def read(self, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Maps tensors into memory; None means all of them.

        Returns:
            CPU tensors that share the file's pages: nothing is copied until it is used.

        Raises:
            CheckpointError: a key is not there, or the file changed since it was opened.
        """
        return dict(self.stream(self.shapes if keys is None else keys))

    def stream(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields (key, tensor) file by file, for work that holds one tensor at a time.

        Quantised tensors are dequantised to float32.
        """
        keys = list(keys)
        needed = [
            name for key in keys if key in self.quantised for name in self.quantised[key].scales
        ]
        scales = dict(self.stream_raw(needed))
        for key, raw in self.stream_raw(keys):
            quantisation = self.quantised.get(key)
            if quantisation is not None:
                given = [scales[name] for name in quantisation.scales]
                raw = quantisation.dequantise(key, raw, given)
            yield key, raw

    def stream_raw(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields (key, tensor) as the file has them; keys of scales are accepted as well."""
        wanted: dict[Path, list[str]] = {}
        for key in keys:
            if key not in self.file_of:
                raise CheckpointError(
                    f"{self.path.name} holds no tensor '{shorten(key)}'.", NEEDED, ANOTHER_FILE
                )
            wanted.setdefault(self.file_of[key], []).append(key)
        for file, names in wanted.items():
            try:
                if self.gguf:
                    yield from map_tensors(file, {name: self.gguf[name] for name in names})
                    continue
                with _open(file, "pt") as tensors:
                    yield from ((name, tensors.get_tensor(name)) for name in names)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{file.name} could not be read after it was opened "
                    f"({shorten(_reason(error, file), 200)}).",
                    "a file that stays in place while it is loaded.",
                    ANOTHER_FILE,
                ) from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads the headers of a file, of a folder, or of the whole set one shard belongs to.

    Args:
        path: a .safetensors or .gguf file; one shard of a set; an index file; or a folder that
            holds one of these, such as the transformer folder of a diffusers model.

    Raises:
        CheckpointError: nothing is there, a part is missing, or a file is neither safetensors nor
            GGUF, cut short or malformed, or has a path that is not text; or a GGUF file cannot
            be read without its library.
    """
    files, index = files_of(path)
    checkpoint = Checkpoint(path, {}, {}, {}, {})
    for file in files:
        check_path(file)
        if len(files) == 1 and first_bytes(file, 4) == b"GGUF":
            checkpoint = _open_gguf(path, file)
        else:
            _add_headers(checkpoint, file)
    lost = [key for key, file in index.items() if checkpoint.file_of.get(key) != file]
    if lost:
        raise CheckpointError(
            f"The index of {path.name} names {len(lost)} tensors that are not in the shards it "
            f"names for them, first '{shorten(lost[0])}'.",
            "the index and the shards of the same download.",
            ANOTHER_FILE,
        )
    if not checkpoint.shapes:
        raise CheckpointError(f"{checkpoint.path.name} holds no tensors.", NEEDED, ANOTHER_FILE)
    return checkpoint


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a dtype's name as people write it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def _open(file: Path, framework: str) -> _OpenFile:
    return cast(_OpenFile, safe_open(str(file), framework=framework))


def _add_headers(checkpoint: Checkpoint, file: Path) -> None:
    """Adds what one safetensors file says of its tensors."""
    try:
        # For NumPy, since PyTorch maps the whole file for writing, which needs as much memory free.
        with _open(file, "np") as tensors:
            # In the file's order; before safetensors 0.5 there are only names in order of letters.
            keys: list[str] = getattr(tensors, "offset_keys", tensors.keys)()
            slices = {key: tensors.get_slice(key) for key in keys}
            headers = {key: (one.get_shape(), one.get_dtype()) for key, one in slices.items()}
            checkpoint.metadata.update(tensors.metadata() or {})
    except SafetensorError as error:
        # Not chained: the library repeats names of the file as they are.
        raise not_safetensors(file, _reason(error, file)) from None
    except OSError as error:
        raise CheckpointError(
            f"{file.name} cannot be opened ({shorten(_reason(error, file), 200)}).",
            NEEDED,
            ANOTHER_FILE,
        ) from None
    for key, (shape, said) in headers.items():
        if key in checkpoint.file_of:
            raise CheckpointError(
                f"'{shorten(key)}' is both in {checkpoint.file_of[key].name} and in {file.name}.",
                "shards that belong together, each tensor in one of them.",
                ANOTHER_FILE,
            )
        dtype = _DTYPES.get(said)
        if dtype is None:
            raise CheckpointError(
                f"{file.name} stores '{shorten(key)}' as {said}, which this pack cannot read.",
                "weights as bfloat16, float16, float32 or float8.",
                "choose the bfloat16 file of this model.",
            )
        checkpoint.file_of[key], checkpoint.dtypes[key] = file, dtype
        checkpoint.shapes[key] = tuple(shape)


def _reason(error: Exception, file: Path) -> str:
    """Returns what a library says of a file, without the folder it lies in."""
    return str(error).replace(str(file), file.name)


def _open_gguf(path: Path, file: Path) -> Checkpoint:
    opened = open_gguf(file)
    return Checkpoint(
        path,
        shapes={key: one.shape for key, one in opened.tensors.items()},
        dtypes={key: one.dtype for key, one in opened.tensors.items()},
        metadata=opened.metadata,
        file_of=dict.fromkeys(opened.tensors, file),
        quantised=opened.quantised,
        gguf=opened.tensors,
    )
