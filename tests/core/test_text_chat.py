"""Chat templates: what is counted, what is cut, and vocabularies made to break the reader."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from glassbox.flux_core.errors import CheckpointError, SettingError
from glassbox.flux_core.text.tekken import read_tekken
from glassbox.flux_core.text.tokenizers import (
    ChatTokenizer,
    load_mistral_tokenizer,
    load_qwen_tokenizer,
)
from glassbox.tests.parity import text_language_samples as samples
from glassbox.tests.parity.text_language_samples import MISTRAL, PROMPTS, QWEN

LONG = "Red  STAR,\tThe Circle 🎨. " * 60


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_qwen_tokenizer(samples.write_qwen_tokenizer(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def mistral() -> ChatTokenizer:
    return load_mistral_tokenizer(samples.tekken())


def test_an_empty_prompt_counts_the_template(qwen: ChatTokenizer, mistral: ChatTokenizer) -> None:
    read = qwen.encode("", QWEN)
    assert (read.count.encoder, read.count.limit, read.count.cut) == ("Qwen3 4B", 512, "")
    assert read.count.used == int(read.mask.sum()) < 30
    assert read.notes == ()
    assert mistral.encode("", MISTRAL).count.used > 100  # the system message, byte by byte


def test_a_prompt_that_just_fits_is_not_cut(qwen: ChatTokenizer) -> None:
    empty = qwen.encode("", QWEN).count.used
    count = 64 - empty  # " star" is one token
    assert qwen.encode(" star" * count, QWEN, 64).count.cut == ""
    assert qwen.encode(" star" * count, QWEN, 64).notes == ()
    over = qwen.encode(" star" * (count + 1), QWEN, 64)
    assert over.count.cut == ""  # the template's end went, as in the published pipeline
    assert over.notes == ("Text and chat template take 65 tokens; 64 are read.",)


@pytest.mark.parametrize("length", [512, 300, 64, 40])
def test_cut_text_is_the_end_of_the_prompt_as_the_user_wrote_it(
    qwen: ChatTokenizer, mistral: ChatTokenizer, length: int
) -> None:
    for tokenizer, spec in ((qwen, QWEN), (mistral, MISTRAL)):
        read = tokenizer.encode(LONG, spec, length)
        assert read.count.used == read.count.limit == length
        assert read.count.cut
        assert LONG.endswith(read.count.cut)
        assert str(length) in read.notes[0]
        kept = LONG[: len(LONG) - len(read.count.cut)]
        shorter = tokenizer.encode(kept, spec, length)
        assert shorter.count.cut == ""
        if kept:  # only what the cut left is in the ids, and the template's end is not
            same = (shorter.ids == read.ids).long().cumprod(dim=1).sum()
            assert same >= length - 8


def test_a_template_longer_than_the_length_leaves_no_room(mistral: ChatTokenizer) -> None:
    read = mistral.encode("a red star", MISTRAL, 20)
    assert read.count.cut == "a red star"
    assert read.ids[0, 0] == 1
    assert read.mask.all()


def test_picture_marks_are_taken_out_and_said(mistral: ChatTokenizer, qwen: ChatTokenizer) -> None:
    read = mistral.encode("a [IMG]red[IMG] star", MISTRAL)
    assert read.ids.equal(mistral.encode("a red star", MISTRAL).ids)
    assert read.notes == ("[IMG] was taken out of the prompt: it stands for a picture.",)
    assert qwen.encode("a [IMG] star", QWEN).notes == ()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt_is_padded_to_its_length(
    qwen: ChatTokenizer, mistral: ChatTokenizer, prompt: str
) -> None:
    for tokenizer, spec in ((qwen, QWEN), (mistral, MISTRAL)):
        for length in (512, 30, 1):
            read = tokenizer.encode(prompt, spec, length)
            assert read.ids.shape == read.mask.shape == (1, length)
            assert int(read.mask.sum()) == read.count.used


def test_half_a_character_is_refused(qwen: ChatTokenizer) -> None:
    with pytest.raises(SettingError) as caught:
        qwen.encode("red \ud83c", QWEN)
    assert caught.value.settings == ("prompt",)


def test_tekken_gives_the_ids_of_the_published_converter(
    mistral: ChatTokenizer, tmp_path: Path
) -> None:
    published = samples.published_mistral_tokenizer(tmp_path)
    for prompt in (*PROMPTS, LONG, samples.SPLIT, MISTRAL.prefix):
        text = f"{MISTRAL.prefix}{prompt}{MISTRAL.suffix}"
        expected = published(text, add_special_tokens=False).input_ids
        ours = read_tekken(samples.tekken()).encode(text, add_special_tokens=False)
        assert list(ours.ids) == expected


def test_words_are_split_by_the_published_rule_whatever_tekken_names(tmp_path: Path) -> None:
    """FLUX.2's pipelines read the tokenizer.json, where "eBay" is one word."""
    data = json.loads(samples.tekken())
    data["config"]["pattern"] = "."
    other = load_mistral_tokenizer(json.dumps(data).encode())
    ours = load_mistral_tokenizer(samples.tekken())
    assert other.encode("the eBay star", MISTRAL).ids.equal(
        ours.encode("the eBay star", MISTRAL).ids
    )


