"""Which language model a file holds, told from its keys and shapes, and which of them are needed.

The names here are those of LanguageModelShape.shapes(). Files add prefixes of their own: `model.`
(transformers, ComfyUI), `language_model.model.` and `model.language_model.` (beside a vision
tower), `text_encoders.qwen3_4b.transformer.model.` (whole checkpoints), …
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import CheckpointError, FamilyMismatchError
from ..specs import LanguageModelSpec
from ..text.encoders import LOADER
from ..text.modules import LanguageModelShape
from .files import Checkpoint
from .text_keys import Part, check_part

_MARK = "layers.0.self_attn.q_proj.weight"
_TABLE = "embed_tokens.weight"
# Tensors of a layer that come along in published files and are not needed.
_KNOWN_EXTRAS = re.compile(r".*\.(rotary_emb\.inv_freq|scale_input|input_scale|comfy_quant)")
_MOST_MODELS = 16  # in one file
# What else is built like the wanted models: a key's ending behind the prefix, or a part of any key.
_OTHERS = (
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
_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LanguageModelPart:
    """A language model inside a file: its layers up to the last one that is read."""

    spec: LanguageModelSpec
    shape: LanguageModelShape
    part: Part
    depth: int  # layers in the file


def find_language_models(shapes: _Shapes) -> list[str]:
    """List the prefixes behind which a file holds language models, wanted or not.

    Raises:
        CheckpointError: there are more than any file has.
    """
    prefixes = [key[: -len(_MARK)] for key in shapes if key.endswith(_MARK)]
    if len(prefixes) > _MOST_MODELS:
        raise CheckpointError(
            f"The file holds {len(prefixes):,} language models.",
            "one.",
            f"choose another file in {LOADER}.",
        )
    return [
        prefix
        for prefix in prefixes
        if (not prefix or prefix.endswith(".")) and prefix + _TABLE in shapes
    ]


def language_model_part(
    file: Checkpoint, prefix: str, wanted: Sequence[LanguageModelSpec]
) -> LanguageModelPart:
    """Tell which of the wanted models lies behind a prefix, and check the tensors it needs.

    Where several are wanted, a size that no known model has is taken as it is.

    Raises:
        FamilyMismatchError: it is another model.
        CheckpointError: tensors are missing, of another shape, or too many.
    """
    vocabulary, hidden = _matrix(file, prefix + _TABLE)
    has_norms = f"{prefix}layers.0.self_attn.q_norm.weight" in file.shapes
    architecture = "qwen3" if has_norms else "mistral3"
    other = _other_model(file.shapes, prefix)
    kin = [one for one in wanted if one.architecture == architecture]
    fitting = [one for one in kin if one.hidden == hidden]
    if not fitting and len(wanted) > 1 and kin and (architecture, hidden) not in _OTHER_WIDTHS:
        fitting = [_of_custom_size(kin[-1], file.shapes, prefix, hidden)]
    if other or not fitting:
        other = other or _OTHER_WIDTHS.get((architecture, hidden), f"a model {hidden} wide")
        raise FamilyMismatchError(
            f"{file.path.name} is another language model: {other}.",
            " or ".join(f"{one.title} ({one.hidden} wide)" for one in wanted)
            + ", which FLUX.2 reads.",
            f"choose the language model of your FLUX.2 model in {LOADER}.",
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
    part = _needed_part(file.shapes, prefix, spec, shape)
    check_part(part, shape.shapes(), file.shapes)
    depth = sum(
        key.startswith(prefix + "layers.") and key.endswith(".input_layernorm.weight")
        for key in file.shapes
    )
    return LanguageModelPart(spec, shape, part, depth)


def _of_custom_size(
    kin: LanguageModelSpec, shapes: _Shapes, prefix: str, hidden: int
) -> LanguageModelSpec:
    """Take a model of a size that nobody published for an experiment with one that is published."""

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


def _needed_part(
    shapes: _Shapes, prefix: str, spec: LanguageModelSpec, shape: LanguageModelShape
) -> Part:
    """Collect the table and the layers that are run; what lies beside them is left alone."""
    numbers = {str(number) for number in range(shape.layers)}
    keys: dict[str, str] = {_TABLE: prefix + _TABLE}
    for key in shapes:
        if not key.startswith(prefix):
            continue
        name = key[len(prefix) :]
        is_layer = name.startswith("layers.") and name.split(".", 2)[1] in numbers
        if is_layer and not _KNOWN_EXTRAS.fullmatch(name):
            keys[name] = key
    return Part(spec.title, prefix, keys, generation="FLUX.2")


def _other_model(shapes: _Shapes, prefix: str) -> str | None:
    """Name the model when it is built like a wanted one but is not it."""
    for ending, name in _OTHERS:
        if prefix + ending in shapes:
            return name
    if any("deepstack_merger" in key for key in shapes):
        return "Qwen3-VL"
    return None


def _matrix(file: Checkpoint, key: str) -> tuple[int, int]:
    shape = file.shapes[key]
    if len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(
            f"{file.path.name} holds a table of tokens with {len(shape)} sides.",
            "rows and columns.",
            f"choose or download the file again in {LOADER}.",
        )
    return shape[0], shape[1]
