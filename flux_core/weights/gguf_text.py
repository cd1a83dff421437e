"""Text encoders in GGUF files: llama.cpp's names of their tensors, its order of rows, tokenizers.

Files that keep transformers' names, as other converters write them, stay as they are.

Source: ggml-org/llama.cpp gguf-py constants.py TENSOR_NAMES and tensor_mapping.py, conversion/
llama.py LlamaModel.permute; city96/ComfyUI-GGUF@795e451 loader.py for what people have.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..errors import CheckpointError, FamilyMismatchError, shorten
from ..text.tekken import SpelledVocabulary
from ..text.tokenizers import ChatTokenizer, load_mistral_tokenizer
from .checkpoint import Checkpoint
from .files import ANOTHER_FILE
from .gguf import read_gguf_header

_ARCHITECTURE = "general.architecture"
_T5 = ("t5", "t5encoder")
_QWEN = "qwen3"
_INTERLEAVED = ("llama", "mistral3")  # Mistral Small 3 has had both names
_MARK = "token_embd.weight"
_BLOCK = re.compile(r"(enc\.|dec\.|v\.|t\.)?blk\.(\d{1,6})\.([a-z0-9_]+)\.(weight|bias)")
_OUTSIDE_T5 = {
    _MARK: "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_T5 = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_OUTSIDE = {
    _MARK: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_ROTATED = (".self_attn.q_proj.weight", ".self_attn.k_proj.weight")
# Mistral's tokenizer; Qwen3's and T5's come from elsewhere.
_WORDS, _KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
# What Mistral's vocabulary is called there: a byte-level BPE, split as tekken splits.
_TEKKEN = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}
_NEEDED = "T5 for FLUX.1; Qwen3 or Mistral Small 3.2 for FLUX.2."
_KNOWN_OTHERS = {  # what people have beside them
    "clip": "the image half (mmproj) of a language model, or a CLIP of clip.cpp",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "qwen2": "Qwen2.5",
    "qwen2vl": "Qwen2.5-VL",
    "qwen3moe": "Qwen3 with a mixture of experts",
    "qwen3vl": "Qwen3-VL",
    "mistral4": "Mistral 4",
}


def with_plain_names(checkpoint: Checkpoint) -> Checkpoint:
    """Renames a text encoder of a GGUF file as transformers does.

    Names that are not known stay as they are after their layer, so that checks find them.

    Raises:
        FamilyMismatchError: it is a model of another architecture.
        CheckpointError: names contradict the architecture or each other.
    """
    if not checkpoint.gguf:
        return checkpoint
    architecture = checkpoint.metadata.get(_ARCHITECTURE, "")
    known = (*_T5, _QWEN, *_INTERLEAVED)
    is_named = any(key == _MARK or _BLOCK.fullmatch(key) for key in checkpoint.shapes)
    if not is_named:
        if architecture in _INTERLEAVED:
            raise _contradictory(checkpoint, f"holds no '{_MARK}'", architecture)
        return checkpoint
    if architecture not in known:
        raise _another(checkpoint, architecture)
    if _MARK not in checkpoint.shapes:
        raise _contradictory(checkpoint, f"holds no '{_MARK}'", architecture)
    if architecture in _INTERLEAVED and _is_stretched(checkpoint.metadata, architecture):
        raise FamilyMismatchError(
            f"{checkpoint.path.name} is another language model: Ministral 3, Devstral 2 or the "
            "like, whose positions are stretched (yarn).",
            "Mistral Small 3.2, which FLUX.2 [dev] reads.",
            "choose the language model of your FLUX.2 model in [text encoder loader].",
        )
    has_gate = "enc.blk.0.ffn_gate.weight" in checkpoint.shapes
    is_t5 = architecture in _T5
    names = {key: _t5_name(key, has_gate) if is_t5 else _name(key) for key in checkpoint.shapes}
    if len(set(names.values())) < len(names):
        raise _contradictory(checkpoint, "has two names for one tensor", architecture)
    return _renamed(checkpoint, names)


def is_interleaved(checkpoint: Checkpoint) -> bool:
    """Returns whether queries and keys have llama.cpp's order of rows, see `in_halves`."""
    return bool(checkpoint.gguf) and checkpoint.metadata.get(_ARCHITECTURE) in _INTERLEAVED


