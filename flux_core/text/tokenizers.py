"""Prompt to token ids, and the part of the prompt that did not fit.

Source: huggingface/diffusers@0.42.1 pipelines/flux/pipeline_flux.py `_get_clip_prompt_embeds`,
`_get_t5_prompt_embeds`, pipelines/flux2/pipeline_flux2_klein.py `_get_qwen3_prompt_embeds`,
pipelines/flux2/pipeline_flux2.py `_get_mistral_3_small_prompt_embeds`: the same tokenizer classes,
templates, padding and truncation.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from ..errors import CheckpointError, SettingError
from ..specs import LanguageModelSpec
from ..values import TokenCount
from .tekken import SpelledVocabulary, read_tekken

CLIP_NAME = "CLIP-L"
T5_NAME = "T5"
_CLIP_FILES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
_T5_FILES = (("tokenizer.json",), ("spiece.model",))
_QWEN_FILES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
_MISTRAL_FILES = (("tokenizer.json",), ("tekken.json",))
_REINSTALL = "install the pack (or ComfyUI, which holds the tokenizers) again."
_ALONGSIDE = (
    "choose ComfyUI's mistral_3_small_flux2 file, which holds its tokenizer, with "
    "[text encoder loader], or put the tokenizer files into the folder of the encoder."
)
_SPECIAL_TOKEN = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")  # <|im_start|>, </think>, <s>, [INST]
_SPECIAL_TOKENS = {CLIP_NAME: 2, T5_NAME: 1}  # begin and end; end


class _Batch(Protocol):
    input_ids: Sequence[int]
    offset_mapping: Sequence[tuple[int, int]]


class _Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    is_fast: bool
    eos_token_id: int

    backend_tokenizer: "_Backend"

    def __call__(self, text: str, **options: object) -> _Batch: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


class _Encoding(Protocol):
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


class _Backend(Protocol):
    """The part of a tokenizers.Tokenizer that is used here."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> _Encoding: ...
    def get_added_tokens_decoder(self) -> Mapping[int, object]: ...
    def no_padding(self) -> None: ...
    def no_truncation(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as one encoder's input."""

    ids: Tensor  # (1, length) int64, padded
    mask: Tensor  # (1, length) int64: 1 for the prompt, 0 for padding
    count: TokenCount
    notes: tuple[str, ...] = ()  # changes to the prompt that one may not expect


class PromptTokenizer:
    """The tokenizer of one text encoder.

    Args:
        name: the encoder's name in counts and errors, CLIP_NAME or T5_NAME.
        tokenizer: the one the encoder was trained with.
        spans: the same, or one that also returns the characters of each token.
    """

    def __init__(self, name: str, tokenizer: _Tokenizer, spans: _Tokenizer) -> None:
        self.name = name
        self.end_id = tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self._spans = spans

    def encode(self, prompt: str, length: int) -> EncodedPrompt:
        """Tokenises a prompt, truncated and padded to the length.

        Args:
            prompt: any text, also empty.
            length: tokens, begin and end token included; at least those.

        Raises:
            SettingError: the prompt is not valid Unicode.
        """
        _check_encodable(prompt, self.name)
        padded = self._tokenizer(prompt, padding="max_length", max_length=length, truncation=True)
        ids = self._tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        room = length - _SPECIAL_TOKENS[self.name]
        used = min(len(ids), room) + _SPECIAL_TOKENS[self.name]
        cut = self._cut(prompt, ids, room) if len(ids) > room else ""
        return EncodedPrompt(
            ids=torch.tensor([padded.input_ids], dtype=torch.int64),
            mask=(torch.arange(length) < used).long()[None],
            count=TokenCount(encoder=self.name, used=used, limit=length, cut=cut),
        )

    def _cut(self, prompt: str, ids: Sequence[int], room: int) -> str:
        """Returns the end of the prompt, from the first token that did not fit."""
        if self._spans.is_fast:
            found = self._spans(
                prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            if found.input_ids == ids:
                return prompt[found.offset_mapping[room][0] :]
        return self._tokenizer.decode(ids[room:])


class ChatTokenizer:
    """The tokenizer of a language model, which takes the prompt as one turn of a chat.

    Args:
        name: where it comes from, for errors.
        backend: has the special tokens of the chat template.
    """

    def __init__(self, name: str, backend: _Backend) -> None:
        self.name = name
        self._backend = backend
        backend.no_padding()
        backend.no_truncation()
        added = backend.get_added_tokens_decoder()
        self._special_ids = {
            str(getattr(token, "content", token)): id_ for id_, token in added.items()
        }

    def encode(
        self, prompt: str, spec: LanguageModelSpec, length: int | None = None
    ) -> EncodedPrompt:
        """Tokenises a prompt in its chat template, truncated at the end and padded.

        Args:
            prompt: any text, also empty; special tokens of the template in it stay special.
            spec: template, side of the padding and default length.
            length: tokens, the template's included; at least 1. None for the default.

        Raises:
            SettingError: the prompt is not valid Unicode.
            CheckpointError: the tokenizer does not have a special token of the template.
        """
        _check_encodable(prompt, spec.title)
        self._check_special_tokens(spec)
        length = spec.tokens if length is None else length
        notes: list[str] = []
        plain = prompt
        for token in spec.removed:
            plain = plain.replace(token, "")
            if token in prompt:
                notes.append(f"{token} was taken out of the prompt: it stands for a picture.")
        text = f"{spec.prefix}{plain}{spec.suffix}"
        found = self._backend.encode(text, add_special_tokens=False)
        ids, cut = list(found.ids[:length]), ""
        if len(found.ids) > length:
            end = len(spec.prefix) + len(plain)
            cut = text[max(found.offsets[length][0], len(spec.prefix)) : end]
            notes.append(f"Text and chat template take {len(found.ids)} tokens; {length} are read.")
        used, padding = len(ids), [self._special_ids[spec.pad_token]] * (length - len(ids))
        ones, zeros = [1] * used, [0] * len(padding)
        on_left = spec.padding == "left"
        return EncodedPrompt(
            ids=torch.tensor([padding + ids if on_left else ids + padding], dtype=torch.int64),
            mask=torch.tensor([zeros + ones if on_left else ones + zeros], dtype=torch.int64),
            count=TokenCount(encoder=spec.title, used=used, limit=length, cut=cut),
            notes=tuple(notes),
        )

    def _check_special_tokens(self, spec: LanguageModelSpec) -> None:
        """Raises unless every special token of the template is one token of the vocabulary."""
        template = spec.prefix + spec.suffix
        needed = dict.fromkeys([spec.pad_token, *_SPECIAL_TOKEN.findall(template)])
        unknown = [token for token in needed if token not in self._special_ids]
        if unknown:
            raise CheckpointError(
                f"The tokenizer in {self.name} does not know {', '.join(unknown)}.",
                f"the tokenizer of {spec.title}.",
                _REINSTALL if spec.architecture == "qwen3" else _ALONGSIDE,
            )


def load_clip_tokenizer(path: Path) -> PromptTokenizer:
    """Loads CLIP's tokenizer from a folder with vocab.json and merges.txt; nothing is downloaded.

    Raises:
        CheckpointError: the folder or its files are missing or broken.
    """
    folder = _folder_with(path, _CLIP_FILES, CLIP_NAME)
    tokenizer = _read("CLIPTokenizer", folder, CLIP_NAME)
    # transformers 4 has CLIP twice, and the one that diffusers uses returns no offsets.
    spans = tokenizer if tokenizer.is_fast else _read("CLIPTokenizerFast", folder, CLIP_NAME)
    return PromptTokenizer(CLIP_NAME, tokenizer, spans)


def load_t5_tokenizer(path: Path) -> PromptTokenizer:
    """Loads T5's tokenizer from a tokenizer.json or spiece.model, or the folder that holds one.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    folder = _folder_with(path, _T5_FILES, T5_NAME)
    tokenizer = _read("T5TokenizerFast", folder, T5_NAME)
    return PromptTokenizer(T5_NAME, tokenizer, tokenizer)


def load_qwen_tokenizer(path: Path) -> ChatTokenizer:
    """Loads Qwen's tokenizer from a folder with vocab.json and merges.txt, or tokenizer.json.

    Raises:
        CheckpointError: the folder or its files are missing or broken.
    """
    folder = _folder_with(path, _QWEN_FILES, "Qwen3")
    tokenizer = _read("Qwen2TokenizerFast", folder, "Qwen3")
    return ChatTokenizer(folder.name, tokenizer.backend_tokenizer)


def load_mistral_tokenizer(source: bytes | SpelledVocabulary | Path) -> ChatTokenizer:
    """Loads Mistral's tokenizer.

    Args:
        source: the bytes of a tekken.json, a GGUF file's vocabulary, or a folder with
            tokenizer.json or tekken.json.

    Raises:
        CheckpointError: the folder or its files are missing or broken.
    """
    if not isinstance(source, Path):
        name = "tekken_model" if isinstance(source, bytes) else "the GGUF file"
        return ChatTokenizer(name, cast(_Backend, read_tekken(source)))
    folder = _folder_with(source, _MISTRAL_FILES, "Mistral", _ALONGSIDE)
    if (folder / "tokenizer.json").is_file():
        return ChatTokenizer(folder.name, _read_backend(folder / "tokenizer.json", "Mistral"))
    return load_mistral_tokenizer((folder / "tekken.json").read_bytes())


def _folder_with(
    path: Path, sets: tuple[tuple[str, ...], ...], name: str, fix: str = _REINSTALL
) -> Path:
    """Returns the folder of a tokenizer; raises unless it holds one of the sets of files."""
    folder = path.parent if path.is_file() else path
    if any(all((folder / file).is_file() for file in files) for files in sets):
        return folder
    files_there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    there = ", ".join(files_there[:5]) or "nothing"
    raise CheckpointError(
        f"The tokenizer folder of {name}, {folder.name}, holds {there}.",
        " or ".join(" and ".join(files) for files in sets) + ".",
        fix,
    )


def _read(kind: str, folder: Path, name: str) -> _Tokenizer:
    """Loads one of transformers' tokenizers from local files."""
    import transformers  # late: takes a second to import

    loader = cast("_Loader", getattr(transformers, kind))
    try:
        return loader.from_pretrained(os.fspath(folder), local_files_only=True)
    except Exception as error:  # the library's own error for a broken file has no type
        raise _unreadable(folder, name, error, _REINSTALL) from error


def _read_backend(file: Path, name: str) -> _Backend:
    """Loads a tokenizer.json as it is: transformers may replace the pattern that splits words."""
    from tokenizers import Tokenizer

    try:
        return cast(_Backend, Tokenizer.from_str(file.read_text(encoding="utf-8")))
    except Exception as error:  # the library's own error for a broken file has no type
        raise _unreadable(file.parent, name, error, _ALONGSIDE) from error


def _unreadable(folder: Path, name: str, error: Exception, fix: str) -> CheckpointError:
    return CheckpointError(
        f"The tokenizer of {name} in {folder.name} could not be read ({error}).",
        "the tokenizer files that belong to the text encoder.",
        fix,
    )


class _Loader(Protocol):
    def from_pretrained(self, path: str, *, local_files_only: bool) -> _Tokenizer: ...


def _check_encodable(prompt: str, name: str) -> None:
    """Raises if the prompt holds half a surrogate pair, which a broken client can send."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SettingError(
            f"The prompt for {name} holds half a character at position {error.start + 1}.",
            "valid Unicode.",
            "type [prompt] again.",
        ) from error
