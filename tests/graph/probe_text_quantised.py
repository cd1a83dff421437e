"""Probe: quantised text encoders made by ComfyUI's own code, read by its layers and by ours.

Its table of tokens looks up the rows it needs and scales those alone.
"""

import importlib
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
from probe_native import _nodes
from probe_native_text import LANGUAGE, SPEC, distance, make_language

TABLE, LAYER = "model.embed_tokens", "model.layers.0.mlp.down_proj"


def main(scratch: Path) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    nodes = _nodes(scratch)
    features = _features(scratch / "qwen_3_4b_fp4_mixed.safetensors", nodes)
    for form in ("metadata", "layers"):
        for format in ("float8_e4m3fn", "float8_e5m2"):
            for packed in (format, "nvfp4"):
                file = scratch / f"{form}-{format}-{packed}.safetensors"
                _write(file, form, {TABLE: format, LAYER: packed})
                answer[file.stem] = _largest_error(file)
    return {"layers": answer, "features": features}


def _features(file: Path, nodes: dict[str, Any]) -> dict[str, float]:
    """Encode Text with ComfyUI's CLIP, which keeps weights quantised, and with ours."""
    import torch
    from comfy import sd
    from comfy.text_encoders import flux
    from safetensors.torch import save_file

    plain = make_language("qwen3_4b", num_hidden_layers=28)
    state = {
        key: one.contiguous()
        for key, one in plain.cond_stage_model.qwen3_4b.transformer.state_dict().items()
    }
    formats = dict.fromkeys((key for key in state if ".self_attn." in key), "float8_e4m3fn")
    formats |= dict.fromkeys((key for key in state if ".mlp." in key), "nvfp4")
    formats = {key: one for key, one in formats.items() if state[key].ndim == 2}
    formats[f"{TABLE}.weight"] = "float8_e4m3fn"
    stored = {key: one for key, one in state.items() if key not in formats}
    for key, format in formats.items():
        stored |= _quantise(key.removesuffix(".weight"), state[key], format, say=True)
    save_file(stored, str(file))
    te = flux.klein_te(
        dtype_llama=torch.float32,
        llama_quantization_metadata={"mixed_ops": True},
        model_type="qwen3_4b",
    )
    target = types.SimpleNamespace(params={}, clip=te, tokenizer=flux.KleinTokenizer)
    sizes = {"qwen3_4b_model_config": {**LANGUAGE, "num_hidden_layers": 28}}
    options = {"dtype": torch.float32, **sizes}
    native = sd.CLIP(target, state_dict=[dict(stored)], model_options=options)
    part = f"{probe.PACK}.flux_core"
    load = importlib.import_module(f"{part}.weights.load_text").load_text_encoders
    spec = replace(importlib.import_module(f"{part}.families").QWEN3_4B, **SPEC)
    loading = importlib.import_module(f"{probe.PACK}.nodes.runtime.loading")
    qwen = loading.native_tokenizers().qwen
    ours = load([file], qwen_tokenizer=qwen, text=spec, dtype=torch.float32)
    handle = importlib.import_module(f"{probe.PACK}.nodes.runtime.handles").TextEncodersHandle(ours)
    encode = nodes["GlassboxEncodeText"].execute
    texts = [
        encode(text_encoders=one, prompt="make the circle red", prompt_2="", t5_tokens=0).result[0]
        for one in (native, handle, plain)
    ]
    return {"apart": distance(texts[0], texts[1]), "from_plain": distance(texts[2], texts[1])}


def _quantise(layer: str, weight: Any, format: str, *, say: bool) -> dict[str, Any]:
    """Store a weight as ComfyUI's layers save it."""
    import torch
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    kind = QUANT_ALGOS[format]["comfy_tensor_layout"]
    packed: Any = QuantizedTensor.from_float(weight, kind, scale="recalculate")
    state = {key: one.contiguous() for key, one in packed.state_dict(f"{layer}.weight").items()}
    if say:
        words = json.dumps({"format": format}).encode()
        state[layer + ".comfy_quant"] = torch.tensor(list(words), dtype=torch.uint8)
    return state


def _write(file: Path, form: str, formats: dict[str, str]) -> None:
    """Quantise random weights with ComfyUI's layouts, and store what its layers save."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for layer, sides in ((TABLE, (300, 64)), (LAYER, (64, 160))):
        weight = torch.randn(sides, generator=generator)
        state |= _quantise(layer, weight, formats[layer], say=form == "layers")
    said = {layer: {"format": format} for layer, format in formats.items()}
    metadata = {"_quantization_metadata": json.dumps({"layers": said})}
    save_file(state, str(file), metadata if form == "metadata" else None)


def _largest_error(file: Path) -> float:
    """Compare what ComfyUI's mixed-precision layers compute with what our weights do."""
    import comfy.ops
    import comfy.utils
    import torch
    from custom_pack.flux_core.weights.load_text import open_text  # type: ignore[import]

    state, metadata = comfy.utils.load_torch_file(str(file), return_metadata=True)
    state, _ = comfy.utils.convert_old_quants(state, "", metadata or {})
    layers: Any = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
    ours = open_text(file).read()
    assert ours.keys() == {f"{TABLE}.weight", f"{LAYER}.weight"}
    table = layers.Embedding(300, 64, device="cpu", dtype=torch.float32)
    table.load_state_dict(_part(state, TABLE))
    linear = layers.Linear(160, 64, bias=False, device="cpu")
    linear.load_state_dict(_part(state, LAYER))
    ids = torch.arange(300)
    found = (table(ids, out_dtype=torch.float32), linear.weight.dequantize())
    assert all(float(one.abs().max()) > 2 for one in found)
    expected = (ours[f"{TABLE}.weight"], ours[f"{LAYER}.weight"])
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def _part(state: dict[str, Any], layer: str) -> dict[str, Any]:
    return {k.removeprefix(f"{layer}."): v for k, v in state.items() if k.startswith(layer + ".")}


if __name__ == "__main__":
    probe.run(main)
