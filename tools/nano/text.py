"""The text encoders of the nano models, trained with their transformers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from ...flux_core.families import NANO_KLEIN, NANO_KONTEXT, NANO_QWEN3
from ...flux_core.nano.paths import CLIP_TOKENIZER, QWEN_TOKENIZER, T5_TOKENIZER
from ...flux_core.operations import torch_operations
from ...flux_core.specs import ClipT5Spec
from ...flux_core.text.modules import (
    ClipSpec,
    LanguageModelShape,
    T5Spec,
    build_clip,
    build_language_model,
    build_t5,
    hidden_states,
)
from ...flux_core.text.tokenizers import load_clip_tokenizer, load_qwen_tokenizer, load_t5_tokenizer

QWEN_VOCABULARY = 512


def nano_text_specs() -> tuple[ClipSpec, T5Spec]:
    """Returns the shapes of the text encoders, with a vocabulary that fits the tokenizers."""
    text, shape = cast(ClipT5Spec, NANO_KONTEXT.text), NANO_KONTEXT.transformer
    clip = ClipSpec(
        width=shape.pooled_width,
        layers=2,
        ffn=2 * shape.pooled_width,
        vocabulary=672,
        positions=text.clip_tokens,
    )
    t5 = T5Spec(
        width=shape.context_width,
        layers=2,
        ffn=2 * shape.context_width,
        vocabulary=64,
        heads=4,
        head_dim=32,
    )
    return clip, t5


def fresh_weights(shapes: dict[str, tuple[int, ...]], embedding: float) -> dict[str, Tensor]:
    """Returns random weights: gains 1, biases 0, matrices of deviation 1 / sqrt(columns).

    Args:
        shapes: names and shapes of a text encoder.
        embedding: deviation of the token embeddings.
    """
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        elif len(shape) == 1:
            weights[name] = torch.ones(shape)
        elif "token" in name:  # CLIP's, T5's and Qwen3's embeddings
            weights[name] = torch.randn(shape) * embedding
        elif "position_embedding" in name or "relative" in name:
            weights[name] = torch.randn(shape) * 0.1
        else:
            weights[name] = torch.randn(shape) / math.sqrt(shape[1])
        if ".SelfAttention.q." in name:  # T5 does not divide by the root of the head's width
            weights[name] /= math.sqrt(32)
    return weights


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Encoded prompts."""

    txt: Tensor  # (B, T, E)
    pooled: Tensor | None  # (B, P)
    summary: Tensor  # (B, W): one vector for the whole prompt


class NanoClipT5(nn.Module):
    """CLIP and T5 at nano size, trained with the transformer."""

    summary_width = NANO_KONTEXT.transformer.pooled_width

    def __init__(self) -> None:
        super().__init__()
        clip_spec, t5_spec = nano_text_specs()
        ops = torch_operations()
        clip = build_clip(clip_spec, dtype=torch.float32, operations=ops)
        t5 = build_t5(t5_spec, dtype=torch.float32, operations=ops)
        prefix = "text_model." if hasattr(clip, "text_model") else ""  # transformers 4
        weights = fresh_weights(clip_spec.shapes(), 0.3)
        clip.load_state_dict({prefix + name: value for name, value in weights.items()}, assign=True)
        t5.load_state_dict(fresh_weights(t5_spec.shapes(), 1.0), assign=True)
        self.clip, self.t5 = clip.requires_grad_(True), t5.requires_grad_(True)
        self._clip_tokenizer = load_clip_tokenizer(CLIP_TOKENIZER)
        self._t5_tokenizer = load_t5_tokenizer(T5_TOKENIZER)
        text = cast(ClipT5Spec, NANO_KONTEXT.text)
        self._lengths = (text.clip_tokens, text.t5_tokens)
        self._ids_of: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Encodes prompts as `TextEncoders` does."""
        rows = [self._ids(prompt) for prompt in prompts]
        clip_ids, t5_ids = (torch.cat(column) for column in zip(*rows, strict=True))
        hidden = self.clip(input_ids=clip_ids).last_hidden_state
        end = (clip_ids == self._clip_tokenizer.end_id).int().argmax(dim=1)
        pooled = hidden[torch.arange(len(rows)), end]
        txt = self.t5(input_ids=t5_ids, attention_mask=None).last_hidden_state
        return EncodedPrompts(txt, pooled, pooled)

    def _ids(self, prompt: str) -> tuple[Tensor, Tensor]:
        if prompt not in self._ids_of:
            clip, t5 = self._lengths
            self._ids_of[prompt] = (
                self._clip_tokenizer.encode(prompt, clip).ids,
                self._t5_tokenizer.encode(prompt, t5).ids,
            )
        return self._ids_of[prompt]


def nano_language_model() -> LanguageModelShape:
    """Returns the shape of the nano Qwen3, with a vocabulary that fits its tokenizer."""
    spec = NANO_QWEN3
    return LanguageModelShape(
        architecture=spec.architecture,
        hidden=spec.hidden,
        layers=max(spec.layers),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        ffn=2 * spec.hidden,
        vocabulary=QWEN_VOCABULARY,
        theta=spec.theta,
        norm_eps=spec.norm_eps,
    )


class NanoQwen(nn.Module):
    """Qwen3 at nano size, trained with the transformer."""

    summary_width = NANO_KLEIN.transformer.context_width

    def __init__(self) -> None:
        super().__init__()
        shape = nano_language_model()
        model = build_language_model(shape, dtype=torch.float32, operations=torch_operations())
        model.load_state_dict(fresh_weights(shape.shapes(), 0.3), assign=True)
        self.model = model.requires_grad_(True)
        self._tokenizer = load_qwen_tokenizer(QWEN_TOKENIZER)
        self._ids_of: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Encodes prompts as `LanguageModelEncoder` does."""
        rows = [self._ids(prompt) for prompt in prompts]
        ids, mask = (torch.cat(column) for column in zip(*rows, strict=True))
        txt = hidden_states(self.model, ids, mask, NANO_QWEN3.layers)
        last = mask.sum(dim=1) - 1  # padding comes after the prompt
        return EncodedPrompts(txt, None, txt[torch.arange(len(rows)), last])

    def _ids(self, prompt: str) -> tuple[Tensor, Tensor]:
        if prompt not in self._ids_of:
            encoded = self._tokenizer.encode(prompt, NANO_QWEN3)
            self._ids_of[prompt] = (encoded.ids, encoded.mask)
        return self._ids_of[prompt]


NanoText: TypeAlias = NanoClipT5 | NanoQwen
