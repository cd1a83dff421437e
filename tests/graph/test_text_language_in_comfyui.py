"""Language models built from ComfyUI's layers, and Qwen's tokenizer as ComfyUI ships it."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from glassbox.flux_core.families import QWEN3_4B
from glassbox.flux_core.text.tokenizers import ChatTokenizer, load_qwen_tokenizer
from glassbox.tests.graph.probe import run_probe
from glassbox.tests.graph.server import IN_USE
from glassbox.tests.graph.test_text_in_comfyui import expect_the_same_bits
from glassbox.tests.parity import text_language_samples as samples
from glassbox.tests.parity.text_samples import PROMPTS

pytestmark = pytest.mark.graph


@pytest.mark.parametrize("kind", ["qwen", "mistral"])
def test_comfyuis_layers_compute_the_same_bits(tmp_path: Path, kind: str) -> None:
    qwen, mistral = samples.qwen_kit(tmp_path), samples.mistral_kit(tmp_path)
    names = ("hidden", "ffn", "heads", "kv_heads", "head_dim")
    file = {"qwen": qwen, "mistral": mistral}[kind].write(tmp_path / "model.safetensors")
    job = {
        "files": [str(file)],
        "qwen_tokenizer": str(qwen.qwen_tokenizer),
        "sizes": {name: getattr(samples.QWEN, name) for name in names},
        "prompt": "remove the blue square",
    }
    answer = run_probe("probe_text_layers", kind, json.dumps(job))
    expect_the_same_bits(answer, "Linear", "Embedding")


@pytest.fixture(scope="module")
def shipped() -> ChatTokenizer:
    return load_qwen_tokenizer(folder())


def folder() -> Path:
    return IN_USE.resolve() / "comfy" / "text_encoders" / "qwen25_tokenizer"


@pytest.mark.parametrize("prompt", [*PROMPTS, "x" * 600, "star " * 900])
def test_ids_of_the_shipped_tokenizer_equal_transformers(
    shipped: ChatTokenizer, prompt: str
) -> None:
    published: Any = transformers.Qwen2TokenizerFast.from_pretrained(str(folder()))
    text = f"{QWEN3_4B.prefix}{prompt}{QWEN3_4B.suffix}"
    expected = published(
        text, padding="max_length", max_length=512, truncation=True, return_tensors="pt"
    )
    read = shipped.encode(prompt, QWEN3_4B)
    assert read.ids.equal(expected.input_ids)
    assert read.mask.equal(expected.attention_mask)
    assert prompt.endswith(read.count.cut)


def test_prompts_that_fit_have_comfyuis_ids(shipped: ChatTokenizer) -> None:
    """ComfyUI pads to 512 as well, and cuts nothing that is longer."""
    prompts = ["make the circle red", "", "a (masterpiece:1.2)", "两只猫 & naïve 🎨"]
    theirs = run_probe("probe_text_layers", "ids", json.dumps(prompts))["ids"]
    for prompt, ids in zip(prompts, theirs, strict=True):
        assert shipped.encode(prompt, QWEN3_4B).ids.tolist() == [ids]


def test_published_ids_of_a_known_prompt(shipped: ChatTokenizer) -> None:
    """Written down, so that both sides cannot drift together."""
    read = shipped.encode("make the circle red", QWEN3_4B, 18)
    turn = [151644, 872, 198, 6927, 279, 12671, 2518, 151645, 198]
    answer = [151644, 77091, 198, 151667, 271, 151668, 271]
    assert read.ids.tolist() == [[*turn, *answer, 151643, 151643]]
    assert read.count.used == 16
