"""Probe: Encode Text with ComfyUI's own CLIP against our text encoders with the same weights.

Tiny models in ComfyUI's own classes, read with the tokenizers it ships.
"""

import importlib
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
from probe_native import _message, _nodes

Answer = dict[str, Any]
PROMPTS = {
    "short": "make the circle red",
    "empty": "",
    "marks": "it's <|endoftext|> not over</s> [IMG], <pad> (red:1.3) 你好",
    "long": "star light " * 300,
}
LENGTHS = (0, 1, 20, 256, 512)
CLIP = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}
T5 = {"d_model": 48, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_heads": 4}
LANGUAGE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SPEC: Any = {"hidden": 64, "ffn": 96, "heads": 2, "kv_heads": 1}


def main(scratch: Path) -> Answer:
    bench = Bench(scratch)
    answer: Answer = {"apart": {}, "reports": {}, "lengths": {}}
    for name, (native, ours) in bench.pairs.items():
        answer["apart"] |= bench.all_settings(name, native, ours, answer)
    answer |= bench.second_prompt() | bench.patched() | bench.as_comfyui()
    answer["refused"] = bench.refused()
    answer["long_clip"] = bench.long_clip()
    return answer


class Bench:
    """The same weights in ComfyUI's CLIP and in our encoders."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.nodes = _nodes(scratch)
        part = f"{probe.PACK}.flux_core"
        self.load = importlib.import_module(f"{part}.weights.load_text").load_text_encoders
        self.families = importlib.import_module(f"{part}.families")
        self.handles = importlib.import_module(f"{probe.PACK}.nodes.runtime.handles")
        self.loading = importlib.import_module(f"{probe.PACK}.nodes.runtime.loading")
        pair = make_pair()
        qwen = make_language("qwen3_4b", num_hidden_layers=28)
        mistral = make_language("mistral3_24b", num_hidden_layers=31, vocab_size=640)
        families = self.families
        self.pairs = {
            "FLUX.1": (pair, self.ours_of_pair(pair)),
            "Qwen3": (qwen, self.ours_of(qwen, replace(families.QWEN3_4B, **SPEC))),
            "Mistral": (mistral, self.ours_of(mistral, replace(families.MISTRAL_SMALL_3, **SPEC))),
        }

    def ours_of_pair(self, clip: Any, name: str = "pair") -> Any:
        model = clip.cond_stage_model
        tower = {
            key: value
            for key, value in model.clip_l.transformer.state_dict().items()
            if key != "text_projection.weight"
        }
        files = [
            self.save(tower, f"{name}_clip"),
            self.save(model.t5xxl.transformer.state_dict(), f"{name}_t5"),
        ]
        return self.ours(files, None)

    def ours_of(self, clip: Any, text: Any) -> Any:
        inner = getattr(clip.cond_stage_model, clip.cond_stage_model.clip)
        state = dict(inner.transformer.state_dict())
        if text.architecture == "mistral3":
            state["tekken_model"] = clip.tokenizer.state_dict()["tekken_model"]
        return self.ours([self.save(state, text.architecture)], text)

    def ours(self, files: list[Path], text: Any) -> Any:
        import torch

        tokenizers = self.loading.native_tokenizers()
        encoders = self.load(
            files,
            clip_tokenizer=tokenizers.clip,
            t5_tokenizer=tokenizers.t5,
            qwen_tokenizer=tokenizers.qwen,
            text=text,
            dtype=torch.float32,
        )
        return self.handles.TextEncodersHandle(encoders)

    def save(self, state: dict[str, Any], name: str) -> Path:
        from glassbox.tests.graph import tiny

        return tiny.save({k: v.contiguous() for k, v in state.items()}, self.scratch / f"{name}.st")

    def encode(self, encoders: Any, prompt: str, tokens: int = 0, prompt_2: str = "") -> Any:
        run = self.nodes["GlassboxEncodeText"].execute
        return run(
            text_encoders=encoders, prompt=prompt, prompt_2=prompt_2, t5_tokens=tokens
        ).result

    def all_settings(self, name: str, native: Any, ours: Any, answer: Answer) -> dict[str, float]:
        apart: dict[str, float] = {}
        for kind, prompt in PROMPTS.items():
            for length in LENGTHS if kind in ("short", "long") else (0,):
                texts = [self.encode(one, prompt, length) for one in (native, ours)]
                setting = f"{name} {kind} {length}"
                apart[setting] = distance(texts[0][0], texts[1][0])
                answer["reports"][setting] = texts[0][1] == texts[1][1]
                answer["lengths"][setting] = texts[0][0].txt.shape[1]
        return apart

    def second_prompt(self) -> Answer:
        texts = [self.encode(one, "red", 0, "a blue star")[0] for one in self.pairs["FLUX.1"]]
        alone = self.encode(self.pairs["FLUX.1"][0], "red")[0]
        return {
            "second_apart": distance(*texts),
            "second_from_first": float((texts[0].txt - alone.txt).abs().max()),
        }

    def patched(self) -> Answer:
        """A LoRA loader's patches on both encoders, on a clone."""
        import torch

        native = self.pairs["FLUX.1"][0]
        plain = self.encode(native, "red")[0]
        keys = (
            "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
            "t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo.weight",
        )
        state = native.cond_stage_model.state_dict()
        generator = torch.Generator().manual_seed(5)
        added = {key: 0.1 * torch.randn(state[key].shape, generator=generator) for key in keys}
        clone = native.clone()
        clone.add_patches({key: ("diff", (value,)) for key, value in added.items()}, 0.5)
        patched = self.encode(clone, "red")[0]
        expected = make_pair()
        changed = expected.cond_stage_model.state_dict()
        for key, value in added.items():
            changed[key] += 0.5 * value
        ours = self.encode(self.ours_of_pair(expected, "changed"), "red")[0]
        again = self.encode(native, "red")[0]
        return {
            "patched_apart": distance(patched, ours),
            "patched_from_plain": [
                float((patched.txt - plain.txt).abs().max()),
                float((patched.pooled - plain.pooled).abs().max()),
            ],
            "plain_again": torch.equal(again.txt, plain.txt)
            and torch.equal(again.pooled, plain.pooled),
        }

    def as_comfyui(self) -> Answer:
        """ComfyUI's own encoding where its lengths are ours, before and after."""
        import torch

        native = self.pairs["Qwen3"][0]
        before = native.encode_from_tokens(native.tokenize("make the circle red"))
        ours = self.encode(native, "make the circle red")[0]
        after = native.encode_from_tokens(native.tokenize("make the circle red"))
        scale = float(before.abs().max())
        return {
            "from_comfyui": float((before - ours.txt).abs().max()) / scale,
            "same_as_before": torch.equal(before, after),
        }

    def long_clip(self) -> float:
        """A CLIP with more places than 77: no place sees those behind it."""
        clip = make_pair(max_position_embeddings=100)
        texts = [self.encode(one, "red star")[0] for one in (clip, self.ours_of_pair(clip, "long"))]
        return float((texts[0].pooled - texts[1].pooled).abs().max() / texts[1].pooled.abs().max())

    def refused(self) -> dict[str, str]:
        import comfy.sdxl_clip
        import comfy.text_encoders.sd3_clip as sd3
        import comfy.text_encoders.z_image as z_image

        pair = self.pairs["FLUX.1"][0]
        skipped, hooked = pair.clone(), pair.clone()
        skipped.clip_layer(-2)
        hooked.apply_hooks_to_conds = object()
        g_sizes = {**CLIP, "hidden_act": "gelu"}
        clips = {
            "sdxl": make_clip(
                comfy.sdxl_clip.SDXLClipModel, clip_l_model_config=CLIP, clip_g_model_config=g_sizes
            ),
            "sd3": make_clip(
                sd3.sd3_clip(clip_l=True, clip_g=False, t5=True),
                clip_l_model_config=CLIP,
                t5xxl_model_config=T5,
            ),
            "t5 only": make_clip(
                sd3.sd3_clip(clip_l=False, clip_g=False, t5=True), t5xxl_model_config=T5
            ),
            "z-image": make_clip(
                z_image.te(), qwen3_4b_model_config={**LANGUAGE, "num_hidden_layers": 3}
            ),
            "skipped": skipped,
            "hooked": hooked,
        }
        said = {
            name: _message(lambda one=one: self.encode(one, "red")) for name, one in clips.items()
        }
        return said | {"length": _message(lambda: self.encode(pair, "red", 600))}


def distance(one: Any, other: Any) -> float:
    """The largest difference, in the largest number."""
    apart = float((one.txt - other.txt).abs().max() / other.txt.abs().max())
    if other.pooled is None:
        assert one.pooled is None
        return apart
    pooled = (one.pooled - other.pooled).abs().max() / other.pooled.abs().max()
    return max(apart, float(pooled))


def make_clip(model: Any, tokenizer: Any = None, **configs: Any) -> Any:
    """ComfyUI's CLIP around a tiny model of one of its classes, with random weights."""
    import torch
    from comfy import sd

    target = types.SimpleNamespace(
        params={}, clip=model, tokenizer=tokenizer or (lambda **_: types.SimpleNamespace())
    )
    clip = sd.CLIP(
        target,
        model_options={"dtype": torch.float32, **configs},
    )
    generator = torch.Generator().manual_seed(1)
    for key, value in clip.cond_stage_model.state_dict().items():
        value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        if "norm" in key and key.endswith("weight"):
            value += 1.0
        elif key.endswith("shared.weight"):
            value *= 10.0  # as T5's own; small ones blow rounding errors up, on both sides
        elif "t5xxl" in key:
            value *= 0.4
    return clip


def make_pair(**changes: Any) -> Any:
    import torch
    from comfy.text_encoders import flux

    return make_clip(
        flux.flux_clip(dtype_t5=torch.float32),
        flux.FluxTokenizer,
        clip_l_model_config={**CLIP, **changes},
        t5xxl_model_config=T5,
    )


def make_language(name: str, **sizes: Any) -> Any:
    import torch
    from comfy.text_encoders import flux

    from glassbox.tests.parity.text_language_samples import tekken

    config = {f"{name}_model_config": {**LANGUAGE, **sizes}}
    if name == "mistral3_24b":
        carried = {"tekken_model": torch.frombuffer(bytearray(tekken()), dtype=torch.uint8)}
        # ComfyUI's own does not build with transformers 5; it too hands on what the file carried.
        tokenizer = Carrier(carried)
        return make_clip(flux.flux2_te(dtype_llama=torch.float32), lambda **_: tokenizer, **config)
    te = flux.klein_te(dtype_llama=torch.float32, model_type=name)
    return make_clip(te, flux.KleinTokenizer, **config)


class Carrier:
    """What is used of ComfyUI's Mistral tokenizer."""

    def __init__(self, carried: dict[str, Any]) -> None:
        self.carried = carried

    def state_dict(self) -> dict[str, Any]:
        return self.carried


if __name__ == "__main__":
    probe.run(main)
