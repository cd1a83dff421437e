"""Loads files into handles; loaders of one file with the same settings share one copy.

The registry holds weak references, so it keeps no model alive. Modules that take long to import
are imported when a model is first loaded.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from ...flux_core.errors import CheckpointError
from ...flux_core.families import FAMILIES
from ...flux_core.specs import TextSpec
from .. import host
from ..native.handle import AnyModel, NativeModelHandle, as_model
from .handles import AutoencoderHandle, ModelHandle, TextEncodersHandle

if TYPE_CHECKING:
    from ...flux_core.weights.checkpoint import Checkpoint

AS_STORED = "as stored"
_Handle = TypeVar("_Handle", bound=ModelHandle | TextEncodersHandle | AutoencoderHandle)
_registry: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()


def shared(key: Hashable, load: Callable[[], _Handle]) -> _Handle:
    """Returns the live handle under this key, or loads one."""
    handle = _registry.get(key)
    if handle is None:
        handle = _registry[key] = load()
    return handle


def load_model(path: Path, family: str, dtype: str, weights: str = AS_STORED) -> ModelHandle:
    """Loads a transformer; `family` "auto" is detected from its weights and its file name.

    Quantised weights stay quantised in memory, or are dequantised once with `weights` "plain".
    """
    from ...flux_core.weights.load import load_flux

    def load() -> ModelHandle:
        chosen = host.model_dtype(dtype, parameters_of([path]))
        network, report = load_flux(
            path,
            family=FAMILIES.get(family),
            dtype=chosen,
            device=host.model_devices()[1],
            operations=host.operations(),
            quantised_operations=host.stored_operations(chosen) if weights == AS_STORED else None,
        )
        return ModelHandle(network, str(report), chosen)

    return shared(("model", identity([path]), family, dtype, weights), load)


def load_autoencoder(path: Path, dtype: str) -> AutoencoderHandle:
    """Loads an autoencoder."""
    from ...flux_core.weights import load as weights

    def load() -> AutoencoderHandle:
        chosen = host.autoencoder_dtype(dtype)
        autoencoder, report = weights.load_autoencoder(
            path,
            dtype=chosen,
            device=host.autoencoder_devices()[1],
            operations=host.operations(),
        )
        return AutoencoderHandle(autoencoder, str(report), chosen)

    return shared(("autoencoder", identity([path]), dtype), load)


@dataclass(frozen=True, slots=True)
class Tokenizers:
    """The folders of the tokenizers that text encoders may need."""

    clip: Path
    t5: Path
    qwen: Path


def native_tokenizers() -> Tokenizers:
    """Returns the tokenizers that ComfyUI ships."""
    return Tokenizers(*host.native_tokenizers(), host.native_qwen_tokenizer())


def load_text_encoders(
    files: Sequence[Path], dtype: str, tokenizers: Tokenizers, text: TextSpec | None = None
) -> TextEncodersHandle:
    """Loads the text encoders of one model from one or two files, in any order.

    `text` sets the text length where the files do not tell it: those of the embedded models.
    """
    from ...flux_core.weights import load_text as weights
    from ...flux_core.weights.load_text import open_text

    def load() -> TextEncodersHandle:
        encoders = weights.load_text_encoders(
            files,
            clip_tokenizer=tokenizers.clip,
            t5_tokenizer=tokenizers.t5,
            qwen_tokenizer=tokenizers.qwen,
            text=text,
            dtype=host.text_dtype(dtype, parameters_of(files, open_text)),
            device=host.text_devices()[1],
            operations=host.operations(),
        )
        return TextEncodersHandle(encoders)

    return shared(("text", frozenset(identity(files)), dtype, tokenizers, text), load)


def load_nano(name: str) -> tuple[ModelHandle, TextEncodersHandle, AutoencoderHandle]:
    """Loads an embedded model's transformer, text encoders and autoencoder, by family name."""
    from ...flux_core.nano import paths

    family, files = FAMILIES[name], paths.FILES[name]
    tokenizers = Tokenizers(paths.CLIP_TOKENIZER, paths.T5_TOKENIZER, paths.QWEN_TOKENIZER)
    return (
        load_model(files.transformer, family.name, "auto"),
        load_text_encoders(files.text_encoders, "auto", tokenizers, family.text),
        load_autoencoder(files.autoencoder, "auto"),
    )


def apply_lora(
    model: AnyModel, path: Path, strength: float, block_strengths: str
) -> tuple[AnyModel, str]:
    """Applies a LoRA to the model on a model socket; returns the changed model and a report.

    Raises:
        GlassboxError: the LoRA is for another model, broken or incomplete, a setting cannot be
            parsed, or a native MODEL is not FLUX.
    """
    from ...flux_core.weights.lora import load_lora
    from ...flux_core.weights.lora_strengths import parse_strengths

    target = as_model(model)
    blocks = parse_strengths(block_strengths, target.network.spec)
    is_native = isinstance(target, NativeModelHandle)
    lora = load_lora(path, target.family, target.network.spec, takes_control=is_native)
    parts = lora.scaled(strength, blocks)
    report = f"{lora.report}\nstrength {strength:g}"
    if block_strengths.strip():
        report += f" times {' '.join(block_strengths.split())}"
    host.notify([f"{len(lora.report.matched)} of {lora.report.keys} keys used"])
    unchanged = len({one.key for one in lora.parts}) - len({one.key for one in parts})
    if unchanged:
        report += f"\nleft as they are, at strength 0: {unchanged} weights"
    if isinstance(target, NativeModelHandle):
        return target.with_lora(lora, parts), f"{report}\nthe MODEL: {target.report}"
    return target.with_changes(parts), report


def fingerprint(folder: str, *names: str) -> str:
    """Returns a digest that tells ComfyUI's cache of changed files; missing ones fail when loaded.

    A digest, because ComfyUI writes it into the images it saves, where no path belongs.
    """
    listed = [name for name in names if name in host.model_names(folder)]
    try:
        found = repr(identity([host.model_path(folder, name) for name in listed]))
    except CheckpointError as error:
        found = str(error)
    return sha256(found.encode()).hexdigest()


def parameters_of(
    files: Sequence[Path], open_file: "Callable[[Path], Checkpoint] | None" = None
) -> int:
    """Counts the parameters in model files from their headers; in transformer files by default."""
    from ...flux_core.weights.quantised import open_dequantised

    opened = map(open_file or open_dequantised, files)
    return sum(math.prod(shape) for one in opened for shape in one.shapes.values())


def identity(files: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    """Returns the real path, size and modification time of each file, which change with it.

    Raises:
        CheckpointError: one is missing, or is no model file.
    """
    from ...flux_core.weights.checkpoint import open_checkpoint

    parts = [part.resolve() for path in files for part in open_checkpoint(path).files]
    return tuple((str(part), part.stat().st_size, part.stat().st_mtime_ns) for part in parts)