def in_halves(name: str, tensor: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of queries and keys as transformers has them; other tensors stay.

    llama.cpp rotates neighbours by position, 0 and 1, 2 and 3, …; transformers rotates row i of
    a head and row i + head_dim / 2.

    Args:
        name: ours, such as `layers.0.self_attn.q_proj.weight`.
        tensor: (heads * head_dim, columns) where it is rotated.
        head_dim: rows of one head.
    """
    if not name.endswith(_ROTATED):
        return tensor
    pairs = tensor.view(-1, head_dim // 2, 2, tensor.shape[1])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def carries_tekken(checkpoint: Checkpoint) -> bool:
    """Returns whether a file says that it carries Mistral's vocabulary."""
    metadata = checkpoint.metadata
    return bool(checkpoint.gguf) and all(metadata.get(key) == one for key, one in _TEKKEN.items())


def load_gguf_tokenizer(checkpoint: Checkpoint) -> ChatTokenizer:
    """Loads the tokenizer of a GGUF file that carries Mistral's vocabulary.

    Its merges are not read: they follow from the order of the tokens, as in tekken.json.

    Raises:
        CheckpointError: it is missing or broken, or the file changed since it was opened.
    """
    header = read_gguf_header(checkpoint.files[0], (_WORDS, _KINDS))
    words, kinds = header.words.get(_WORDS, ()), header.numbers.get(_KINDS, ())
    return load_mistral_tokenizer(SpelledVocabulary(words, kinds))


def _t5_name(key: str, has_gate: bool) -> str:
    block = _BLOCK.fullmatch(key)
    if block is None:
        return _OUTSIDE_T5.get(key, "decoder." + key if key.startswith("dec.") else key)
    half, number, name, ending = block.groups()
    if half == "dec.":
        return "decoder." + key
    if name == "ffn_up" and not has_gate:  # of the first T5, which has no gate
        return f"encoder.block.{number}.layer.1.DenseReluDense.wi.{ending}"
    return f"encoder.block.{number}.{_IN_T5.get(name, name)}.{ending}"


def _name(key: str) -> str:
    block = _BLOCK.fullmatch(key)
    if block is None or block[1]:
        return _OUTSIDE.get(key, key)
    return f"model.layers.{block[2]}.{_IN_LAYER.get(block[3], block[3])}.{block[4]}"


def _is_stretched(metadata: Mapping[str, str], architecture: str) -> bool:
    return metadata.get(f"{architecture}.rope.scaling.type") == "yarn"


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    return replace(
        checkpoint,
        shapes={names[key]: shape for key, shape in checkpoint.shapes.items()},
        dtypes={names[key]: dtype for key, dtype in checkpoint.dtypes.items()},
        file_of={names[key]: file for key, file in checkpoint.file_of.items()},
        quantised={names[key]: one for key, one in checkpoint.quantised.items()},
        gguf={names[key]: one for key, one in checkpoint.gguf.items()},
    )


def _another(checkpoint: Checkpoint, architecture: str) -> FamilyMismatchError:
    what = _KNOWN_OTHERS.get(architecture) or f"'{shorten(architecture)}' by its own words"
    return FamilyMismatchError(
        f"{checkpoint.path.name} is another GGUF file: {what}.",
        _NEEDED,
        "choose the text encoder of your model in [text encoder loader].",
    )


def _contradictory(checkpoint: Checkpoint, what: str, architecture: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path.name} says that it is '{architecture}', and {what}.",
        _NEEDED,
        ANOTHER_FILE,
    )
