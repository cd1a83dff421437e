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
LOADER = "'Load Text Encoders (FLUX)'"


def nothing() -> None:
    """Stand in for a host that has nothing to prepare."""


class PromptEncoder(Protocol):
    """The text encoders of one model.

    A host sets `ready`, called before the modules are used (it moves them to their device), and
    `device`, where they compute; left at None, that is where the weights lie.
    """

    modules: tuple[nn.Module, ...]
    report: str  # what was loaded, for people
    ready: Callable[[], None]
    device: torch.device | None

    @property
    def text(self) -> TextSpec:
        """What the model's text is."""
        ...

    def encode(self, prompt: str, prompt_2: str = "", *, tokens: int | None = None) -> TextFeatures:
        """Encode one prompt; what does not fit is cut, and named in the counts."""
        ...


class _Output(Protocol):
    last_hidden_state: Tensor


class _Encoder(Protocol):
    def __call__(self, **inputs: Tensor | None) -> _Output: ...


class TextEncoders:
    """CLIP and T5 with their tokenizers: FLUX.1's PromptEncoder.

    Args:
        text: how many tokens each encoder gives.
        clip, t5: modules of `build_clip` and `build_t5`, loaded.
        clip_spec, t5_spec: their shapes.
        clip_tokenizer, t5_tokenizer: their tokenizers.
        report: what was loaded, for people.
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
        self.ready: Callable[[], None] = nothing
        self.device: torch.device | None = None

    @property
    def clip_tokens(self) -> int:
        """Tokens CLIP takes: never more than it has positions for."""
        return min(self.text.clip_tokens, self.clip_spec.positions)

    def encode(self, prompt: str, prompt_2: str = "", *, tokens: int | None = None) -> TextFeatures:
        """Encode one prompt; what does not fit is cut, and named in the counts.

        Args:
            prompt: read by CLIP, and by T5 too when prompt_2 is empty.
            prompt_2: read by T5.
            tokens: T5's length, 1..512; None for the encoders' own.

        Returns:
            txt (1, T, E): all T positions, padding included, as the model was trained; pooled
            (1, P): the last layer at the first end mark, not projected. Each in its encoder's
            dtype, on the device where it computed.

        Raises:
            SettingError: tokens is out of range.
            CheckpointError: a tokenizer belongs to another encoder.
            NonFiniteError: an encoder's values overflowed.
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
        """Run CLIP on ids (1, L) and take the first end mark: (1, P)."""
        clip = self.modules[0]
        ids = ids.to(_device_of(self))
        # Given, because a host that loads in part leaves the module's own buffer behind.
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden = cast(_Encoder, clip)(input_ids=ids, position_ids=positions).last_hidden_state
        end = int((ids[0] == self.clip_tokenizer.end_id).int().argmax())
        return hidden[:, end]  # (1, L, P) -> (1, P)

    def _read(self, ids: Tensor) -> Tensor:
        """Run T5 on ids (1, T) with no mask: padding is attended to, as in training."""
        t5 = self.modules[1]
        ids = ids.to(_device_of(self))
        return cast(_Encoder, t5)(input_ids=ids, attention_mask=None).last_hidden_state


class LanguageModelEncoder:
    """A language model read between its layers: FLUX.2's PromptEncoder.

    Args:
        text: template, length, and the layers that are read.
        module: of `build_language_model`, loaded.
        shape: its shape.
        tokenizer: its tokenizer.
        report: what was loaded, for people.
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
        self.ready: Callable[[], None] = nothing
        self.device: torch.device | None = None

    def encode(self, prompt: str, prompt_2: str = "", *, tokens: int | None = None) -> TextFeatures:
        """Encode one prompt; what does not fit is cut, and named in the counts.

        Args:
            prompt: what is read.
            prompt_2: not read; the notes say so when it says something else.
            tokens: length, 1..512, the chat template's included; None for the model's own.

        Returns:
            txt (1, T, E): the states behind the layers of `text.layers` side by side, at all T
            positions, padding included, in the weights' dtype, on the device where they were
            computed; nothing is pooled.

        Raises:
            SettingError: tokens is out of range.
            CheckpointError: the tokenizer belongs to another encoder.
            NonFiniteError: the values overflowed.
        """
        length = _length(tokens, self.text)
        read = self.tokenizer.encode(prompt, self.text, length)
        _check_vocabulary(read, self.shape.vocabulary, self.text.title)
        notes = list(read.notes)
        if prompt_2 not in ("", prompt):
            notes.append(f"prompt_2 was not read: {self.text.title} takes one prompt.")
        self.ready()
        device = _device_of(self)
        ids, mask = read.ids.to(device), read.mask.to(device)
        txt = hidden_states(self.modules[0], ids, mask, self.text.layers)
        _check_finite(txt, self.text.title)
        return TextFeatures(
            txt=txt,
            pooled=None,
            counts=(read.count,),
            notes=tuple(notes),
            source=self.text.title,
        )


def _device_of(encoder: PromptEncoder) -> torch.device:
    return encoder.device or next(encoder.modules[0].parameters()).device


def _length(tokens: int | None, text: TextSpec) -> int:
    """Give the length of the sequence: what was asked for, or the model's own."""
    length = text.tokens if tokens is None else tokens
    if not 1 <= length <= MAX_TOKENS:
        raise SettingError(
            f"t5_tokens is {length}.",
            f"1 to {MAX_TOKENS} tokens.",
            "change t5_tokens of 'Encode Text (FLUX)'; 0 there means the model's own length.",
        )
    return length


def _check_vocabulary(prompt: EncodedPrompt, rows: int, title: str) -> None:
    """See that the encoder has a row for every id, before a kernel fails on it."""
    largest = int(prompt.ids.max())
    if largest >= rows:
        raise CheckpointError(
            f"The tokenizer of {prompt.count.encoder} gave id {largest}; its encoder has "
            f"{rows} rows.",
            "a tokenizer and an encoder of the same model.",
            f"choose the files of {title} in {LOADER}.",
        )


def _check_finite(features: Tensor, encoder: str) -> None:
    if not torch.isfinite(features).all():
        raise NonFiniteError(
            f"{encoder} gave NaN or infinity in {str(features.dtype).removeprefix('torch.')}.",
            "finite text features.",
            f"set dtype to bfloat16 or float32 in {LOADER}, or download the file again.",
        )
