"""Prompt → TextFeatures: CLIP's pooled vector and T5's sequence, or a language model's states.

Source: huggingface/diffusers@0.42.1 pipelines/flux/pipeline_flux.py FluxPipeline.encode_prompt,
pipelines/flux2/pipeline_flux2_klein.py Flux2KleinPipeline.encode_prompt, pipelines/flux2/
pipeline_flux2.py Flux2Pipeline.encode_prompt.
"""

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, NonFiniteError, SettingError
from ..specs import ClipT5Spec, LanguageModelSpec, TextSpec
from ..values import TextFeatures
from .modules import ClipSpec, LanguageModelShape, T5Spec, hidden_states
from .tokenizers import ChatTokenizer, EncodedPrompt, PromptTokenizer

MAX_TOKENS = 512  # what the models were trained with; diffusers refuses more
LOADER = "[text encoder loader]"


def do_nothing() -> None:
    """Is `ready` of encoders whose host has nothing to prepare."""


class PromptEncoder(Protocol):
    """The text encoders of one model.

    A host may set `ready`, which is called before the modules are used (to move them to their
    device), and `device`, where they compute; None means the device of the weights.
    """

    modules: tuple[nn.Module, ...]
    report: str  # what was loaded, in words
    ready: Callable[[], None]
    device: torch.device | None

    @property
    def text(self) -> TextSpec:
        """The model's text spec: encoders, widths and length."""
        ...

    def encode(self, prompt: str, prompt_2: str = "", *, tokens: int | None = None) -> TextFeatures:
        """Encodes one prompt. What does not fit is cut, and reported in the counts."""
        ...


class _Output(Protocol):
    last_hidden_state: Tensor


class _Encoder(Protocol):
    def __call__(self, **inputs: Tensor | None) -> _Output: ...


class TextEncoders:
    """CLIP and T5 with their tokenizers: FLUX.1's PromptEncoder.

    Args:
        text: the length of each encoder's sequence.
        clip, t5: modules from `build_clip` and `build_t5`, with their weights loaded.
        clip_spec, t5_spec: their shapes.
        clip_tokenizer, t5_tokenizer: their tokenizers.
        report: what was loaded, in words.
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
        self.modules: tuple[nn.Module, ...] = (clip, t5)
        self.clip_spec, self.t5_spec = clip_spec, t5_spec
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer
        self.report = report
        self.ready: Callable[[], None] = do_nothing
        self.device: torch.device | None = None

    @property
    def clip_tokens(self) -> int:
        """CLIP's sequence length, at most the number of its positions."""
        return min(self.text.clip_tokens, self.clip_spec.positions)

    def encode(self, prompt: str, prompt_2: str = "", *, tokens: int | None = None) -> TextFeatures:
        """Encodes one prompt. What does not fit is cut, and reported in the counts.

        Args:
            prompt: encoded by CLIP, and by T5 too when prompt_2 is empty.
            prompt_2: encoded by T5.
            tokens: T5's sequence length, 1..512; None for the model's default.

        Returns:
            txt (1, T, E): all T positions, padding included, as in training; pooled (1, P): the
            last hidden state at the first end token, without the projection. Each in its
            encoder's dtype, on its device.

        Raises:
            SettingError: tokens is out of range.
            CheckpointError: a tokenizer belongs to another encoder.
            NonFiniteError: an encoder overflowed.
        """
        length = _length(tokens, self.text)
        for_clip = self.clip_tokenizer.encode(prompt, self.clip_tokens)
        for_t5 = self.t5_tokenizer.encode(prompt_2 or prompt, length)
        _check_vocabulary(for_clip, self.clip_spec.vocabulary, self.text.title)
        _check_vocabulary(for_t5, self.t5_spec.vocabulary, self.text.title)
        self.ready()
        pooled = self._pool(for_clip.ids)
        txt = self._read(for_t5.ids)
        _check_finite(pooled, for_clip.count.encoder)
        _check_finite(txt, for_t5.count.encoder)
        return TextFeatures(
            txt=txt,
            pooled=pooled,
            counts=(for_clip.count, for_t5.count),
            source=self.text.title,
        )

    def _pool(self, ids: Tensor) -> Tensor:
        """Runs CLIP on ids (1, L); returns the state at the first end token: (1, P)."""
        clip = self.modules[0]
        ids = ids.to(_device_of(self))
        # Passed in, because a host that loads in part does not move the module's own buffer.
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden = cast(_Encoder, clip)(input_ids=ids, position_ids=positions).last_hidden_state
        end = int((ids[0] == self.clip_tokenizer.end_id).int().argmax())
        return hidden[:, end]  # (1, L, P) -> (1, P)

    def _read(self, ids: Tensor) -> Tensor:
        """Runs T5 on ids (1, T) without a mask: padding is attended to, as in training."""
        t5 = self.modules[1]
        ids = ids.to(_device_of(self))
        return cast(_Encoder, t5)(input_ids=ids, attention_mask=None).last_hidden_state


