"""Which text encoders a file holds, told from its keys, and what each key is called here.

The names here are those of ClipSpec.shapes() and T5Spec.shapes(). Files add prefixes of their
own: `text_model.` (transformers 4, ComfyUI), `encoder.` (T5), `text_encoders.clip_l.transformer.`
(whole checkpoints), …
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import CheckpointError
from ..text.modules import CLIP_L, T5_XXL, ClipSpec, Shapes, T5Spec
from .names import MOST_BLOCKS, shorten

Kind = Literal["CLIP-L", "T5"]

_CLIP_MARK = "embeddings.token_embedding.weight"
_T5_MARK = "block.0.layer.0.SelfAttention.q.weight"
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
    r"|scale_input|input_scale|comfy_quant"
    r")",
    re.DOTALL,  # a name of many dots or lines must not cost more than its length
)
# Widths of text encoders that look like FLUX.1's and are not.
_OTHER_CLIPS = {512: "CLIP ViT-B", 1024: "CLIP-H (OpenCLIP)", 1280: "CLIP-G (OpenCLIP)"}
_OTHER_T5S = {512: "T5 small", 768: "T5 base", 1024: "T5 large", 2048: "T5 XL"}
_MOST_PARTS = 16  # encoders in one file; published checkpoints have up to four
_STRANGERS = (
    (r"\.lora_(A|B|down|up)\b|^lora_", "a LoRA"),
    (r"double_blocks\.0\.", "a FLUX diffusion model"),
    (r"(^|\.)(single_)?transformer_blocks\.0\.", "a diffusion transformer"),
    (
        r"joint_blocks\.0\.|input_blocks\.0\.|(^|\.)down_blocks\.0\..*attentions",
        "a diffusion model",
    ),
    (r"(^|\.)decoder\.(mid|up)\.|(^|\.)decoder\.(mid|up)_block", "an autoencoder (VAE)"),
    (r"resblocks\.0\.", "an OpenCLIP file in its own layout"),
    (r"vision_model\.|visual\.", "an image encoder"),
    (r"layers\.0\.(self_attn|mixer|linear_attn)", "a language model (such as Qwen or Mistral)"),
)
_NODES = (
    ("a FLUX diffusion model", "'Load Model (FLUX)'"),
    ("a diffusion transformer", "'Load Model (FLUX)' if it is FLUX"),
    ("an autoencoder (VAE)", "'Load Autoencoder (FLUX)'"),
    ("a LoRA", "'Apply LoRA (FLUX)'"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One text encoder inside a file."""

    kind: str  # a Kind, or the title of a language model
    prefix: str  # before every name
    keys: dict[str, str]  # name here -> key in the file
    other: str | None = None  # the model it is, when it is not FLUX.1's
    generation: str = "FLUX.1"

    @property
    def is_whole_file(self) -> bool:
        """Nothing sets the encoder apart from what else may be in the file."""
        return self.prefix in ("", "text_model.", "encoder.")


