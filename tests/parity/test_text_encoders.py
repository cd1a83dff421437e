"""Our encoders against diffusers' FluxPipeline.encode_prompt and transformers, fp32 on CPU."""

from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from glassbox.flux_core.specs import ClipT5Spec
from glassbox.flux_core.text.encoders import TextEncoders
from glassbox.flux_core.weights.load_text import load_text_encoders
from glassbox.tests.parity import text_samples as samples

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Pair:
    ours: TextEncoders
    published: diffusers.FluxPipeline


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("text")
    clip_files = samples.write_clip_tokenizer(folder / "clip_tokenizer")
    t5_files = samples.write_t5_tokenizer(folder / "t5_tokenizer")
    clip, t5 = samples.tiny_clip(clip_files), samples.tiny_t5()
    clip.save_pretrained(folder / "clip")
    t5.save_pretrained(folder / "t5")
    ours = load_text_encoders(
        [folder / "clip", folder / "t5"],
        clip_tokenizer=clip_files,
        t5_tokenizer=t5_files,
        text=ClipT5Spec(clip_tokens=77, t5_tokens=512),
    )
    published = diffusers.FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=clip,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(str(clip_files), model_max_length=77),
        text_encoder_2=t5,
        tokenizer_2=transformers.T5TokenizerFast.from_pretrained(str(t5_files.parent)),
    )
    return Pair(ours, published)


def encode_published(pair: Pair, prompt: str, prompt_2: str | None, length: int):
    with torch.no_grad():
        txt, pooled, _ = pair.published.encode_prompt(
            prompt, prompt_2, device=torch.device("cpu"), max_sequence_length=length
        )
    return txt, pooled


@pytest.mark.parametrize("length", [512, 256, 77, 9])
@pytest.mark.parametrize("prompt", samples.PROMPTS)
def test_features_equal_the_published_pipeline(pair: Pair, prompt: str, length: int) -> None:
    txt, pooled = encode_published(pair, prompt, None, length)
    features = pair.ours.encode(prompt, tokens=length)
    assert features.txt.shape == (1, length, samples.T5_WIDTH)
    assert features.pooled is not None
    torch.testing.assert_close(features.txt, txt, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(features.pooled, pooled, atol=TOLERANCE, rtol=0)
    assert features.txt.std() > 0.1  # the comparison is not one of zeros
    assert features.pooled.std() > 0.1


def test_t5_reads_the_second_prompt_and_clip_the_first(pair: Pair) -> None:
    txt, pooled = encode_published(pair, "a red star", "remove the blue square", 512)
    features = pair.ours.encode("a red star", "remove the blue square")
    torch.testing.assert_close(features.txt, txt, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(features.pooled, pooled, atol=TOLERANCE, rtol=0)
    other = pair.ours.encode("a red star")
    assert torch.equal(other.pooled, features.pooled)
    assert not torch.allclose(other.txt, features.txt)


@pytest.mark.parametrize("prompt", samples.PROMPTS)
def test_ids_equal_the_published_tokenizers(pair: Pair, prompt: str) -> None:
    for ours, published, length in (
        (pair.ours.clip_tokenizer, pair.published.tokenizer, 77),
        (pair.ours.t5_tokenizer, pair.published.tokenizer_2, 512),
        (pair.ours.t5_tokenizer, pair.published.tokenizer_2, 16),
    ):
        expected = published(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        assert torch.equal(ours.encode(prompt, length).ids, expected)


def test_the_first_end_mark_is_pooled_even_when_its_id_is_two(tmp_path: Path) -> None:
    """transformers takes eos_token_id 2 for an old configuration and pools the largest id."""
    clip_files = samples.write_clip_tokenizer(tmp_path / "clip_tokenizer", marks_first=True)
    clip, t5 = samples.tiny_clip(clip_files), samples.tiny_t5()
    ours = load_text_encoders(
        [
            samples.save(samples.t5_state(t5), tmp_path / "t5.safetensors"),
            samples.save(samples.clip_state(clip), tmp_path / "clip.safetensors"),
        ],
        clip_tokenizer=clip_files,
        t5_tokenizer=samples.write_t5_tokenizer(tmp_path / "t5_tokenizer"),
    )
    prompt = "the <|endoftext|> star"
    ids = ours.clip_tokenizer.encode(prompt, 77).ids
    assert ids[0, 2] == 2  # begin, "the", end
    with torch.no_grad():
        expected = clip(ids).last_hidden_state[:, 2]
    torch.testing.assert_close(ours.encode(prompt).pooled, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_transformers(pair: Pair, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same rounding: float16 keeps T5's `wo` in float32, as from_pretrained does."""
    clip_files = samples.write_clip_tokenizer(tmp_path / "clip_tokenizer")
    t5_files = samples.write_t5_tokenizer(tmp_path / "t5_tokenizer")
    clip, t5 = samples.tiny_clip(clip_files), samples.tiny_t5()
    clip.to(dtype).save_pretrained(tmp_path / "clip")
    t5.to(dtype).save_pretrained(tmp_path / "t5")
    ours = load_text_encoders(
        [tmp_path / "t5", tmp_path / "clip"], clip_tokenizer=clip_files, t5_tokenizer=t5_files
    )
    if dtype == torch.float16:  # some versions widen bfloat16 too
        t5 = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5", torch_dtype=dtype).eval()
    features = ours.encode("make the circle red")
    ids = ours.t5_tokenizer.encode("make the circle red", 512).ids
    with torch.no_grad():
        expected = t5(ids).last_hidden_state
        pooled = clip(ours.clip_tokenizer.encode("make the circle red", 77).ids).pooler_output
    assert features.txt.dtype == features.pooled.dtype == dtype
    assert torch.equal(features.txt, expected)
    assert torch.equal(features.pooled, pooled)
