"""Language models built from ComfyUI's layers, and Qwen's tokenizer as ComfyUI ships it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from glassbox.flux_core.families import QWEN3_4B
from glassbox.flux_core.text.tokenizers import ChatTokenizer, load_qwen_tokenizer
from glassbox.tests.graph.server import IN_USE
from glassbox.tests.parity import text_language_samples as samples
from glassbox.tests.parity.text_samples import PROMPTS

pytestmark = pytest.mark.graph

# A process of its own: importing comfy changes global state. The folder of this test stays off
# sys.path, where its server.py would hide ComfyUI's.
START = """
import json, sys, types
from dataclasses import replace
from pathlib import Path
comfyui, root, job = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, comfyui)
from comfy.cli_args import args
args.cpu = True
import comfy.ops, torch
pack = types.ModuleType("glassbox")
pack.__path__ = [root]
sys.modules["glassbox"] = pack
from glassbox.flux_core.families import MISTRAL_SMALL_3, QWEN3_4B
from glassbox.flux_core.weights.load_text import load_text_encoders
"""
COMPARE = (
    START
    + """
sizes = job["sizes"] | {"layers": (1, 2, 3)}
for kind, spec in (("qwen", QWEN3_4B), ("mistral", MISTRAL_SMALL_3)):
    def load(operations, dtype):
        return load_text_encoders(
            [Path(job[kind])],
            qwen_tokenizer=Path(job["tokenizer"]),
            text=replace(spec, **sizes),
            operations=operations,
            dtype=dtype,
        )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plain = load(None, dtype).encode(job["prompt"])
        for operations in (comfy.ops.manual_cast, comfy.ops.disable_weight_init):
            encoder = load(operations, dtype)
            kinds = {type(m).__qualname__ for m in encoder.modules[0].modules()}
            for leaf in ("Linear", "Embedding"):
                assert leaf not in kinds, leaf
                assert f"{operations.__qualname__}.{leaf}" in kinds, leaf
            features = encoder.encode(job["prompt"])
            assert torch.equal(features.txt, plain.txt), (kind, dtype, operations)
print("the same")
"""
)
TOKENIZE = (
    START
    + """
from comfy.text_encoders.flux import KleinTokenizer
tokenizer = KleinTokenizer()
rows = [tokenizer.tokenize_with_weights(prompt)["qwen3_4b"][0] for prompt in job]
print(json.dumps([[pair[0] for pair in row] for row in rows]))
"""
)


def run(script: str, job: object, folder: Path) -> str:
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", script, str(IN_USE.resolve()), root, json.dumps(job)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_comfyuis_layers_compute_the_same_bits(tmp_path: Path) -> None:
    qwen, mistral = samples.qwen_kit(tmp_path), samples.mistral_kit(tmp_path)
    names = ("hidden", "ffn", "heads", "kv_heads", "head_dim")
    job = {
        "qwen": str(qwen.write(tmp_path / "qwen.safetensors")),
        "mistral": str(mistral.write(tmp_path / "mistral.safetensors")),
        "tokenizer": str(qwen.qwen_tokenizer),
        "sizes": {name: getattr(samples.QWEN, name) for name in names},
        "prompt": "remove the blue square",
    }
    assert run(COMPARE, job, tmp_path) == "the same"


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
    text = f"{QWEN3_4B.before}{prompt}{QWEN3_4B.behind}"
    expected = published(
        text, padding="max_length", max_length=512, truncation=True, return_tensors="pt"
    )
    read = shipped.encode(prompt, QWEN3_4B)
    assert read.ids.equal(expected.input_ids)
    assert read.mask.equal(expected.attention_mask)
    assert prompt.endswith(read.count.cut)


def test_prompts_that_fit_have_comfyuis_ids(shipped: ChatTokenizer, tmp_path: Path) -> None:
    """ComfyUI pads to 512 as well, and cuts nothing that is longer."""
    prompts = ["make the circle red", "", "a (masterpiece:1.2)", "两只猫 & naïve 🎨"]
    theirs = json.loads(run(TOKENIZE, prompts, tmp_path))
    for prompt, ids in zip(prompts, theirs, strict=True):
        assert shipped.encode(prompt, QWEN3_4B).ids.tolist() == [ids]


def test_published_ids_of_a_known_prompt(shipped: ChatTokenizer) -> None:
    """Written down, so that both sides cannot drift together."""
    read = shipped.encode("make the circle red", QWEN3_4B, 18)
    turn = [151644, 872, 198, 6927, 279, 12671, 2518, 151645, 198]
    answer = [151644, 77091, 198, 151667, 271, 151668, 271]
    assert read.ids.tolist() == [[*turn, *answer, 151643, 151643]]
    assert read.count.used == 16
