"""Probe: quantised text encoders made by ComfyUI's own code, read by its layers and by ours.

Its table of tokens looks up the rows it needs and scales those alone.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe

TABLE, LAYER = "model.embed_tokens", "model.layers.0.mlp.down_proj"


def main() -> None:
    probe.load_comfyui()
    probe.load_pack()
    import torch

    answer: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for form in ("metadata", "layers"):
            for format in ("float8_e4m3fn", "float8_e5m2"):
                for packed in (format, "nvfp4"):
                    file = Path(scratch) / f"{form}-{format}-{packed}.safetensors"
                    _write(file, form, {TABLE: format, LAYER: packed})
                    answer[file.stem] = _largest_error(file)
    print(json.dumps(answer))


def _write(file: Path, form: str, formats: dict[str, str]) -> None:
    """Quantise random weights with ComfyUI's layouts, and store what its layers save."""
    import torch
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for layer, sides in ((TABLE, (300, 64)), (LAYER, (64, 160))):
        weight = torch.randn(sides, generator=generator)
        kind = QUANT_ALGOS[formats[layer]]["comfy_tensor_layout"]
        stored: Any = QuantizedTensor.from_float(weight, kind, scale="recalculate")
        for ending, tensor in stored.state_dict(f"{layer}.weight").items():
            state[ending] = tensor.contiguous()
        if form == "layers":
            words = json.dumps({"format": formats[layer]}).encode()
            state[layer + ".comfy_quant"] = torch.tensor(list(words), dtype=torch.uint8)
    said = {layer: {"format": format} for layer, format in formats.items()}
    metadata = {"_quantization_metadata": json.dumps({"layers": said})}
    save_file(state, str(file), metadata if form == "metadata" else None)


def _largest_error(file: Path) -> float:
    """Compare what ComfyUI's mixed-precision layers compute with what our weights do."""
    import comfy.ops
    import comfy.utils
    import torch
    from custom_pack.flux_core.weights.text_files import open_text  # type: ignore[import]

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
    main()
