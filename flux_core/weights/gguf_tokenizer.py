"""Mistral's tokenizer out of a GGUF file; Qwen3's and T5's come from elsewhere."""

from ..text.tekken import SpelledVocabulary
from ..text.tokenizers import ChatTokenizer, load_mistral_tokenizer
from .files import Checkpoint
from .gguf_header import read_gguf_header

_WORDS, _KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
# What Mistral's vocabulary is called there: a byte-level BPE, split as tekken splits.
_SAID = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}


def carries_tekken(checkpoint: Checkpoint) -> bool:
    """Tell whether a file says that it carries Mistral's vocabulary."""
    says = checkpoint.metadata
    return bool(checkpoint.gguf) and all(says.get(key) == value for key, value in _SAID.items())


def load_gguf_tokenizer(checkpoint: Checkpoint) -> ChatTokenizer:
    """Read the tokenizer of a GGUF file that carries Mistral's vocabulary.

    Its merges are not read: they follow from the order of the tokens, as in tekken.json.

    Raises:
        CheckpointError: it is missing or broken, or the file changed since it was opened.
    """
    header = read_gguf_header(checkpoint.files[0], keep=(_WORDS, _KINDS))
    words, kinds = header.words.get(_WORDS, ()), header.numbers.get(_KINDS, ())
    return load_mistral_tokenizer(SpelledVocabulary(words, kinds))
