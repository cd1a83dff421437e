"""Text encoders in GGUF files, as llama.cpp's converter writes them, and what they stand for.

The names come from the gguf library's own table; the order of Mistral's rows from what llama.cpp
turns together.
"""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import torch
from gguf import MODEL_ARCH
from torch import Tensor

from glassbox.flux_core.text.tekken import read_tekken
from glassbox.tests.core.quantised_files import State, gguf_bytes, text, write_bytes
from glassbox.tests.core.test_weights_gguf import Entries, Kind, by_hand
from glassbox.tests.parity import text_language_samples as samples
from glassbox.tests.parity.text_language_samples import LanguageKit

ARCHITECTURES = {
    "t5": MODEL_ARCH.T5,
    "t5encoder": MODEL_ARCH.T5ENCODER,
    "qwen3": MODEL_ARCH.QWEN3,
    "llama": MODEL_ARCH.LLAMA,
    "mistral3": MODEL_ARCH.MISTRAL3,
}
INTERLEAVED = ("llama", "mistral3")
HEAD = 8  # rows of one head of the tiny models
CONTROL, WORD, UNUSED = 3, 1, 5


def entries_of(
    state: State, architecture: str, kind: str, head: int = HEAD
) -> tuple[Entries, State]:
    """A file's tensors under llama.cpp's names, and what they stand for under transformers'.

    Args:
        kind: of the matrices: "Q8_0", "Q4_0", "F16", "BF16" or "F32"; the rest is float32.
    """
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], 64)
    entries: Entries = {}
    plain: State = {}
    for key, tensor in state.items():
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None, key
        rows = order(len(tensor), head)
        is_turned = architecture in INTERLEAVED and (".q_proj." in key or ".k_proj." in key)
        stored = tensor[rows] if is_turned else tensor
        form, data, made = packed(stored, kind)
        entries[name] = (Kind[form].value, tuple(tensor.shape), data)
        plain[key] = made
        if is_turned:
            plain[key] = torch.empty_like(made)
            plain[key][rows] = made
    return entries, plain


def packed(tensor: Tensor, kind: str) -> tuple[str, bytes, Tensor]:
    """How a tensor is stored, its bytes, and what they stand for."""
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    if tensor.ndim == 2 and kind not in dtypes and tensor.shape[1] % 32 == 0:
        return kind, *by_hand(kind, tensor)
    form = kind if tensor.ndim == 2 and kind in dtypes else "F32"
    stored = tensor.to(dtypes[form]).contiguous()
    return form, stored.view(torch.uint8).numpy().tobytes(), stored.float()


def order(rows: int, head: int) -> list[int]:
    """Where each row of llama.cpp's stands in transformers': neighbours are turned together."""
    half = head // 2
    return [
        first + pair + side * half
        for first in range(0, rows, head)
        for pair in range(half)
        for side in range(2)
    ]


def said(key: str, words: str) -> bytes:
    return text(key) + struct.pack("<I", 8) + text(words)


def listed(key: str, words: Sequence[str]) -> bytes:
    return text(key) + struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(text, words))


def numbered(key: str, numbers: Sequence[int]) -> bytes:
    return text(key) + struct.pack(f"<IIQ{len(numbers)}i", 9, 5, len(numbers), *numbers)


def gguf_file(
    path: Path, entries: Mapping[str, tuple[int, tuple[int, ...], bytes]], *metadata: bytes
) -> Path:
    return write_bytes(path, gguf_bytes(entries, b"".join(metadata), len(metadata)))


def vocabulary() -> tuple[list[str], list[int]]:
    """The words of the tiny tekken as a GGUF file has them, and an unused one at the end."""
    by_word = read_tekken(samples.tekken()).get_vocab()
    words = sorted(by_word, key=lambda word: by_word[word])
    kinds = [CONTROL] * samples.RESERVED + [WORD] * (len(words) - samples.RESERVED)
    return [*words, "[PAD]"], [*kinds, UNUSED]


def tokenizer(words: Sequence[str], kinds: Sequence[int]) -> list[bytes]:
    return [
        said("tokenizer.ggml.model", "gpt2"),
        said("tokenizer.ggml.pre", "tekken"),
        listed("tokenizer.ggml.tokens", words),
        numbered("tokenizer.ggml.token_type", kinds),
    ]


def language_file(
    kit: LanguageKit, architecture: str, kind: str, path: Path, *metadata: bytes
) -> tuple[Path, State]:
    state = {"model." + key: one for key, one in kit.state.items()}
    entries, plain = entries_of(state, architecture, kind)
    file = gguf_file(path, entries, said("general.architecture", architecture), *metadata)
    return file, {key.removeprefix("model."): one for key, one in plain.items()}
