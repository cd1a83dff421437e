"""ComfyUI's own CLIP on our text encoder socket: its weights and patches, our tokenizers.

`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...flux_core.errors import FamilyMismatchError, SettingError
from ...flux_core.families import FLUX1_TEXT, MISTRAL_SMALL_3, QWEN3_4B, QWEN3_8B
from ...flux_core.specs import LanguageModelSpec
from ...flux_core.text.encoders import LanguageModelEncoder, PromptEncoder, TextEncoders
from ...flux_core.text.modules import ClipSpec, LanguageModelShape, T5Spec
from ...flux_core.text.tokenizers import (
    ChatTokenizer,
    PromptTokenizer,
    load_clip_tokenizer,
    load_mistral_tokenizer,
    load_qwen_tokenizer,
    load_t5_tokenizer,
)
from ...flux_core.values import TextFeatures
from .. import host
from ..runtime.handles import text_to_outputs

_MODULE = "comfy.text_encoders.flux"
_CLIP_AND_T5, _LANGUAGE = "FluxClipModel", "Flux2TEModel"  # or classes derived from them
_LANGUAGE_MODELS = {
    "mistral3_24b": MISTRAL_SMALL_3,
    "qwen3_8b": QWEN3_8B,
    "qwen3_4b": QWEN3_4B,
}
_mistral_tokenizers: WeakKeyDictionary[Any, ChatTokenizer] = WeakKeyDictionary()


class NativeTextEncoders:
    """A native CLIP, which ComfyUI loads with its patches.

    Raises:
        FamilyMismatchError: it is another model's.
        SettingError: it has settings that would be ignored.
    """

    def __init__(self, clip: Any) -> None:
        _check_plain(clip)
        self.clip = clip
        self.encoders = _encoder(clip)
        self.encoders.device = clip.patcher.load_device
        self.encoders.ready = self._load

    def encode(self, prompt: str, prompt_2: str, t5_tokens: int | None) -> TextFeatures:
        """Encodes a prompt as `TextEncodersHandle` does, in float32."""
        return text_to_outputs(self.encoders.encode(prompt, prompt_2, tokens=t5_tokens))

    def _load(self) -> None:
        self.clip.load_model()


def _check_plain(clip: Any) -> None:
    """Raises if a CLIP has settings that only ComfyUI's own text nodes follow."""
    if clip.layer_idx not in (None, -1):
        raise SettingError(
            f"'CLIP Set Last Layer' is at {clip.layer_idx} on this CLIP.",
            "the last layer, which FLUX was trained with.",
            "remove that node from this wire.",
        )
    if clip.apply_hooks_to_conds or clip.use_clip_schedule:
        raise SettingError(
            "The CLIP carries hooks, which only ComfyUI's own text nodes follow.",
            "a CLIP without hooks.",
            "remove 'Set CLIP Hooks' from this wire; add LoRAs with 'Load LoRA (Model and CLIP)'.",
        )


def _encoder(clip: Any) -> PromptEncoder:
    """Returns our encoder around ComfyUI's modules."""
    model = clip.cond_stage_model
    kinds = {one.__name__ for one in type(model).__mro__ if one.__module__ == _MODULE}
    if _CLIP_AND_T5 in kinds:
        return _clip_and_t5(model)
    name = getattr(model, "clip", "")
    if _LANGUAGE in kinds and name in _LANGUAGE_MODELS:
        return _language_model(clip, getattr(model, name).transformer, _LANGUAGE_MODELS[name])
    parts = ", ".join(key for key, _ in model.named_children()) or "nothing"
    raise FamilyMismatchError(
        f"The CLIP is {type(model).__name__.rstrip('_')}, made of {parts}.",
        "CLIP-L and T5 for FLUX.1, or Qwen3 or Mistral for FLUX.2.",
        "load clip_l and t5xxl with 'Load CLIP (Dual)', type flux; or qwen_3_4b, qwen_3_8b or "
        "mistral_3_small_flux2 with 'Load CLIP', type flux2.",
    )


def _clip_and_t5(model: Any) -> TextEncoders:
    clip, t5 = model.clip_l.transformer, model.t5xxl.transformer
    tower, block = clip.text_model, t5.encoder.block[0]
    tokens, positions = tower.embeddings.token_embedding, tower.embeddings.position_embedding
    attention = block.layer[0].SelfAttention
    folders = host.native_tokenizers()
    return TextEncoders(
        FLUX1_TEXT,
        clip=cast(nn.Module, _Clip(clip)),
        t5=cast(nn.Module, _T5(t5)),
        clip_spec=ClipSpec(
            width=tokens.embedding_dim,
            layers=clip.num_layers,
            ffn=tower.encoder.layers[0].mlp.fc1.out_features,
            vocabulary=tokens.num_embeddings,
            positions=positions.num_embeddings,
        ),
        t5_spec=T5Spec(
            width=t5.shared.embedding_dim,
            layers=t5.num_layers,
            ffn=block.layer[-1].DenseReluDense.wo.in_features,
            vocabulary=t5.shared.num_embeddings,
            heads=attention.num_heads,
            head_dim=attention.q.out_features // attention.num_heads,
        ),
        clip_tokenizer=_clip_tokenizer(folders[0]),
        t5_tokenizer=_t5_tokenizer(folders[1]),
    )


