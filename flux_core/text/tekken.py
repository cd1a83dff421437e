"""Mistral's tekken vocabulary, as ComfyUI's and GGUF files hold it, to a tokenizer.

Source: huggingface/transformers integrations/mistral/tokenizer.py MistralConverter for the
vocabulary and its merges.

Deviation: words are split by the pattern of Mistral Small 3.1's tokenizer.json, which the published
pipelines of FLUX.2 [dev] use, not by the one in tekken: the two differ where capitals follow small
letters.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ..errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_BYTES = 64 << 20  # of the file; Mistral Small's is 15 MB
_MOST_TOKENS = 1 << 18
# The sum of all tokens' squared lengths, which is what finding their merges costs in bytes: one
# token of 16 KB, or all of Mistral Small's 131,072 at 45 bytes, where they have 7 on average.
_MOST_SQUARED_BYTES = 256 << 20
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_Table = Mapping[str, object]
_NORMAL, _UNUSED = 1, 5  # GGUF's token types


@dataclass(frozen=True, slots=True)
class SpelledVocabulary:
    """The same vocabulary as GGUF files hold it, in order of the ids.

    Source: ggml-org/llama.cpp gguf-py constants.py TokenType.
    """

    words: Sequence[str]  # one letter for each byte; special tokens as they are
    kinds: Sequence[int]


def read_tekken(source: bytes | SpelledVocabulary) -> "Tokenizer":
    """Returns a tokenizer of a tekken.json's bytes, or of a GGUF file's vocabulary.

    Raises:
        CheckpointError: it is no such vocabulary, or larger than any.
    """
    try:
        special, tokens = _parse(source) if isinstance(source, bytes) else _spelled(source)
        _check(special, tokens)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(str(error) or type(error).__name__) from None
    return _build(special, tokens)


def _parse(data: bytes) -> tuple[list[str], dict[bytes, int]]:
    """Returns the special tokens in order of their ids, and the ids of all others."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data):,} bytes, where {MOST_BYTES:,} are the most")
    root = cast(_Table, json.loads(data))
    config = cast(_Table, root["config"])
    listed = cast(Sequence[_Table], root["special_tokens"])
    entries = cast(Sequence[_Table], root["vocab"])
    reserved = _number(config.get("default_num_special_tokens", len(listed)))
    size = _number(config.get("default_vocab_size", reserved + len(entries)))
    if max(reserved, len(listed), size) > _MOST_TOKENS:
        raise ValueError(f"it lists more than {_MOST_TOKENS:,} tokens")
    special = [f"<SPECIAL_{number}>" for number in range(reserved)]
    for entry in listed:
        special[_number(entry["rank"])] = _text(entry)
    tokens: dict[bytes, int] = {}
    for entry in entries:
        rank = _number(entry["rank"])
        if rank < size - reserved:
            tokens[base64.b64decode(cast(str, entry["token_bytes"]))] = rank + reserved
    return special, tokens


def _spelled(source: SpelledVocabulary) -> tuple[list[str], dict[bytes, int]]:
    """Returns the same from GGUF's lists; special tokens come first, unused ones are skipped."""
    words, kinds = source.words, source.kinds
    if len(words) != len(kinds) or len(words) > _MOST_TOKENS:
        raise ValueError(f"it lists {len(words):,} tokens and {len(kinds):,} kinds of them")
    reserved = next((index for index, kind in enumerate(kinds) if kind == _NORMAL), len(kinds))
    bytes_of = {letter: byte for byte, letter in enumerate(_letters())}
    tokens: dict[bytes, int] = {}
    for number in range(reserved, len(words)):
        if kinds[number] == _NORMAL:
            token = bytes(bytes_of[letter] for letter in words[number])
            if token in tokens:
                raise ValueError("two of its tokens are the same")
            tokens[token] = number
        elif kinds[number] != _UNUSED:
            raise ValueError("its special tokens do not come first")
    return list(words[:reserved]), tokens


def _check(special: Sequence[str], tokens: Mapping[bytes, int]) -> None:
    """Raises if two tokens are the same, merges would take forever, or a byte has no token."""
    if len(set(special)) != len(special):
        raise ValueError("two of its special tokens are the same")
    squared = sum(len(token) ** 2 for token in tokens)
    if len(set(tokens.values())) != len(tokens) or squared > _MOST_SQUARED_BYTES:
        raise ValueError("two of its tokens have one id, or they are longer than any text's")
    if any(bytes([byte]) not in tokens for byte in range(256)):
        raise ValueError("it has no token for some byte")


def _build(special: Sequence[str], tokens: Mapping[bytes, int]) -> "Tokenizer":
    """Assembles the byte-level BPE; a word that is itself a token is not merged."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in tokens}
    vocabulary = {spelled[token]: number for token, number in tokens.items()}
    vocabulary |= {token: number for number, token in enumerate(special)}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(tokens)]
    model = BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True)
    tokenizer = Tokenizer(model)
    words = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    return tokenizer


def _merges(tokens: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns every pair of tokens that makes a third, in the order of their priority."""
    merges: list[tuple[int, int, int, bytes, bytes]] = []
    for token, number in tokens.items():
        for middle in range(1, len(token)):
            left, right = token[:middle], token[middle:]
            if left in tokens and right in tokens:
                merges.append((number, tokens[left], tokens[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _letters() -> list[str]:
    """Returns the character that stands for each byte, as in every byte-level BPE.

    Printable bytes stand for themselves; the others get the code points after 0xFF, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(0x100)]


def _text(entry: _Table) -> str:
    text = entry.get("token_str")
    if isinstance(text, str):
        return text.encode().decode()  # raises for half a character
    return base64.b64decode(cast(str, entry["token_bytes"])).decode()


def _number(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError("one of its numbers is not a number, or negative")
    return value


def _broken(reason: str) -> CheckpointError:
    return CheckpointError(
        f"The tokenizer of Mistral could not be read ({reason[:200]}).",
        "the tekken vocabulary of Mistral Small 3, as in ComfyUI's mistral_3_small_flux2 files.",
        "choose or download the file again with [text encoder loader].",
    )
