"""Prompt → token ids, and what of the prompt did not fit.

Source: huggingface/diffusers@0.42.1 pipelines/flux/pipeline_flux.py `_get_clip_prompt_embeds`,
`_get_t5_prompt_embeds`: the same tokenizer classes, padding and truncation.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from ..errors import CheckpointError, SettingError
from ..values import TokenCount

CLIP_NAME = "CLIP-L"
T5_NAME = "T5"
_CLIP_FILES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
_T5_FILES = (("tokenizer.json",), ("spiece.model",))
_REINSTALL = "Install the pack (or ComfyUI, which brings the tokenizers of FLUX.1) again."
_SPECIAL_MARKS = {CLIP_NAME: 2, T5_NAME: 1}  # begin and end; end


class _Batch(Protocol):
    input_ids: Sequence[int]
    offset_mapping: Sequence[tuple[int, int]]


class _Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    is_fast: bool
    eos_token_id: int

    def __call__(self, text: str, **options: object) -> _Batch: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as one encoder reads it."""

    ids: Tensor  # (1, length) int64, padded
    count: TokenCount


class PromptTokenizer:
    """The tokenizer of one text encoder.

    Args:
        name: the encoder's name in counts and errors, CLIP_NAME or T5_NAME.
        tokenizer: the one whose ids the encoder was trained on.
        spans: one that also knows which characters each token stands for.
    """

    def __init__(self, name: str, tokenizer: _Tokenizer, spans: _Tokenizer) -> None:
        self.name = name
        self.end_id = tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self._spans = spans

    def encode(self, prompt: str, length: int) -> EncodedPrompt:
        """Tokenise, cut to the length, pad to it.

        Args:
            prompt: any text, also empty.
            length: tokens, begin and end marks included; at least those marks.

        Raises:
            SettingError: the prompt holds characters that no encoding of text knows.
        """
        _check_encodable(prompt, self.name)
        padded = self._tokenizer(prompt, padding="max_length", max_length=length, truncation=True)
        words = self._tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        room = length - _SPECIAL_MARKS[self.name]
        used = min(len(words), room) + _SPECIAL_MARKS[self.name]
        cut = self._cut(prompt, words, room) if len(words) > room else ""
        return EncodedPrompt(
            ids=torch.tensor([padded.input_ids], dtype=torch.int64),
            count=TokenCount(encoder=self.name, used=used, limit=length, cut=cut),
        )

    def _cut(self, prompt: str, words: Sequence[int], room: int) -> str:
        """Give the end of the prompt from the first token that did not fit."""
        if self._spans.is_fast:
            found = self._spans(
                prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            if found.input_ids == words:
                return prompt[found.offset_mapping[room][0] :]
        return self._tokenizer.decode(words[room:])


def load_clip_tokenizer(path: Path) -> PromptTokenizer:
    """Read CLIP's tokenizer from a folder with vocab.json and merges.txt; nothing is downloaded.

    Raises:
        CheckpointError: the folder or its files are not there, or are broken.
    """
    folder = _folder_with(path, _CLIP_FILES, CLIP_NAME)
    tokenizer = _read("CLIPTokenizer", folder, CLIP_NAME)
    # transformers 4 has CLIP twice, and the one diffusers uses cannot say where tokens come from.
    spans = tokenizer if tokenizer.is_fast else _read("CLIPTokenizerFast", folder, CLIP_NAME)
    return PromptTokenizer(CLIP_NAME, tokenizer, spans)


def load_t5_tokenizer(path: Path) -> PromptTokenizer:
    """Read T5's tokenizer from a tokenizer.json or spiece.model, or the folder that holds one.

    Raises:
        CheckpointError: the file is not there, or is broken.
    """
    folder = _folder_with(path, _T5_FILES, T5_NAME)
    tokenizer = _read("T5TokenizerFast", folder, T5_NAME)
    return PromptTokenizer(T5_NAME, tokenizer, tokenizer)


def _folder_with(path: Path, sets: tuple[tuple[str, ...], ...], name: str) -> Path:
    """Find the folder of a tokenizer, and see that one of the sets of files is in it."""
    folder = path.parent if path.is_file() else path
    if any(all((folder / file).is_file() for file in files) for files in sets):
        return folder
    files_there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    there = ", ".join(files_there[:5]) or "nothing"
    raise CheckpointError(
        f"The tokenizer folder of {name}, {folder.name}, holds {there}.",
        " or ".join(" and ".join(files) for files in sets) + ".",
        _REINSTALL,
    )


def _read(kind: str, folder: Path, name: str) -> _Tokenizer:
    """Load one of transformers' tokenizers from local files."""
    import transformers  # late: takes a second to import

    loader = cast("_Loader", getattr(transformers, kind))
    try:
        for file in folder.glob("*.json"):
            json.loads(file.read_bytes())  # the library's own error for this has no type
        return loader.from_pretrained(os.fspath(folder), local_files_only=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"The tokenizer of {name} in {folder.name} could not be read ({error}).",
            "the tokenizer files that belong to the text encoder.",
            _REINSTALL,
        ) from error


class _Loader(Protocol):
    def from_pretrained(self, path: str, *, local_files_only: bool) -> _Tokenizer: ...


def _check_encodable(prompt: str, name: str) -> None:
    """Refuse halves of a surrogate pair, which a broken client can send."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SettingError(
            f"The prompt for {name} holds half a character at place {error.start + 1}.",
            "text that is valid Unicode.",
            "Type the prompt of 'Encode Text (FLUX)' again.",
        ) from error
