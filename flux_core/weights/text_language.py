"""A language model's file → LanguageModelEncoder: only the layers that are read are loaded."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ..errors import CheckpointError, FamilyMismatchError
from ..families import LANGUAGE_MODELS
from ..operations import Operations
from ..specs import LanguageModelSpec, TextSpec
from ..text.encoders import LOADER, LanguageModelEncoder
from ..text.modules import build_language_model
from ..text.tekken import MOST_BYTES
from ..text.tokenizers import ChatTokenizer, load_mistral_tokenizer, load_qwen_tokenizer
from .files import Checkpoint
from .gguf_text import in_halves, is_interleaved
from .gguf_tokenizer import carries_tekken, load_gguf_tokenizer
from .text_fill import Found, count, dequantised, dtype_of, fill, name_of
from .text_keys import describe_stranger, find_parts
from .text_language_keys import LanguageModelPart, find_language_models, language_model_part

_TEKKEN = "tekken_model"


def load_language_model(
    files: Sequence[Checkpoint],
    *,
    qwen_tokenizer: Path | None,
    text: TextSpec | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
    operations: Operations,
) -> LanguageModelEncoder | None:
    """Load the one language model among opened files; None when there is none.

    Args:
        files: what was chosen.
        qwen_tokenizer: folder with vocab.json and merges.txt; None looks beside the model.
        text: the model it has to be; anything but a language model means any of FLUX.2's.
        dtype: of the weights; None keeps the file's (quantised ones become bfloat16).
        device: where the weights go; None leaves them mapped from the file.
        operations: the layers to build from.

    Raises:
        CheckpointError: a tensor or the tokenizer is missing, broken or of another shape.
        FamilyMismatchError: it is another language model, or came with another model's encoder.
    """
    found = [(file, prefix) for file in files for prefix in find_language_models(file.shapes)]
    if not found:
        return None
    wanted = (text,) if isinstance(text, LanguageModelSpec) else LANGUAGE_MODELS
    file, prefix = found[0]
    model = language_model_part(file, prefix, wanted)
    _check_alone(files, found, model)
    one = Found(model.part, file)
    chosen = dtype_of(one, dtype)
    tokenizer = _load_tokenizer(file, model.spec, qwen_tokenizer)
    module = build_language_model(model.shape, dtype=chosen, operations=operations)
    head_dim = model.shape.head_dim
    turn = partial(in_halves, head_dim=head_dim) if is_interleaved(file) else None
    fill(module, one, lambda name: chosen, device, turn)
    return LanguageModelEncoder(
        model.spec,
        module=module,
        shape=model.shape,
        tokenizer=tokenizer,
        report="\n".join((_describe(one, model, chosen), *dequantised(one, lambda name: chosen))),
    )


def _check_alone(
    files: Sequence[Checkpoint],
    found: Sequence[tuple[Checkpoint, str]],
    model: LanguageModelPart,
) -> None:
    """See that nothing was chosen beside the language model."""
    title, file = model.spec.title, found[0][0]
    if len(found) > 1:
        raise CheckpointError(
            f"{len(found)} language models were given "
            f"({' and '.join(one.path.name for one, _ in found)}).",
            f"one: FLUX.2 reads {title} alone.",
            f"set file_2 to none in {LOADER}.",
        )
    for other in files:
        parts = find_parts(other.shapes)
        if parts:
            raise FamilyMismatchError(
                f"{file.path.name} is {title} of FLUX.2, and {other.path.name} holds "
                f"{parts[0].kind}, which FLUX.1 reads.",
                "CLIP-L and T5 for FLUX.1, or one language model for FLUX.2.",
                f"choose the files of one model in {LOADER}.",
            )
        if other is not file:
            raise CheckpointError(
                f"{other.path.name} is {describe_stranger(other.shapes)}.",
                f"nothing beside {title}: FLUX.2 has one text encoder.",
                f"set file_2 to none in {LOADER}.",
            )


def _load_tokenizer(
    file: Checkpoint, spec: LanguageModelSpec, qwen_tokenizer: Path | None
) -> ChatTokenizer:
    """Find the tokenizer: given, inside the file, or beside it."""
    folder = file.path if file.path.is_dir() else file.path.parent
    if spec.architecture == "qwen3":
        return load_qwen_tokenizer(qwen_tokenizer or folder)
    if carries_tekken(file):
        return load_gguf_tokenizer(file)
    inside = [key for key in file.shapes if key.rpartition(".")[2] == _TEKKEN]
    if inside:
        return load_mistral_tokenizer(_read_bytes(file, inside[0]))
    # A Hugging Face model keeps it beside the weights, a diffusers model in the next folder.
    places = (folder, folder.with_name("tokenizer"))
    names = ("tokenizer.json", "tekken.json")
    having = [place for place in places if any((place / name).is_file() for name in names)]
    return load_mistral_tokenizer(having[0] if having else folder)


def _read_bytes(file: Checkpoint, key: str) -> bytes:
    shape, dtype = file.shapes[key], file.dtypes[key]
    if dtype != torch.uint8 or count(shape) > MOST_BYTES:
        raise CheckpointError(
            f"{file.path.name} carries its tokenizer as {count(shape):,} numbers of "
            f"{name_of(dtype)}.",
            f"bytes, at most {MOST_BYTES:,}.",
            f"choose or download the file again in {LOADER}.",
        )
    return file.read([key])[key].numpy().tobytes()


def _describe(one: Found, model: LanguageModelPart, dtype: torch.dtype) -> str:
    spec, shape = model.spec, model.shape
    total = sum(count(sides) for sides in shape.shapes().values())
    return (
        f"{spec.title}: {one.file.path.name}, {shape.layers} of {model.depth} layers, "
        f"width {shape.hidden}, up to {spec.tokens} tokens, {total / 1e6:,.1f} M parameters, "
        f"{name_of(dtype)}"
    )
