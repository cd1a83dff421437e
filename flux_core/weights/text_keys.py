"""Key map of the text encoders: which of them a file holds, and what each key is called here.

The names here are those of the specs' shapes() in `text/modules.py`. Files add prefixes of their
own. CLIP and T5: `text_model.` (transformers 4, ComfyUI), `encoder.` (T5),
`text_encoders.clip_l.transformer.` (whole checkpoints). Language models: `model.` (transformers,
ComfyUI), `language_model.model.` and `model.language_model.` (beside a vision tower),
`text_encoders.qwen3_4b.transformer.model.` (whole checkpoints), …
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import CheckpointError, FamilyMismatchError
from ..specs import LanguageModelSpec
from ..text.modules import CLIP_L, T5_XXL, ClipSpec, LanguageModelShape, T5Spec
from ..types import Shapes
from .checkpoint import Checkpoint
from .key_map import (
    KeyMap,
    KeyRule,
    check_shapes,
    count_numbers,
    matrix_sides,
)

CHOOSE = "choose another file in [text encoder loader]."

_CLIP_MARK = "embeddings.token_embedding.weight"
_T5_MARK = "block.0.layer.0.SelfAttention.q.weight"
_MODEL_MARK = "layers.0.self_attn.q_proj.weight"
_TABLE = "embed_tokens.weight"
_MOST_ENCODERS = 16  # of one kind in one file; published checkpoints have up to four
_CLIP_NAME = re.compile(
    r"(embeddings\.(token|position)_embedding|encoder\.layers\.\d+|final_layer)"
)
_T5_NAME = re.compile(r"(embed_tokens|block\.\d+|final_layer_norm)\.")
# Tensors that come along in published files and are not needed to encode a prompt.
_KNOWN_EXTRAS = re.compile(
    r"(.*\.)?("
    r"embeddings\.position_ids|logit_scale|logit_bias|text_projection(\.weight)?"
    r"|visual_projection\.weight|vision_model\..*|lm_head\.weight|decoder\..*"
    r"|shared\.weight|encoder\.embed_tokens\.weight|spiece_model|scaled_fp8"
    r"|scale_input|input_scale|comfy_quant|rotary_emb\.inv_freq"
    r")",
    re.DOTALL,  # a name of many dots or lines must not cost more than its length
)
# Widths of text encoders that look like FLUX.1's and are not.
_OTHER_CLIPS = {512: "CLIP ViT-B", 1024: "CLIP-H (OpenCLIP)", 1280: "CLIP-G (OpenCLIP)"}
_OTHER_T5S = {512: "T5 small", 768: "T5 base", 1024: "T5 large", 2048: "T5 XL"}
# What else is built like the wanted language models: by a key, after the prefix.
_OTHER_MODELS = (
    ("layers.0.self_attn.q_proj.bias", "Qwen2.5"),
    ("layers.0.post_feedforward_layernorm.weight", "Gemma"),
    ("layers.0.mlp.gate.weight", "a mixture of experts"),
    ("layers.0.self_attn.sinks", "GPT-OSS"),
)
_OTHER_WIDTHS = {
    ("qwen3", 1024): "Qwen3 0.6B",
    ("qwen3", 2048): "Qwen3 1.7B",
    ("qwen3", 5120): "Qwen3 14B or 32B",
    ("mistral3", 2048): "Llama 3.2 1B or the like",
    ("mistral3", 3072): "Ministral 3 3B, Llama 3.2 3B or the like",
    ("mistral3", 4096): "Mistral 7B, Llama 3 8B or the like",
    ("mistral3", 8192): "Llama 3 70B or the like",
    ("mistral3", 12288): "Mistral Large or the like",
}


@dataclass(frozen=True, slots=True)
class EncoderKeys:
    """One text encoder inside a file."""

    title: str  # "CLIP-L", "T5", or that of a language model
    key_map: KeyMap
    other: str | None = None  # the model it is, when it is not FLUX.1's

    @property
    def is_whole_file(self) -> bool:
        """Whether nothing sets the encoder apart from what else may be in the file."""
        return self.key_map.prefix in ("", "text_model.", "encoder.")


@dataclass(frozen=True, slots=True)
class LanguageModelKeys:
    """A language model inside a file: its layers up to the last one that is read."""

    spec: LanguageModelSpec
    shape: LanguageModelShape
    keys: EncoderKeys
    depth: int  # layers in the file


def find_encoders(shapes: Shapes) -> list[EncoderKeys]:
    """Finds every CLIP and T5 in a file, wanted or not.

    Raises:
        CheckpointError: there are more than any file has.
    """
    _check_count(sum(key.endswith((_CLIP_MARK, _T5_MARK)) for key in shapes), "text encoders")
    encoders: list[EncoderKeys] = []
    for key in shapes:
        if key.endswith(_CLIP_MARK):
            encoders.append(_encoder("CLIP-L", key.removesuffix(_CLIP_MARK), shapes))
        elif key.endswith(_T5_MARK):
            prefix = key.removesuffix(_T5_MARK)
            if not prefix.endswith("decoder."):
                encoders.append(_encoder("T5", prefix, shapes))
    return encoders


def find_language_models(shapes: Shapes) -> list[str]:
    """Lists the prefixes of the language models in a file, wanted or not.

    Raises:
        CheckpointError: there are more than any file has.
    """
    prefixes = [key[: -len(_MODEL_MARK)] for key in shapes if key.endswith(_MODEL_MARK)]
    _check_count(len(prefixes), "language models")
    return [
        prefix
        for prefix in prefixes
        if (not prefix or prefix.endswith(".")) and prefix + _TABLE in shapes
    ]


def leftover_keys(keys: Iterable[str], encoders: Iterable[EncoderKeys]) -> list[str]:
    """Lists the keys that belong to no encoder and are not known to come along."""
    claimed = {
        key for one in encoders for rule in one.key_map.rules.values() for key in rule.sources
    }
    return [key for key in keys if key not in claimed and not _KNOWN_EXTRAS.fullmatch(key)]


def clip_spec(encoder: EncoderKeys, shapes: Shapes) -> ClipSpec:
    """Reads CLIP's sizes; a file as wide as CLIP-L has to be as deep.

    Raises:
        CheckpointError: a tensor that tells a size is missing or malformed.
    """
    ours = encoder.key_map.shapes(shapes)
    vocabulary, width = matrix_sides(ours, _CLIP_MARK, encoder.title)
    positions, _ = matrix_sides(ours, "embeddings.position_embedding.weight", encoder.title)
    if width == CLIP_L.width:
        layers, ffn = CLIP_L.layers, CLIP_L.ffn
    else:
        layers = count_numbers(ours, "encoder.layers.")
        ffn, _ = matrix_sides(ours, "encoder.layers.0.mlp.fc1.weight", encoder.title)
    return ClipSpec(width=width, layers=layers, ffn=ffn, vocabulary=vocabulary, positions=positions)


def t5_spec(encoder: EncoderKeys, shapes: Shapes) -> T5Spec:
    """Reads T5's sizes; a file as wide as T5-XXL has to be T5-XXL.

    Raises:
        CheckpointError: a tensor that tells a size is missing or malformed.
    """
    ours = encoder.key_map.shapes(shapes)
    vocabulary, width = matrix_sides(ours, _TABLE, encoder.title)
    if width == T5_XXL.width:
        return T5_XXL
    layers = count_numbers(ours, "block.")
    ffn, _ = matrix_sides(ours, "block.0.layer.1.DenseReluDense.wi_0.weight", encoder.title)
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    buckets, heads = matrix_sides(ours, bias, encoder.title)
    inner, _ = matrix_sides(ours, _T5_MARK, encoder.title)
    return T5Spec(
        width=width,
        layers=layers,
        ffn=ffn,
        vocabulary=vocabulary,
        heads=heads,
        head_dim=max(1, inner // heads),
        buckets=buckets,
    )


def language_model_keys(
    file: Checkpoint, prefix: str, wanted: Sequence[LanguageModelSpec]
) -> LanguageModelKeys:
    """Detects which of the wanted models has a prefix, and checks the tensors it needs.

    Where several are wanted, a size that no known model has is taken as it is.

    Raises:
        FamilyMismatchError: it is another model.
        CheckpointError: tensors are missing, of another shape, or too many.
    """
    shapes = file.shapes
    vocabulary, hidden = matrix_sides(shapes, prefix + _TABLE, "language model")
    has_norms = f"{prefix}layers.0.self_attn.q_norm.weight" in shapes
    architecture = "qwen3" if has_norms else "mistral3"
    other = _other_language_model(shapes, prefix)
    kin = [one for one in wanted if one.architecture == architecture]
    fitting = [one for one in kin if one.hidden == hidden]
    if not fitting and len(wanted) > 1 and kin and (architecture, hidden) not in _OTHER_WIDTHS:
        fitting = [_of_custom_size(kin[-1], shapes, prefix, hidden)]
    if other or not fitting:
        other = other or _OTHER_WIDTHS.get((architecture, hidden), f"a model {hidden} wide")
        raise FamilyMismatchError(
            f"{file.path.name} is another language model: {other}.",
            " or ".join(f"{one.title} ({one.hidden} wide)" for one in wanted)
            + ", which FLUX.2 reads.",
            "choose the language model of your FLUX.2 model in [text encoder loader].",
        )
    spec = fitting[0]
    shape = LanguageModelShape(
        architecture=spec.architecture,
        hidden=spec.hidden,
        layers=max(spec.layers),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        ffn=spec.ffn,
        vocabulary=vocabulary,
        theta=spec.theta,
        norm_eps=spec.norm_eps,
    )
    key_map = _layers_map(shapes, prefix, shape.layers)
    check_shapes(file.path.name, key_map, shapes, shape.shapes(), spec.title)
    depth = sum(
        key.startswith(prefix + "layers.") and key.endswith(".input_layernorm.weight")
        for key in shapes
    )
    return LanguageModelKeys(spec, shape, EncoderKeys(spec.title, key_map), depth)


def _check_count(count: int, what: str) -> None:
    if count > _MOST_ENCODERS:
        raise CheckpointError(f"The file holds {count:,} {what}.", "one or two of them.", CHOOSE)


def _encoder(title: Literal["CLIP-L", "T5"], prefix: str, shapes: Shapes) -> EncoderKeys:
    """Collects the keys of the encoder with a prefix."""
    pattern = _CLIP_NAME if title == "CLIP-L" else _T5_NAME
    keys = {
        key[len(prefix) :]: key
        for key in shapes
        if key.startswith(prefix)
        and pattern.match(key, len(prefix))
        and not _KNOWN_EXTRAS.fullmatch(key[len(prefix) :])
    }
    if title == "T5":
        # One table under one of two names, or under both.
        shared = prefix.removesuffix("encoder.") + "shared.weight"
        if shared in shapes:
            keys[_TABLE] = shared
    return EncoderKeys(title, _renaming(prefix, keys), _other_encoder(title, keys, shapes))


def _layers_map(shapes: Shapes, prefix: str, layers: int) -> KeyMap:
    """Maps the table and the layers that are run; what else the model has is not loaded."""
    numbers = {str(number) for number in range(layers)}
    keys: dict[str, str] = {_TABLE: prefix + _TABLE}
    for key in shapes:
        if not key.startswith(prefix):
            continue
        name = key[len(prefix) :]
        is_layer = name.startswith("layers.") and name.split(".", 2)[1] in numbers
        if is_layer and not _KNOWN_EXTRAS.fullmatch(name):
            keys[name] = key
    return _renaming(prefix, keys)


def _renaming(prefix: str, keys: Mapping[str, str]) -> KeyMap:
    """Builds the key map that only renames; what else is in the file is judged elsewhere."""
    return KeyMap(
        layout="transformers",
        prefix=prefix,
        rules={name: KeyRule((key,)) for name, key in keys.items()},
        names=lambda name: (prefix + name,),
        unused=(),
        others=0,
    )


def _other_encoder(title: str, keys: Mapping[str, str], shapes: Shapes) -> str | None:
    """Returns the name of a model that is built like the wanted one but is not it."""
    mark = _CLIP_MARK if title == "CLIP-L" else _T5_MARK
    width = (shapes[keys[mark]] or (0,))[-1]
    if title == "CLIP-L":
        return _OTHER_CLIPS.get(width)
    if "block.1.layer.0.SelfAttention.relative_attention_bias.weight" in keys:
        return "UMT5"
    if "block.0.layer.1.DenseReluDense.wi.weight" in keys:
        return "T5 of the first version (not v1.1)"
    return _OTHER_T5S.get(width)


def _other_language_model(shapes: Shapes, prefix: str) -> str | None:
    """Returns the name of a model that is built like a wanted one but is not it."""
    for key, name in _OTHER_MODELS:
        if prefix + key in shapes:
            return name
    return "Qwen3-VL" if any("deepstack_merger" in key for key in shapes) else None


def _of_custom_size(
    kin: LanguageModelSpec, shapes: Shapes, prefix: str, hidden: int
) -> LanguageModelSpec:
    """Takes a model of a size that nobody published for an experiment with a published one."""

    def rows(name: str, usual: int) -> int:
        shape = shapes.get(f"{prefix}layers.0.{name}.weight", ())
        return shape[0] if len(shape) == 2 else usual

    queries, keys = (rows(f"self_attn.{one}_proj", 0) // kin.head_dim for one in "qk")
    heads = (queries, keys) if keys and queries % keys == 0 else (kin.heads, kin.kv_heads)
    return replace(
        kin,
        title=f"{kin.title} in a custom size ({hidden} wide)",
        hidden=hidden,
        ffn=rows("mlp.gate_proj", kin.ffn),
        heads=heads[0],
        kv_heads=heads[1],
    )
