"""Text encoder files → the encoders of a model: one or two files, in any order and layout.

Headers are read and judged first; weights are mapped from the file, not copied, wherever their
dtype is kept.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import CheckpointError, FamilyMismatchError
from ..families import FLUX1_TEXT
from ..operations import Operations, torch_operations
from ..specs import ClipT5Spec, TextSpec
from ..text.encoders import LOADER, LanguageModelEncoder, TextEncoders
from ..text.modules import CLIP_L, T5_XXL, ClipSpec, T5Spec, build_clip, build_t5
from ..text.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from .files import Checkpoint
from .names import shorten
from .text_files import open_text
from .text_fill import Found, count, dequantised, dtype_of, fill, name_of
from .text_keys import (
    Kind,
    check_part,
    clip_spec,
    describe_stranger,
    find_parts,
    leftover_keys,
    loader_of,
    t5_spec,
)
from .text_language import load_language_model

_logger = logging.getLogger(__name__)

_NEEDED = (
    "CLIP-L and T5-XXL for FLUX.1, as in clip_l.safetensors and t5xxl_fp16.safetensors, or one "
    "language model for FLUX.2, as in qwen_3_4b.safetensors."
)
_PAIR = "CLIP-L and T5-XXL, as in clip_l.safetensors and t5xxl_fp16.safetensors."
_WIDE_LAYER = "DenseReluDense.wo.weight"


def load_text_encoders(
    files: Sequence[Path],
    *,
    clip_tokenizer: Path | None = None,
    t5_tokenizer: Path | None = None,
    qwen_tokenizer: Path | None = None,
    text: TextSpec | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    operations: Operations | None = None,
) -> TextEncoders | LanguageModelEncoder:
    """Load CLIP and T5, or one language model: the files say which.

    Args:
        files: the file or shard folder of each encoder, in any order, or one file with both.
        clip_tokenizer: folder with vocab.json and merges.txt.
        t5_tokenizer: tokenizer.json or spiece.model, or its folder.
        qwen_tokenizer: folder with vocab.json and merges.txt. Of the tokenizers that are None,
            those that are needed are looked for beside their encoders; Mistral's lies in or
            beside its file always.
        text: what the model's text is; None, or of the other kind: what the files are.
        dtype: of the weights; None keeps each file's (quantised ones become bfloat16).
        device: where the weights go; None leaves them mapped from the file.
        operations: the layers to build from; None means torch.nn.

    Raises:
        CheckpointError: a file or a tensor is missing, broken or of another shape.
        FamilyMismatchError: a file is another model's text encoder, or two belong to different
            models.

    Deviation: with float16, T5's `wo` layers are kept in float32, as transformers does.
    """
    opened = [open_text(path) for path in files]
    operations = operations or torch_operations()
    encoders = load_language_model(
        opened,
        qwen_tokenizer=qwen_tokenizer,
        text=text,
        dtype=dtype,
        device=device,
        operations=operations,
    ) or _load_clip_t5(
        [found for file in opened for found in _find(file)],
        tokenizers=(clip_tokenizer, t5_tokenizer),
        text=text if isinstance(text, ClipT5Spec) else None,
        dtype=dtype,
        device=device,
        operations=operations,
    )
    _logger.info("Text encoders:\n%s", encoders.report)
    return encoders


def _load_clip_t5(
    found: Sequence[Found],
    *,
    tokenizers: tuple[Path | None, Path | None],
    text: ClipT5Spec | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
    operations: Operations,
) -> TextEncoders:
    """Check both encoders by their headers, then load them."""
    clip, t5 = _choose(found, "CLIP-L"), _choose(found, "T5")
    clip_shape = clip_spec(clip.part, clip.file.shapes)
    t5_shape = t5_spec(t5.part, t5.file.shapes)
    check_part(clip.part, clip_shape.shapes(), clip.file.shapes)
    check_part(t5.part, t5_shape.shapes(), t5.file.shapes)
    _check_pair(clip_shape, t5_shape)
    clip_dtype, t5_dtype = (dtype_of(one, dtype) for one in (clip, t5))
    clip_tokenizer = load_clip_tokenizer(tokenizers[0] or clip.file.path.parent)
    t5_tokenizer = load_t5_tokenizer(tokenizers[1] or t5.file.path.parent)

    text = text or FLUX1_TEXT
    clip_module = build_clip(clip_shape, dtype=clip_dtype, operations=operations)
    t5_module = build_t5(t5_shape, dtype=t5_dtype, operations=operations)
    fill(clip_module, clip, lambda name: clip_dtype, device)
    fill(t5_module, t5, lambda name: _t5_dtype(name, t5_dtype), device)
    report = "\n".join(
        (
            _describe(clip, clip_shape, clip_dtype, f"{clip_shape.positions} positions"),
            *dequantised(clip, lambda name: clip_dtype),
            _describe(t5, t5_shape, t5_dtype, f"up to {text.t5_tokens} tokens"),
            *dequantised(t5, lambda name: _t5_dtype(name, t5_dtype)),
        )
    )
    return TextEncoders(
        text,
        clip=clip_module,
        t5=t5_module,
        clip_spec=clip_shape,
        t5_spec=t5_shape,
        clip_tokenizer=clip_tokenizer,
        t5_tokenizer=t5_tokenizer,
        report=report,
    )


def _find(file: Checkpoint) -> list[Found]:
    """Find the encoders of a file, and refuse a file without any or with more than them."""
    parts = find_parts(file.shapes)
    if not parts:
        stranger = describe_stranger(file.shapes)
        raise CheckpointError(
            f"{file.path.name} is {stranger}.",
            _NEEDED,
            f"{loader_of(stranger)}choose a text encoder file in {LOADER}.",
        )
    left = leftover_keys(file.shapes, parts)
    if left and any(part.is_whole_file and part.other is None for part in parts):
        raise CheckpointError(
            f"{file.path.name} holds {len(left)} tensors beside its text encoder, first "
            f"'{shorten(left[0])}'.",
            "a file of the text encoder alone, or a whole checkpoint with its usual prefixes.",
            f"choose or download another file in {LOADER}.",
        )
    return [Found(part, file) for part in parts]


def _choose(found: Sequence[Found], kind: Kind) -> Found:
    """Take the one encoder of a kind."""
    ours = [one for one in found if one.part.kind == kind and one.part.other is None]
    if len(ours) == 1:
        return ours[0]
    if len(ours) > 1:
        names = " and ".join(one.file.path.name for one in ours)
        raise CheckpointError(
            f"{len(ours)} {kind} encoders were given ({names}).",
            _PAIR,
            f"choose one file of each in {LOADER}.",
        )
    others = [one for one in found if one.part.kind == kind]
    if others:
        raise FamilyMismatchError(
            f"{others[0].file.path.name} is {others[0].part.other}, not FLUX.1's {kind}.",
            _PAIR,
            f"choose the {kind} file of FLUX.1 in {LOADER}.",
        )
    there = ", ".join(f"{one.file.path.name} ({one.part.kind})" for one in found)
    example = "clip_l.safetensors" if kind == "CLIP-L" else "t5xxl_fp16.safetensors"
    raise CheckpointError(
        f"{kind} is missing; given was {there or 'nothing'}.",
        _PAIR,
        f"choose {example} as the other file of {LOADER}.",
    )


def _check_pair(clip: ClipSpec, t5: T5Spec) -> None:
    """See that both encoders belong to one model."""
    if (clip.width == CLIP_L.width) != (t5.width == T5_XXL.width):
        raise FamilyMismatchError(
            f"CLIP is {clip.width} wide and T5 is {t5.width} wide.",
            f"{CLIP_L.width} and {T5_XXL.width} for FLUX.1; a small pair only together.",
            f"choose both files of the same model in {LOADER}.",
        )


def _t5_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Keep the layers whose results overflow float16 in float32.

    Source: huggingface/transformers models/t5/modeling_t5.py `_keep_in_fp32_modules`.
    """
    return torch.float32 if dtype == torch.float16 and name.endswith(_WIDE_LAYER) else dtype


def _describe(one: Found, spec: ClipSpec | T5Spec, dtype: torch.dtype, length: str) -> str:
    total = sum(count(shape) for shape in spec.shapes().values())
    return (
        f"{one.part.kind}: {one.file.path.name}, {spec.layers} layers, width {spec.width}, "
        f"{length}, {total / 1e6:,.1f} M parameters, {name_of(dtype)}"
    )
