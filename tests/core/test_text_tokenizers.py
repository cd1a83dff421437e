"""Counting tokens, and the end of a prompt that did not fit."""

from pathlib import Path

import pytest

from glassbox.flux_core.errors import CheckpointError, SettingError
from glassbox.flux_core.text.tokenizers import (
    PromptTokenizer,
    load_clip_tokenizer,
    load_t5_tokenizer,
)
from glassbox.tests.parity import text_samples as samples


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    return load_clip_tokenizer(samples.write_clip_tokenizer(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    return load_t5_tokenizer(samples.write_t5_tokenizer(tmp_path_factory.mktemp("t5")))


def test_an_empty_prompt_counts_its_marks_only(clip: PromptTokenizer, t5: PromptTokenizer) -> None:
    count = clip.encode("", 77).count
    assert (count.encoder, count.used, count.limit, count.cut) == ("CLIP-L", 2, 77, "")
    count = t5.encode("", 512).count
    assert (count.encoder, count.used, count.limit, count.cut) == ("T5", 1, 512, "")


def test_a_word_of_the_vocabulary_is_one_token(clip: PromptTokenizer) -> None:
    assert clip.encode("make the circle red", 77).count.used == 4 + 2


def test_a_prompt_that_just_fits_is_not_cut(clip: PromptTokenizer) -> None:
    assert clip.encode("star " * 75, 77).count.cut == ""
    assert clip.encode("star " * 75, 77).count.used == 77
    assert clip.encode("star " * 76, 77).count.cut == "star "


def test_cut_text_is_the_end_of_the_prompt_as_the_user_wrote_it(
    clip: PromptTokenizer, t5: PromptTokenizer
) -> None:
    prompt = "Red  STAR,\tThe Circle. " * 218  # 5,014 characters
    assert len(prompt) >= 5000
    for tokenizer, length in ((clip, 77), (t5, 512), (t5, 256), (t5, 1), (clip, 2)):
        count = tokenizer.encode(prompt, length).count
        assert count.used == count.limit == length
        assert count.cut
        assert prompt.endswith(count.cut)
        kept = prompt[: len(prompt) - len(count.cut)]
        assert tokenizer.encode(kept, length).count.cut == ""
        # T5 may still take the mark before a word, and not the word.
        assert length - tokenizer.encode(kept, 10_000).count.used in (0, 1)


def test_cut_text_keeps_a_character_of_many_tokens_whole(clip: PromptTokenizer) -> None:
    """One emoji is several byte tokens; when some of them do not fit, all of it is cut."""
    prompt = "red 🎨🎨🎨 end"
    for length in range(3, 16):
        cut = clip.encode(prompt, length).count.cut
        assert prompt.endswith(cut)
        cut.encode("utf-8")


@pytest.mark.parametrize("prompt", samples.PROMPTS)
def test_every_prompt_is_padded_to_its_length(
    clip: PromptTokenizer, t5: PromptTokenizer, prompt: str
) -> None:
    for tokenizer, length in ((clip, 77), (t5, 512), (t5, 3)):
        encoded = tokenizer.encode(prompt, length)
        assert encoded.ids.shape == (1, length)
        assert 1 <= encoded.count.used <= length
        assert prompt.endswith(encoded.count.cut)


def test_tokens_after_the_counted_ones_are_padding(t5: PromptTokenizer) -> None:
    encoded = t5.encode("remove the blue square", 64)
    assert encoded.ids[0, encoded.count.used - 1] == t5.end_id
    assert not encoded.ids[0, encoded.count.used :].any()


def test_half_a_character_is_refused(clip: PromptTokenizer) -> None:
    with pytest.raises(SettingError, match="half a character at position 5") as caught:
        clip.encode("red \ud83c", 77)
    assert caught.value.settings == ("prompt",)


def test_tokenizer_files_give_the_same_ids_in_either_form(
    t5: PromptTokenizer, tmp_path: Path
) -> None:
    """spiece.model as published by Google, tokenizer.json as shipped with ComfyUI."""
    import transformers

    samples.write_t5_tokenizer(tmp_path / "spm")
    published = transformers.T5TokenizerFast.from_pretrained(str(tmp_path / "spm"))
    published.save_pretrained(tmp_path / "json")
    (tmp_path / "json" / "spiece.model").unlink(missing_ok=True)
    other = load_t5_tokenizer(tmp_path / "json" / "tokenizer.json")
    for prompt in samples.PROMPTS:
        assert other.encode(prompt, 100).ids.equal(t5.encode(prompt, 100).ids)
        assert other.encode(prompt, 100).count == t5.encode(prompt, 100).count


def test_a_folder_without_tokenizer_files_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds vocab\.json") as caught:
        load_clip_tokenizer(tmp_path)
    assert "merges.txt" in str(caught.value)
    with pytest.raises(CheckpointError):
        load_t5_tokenizer(tmp_path / "gone")


def test_a_broken_tokenizer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{not json")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(CheckpointError, match="could not be read"):
        load_clip_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(CheckpointError):
        load_t5_tokenizer(tmp_path)
