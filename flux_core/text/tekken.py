"""Mistral's tekken vocabulary → a tokenizer; ComfyUI's and GGUF files carry it.

Source: huggingface/transformers integrations/mistral/tokenizer.py MistralConverter for the
vocabulary and its merges.

Deviation: words are split as the published pipelines of FLUX.2 [dev] split them, by the rule of
Mistral Small 3.1's tokenizer.json, and not by the one tekken names: the two differ where capitals
follow small letters.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ..errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_BYTES = 64 << 20  # of the file; Mistral Small's has 15 MB
_MOST_TOKENS = 1 << 18
# The sum of all tokens' squared lengths, which is what finding their merges costs in bytes: one
# token of 16 KB, or all of Mistral Small's 131,072 at 45 bytes, where they have 7 on average.
_MOST_SQUARED_BYTES = 256 << 20
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_Table = Mapping[str, object]
_WORD, _UNUSED = 1, 5  # kinds of tokens, as GGUF counts them


@dataclass(frozen=True, slots=True)
class SpelledVocabulary:
    """The same vocabulary as GGUF files have it, by id.

    Source: ggml-org/llama.cpp gguf-py constants.py TokenType.
    """

    words: Sequence[str]  # one letter for each byte; special tokens as they are
    kinds: Sequence[int]


def read_tekken(source: bytes | SpelledVocabulary) -> "Tokenizer":
    """Make a tokenizer from the text of a tekken.json, or from what a GGUF file has of it.

    Raises:
        CheckpointError: it is something else, or larger than any vocabulary.
    """
    try:
        special, tokens = _parse(source) if isinstance(source, bytes) else _spelled(source)
        _check(special, tokens)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(str(error) or type(error).__name__) from None
    return _build(special, tokens)


def _parse(data: bytes) -> tuple[list[str], dict[bytes, int]]:
    """Give the special tokens in order of their ids, and the others with their ids."""
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
    """Give the same of a GGUF's lists; special tokens come first, and unused ones are none."""
    words, kinds = source.words, source.kinds
    if len(words) != len(kinds) or len(words) > _MOST_TOKENS:
        raise ValueError(f"it lists {len(words):,} tokens and {len(kinds):,} kinds of them")
    reserved = next((place for place, kind in enumerate(kinds) if kind == _WORD), len(kinds))
    bytes_of = {letter: byte for byte, letter in enumerate(_letters())}
    tokens: dict[bytes, int] = {}
    for number in range(reserved, len(words)):
        if kinds[number] == _WORD:
            token = bytes(bytes_of[letter] for letter in words[number])
            if token in tokens:
                raise ValueError("two of its tokens are the same")
            tokens[token] = number
        elif kinds[number] != _UNUSED:
            raise ValueError("its special tokens do not come first")
    return list(words[:reserved]), tokens


def _check(special: Sequence[str], tokens: Mapping[bytes, int]) -> None:
    """Refuse what would name two tokens alike, take for ever, or not know some letter."""
    if len(set(special)) != len(special):
        raise ValueError("two of its special tokens are the same")
    squared = sum(len(token) ** 2 for token in tokens)
    if len(set(tokens.values())) != len(tokens) or squared > _MOST_SQUARED_BYTES:
        raise ValueError("two of its tokens have one id, or they are longer than any text's")
    if any(bytes([byte]) not in tokens for byte in range(256)):
        raise ValueError("it has no token for some byte")


def _build(special: Sequence[str], tokens: Mapping[bytes, int]) -> "Tokenizer":
    """Assemble the byte-level BPE; a word that is a token is taken whole."""
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
    """List every pair of tokens that makes a third, in the order they are tried."""
    merges: list[tuple[int, int, int, bytes, bytes]] = []
    for token, number in tokens.items():
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            if left in tokens and right in tokens:
                merges.append((number, tokens[left], tokens[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _letters() -> list[str]:
    """Give the letter that stands for each byte, as in every byte-level BPE.

    Printable bytes stand for themselves; the others follow behind the last byte, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(0x100)]


def _text(entry: _Table) -> str:
    said = entry.get("token_str")
    given = (
        said.encode()
        if isinstance(said, str)
        else base64.b64decode(cast(str, entry["token_bytes"]))
    )
    return given.decode()


def _number(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError("one of its numbers is none")
    return value


def _broken(reason: str) -> CheckpointError:
    return CheckpointError(
        f"The tokenizer of Mistral could not be read ({reason[:200]}).",
        "the tekken vocabulary of Mistral Small 3, as in ComfyUI's mistral_3_small_flux2 files.",
        "choose or download the file again in 'Load Text Encoders (FLUX)'.",
    )