def _language_model(clip: Any, transformer: Any, spec: LanguageModelSpec) -> LanguageModelEncoder:
    config = transformer.model.config
    return LanguageModelEncoder(
        spec,
        module=cast(nn.Module, _LanguageModel(transformer, spec.layers)),
        shape=LanguageModelShape(
            architecture=spec.architecture,
            hidden=config.hidden_size,
            layers=spec.layers[-1],
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            ffn=config.intermediate_size,
            vocabulary=transformer.model.embed_tokens.num_embeddings,
            theta=config.rope_theta,
            norm_eps=config.rms_norm_eps,
        ),
        tokenizer=_chat_tokenizer(clip.tokenizer, spec),
    )


@cache
def _clip_tokenizer(folder: Path) -> PromptTokenizer:
    return load_clip_tokenizer(folder)


@cache
def _t5_tokenizer(folder: Path) -> PromptTokenizer:
    return load_t5_tokenizer(folder)


@cache
def _qwen_tokenizer(folder: Path) -> ChatTokenizer:
    return load_qwen_tokenizer(folder)


def _chat_tokenizer(native: Any, spec: LanguageModelSpec) -> ChatTokenizer:
    """Returns Qwen's tokenizer, or the one stored in Mistral's file."""
    if spec.architecture == "qwen3":
        return _qwen_tokenizer(host.native_qwen_tokenizer())
    if native not in _mistral_tokenizers:
        stored = native.state_dict()["tekken_model"]
        data = stored.numpy().tobytes() if isinstance(stored, Tensor) else bytes(stored)
        _mistral_tokenizers[native] = load_mistral_tokenizer(data)
    return _mistral_tokenizers[native]


@dataclass(frozen=True, slots=True)
class _Output:
    last_hidden_state: Tensor


@dataclass(frozen=True, slots=True)
class _States:
    hidden_states: dict[int, Tensor]  # by number of layers run; only those that are used


class _Clip:
    """CLIP, called as transformers' is; returns the states after the last norm."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer

    def __call__(self, *, input_ids: Tensor, position_ids: Tensor) -> _Output:
        # ComfyUI's takes no position_ids and adds all positions at once, so ids are padded to them;
        # attention is causal, so padding changes nothing before it.
        embedding = self.transformer.text_model.embeddings.position_embedding
        missing = embedding.num_embeddings - position_ids.shape[1]
        ids = nn.functional.pad(input_ids, (0, missing))
        hidden = _run(self.transformer, ids)[0]
        return _Output(hidden[:, : input_ids.shape[1]].float())


class _T5:
    """T5, called as transformers' is."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer

    def __call__(self, *, input_ids: Tensor, attention_mask: None) -> _Output:
        return _Output(_run(self.transformer, input_ids, attention_mask)[0].float())


class _LanguageModel:
    """Qwen3 or Mistral, called as transformers' are."""

    def __init__(self, transformer: Any, layers: tuple[int, ...]) -> None:
        self.transformer, self.layers = transformer, sorted(layers)

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **_: object) -> _States:
        """Runs ids (1, L) under a mask, (1, L) or (1, 1, L, L) for each pair of positions."""
        hidden = _run(self.transformer, input_ids, attention_mask, self.layers)[1]
        states = dict(zip(self.layers, hidden.float().unbind(1), strict=True))
        if attention_mask.ndim == 4:
            isolated = ~attention_mask[:, 0].any(-1)  # padding on the left: (1, L)
            if isolated.any():
                self._set_isolated(states, input_ids, isolated)
        return _States(states)

    def _set_isolated(self, states: dict[int, Tensor], ids: Tensor, isolated: Tensor) -> None:
        """Sets the states of positions that attend to nothing: embedding and MLPs alone."""
        model = self.transformer.model
        x = model.embed_tokens(ids[isolated], out_dtype=torch.float32)
        for number, layer in enumerate(model.layers[: self.layers[-1]], 1):
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if number in states:
                states[number][isolated] = x.float()


def _run(
    transformer: Any, ids: Tensor, mask: Tensor | None = None, layers: list[int] | None = None
) -> Any:
    """Runs one of ComfyUI's text transformers as its SDClipModel does."""
    return transformer(
        None,
        mask,
        embeds=transformer.get_input_embeddings()(ids, out_dtype=torch.float32),
        num_tokens=[ids.shape[1]],
        intermediate_output=layers,
        final_layer_norm_intermediate=False,
        dtype=torch.float32,
    )
