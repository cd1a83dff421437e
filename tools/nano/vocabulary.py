"""The tokenizers of the nano models: sentencepiece for T5, byte-pair merges for CLIP and Qwen.

Each word of `wording.py` is one token. `write_tokenizers` writes them into flux_core/nano/, in the
formats of the published tokenizers.
"""

import io
import json
from collections import Counter
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...flux_core.nano.paths import CLIP_TOKENIZER, QWEN_TOKENIZER, T5_TOKENIZER
from .wording import PUNCTUATION, vocabulary
from .world import COLOURS, KINDS

_END_OF_WORD = "</w>"
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"
QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_SPACE, _NEW_LINE = "Ġ", "Ċ"  # the byte symbols of a space and a new line


_T5_CONFIG: dict[str, object] = {
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "extra_ids": 0,
    "additional_special_tokens": [],
    "model_max_length": 512,
    "tokenizer_class": "T5Tokenizer",
}


def words() -> list[str]:
    """Returns every word that is one token."""
    return vocabulary([*KINDS, *COLOURS])


def write_tokenizers(
    clip: Path = CLIP_TOKENIZER, t5: Path = T5_TOKENIZER, qwen: Path = QWEN_TOKENIZER
) -> None:
    """Writes the tokenizers into their folders."""
    for folder, write in ((clip, _write_clip), (t5, _write_t5), (qwen, _write_qwen)):
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)


def learn_merges(spelled: list[list[str]]) -> list[tuple[str, str]]:
    """Returns byte-pair merges that make one token of every word, given as its symbols."""
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for symbols in spelled for pair in pairwise(symbols))
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _byte_symbols() -> list[str]:
    """Returns the printable symbols of the 256 bytes, in the order of the published vocabulary.

    Source: openai/CLIP simple_tokenizer.py bytes_to_unicode.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    moved = [256 + index for index in range(256 - len(plain))]
    return [chr(code) for code in (*plain, *moved)]


def _write_clip(folder: Path) -> None:
    known = [word for word in words() if len(word) > 1]
    merges = learn_merges([[*word[:-1], word[-1] + _END_OF_WORD] for word in known])
    symbols = _byte_symbols()
    tokens = [
        *symbols,
        *(symbol + _END_OF_WORD for symbol in symbols),
        *("".join(pair) for pair in merges),
        CLIP_BEGIN,
        CLIP_END,
    ]
    ids = {token: index for index, token in enumerate(tokens)}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    _write(folder / "vocab.json", json.dumps(ids, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(lines))
    config = {
        "bos_token": CLIP_BEGIN,
        "eos_token": CLIP_END,
        "pad_token": CLIP_END,
        "unk_token": CLIP_END,
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=1))


def _write_qwen(folder: Path) -> None:
    """Writes a byte-level vocabulary, whose words begin with their space, and its merges."""
    known = [*vocabulary([*KINDS, *COLOURS], two_images=True), "user", "assistant"]
    merges = learn_merges([list(word) for word in known] + [[_NEW_LINE] * 2])
    merges += [(_SPACE, word) for word in known]
    tokens = dict.fromkeys([*_byte_symbols(), *("".join(pair) for pair in merges)])
    ids = {token: index for index, token in enumerate(tokens)}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    _write(folder / "vocab.json", json.dumps(ids, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(lines))
    marks = {
        str(len(ids) + index): {
            "content": mark,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": not mark.endswith("think>"),
        }
        for index, mark in enumerate(QWEN_MARKS)
    }
    config = {
        "added_tokens_decoder": marks,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 512,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=1))


def _write_t5(folder: Path) -> None:
    """Writes spiece.model, lower-casing, and the tokenizer.json that transformers makes of it."""
    # imported late and untyped: needed to write files only
    sentencepiece: Any = import_module("sentencepiece")
    transformers: Any = import_module("transformers")
    layout: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # for its normaliser: the pieces are replaced
        sentence_iterator=iter([" ".join(words())] * 4),
        model_writer=trained,
        vocab_size=40,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc_cf",
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    model: Any = layout.ModelProto()
    model.ParseFromString(trained.getvalue())
    # kinds of pieces: 1 normal, 2 unknown, 3 control
    pieces: list[tuple[str, int, float]] = [("<pad>", 3, 0.0), ("</s>", 3, 0.0), ("<unk>", 2, 0.0)]
    pieces += [(f"▁{word}", 1, -1.0) for word in words()]
    pieces += [(mark, 1, -2.0) for mark in PUNCTUATION]
    pieces += [("▁", 1, -8.0)]
    del model.pieces[:]
    for text, kind, score in pieces:
        model.pieces.add(piece=text, type=kind, score=score)
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.ClearField("input")
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    tokenizer = transformers.T5TokenizerFast.from_pretrained(
        folder, extra_ids=0, local_files_only=True
    )
    tokenizer.save_pretrained(folder)
    # Written again: transformers 4 cannot read what transformers 5 saves.
    _write(folder / "tokenizer_config.json", json.dumps(_T5_CONFIG, indent=1))


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