def find_parts(shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    """Find every CLIP and T5 in a file, wanted or not.

    Raises:
        CheckpointError: there are more than any file has.
    """
    count = sum(key.endswith((_CLIP_MARK, _T5_MARK)) for key in shapes)
    if count > _MOST_PARTS:
        raise CheckpointError(
            f"The file holds {count:,} text encoders.",
            "one or two of them.",
            "choose another file in 'Load Text Encoders (FLUX)'.",
        )
    parts: list[Part] = []
    for key in shapes:
        if key.endswith(_CLIP_MARK):
            parts.append(_part("CLIP-L", key.removesuffix(_CLIP_MARK), shapes))
        elif key.endswith(_T5_MARK):
            prefix = key.removesuffix(_T5_MARK)
            if not prefix.endswith("decoder."):
                parts.append(_part("T5", prefix, shapes))
    return parts


def leftover_keys(shapes: Iterable[str], parts: Iterable[Part]) -> list[str]:
    """List the keys that belong to no part and are not known to come along."""
    claimed = {key for part in parts for key in part.keys.values()}
    return [key for key in shapes if key not in claimed and not _KNOWN_EXTRAS.fullmatch(key)]


def loader_of(stranger: str) -> str:
    """Say which node loads what `describe_stranger` named, if one does; ends with a blank."""
    return next((f"load it with {node}, and " for name, node in _NODES if name == stranger), "")


def describe_stranger(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Say what a file without text encoders most likely is."""
    for pattern, name in _STRANGERS:
        if any(re.search(pattern, key) for key in shapes):
            return name
    first = next(iter(shapes), "none")
    return f"a file of {len(shapes)} tensors that are no text encoder (first: '{shorten(first)}')"


def clip_spec(part: Part, shapes: Mapping[str, tuple[int, ...]]) -> ClipSpec:
    """Read CLIP's shape; a file as wide as CLIP-L has to be as deep."""
    vocabulary, width = _matrix(part, _CLIP_MARK, shapes)
    positions, _ = _matrix(part, "embeddings.position_embedding.weight", shapes)
    if width == CLIP_L.width:
        layers, ffn = CLIP_L.layers, CLIP_L.ffn
    else:
        layers = _count_layers(part, r"encoder\.layers\.(\d+)\.")
        ffn, _ = _matrix(part, "encoder.layers.0.mlp.fc1.weight", shapes)
    return ClipSpec(width=width, layers=layers, ffn=ffn, vocabulary=vocabulary, positions=positions)


def t5_spec(part: Part, shapes: Mapping[str, tuple[int, ...]]) -> T5Spec:
    """Read T5's shape; a file as wide as T5-XXL has to be T5-XXL."""
    vocabulary, width = _matrix(part, "embed_tokens.weight", shapes)
    if width == T5_XXL.width:
        return T5_XXL
    layers = _count_layers(part, r"block\.(\d+)\.")
    ffn, _ = _matrix(part, "block.0.layer.1.DenseReluDense.wi_0.weight", shapes)
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    buckets, heads = _matrix(part, bias, shapes)
    inner, _ = _matrix(part, _T5_MARK, shapes)
    return T5Spec(
        width=width,
        layers=layers,
        ffn=ffn,
        vocabulary=vocabulary,
        heads=heads,
        head_dim=max(1, inner // heads),
        buckets=buckets,
    )


def check_part(part: Part, needed: Shapes, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what a file holds of one encoder with what that encoder needs.

    Raises:
        CheckpointError: tensors are missing, of another shape, or too many.
    """
    missing = [name for name in needed if name not in part.keys]
    extra = [key for name, key in part.keys.items() if name not in needed]
    wrong = [n for n, shape in needed.items() if n in part.keys and shapes[part.keys[n]] != shape]
    if missing:
        found = f"{len(missing)} of its tensors are missing, first '{shorten(missing[0])}'."
    elif extra:
        found = f"{len(extra)} tensors do not belong to it, first '{shorten(extra[0])}'."
    elif wrong:
        name = wrong[0]
        key = part.keys[name]
        found = (
            f"{len(wrong)} of its tensors have another shape; first '{shorten(key)}' is "
            f"{_sides(shapes[key])}, not {_sides(needed[name])}."
        )
    else:
        return
    raise CheckpointError(
        f"The file was taken for {part.kind}, but {found}",
        f"a complete {part.kind} of {part.generation}.",
        "choose or download the file again in 'Load Text Encoders (FLUX)'.",
    )


def _part(kind: Kind, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Part:
    """Collect the keys of the encoder behind a prefix."""
    pattern = _CLIP_NAME if kind == "CLIP-L" else _T5_NAME
    keys = {
        key[len(prefix) :]: key
        for key in shapes
        if key.startswith(prefix)
        and pattern.match(key, len(prefix))
        and not _KNOWN_EXTRAS.fullmatch(key[len(prefix) :])
    }
    if kind == "T5":
        # One table under one of two names, or under both.
        shared = prefix.removesuffix("encoder.") + "shared.weight"
        if shared in shapes:
            keys["embed_tokens.weight"] = shared
    return Part(kind, prefix, keys, _other_model(kind, keys, shapes))


def _other_model(
    kind: Kind, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Name the model when it is built like the wanted one but is not it."""
    if kind == "CLIP-L":
        return _OTHER_CLIPS.get(_width(shapes[keys[_CLIP_MARK]]))
    if "block.1.layer.0.SelfAttention.relative_attention_bias.weight" in keys:
        return "UMT5"
    if "block.0.layer.1.DenseReluDense.wi.weight" in keys:
        return "T5 of the first version (not v1.1)"
    return _OTHER_T5S.get(_width(shapes[keys[_T5_MARK]]))


def _width(shape: tuple[int, ...]) -> int:
    return shape[-1] if shape else 0


def _count_layers(part: Part, pattern: str) -> int:
    """Count layers from the largest number, without trusting it."""
    numbers = [found[1] for name in part.keys if (found := re.match(pattern, name))]
    longest = max(map(len, numbers), default=0)
    count = max(map(int, numbers), default=-1) + 1 if longest < 6 else MOST_BLOCKS + 1
    if count > MOST_BLOCKS:
        raise CheckpointError(
            f"The file was taken for {part.kind}, but it numbers more than {MOST_BLOCKS} layers.",
            f"a complete {part.kind} of {part.generation}.",
            "choose or download the file again in 'Load Text Encoders (FLUX)'.",
        )
    return count


def _matrix(part: Part, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Give the sides of a matrix the shape is read from."""
    key = part.keys.get(name)
    shape = shapes[key] if key is not None else None
    if shape is None or len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(
            f"The file was taken for {part.kind}, but its '{name}' is "
            + ("missing." if shape is None else f"{_sides(shape) or 'a single number'}."),
            f"a complete {part.kind} of {part.generation}.",
            "choose or download the file again in 'Load Text Encoders (FLUX)'.",
        )
    return shape[0], shape[1]


def _sides(shape: tuple[int, ...]) -> str:
    return shorten(" by ".join(map(str, shape)))
