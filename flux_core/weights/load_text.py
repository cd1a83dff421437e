"""Text encoder files → the encoders of a model: one or two files, in any order and layout.

Headers are read and judged first; weights are mapped from the file, not copied, wherever their
dtype stays. Of a language model only the layers that are read are loaded.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, FamilyMismatchError, settings_in, shorten
from ..families import FLUX1_TEXT, LANGUAGE_MODELS
from ..operations import Operations, torch_operations
from ..specs import ClipT5Spec, LanguageModelSpec, TextSpec
from ..text.encoders import LanguageModelEncoder, TextEncoders
from ..text.modules import (
    CLIP_L,
    T5_XXL,
    ClipSpec,
    T5Spec,
    build_clip,
    build_language_model,
    build_t5,
)
from ..text.tekken import MOST_BYTES
from ..text.tokenizers import (
    ChatTokenizer,
    load_clip_tokenizer,
    load_mistral_tokenizer,
    load_qwen_tokenizer,
    load_t5_tokenizer,
)
from ..types import Shapes
from .checkpoint import Checkpoint, dtype_name
from .convert import Conversion, plan_conversion
from .gguf_text import (
    carries_tekken,
    in_halves,
    is_interleaved,
    load_gguf_tokenizer,
    with_plain_names,
)
from .key_map import check_shapes
from .kinds import LIBRARIES, PARTS, TRANSFORMERS, identify
from .quantised import PLAIN_FILE, open_dequantised
from .text_keys import (
    CHOOSE,
    EncoderKeys,
    clip_spec,
    find_encoders,
    find_language_models,
    language_model_keys,
    leftover_keys,
    t5_spec,
)

_logger = logging.getLogger(__name__)

_PAIR = "CLIP-L and T5-XXL for FLUX.1, as in clip_l.safetensors and t5xxl_fp16.safetensors"
_WIDE_LAYER = "DenseReluDense.wo.weight"
_TEKKEN = "tekken_model"
# For what is quantised in a way that is not read here.
_NATIVE = (
    "choose its bfloat16 or float16 file in [text encoder loader], or load this one with the "
    "loader it is made for, such as ComfyUI's own, and wire that one's CLIP to [text encoding]."
)
_READ = "float32, bfloat16, float16, float8, NVFP4 as ComfyUI writes it, or GGUF."
# Of tokens: ComfyUI 0.30.0 comfy/ops.py MixedPrecisionOps.Embedding takes them without a scale.
_TABLES = ("embed_tokens.weight", "shared.weight", "token_embedding.weight")
_OTHER_PARTS = ("model.diffusion_model.", "first_stage_model.", "vae.")  # of a whole checkpoint


@dataclass(frozen=True, slots=True)
class _EncoderFile:
    """One CLIP or T5, and the file it lies in."""

    keys: EncoderKeys
    file: Checkpoint


def open_text(path: Path) -> Checkpoint:
    """Opens a text encoder's file, with quantised weights in the shapes they stand for.

    Raises:
        CheckpointError: the file is broken, or quantised in a way that is not read here.
        FamilyMismatchError: it is a GGUF file of another architecture.
    """
    try:
        checkpoint = open_dequantised(path, others=_OTHER_PARTS, unscaled=_TABLES)
    except CheckpointError as error:
        if error.fix != PLAIN_FILE:
            raise
        raise CheckpointError(error.found, _READ, _NATIVE) from None
    keys = [key for key in checkpoint.shapes if not key.startswith(_OTHER_PARTS)]
    library = identify(keys, {}, LIBRARIES)
    if library is not None:
        raise CheckpointError(f"{checkpoint.path.name} is {library.title}.", _READ, _NATIVE)
    return with_plain_names(checkpoint)


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
    """Loads CLIP and T5, or one language model: the files say which.

    Args:
        files: the file or shard folder of each encoder, in any order, or one file with both.
        clip_tokenizer: folder with vocab.json and merges.txt.
        t5_tokenizer: tokenizer.json or spiece.model, or its folder.
        qwen_tokenizer: folder with vocab.json and merges.txt. Of the tokenizers that are None,
            those that are needed are looked for beside their encoders; Mistral's always lies in
            or beside its file.
        text: what the model's text is; None, or of the other kind: what the files are.
        dtype: of the weights; None keeps each file's (quantised ones become bfloat16).
        device: where the weights go; None leaves them mapped from the file.
        operations: the layers to build from; None means torch.nn.

    Raises:
        CheckpointError: a file or a tensor is missing, broken or of another shape.
        FamilyMismatchError: a file is another model's text encoder, or two belong to different
            models.

    Deviation: with float16, T5's `wo` layers stay float32, as transformers does.
    """
    opened = [open_text(path) for path in files]
    operations = operations or torch_operations()
    models = [(file, prefix) for file in opened for prefix in find_language_models(file.shapes)]
    if models:
        encoders = _load_language_model(
            opened,
            models,
            qwen_tokenizer=qwen_tokenizer,
            text=text,
            dtype=dtype,
            device=device,
            operations=operations,
        )
    else:
        encoders = _load_clip_t5(
            [encoder for file in opened for encoder in _encoders_in(file)],
            tokenizers=(clip_tokenizer, t5_tokenizer),
            text=text if isinstance(text, ClipT5Spec) else FLUX1_TEXT,
            dtype=dtype,
            device=device,
            operations=operations,
        )
    _logger.info("Text encoders:\n%s", encoders.report)
    return encoders


def _load_clip_t5(
    encoders: Sequence[_EncoderFile],
    *,
    tokenizers: tuple[Path | None, Path | None],
    text: ClipT5Spec,
    dtype: torch.dtype | None,
    device: torch.device | None,
    operations: Operations,
) -> TextEncoders:
    """Checks both encoders by their headers, then loads them."""
    clip, t5 = _choose(encoders, "CLIP-L"), _choose(encoders, "T5")
    clip_sizes = clip_spec(clip.keys, clip.file.shapes)
    t5_sizes = t5_spec(t5.keys, t5.file.shapes)
    for one, needed in ((clip, clip_sizes.shapes()), (t5, t5_sizes.shapes())):
        title = f"{one.keys.title} of FLUX.1"
        check_shapes(one.file.path.name, one.keys.key_map, one.file.shapes, needed, title)
    _check_pair(clip_sizes, t5_sizes)
    clip_plan, t5_plan = (
        plan_conversion(one.file, one.keys.key_map, dtype, fix=_NATIVE) for one in (clip, t5)
    )
    if t5_plan.target == torch.float16:
        # Layers whose results overflow float16, huggingface/transformers
        # models/t5/modeling_t5.py `_keep_in_fp32_modules`.
        wide = [name for name in t5_plan.key_map.rules if name.endswith(_WIDE_LAYER)]
        t5_plan = replace(t5_plan, fixed=dict.fromkeys(wide, torch.float32))
    clip_tokenizer = load_clip_tokenizer(tokenizers[0] or clip.file.path.parent)
    t5_tokenizer = load_t5_tokenizer(tokenizers[1] or t5.file.path.parent)

    clip_module = build_clip(clip_sizes, dtype=clip_plan.target, operations=operations)
    t5_module = build_t5(t5_sizes, dtype=t5_plan.target, operations=operations)
    _assign(clip_module, clip_plan.read(device))
    _assign(t5_module, t5_plan.read(device))
    report: list[str] = []
    for title, plan, sizes, length in (
        ("CLIP-L", clip_plan, clip_sizes, f"{clip_sizes.positions} positions"),
        ("T5", t5_plan, t5_sizes, f"up to {text.t5_tokens} tokens"),
    ):
        described = f"{sizes.layers} layers, width {sizes.width}, {length}"
        report.append(_describe(title, plan, sizes.shapes(), described))
        report += plan.dequantised_notes()
    return TextEncoders(
        text,
        clip=clip_module,
        t5=t5_module,
        clip_spec=clip_sizes,
        t5_spec=t5_sizes,
        clip_tokenizer=clip_tokenizer,
        t5_tokenizer=t5_tokenizer,
        report="\n".join(report),
    )


def _load_language_model(
    files: Sequence[Checkpoint],
    models: Sequence[tuple[Checkpoint, str]],
    *,
    qwen_tokenizer: Path | None,
    text: TextSpec | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
    operations: Operations,
) -> LanguageModelEncoder:
    """Loads the one language model among opened files, with the prefix of its keys."""
    wanted = (text,) if isinstance(text, LanguageModelSpec) else LANGUAGE_MODELS
    file, prefix = models[0]
    model = language_model_keys(file, prefix, wanted)
    _check_alone(files, models, model.spec.title)
    plan = plan_conversion(file, model.keys.key_map, dtype, fix=_NATIVE)
    tokenizer = _load_tokenizer(file, model.spec, qwen_tokenizer)
    module = build_language_model(model.shape, dtype=plan.target, operations=operations)
    state = plan.read(device)
    if is_interleaved(file):
        head_dim = model.shape.head_dim
        state = {name: in_halves(name, one, head_dim) for name, one in state.items()}
    _assign(module, state)
    spec, shape = model.spec, model.shape
    sizes = (
        f"{shape.layers} of {model.depth} layers, width {shape.hidden}, up to {spec.tokens} tokens"
    )
    report = (_describe(spec.title, plan, shape.shapes(), sizes), *plan.dequantised_notes())
    return LanguageModelEncoder(
        spec, module=module, shape=shape, tokenizer=tokenizer, report="\n".join(report)
    )


def _encoders_in(file: Checkpoint) -> list[_EncoderFile]:
    """Finds the encoders of a file, and refuses a file without any or with more than them."""
    encoders = find_encoders(file.shapes)
    if not encoders:
        title, fix = _describe_other(file)
        raise CheckpointError(
            f"{file.path.name} is {title}.", f"{_PAIR}, or one language model for FLUX.2.", fix
        )
    left = leftover_keys(file.shapes, encoders)
    if left and any(one.is_whole_file and one.other is None for one in encoders):
        raise CheckpointError(
            f"{file.path.name} holds {len(left)} tensors beside its text encoder, first "
            f"'{shorten(left[0])}'.",
            "a file of the text encoder alone, or a whole checkpoint with its usual prefixes.",
            CHOOSE,
        )
    return [_EncoderFile(one, file) for one in encoders]


def _describe_other(file: Checkpoint) -> tuple[str, str]:
    """Returns what a file without text encoders is, and where it belongs."""
    kind = identify(file.shapes, {}, (*TRANSFORMERS, *PARTS))
    if kind is not None:
        other_loader = set(settings_in(kind.fix)) - {"text encoder loader"}
        return kind.title, kind.fix if other_loader else CHOOSE
    first = shorten(next(iter(file.shapes)))
    return (
        f"a file of {len(file.shapes)} tensors that are no text encoder (first: '{first}')",
        CHOOSE,
    )


def _choose(encoders: Sequence[_EncoderFile], title: str) -> _EncoderFile:
    """Returns the one encoder of a title."""
    ours = [one for one in encoders if one.keys.title == title and one.keys.other is None]
    if len(ours) == 1:
        return ours[0]
    if len(ours) > 1:
        names = " and ".join(one.file.path.name for one in ours)
        raise CheckpointError(
            f"{len(ours)} {title} encoders were given ({names}).",
            f"{_PAIR}.",
            "choose one file of each in [text encoder loader].",
        )
    others = [one for one in encoders if one.keys.title == title]
    if others:
        raise FamilyMismatchError(
            f"{others[0].file.path.name} is {others[0].keys.other}, not FLUX.1's {title}.",
            f"{_PAIR}.",
            f"choose the {title} file of FLUX.1 in [text encoder loader].",
        )
    there = ", ".join(f"{one.file.path.name} ({one.keys.title})" for one in encoders)
    example = "clip_l.safetensors" if title == "CLIP-L" else "t5xxl_fp16.safetensors"
    raise CheckpointError(
        f"{title} is missing; given was {there or 'nothing'}.",
        f"{_PAIR}.",
        f"choose {example} as the other file of [text encoder loader].",
    )


def _check_pair(clip: ClipSpec, t5: T5Spec) -> None:
    """Refuses encoders that belong to different models."""
    if (clip.width == CLIP_L.width) != (t5.width == T5_XXL.width):
        raise FamilyMismatchError(
            f"CLIP is {clip.width} wide and T5 is {t5.width} wide.",
            f"{CLIP_L.width} and {T5_XXL.width} for FLUX.1; a small pair only together.",
            "choose both files of the same model in [text encoder loader].",
        )


def _check_alone(
    files: Sequence[Checkpoint], models: Sequence[tuple[Checkpoint, str]], title: str
) -> None:
    """Refuses what was chosen beside the language model."""
    file = models[0][0]
    if len(models) > 1:
        raise CheckpointError(
            f"{len(models)} language models were given "
            f"({' and '.join(one.path.name for one, _ in models)}).",
            f"one: FLUX.2 reads {title} alone.",
            "set file_2 to none in [text encoder loader].",
        )
    for other in files:
        encoders = find_encoders(other.shapes)
        if encoders:
            raise FamilyMismatchError(
                f"{file.path.name} is {title} of FLUX.2, and {other.path.name} holds "
                f"{encoders[0].title}, which FLUX.1 reads.",
                "CLIP-L and T5 for FLUX.1, or one language model for FLUX.2.",
                "choose the files of one model in [text encoder loader].",
            )
        if other is not file:
            raise CheckpointError(
                f"{other.path.name} is {_describe_other(other)[0]}.",
                f"nothing beside {title}: FLUX.2 has one text encoder.",
                "set file_2 to none in [text encoder loader].",
            )


def _load_tokenizer(
    file: Checkpoint, spec: LanguageModelSpec, qwen_tokenizer: Path | None
) -> ChatTokenizer:
    """Loads the tokenizer: given, inside the file, or beside it."""
    folder = file.path if file.path.is_dir() else file.path.parent
    if spec.architecture == "qwen3":
        return load_qwen_tokenizer(qwen_tokenizer or folder)
    if carries_tekken(file):
        return load_gguf_tokenizer(file)
    inside = [key for key in file.shapes if key.rpartition(".")[2] == _TEKKEN]
    if inside:
        return load_mistral_tokenizer(_read_bytes(file, inside[0]))
    # A Hugging Face model keeps it beside the weights, a diffusers model in the next folder.
    folders = (folder, folder.with_name("tokenizer"))
    names = ("tokenizer.json", "tekken.json")
    having = [one for one in folders if any((one / name).is_file() for name in names)]
    return load_mistral_tokenizer(having[0] if having else folder)


def _read_bytes(file: Checkpoint, key: str) -> bytes:
    count, dtype = math.prod(file.shapes[key]), file.dtypes[key]
    if dtype != torch.uint8 or count > MOST_BYTES:
        raise CheckpointError(
            f"{file.path.name} carries its tokenizer as {count:,} numbers of {dtype_name(dtype)}.",
            f"bytes, at most {MOST_BYTES:,}.",
            "choose or download the file again in [text encoder loader].",
        )
    return file.read([key])[key].numpy().tobytes()


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    # transformers 4 has CLIP's text tower in an attribute, which is part of every name.
    inner = "text_model." if hasattr(module, "text_model") else ""
    named = {inner + name: tensor for name, tensor in state.items()}
    module.load_state_dict(named, strict=True, assign=True)
    module.requires_grad_(False)


def _describe(title: str, plan: Conversion, shapes: Shapes, sizes: str) -> str:
    millions = sum(map(math.prod, shapes.values())) / 1e6
    return (
        f"{title}: {plan.checkpoint.path.name}, {sizes}, {millions:,.1f} M parameters, "
        f"{dtype_name(plan.target)}"
    )