class LanguageModelEncoder:
    """A language model whose intermediate hidden states are used: FLUX.2's PromptEncoder.

    Args:
        text: chat template, length, and the layers whose states are used.
        module: from `build_language_model`, with its weights loaded.
        shape: its shape.
        tokenizer: its tokenizer.
        report: what was loaded, in words.
    """

    def __init__(
        self,
        text: LanguageModelSpec,
        *,
        module: nn.Module,
        shape: LanguageModelShape,
        tokenizer: ChatTokenizer,
        report: str = "",
    ) -> None:
        self.text = text
        self.modules: tuple[nn.Module, ...] = (module,)
        self.shape, self.tokenizer = shape, tokenizer
        self.report = report
        self.ready: Callable[[], None] = do_nothing
        self.device: torch.device | None = None

    def encode(self, prompt: str, prompt_2: str = "", *, tokens: int | None = None) -> TextFeatures:
        """Encodes one prompt. What does not fit is cut, and reported in the counts.

        Args:
            prompt: what to encode.
            prompt_2: ignored; a note says so when it differs from prompt.
            tokens: sequence length, 1..512, chat template included; None for the model's default.

        Returns:
            txt (1, T, E): the hidden states after each layer of `text.layers`, concatenated, at
            all T positions, padding included, in the weights' dtype, on their device; pooled is
            None.

        Raises:
            SettingError: tokens is out of range.
            CheckpointError: the tokenizer belongs to another encoder.
            NonFiniteError: the model overflowed.
        """
        length = _length(tokens, self.text)
        encoded = self.tokenizer.encode(prompt, self.text, length)
        _check_vocabulary(encoded, self.shape.vocabulary, self.text.title)
        notes = list(encoded.notes)
        if prompt_2 not in ("", prompt):
            notes.append(f"prompt_2 was not read: {self.text.title} takes one prompt.")
        self.ready()
        device = _device_of(self)
        ids, mask = encoded.ids.to(device), encoded.mask.to(device)
        txt = hidden_states(self.modules[0], ids, mask, self.text.layers)
        _check_finite(txt, self.text.title)
        return TextFeatures(
            txt=txt,
            pooled=None,
            counts=(encoded.count,),
            notes=tuple(notes),
            source=self.text.title,
        )


def _device_of(encoder: PromptEncoder) -> torch.device:
    return encoder.device or next(encoder.modules[0].parameters()).device


def _length(tokens: int | None, text: TextSpec) -> int:
    """Returns the sequence length: the one asked for, or the model's default."""
    length = text.tokens if tokens is None else tokens
    if not 1 <= length <= MAX_TOKENS:
        raise SettingError(
            f"The text length is {length} tokens.",
            f"1 to {MAX_TOKENS} tokens.",
            "change [text tokens]; 0 there means the model's default.",
        )
    return length


def _check_vocabulary(prompt: EncodedPrompt, rows: int, title: str) -> None:
    """Raises if an id has no embedding: on a GPU the kernel would fail without a reason."""
    largest = int(prompt.ids.max())
    if largest >= rows:
        raise CheckpointError(
            f"The tokenizer of {prompt.count.encoder} gave id {largest}; its encoder has "
            f"{rows} rows.",
            "a tokenizer and an encoder of the same model.",
            f"choose the files of {title} with {LOADER}.",
        )


def _check_finite(features: Tensor, encoder: str) -> None:
    if not torch.isfinite(features).all():
        raise NonFiniteError(
            f"{encoder} gave NaN or infinity in {str(features.dtype).removeprefix('torch.')}.",
            "finite text features.",
            "set [text encoder dtype] to bfloat16 or float32, or download the file again.",
        )
