"""Probe: text encoders of ComfyUI's layers against those of torch's, and ComfyUI's tokenizer.

Arguments: "pair" (CLIP-L and T5), "qwen", "mistral" or "ids", and what it takes, as JSON.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe

Answer = dict[str, Any]


def main(_: Path) -> Answer:
    what, job = sys.argv[1], json.loads(sys.argv[2])
    probe.load_glassbox()
    if what == "ids":
        return {"ids": _ids(job)}
    return _compared(_pair(job) if what == "pair" else _language(what, job), job["prompt"])


def _ids(prompts: list[str]) -> list[list[int]]:
    from comfy.text_encoders.flux import KleinTokenizer

    tokenize = KleinTokenizer().tokenize_with_weights
    return [[pair[0] for pair in tokenize(prompt)["qwen3_4b"][0]] for prompt in prompts]


def _pair(job: dict[str, Any]) -> Callable[..., Any]:
    from glassbox.flux_core.weights.load_text import load_text_encoders

    tokenizers = {name: Path(job[name]) for name in ("clip_tokenizer", "t5_tokenizer")}
    files = [Path(file) for file in job["files"]]
    return lambda **how: load_text_encoders(files, **tokenizers, **how)


def _language(kind: str, job: dict[str, Any]) -> Callable[..., Any]:
    from glassbox.flux_core.families import MISTRAL_SMALL_3, QWEN3_4B
    from glassbox.flux_core.weights.load_text import load_text_encoders

    spec = {"qwen": QWEN3_4B, "mistral": MISTRAL_SMALL_3}[kind]
    spec = replace(spec, **job["sizes"], layers=(1, 2, 3))
    (file,), tokenizer = job["files"], Path(job["qwen_tokenizer"])
    return lambda **how: load_text_encoders(
        [Path(file)], qwen_tokenizer=tokenizer, text=spec, **how
    )


def _compared(load: Callable[..., Any], prompt: str) -> Answer:
    """For every dtype and set of ComfyUI's layers: if the bits are the same; its classes."""
    import comfy.ops
    import torch

    answer: Answer = {"same": {}, "kinds": {}}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plain = load(operations=None, dtype=dtype).encode(prompt)
        for operations in (comfy.ops.manual_cast, comfy.ops.disable_weight_init):
            encoders = load(operations=operations, dtype=dtype)
            modules = [module for part in encoders.modules for module in part.modules()]
            made = encoders.encode(prompt)
            name = f"{operations.__qualname__} {dtype}"
            answer["kinds"][name] = sorted({type(module).__qualname__ for module in modules})
            answer["same"][name] = torch.equal(made.txt, plain.txt) and (
                plain.pooled is None or torch.equal(made.pooled, plain.pooled)
            )
    return answer


if __name__ == "__main__":
    probe.run(main)
