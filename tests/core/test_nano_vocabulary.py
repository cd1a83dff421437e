"""The nano tokenizers: made from the world's words, read by the text encoders' own loader."""

import random
from pathlib import Path

import pytest

from glassbox.flux_core.families import NANO_KONTEXT
from glassbox.flux_core.nano.paths import CLIP_TOKENIZER, T5_TOKENIZER
from glassbox.flux_core.text.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from glassbox.tools.nano.vocabulary import words, write_tokenizers
from glassbox.tools.nano.wording import add_fillers
from glassbox.tools.nano.world import EDITS, random_edit


def test_every_word_is_one_token_of_both() -> None:
    clip, t5 = load_clip_tokenizer(CLIP_TOKENIZER), load_t5_tokenizer(T5_TOKENIZER)
    for word in words():
        assert clip.encode(word, 20).count.used == 3  # begin, word, end
        assert t5.encode(word, 20).count.used == 2


@pytest.mark.parametrize("action", [*EDITS, "caption"])
def test_every_sentence_fits(action: str) -> None:
    clip, t5 = load_clip_tokenizer(CLIP_TOKENIZER), load_t5_tokenizer(T5_TOKENIZER)
    rng, text = random.Random(action), NANO_KONTEXT.text
    for _ in range(50):
        sentence = random_edit(action, 2, rng, held_out=False).text
        assert not t5.encode(sentence, text.t5_tokens).count.cut
        assert t5._tokenizer.unk_token_id not in t5.encode(sentence, text.t5_tokens).ids
        if action != "caption":
            instruction = add_fillers(sentence, rng)
            assert not clip.encode(instruction, text.clip_tokens).count.cut


def test_capital_letters_do_not_matter() -> None:
    for tokenizer in (load_clip_tokenizer(CLIP_TOKENIZER), load_t5_tokenizer(T5_TOKENIZER)):
        low = tokenizer.encode("make the circle red", 20).ids
        assert tokenizer.encode("Make the CIRCLE Red", 20).ids.equal(low)


def test_the_committed_files_are_those_the_words_give(tmp_path: Path) -> None:
    write_tokenizers(tmp_path / "clip", tmp_path / "t5")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "clip" / name).read_bytes() == (CLIP_TOKENIZER / name).read_bytes()
    clip = "make the red circle blue, please"
    made = load_t5_tokenizer(tmp_path / "t5").encode(clip, 20).ids
    assert made.equal(load_t5_tokenizer(T5_TOKENIZER).encode(clip, 20).ids)
