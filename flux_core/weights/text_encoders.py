"""Text encoder files → TextEncoders: one or two files, in any order and layout.

Headers are read and judged first; weights are mapped from the file, not copied, wherever their
dtype is kept.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, FamilyMismatchError
from ..families import FLUX1_KONTEXT
from ..operations import Operations, torch_operations
from ..specs import ClipT5Spec
from ..text.encoders import LOADER, TextEncoders
from ..text.modules import CLIP_L, T5_XXL, ClipSpec, T5Spec, build_clip, build_t5
from ..text.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from .files import Checkpoint, open_checkpoint
from .names import shorten
from .text_keys import (
    Kind,
    Part,
    check_part,
    clip_spec,
    describe_stranger,
    find_parts,
    leftover_keys,
    t5_spec,
)

_logger = logging.getLogger(__name__)

_NEEDED = "CLIP-L and T5-XXL, as in clip_l.safetensors and t5xxl_fp16.safetensors."
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_WIDE_LAYER = "DenseReluDense.wo.weight"


@dataclass(frozen=True, slots=True)
class _Found:
    """One encoder and the file it lies in."""

    part: Part
    file: Checkpoint


def load_text_encoders(
    files: Sequence[Path],
    *,
    clip_tokenizer: Path,
    t5_tokenizer: Path,
    text: ClipT5Spec = FLUX1_KONTEXT.text,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    operations: Operations | None = None,
) -> TextEncoders:
    """Load CLIP and T5.

    Args:
        files: the file or shard folder of each encoder, in any order, or one file with both.
        clip_tokenizer: folder with vocab.json and merges.txt.
        t5_tokenizer: tokenizer.json or spiece.model, or its folder.
        text: how many tokens each encoder gives.
        dtype: of the weights; None keeps each file's (8-bit floats become bfloat16).
        device: where the weights go; None leaves them mapped from the file.
        operations: the layers to build from; None means torch.nn.

    Raises:
        CheckpointError: a file or a tensor is missing, broken or of another shape.
        FamilyMismatchError: a file is another model's text encoder.

    Deviation: with float16, T5's `wo` layers are kept in float32, as transformers does.
    """
    found = [found for path in files for found in _find(open_checkpoint(path))]
    clip, t5 = _choose(found, "CLIP-L"), _choose(found, "T5")
    clip_shape = clip_spec(clip.part, clip.file.shapes)
    t5_shape = t5_spec(t5.part, t5.file.shapes)
    check_part(clip.part, clip_shape.shapes(), clip.file.shapes)
    check_part(t5.part, t5_shape.shapes(), t5.file.shapes)
    _check_pair(clip_shape, t5_shape)
    clip_dtype, t5_dtype = (dtype or _dtype_of(one) for one in (clip, t5))
    tokenizers = load_clip_tokenizer(clip_tokenizer), load_t5_tokenizer(t5_tokenizer)

    operations = operations or torch_operations()
    clip_module = build_clip(clip_shape, dtype=clip_dtype, operations=operations)
    t5_module = build_t5(t5_shape, dtype=t5_dtype, operations=operations)
    _fill(clip_module, clip, lambda name: clip_dtype, device)
    _fill(t5_module, t5, lambda name: _t5_dtype(name, t5_dtype), device)
    report = "\n".join(
        (
            _describe(clip, clip_shape, clip_dtype, f"{clip_shape.positions} positions"),
            _describe(t5, t5_shape, t5_dtype, f"up to {text.t5_tokens} tokens"),
        )
    )
    _logger.info("Text encoders:\n%s", report)
    return TextEncoders(
        text,
        clip=clip_module,
        t5=t5_module,
        clip_spec=clip_shape,
        t5_spec=t5_shape,
        clip_tokenizer=tokenizers[0],
        t5_tokenizer=tokenizers[1],
        report=report,
    )


def _find(file: Checkpoint) -> list[_Found]:
    """Find the encoders of a file, and refuse a file without any or with more than them."""
    parts = find_parts(file.shapes)
    if not parts:
        raise CheckpointError(
            f"{file.path.name} is {describe_stranger(file.shapes)}.",
            _NEEDED,
            f"choose a text encoder file in {LOADER}.",
        )
    left = leftover_keys(file.shapes, parts)
    if left and any(part.is_whole_file and part.other is None for part in parts):
        raise CheckpointError(
            f"{file.path.name} holds {len(left)} tensors beside its text encoder, first "
            f"'{shorten(left[0])}'.",
            "a file of the text encoder alone, or a whole checkpoint with its usual prefixes.",
            f"choose or download another file in {LOADER}.",
        )
    return [_Found(part, file) for part in parts]


def _choose(found: Sequence[_Found], kind: Kind) -> _Found:
    """Take the one encoder of a kind."""
    ours = [one for one in found if one.part.kind == kind and one.part.other is None]
    if len(ours) == 1:
        return ours[0]
    if len(ours) > 1:
        names = " and ".join(one.file.path.name for one in ours)
        raise CheckpointError(
            f"{len(ours)} {kind} encoders were given ({names}).",
            _NEEDED,
            f"choose one file of each in {LOADER}.",
        )
    others = [one for one in found if one.part.kind == kind]
    if others:
        raise FamilyMismatchError(
            f"{others[0].file.path.name} is {others[0].part.other}, not FLUX.1's {kind}.",
            _NEEDED,
            f"choose the {kind} file of FLUX.1 in {LOADER}.",
        )
    there = ", ".join(f"{one.file.path.name} ({one.part.kind})" for one in found)
    example = "clip_l.safetensors" if kind == "CLIP-L" else "t5xxl_fp16.safetensors"
    raise CheckpointError(
        f"{kind} is missing; given was {there or 'nothing'}.",
        _NEEDED,
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


def _dtype_of(one: _Found) -> torch.dtype:
    """Give the dtype most of the weights have, or what 8-bit floats are widened to."""
    sizes: dict[torch.dtype, int] = {}
    for key in one.part.keys.values():
        stored = one.file.dtypes[key]
        sizes[stored] = sizes.get(stored, 0) + _count(one.file.shapes[key])
    odd = [stored for stored in sizes if stored not in (*_FLOATS, *_FP8)]
    if odd:
        raise CheckpointError(
            f"{one.file.path.name} stores {one.part.kind} as {_name(odd[0])}.",
            "float32, bfloat16, float16 or float8 weights.",
            f"choose a bfloat16, float16 or fp8 file in {LOADER}.",
        )
    most = max(sizes, key=lambda stored: sizes[stored])
    return torch.bfloat16 if most in _FP8 else most


def _t5_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Keep the layers whose results overflow float16 in float32.

    Source: huggingface/transformers models/t5/modeling_t5.py `_keep_in_fp32_modules`.
    """
    return torch.float32 if dtype == torch.float16 and name.endswith(_WIDE_LAYER) else dtype


def _fill(
    module: nn.Module,
    one: _Found,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device | None,
) -> None:
    """Hand the file's tensors to an empty module; those that need no change stay mapped."""
    # transformers 4 keeps CLIP's text tower in an attribute, which is part of every name.
    inner = "text_model." if hasattr(module, "text_model") else ""
    names = {key: name for name, key in one.part.keys.items()}
    scales = {name: one.file.read([key])[key] for name, key in one.part.scales.items()}
    state: dict[str, Tensor] = {}
    for key, stored in one.file.stream(names):
        name = names[key]
        if name in scales:  # per tensor: weight = stored * scale
            stored = stored.to(torch.float32) * scales[name].to(torch.float32)
        state[inner + name] = stored.to(device=device, dtype=dtype_of(name))
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def _describe(one: _Found, spec: ClipSpec | T5Spec, dtype: torch.dtype, length: str) -> str:
    count = sum(_count(shape) for shape in spec.shapes().values())
    return (
        f"{one.part.kind}: {one.file.path.name}, {spec.layers} layers, width {spec.width}, "
        f"{length}, {count / 1e6:,.1f} M parameters, {_name(dtype)}"
    )


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
