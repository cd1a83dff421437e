"""Prompt → TextFeatures: CLIP's pooled vector and T5's sequence.

Source: huggingface/diffusers@0.42.1 pipelines/flux/pipeline_flux.py FluxPipeline.encode_prompt.
"""

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, NonFiniteError, SettingError
from ..specs import ClipT5Spec
from ..values import TextFeatures
from .modules import ClipSpec, T5Spec
from .tokenizers import EncodedPrompt, PromptTokenizer

T5_MAX_TOKENS = 512  # what FLUX.1 was trained with; diffusers refuses more
LOADER = "'Load Text Encoders (FLUX)'"


def nothing() -> None:
    """Stand in for a host that has nothing to prepare."""


class _Output(Protocol):
    last_hidden_state: Tensor


class _Encoder(Protocol):
    def __call__(self, **inputs: Tensor | None) -> _Output: ...


class TextEncoders:
    """CLIP and T5 with their tokenizers.

    Args:
        text: how many tokens each encoder gives.
        clip, t5: modules of `build_clip` and `build_t5`, loaded.
        clip_spec, t5_spec: their shapes.
        clip_tokenizer, t5_tokenizer: their tokenizers.
        report: what was loaded, for people.

    A host sets `ready`, called before the modules are used (it moves them to their device), and
    `device`, where they compute; left at None, that is where the weights lie.
    """

    def __init__(
        self,
        text: ClipT5Spec,
        *,
        clip: nn.Module,
        t5: nn.Module,
        clip_spec: ClipSpec,
        t5_spec: T5Spec,
        clip_tokenizer: PromptTokenizer,
        t5_tokenizer: PromptTokenizer,
        report: str = "",
    ) -> None:
        self.text = text
        self.modules = (clip, t5)
        self.clip_spec, self.t5_spec = clip_spec, t5_spec
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer
        self.report = report
        self.ready: Callable[[], None] = nothing
        self.device: torch.device | None = None

    @property
    def clip_tokens(self) -> int:
        """Tokens CLIP takes: never more than it has positions for."""
        return min(self.text.clip_tokens, self.clip_spec.positions)

    def encode(
        self, prompt: str, prompt_2: str = "", *, t5_tokens: int | None = None
    ) -> TextFeatures:
        """Encode one prompt; what does not fit is cut, and named in the counts.

        Args:
            prompt: read by CLIP, and by T5 too when prompt_2 is empty.
            prompt_2: read by T5.
            t5_tokens: T5's length, 1..512; None for the encoders' own.

        Returns:
            txt (1, T, E): all T positions, padding included, as the model was trained; pooled
            (1, P): the last layer at the first end mark, not projected. Each in its encoder's
            dtype, on the device where it computed.

        Raises:
            SettingError: t5_tokens is out of range.
            CheckpointError: a tokenizer belongs to another encoder.
            NonFiniteError: an encoder's values overflowed.
        """
        length = self.text.t5_tokens if t5_tokens is None else t5_tokens
        if not 1 <= length <= T5_MAX_TOKENS:
            raise SettingError(
                f"t5_tokens is {length}.",
                f"1 to {T5_MAX_TOKENS} tokens.",
                "Change t5_tokens of 'Encode Text (FLUX)'; 0 there means the model's own length.",
            )
        for_clip = self.clip_tokenizer.encode(prompt, self.clip_tokens)
        for_t5 = self.t5_tokenizer.encode(prompt_2 or prompt, length)
        _check_vocabulary(for_clip, self.clip_spec.vocabulary)
        _check_vocabulary(for_t5, self.t5_spec.vocabulary)
        self.ready()
        pooled = self._pool(for_clip.ids)
        txt = self._read(for_t5.ids)
        _check_finite(pooled, for_clip.count.encoder)
        _check_finite(txt, for_t5.count.encoder)
        return TextFeatures(txt=txt, pooled=pooled, counts=(for_clip.count, for_t5.count))

    def _pool(self, ids: Tensor) -> Tensor:
        """Run CLIP on ids (1, L) and take the first end mark: (1, P)."""
        clip = self.modules[0]
        ids = ids.to(self._device_of(clip))
        # Given, because a host that loads in part leaves the module's own buffer behind.
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden = cast(_Encoder, clip)(input_ids=ids, position_ids=positions).last_hidden_state
        end = int((ids[0] == self.clip_tokenizer.end_id).int().argmax())
        return hidden[:, end]  # (1, L, P) -> (1, P)

    def _read(self, ids: Tensor) -> Tensor:
        """Run T5 on ids (1, T) with no mask: padding is attended to, as in training."""
        t5 = self.modules[1]
        ids = ids.to(self._device_of(t5))
        return cast(_Encoder, t5)(input_ids=ids, attention_mask=None).last_hidden_state

    def _device_of(self, module: nn.Module) -> torch.device:
        return self.device or next(module.parameters()).device


def _check_vocabulary(prompt: EncodedPrompt, rows: int) -> None:
    """See that the encoder has a row for every id, before a kernel fails on it."""
    largest = int(prompt.ids.max())
    if largest >= rows:
        raise CheckpointError(
            f"The tokenizer of {prompt.count.encoder} gave id {largest}; its encoder has "
            f"{rows} rows.",
            "a tokenizer and an encoder of the same model.",
            f"choose the text encoder files of FLUX.1 in {LOADER}.",
        )


def _check_finite(features: Tensor, encoder: str) -> None:
    if not torch.isfinite(features).all():
        raise NonFiniteError(
            f"{encoder} gave NaN or infinity in {str(features.dtype).removeprefix('torch.')}.",
            "finite text features.",
            f"Set dtype to bfloat16 or float32 in {LOADER}, or download the file again.",
        )
