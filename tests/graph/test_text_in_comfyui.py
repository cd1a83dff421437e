"""The text encoders built from ComfyUI's layers, and read with the tokenizers it ships."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers

from glassbox.flux_core.text.tokenizers import (
    PromptTokenizer,
    load_clip_tokenizer,
    load_t5_tokenizer,
)
from glassbox.tests.graph.server import IN_USE
from glassbox.tests.parity import text_samples as samples

pytestmark = pytest.mark.graph

PROMPTS = (
    *samples.PROMPTS,
    "a photo of an astronaut riding a horse, 8k, (masterpiece:1.2), golden-hour light",
    "Ein Haus am See, à l'aube — “quoted” … ½ price; 東京 и Москва",
    "x" * 600,
    "İstanbul ǅ ﬃ ① ™ \u200b\u00a0end",
)

# A process of its own: importing comfy changes global state. The folder of this test stays off
# sys.path, where its server.py would hide ComfyUI's.
COMPARE = """
import json, sys, types
from pathlib import Path
comfyui, root, job = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, comfyui)
from comfy.cli_args import args
args.cpu = True
import comfy.ops, torch
pack = types.ModuleType("glassbox")
pack.__path__ = [root]
sys.modules["glassbox"] = pack
from glassbox.flux_core.weights.load_text import load_text_encoders

def load(operations, dtype):
    return load_text_encoders(
        [Path(file) for file in job["files"]],
        clip_tokenizer=Path(job["clip_tokenizer"]),
        t5_tokenizer=Path(job["t5_tokenizer"]),
        operations=operations,
        dtype=dtype,
    )

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    plain = load(None, dtype).encode(job["prompt"])
    for operations in (comfy.ops.manual_cast, comfy.ops.disable_weight_init):
        encoders = load(operations, dtype)
        kinds = {type(m).__qualname__ for part in encoders.modules for m in part.modules()}
        for leaf in ("Linear", "LayerNorm", "Embedding"):
            assert leaf not in kinds, leaf
            assert f"{operations.__qualname__}.{leaf}" in kinds, leaf
        features = encoders.encode(job["prompt"])
        assert torch.equal(features.txt, plain.txt), (dtype, operations)
        assert torch.equal(features.pooled, plain.pooled), (dtype, operations)
print("the same")
"""


def test_comfyuis_layers_compute_the_same_bits(tmp_path: Path) -> None:
    kit = samples.make_kit(tmp_path)
    job = {
        "files": [
            str(samples.save(kit.clip, tmp_path / "clip_l.safetensors", "text_model.")),
            str(samples.save(kit.t5, tmp_path / "t5xxl.safetensors")),
        ],
        "clip_tokenizer": str(kit.clip_tokenizer),
        "t5_tokenizer": str(kit.t5_tokenizer),
        "prompt": "remove the blue square",
    }
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", COMPARE, str(IN_USE.resolve()), root, json.dumps(job)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("the same\n")


@dataclass(frozen=True)
class Shipped:
    clip: PromptTokenizer
    t5: PromptTokenizer
    published_clip: Any
    published_t5: Any


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    comfy = IN_USE.resolve() / "comfy"
    clip, t5 = comfy / "sd1_tokenizer", comfy / "text_encoders" / "t5_tokenizer"
    return Shipped(
        load_clip_tokenizer(clip),
        load_t5_tokenizer(t5),
        transformers.CLIPTokenizer.from_pretrained(str(clip)),
        transformers.T5TokenizerFast.from_pretrained(str(t5)),
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_of_the_shipped_tokenizers_equal_transformers(shipped: Shipped, prompt: str) -> None:
    for ours, published, length in (
        (shipped.clip, shipped.published_clip, 77),
        (shipped.t5, shipped.published_t5, 512),
    ):
        expected = published(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        encoded = ours.encode(prompt, length)
        assert encoded.ids.equal(expected.input_ids)
        assert prompt.endswith(encoded.count.cut)
        assert encoded.count.used < length or encoded.ids[0, -1] == ours.end_id


def test_published_ids_of_a_known_prompt(shipped: Shipped) -> None:
    """Written down, so that both sides cannot drift together."""
    clip = shipped.clip.encode("a photo of a cat", 9)
    assert clip.ids.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407, 49407, 49407]]
    assert clip.count.used == 7
    t5 = shipped.t5.encode("a photo of a cat", 9)
    assert t5.ids.tolist() == [[3, 9, 1202, 13, 3, 9, 1712, 1, 0]]
    assert t5.count.used == 8