def broken(**changes: Any) -> bytes:
    return json.dumps(json.loads(samples.tekken()) | changes).encode()


def _word(token: bytes, rank: object) -> dict[str, object]:
    return {"rank": rank, "token_bytes": base64.b64encode(token).decode()}


BYTES = [_word(bytes([byte]), byte) for byte in range(256)]
BROKEN = {
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "no table": b"[1, 2]",
    "deep": b"[" * 100_000,
    "no config": b"{}",
    "config": broken(config=[]),
    "no words": broken(vocab=[]),
    "a byte missing": broken(vocab=BYTES[1:]),
    "one id twice": broken(vocab=[*BYTES, _word(b"ab", 0)]),
    "rank is text": broken(vocab=[*BYTES, _word(b"ab", "256")]),
    "negative rank": broken(vocab=[*BYTES, _word(b"ab", -1)]),
    "token is a number": broken(vocab=[*BYTES, {"rank": 256, "token_bytes": 3}]),
    "token is no base64": broken(vocab=[*BYTES, {"rank": 256, "token_bytes": "é"}]),
    "endless token": broken(vocab=[*BYTES, _word(b"a" * (1 << 20), 256)]),
    "endless merges": broken(
        vocab=[*BYTES, *(_word(b"a" * length, 254 + length) for length in range(2, 1200))],
        config={},
    ),
    "half a character": broken(special_tokens=[{"rank": 0, "token_str": "\ud800"}]),
    "special without rank": broken(special_tokens=[{"token_str": "<s>"}]),
    "special beyond": broken(special_tokens=[{"rank": 10**9, "token_str": "<s>"}]),
    "special twice": broken(
        special_tokens=[{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "<s>"}]
    ),
    "huge count": broken(config={"default_num_special_tokens": 10**12}),
    "huge size": broken(config={"default_vocab_size": 10**12}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_vocabulary_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_mistral_tokenizer(BROKEN[name])
    assert caught.value.settings == ("text encoder loader",)
    assert len(str(caught.value)) < 700


def test_a_vocabulary_without_the_special_tokens_of_the_template_is_refused() -> None:
    tokenizer = load_mistral_tokenizer(broken(special_tokens=[{"rank": 0, "token_str": "<s>"}]))
    with pytest.raises(CheckpointError, match=r"does not know <pad>, \[SYSTEM_PROMPT\]") as caught:
        tokenizer.encode("a red star", MISTRAL)
    assert "Mistral Small 3.2 24B" in caught.value.needed
    assert caught.value.settings == ("text encoder loader",)


@pytest.mark.parametrize("text", ["{not json", "{}", "[]", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError):
        load_mistral_tokenizer(tmp_path)
    with pytest.raises(CheckpointError):
        load_qwen_tokenizer(tmp_path)


def test_a_tokenizer_file_with_its_own_padding_and_length_is_read_without_them(
    mistral: ChatTokenizer, tmp_path: Path
) -> None:
    tokenizer = read_tekken(samples.tekken())
    tokenizer.enable_padding(length=700)
    tokenizer.enable_truncation(16)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    other = load_mistral_tokenizer(tmp_path)
    for prompt in PROMPTS:
        assert other.encode(prompt, MISTRAL).ids.equal(mistral.encode(prompt, MISTRAL).ids)
