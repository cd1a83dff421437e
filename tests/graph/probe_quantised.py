"""Probe: quantised files made by ComfyUI's own code, and read by its layers and by ours."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe

LAYERS = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear2")  # of unequal sides


def main(scratch: Path) -> dict[str, Any]:
    probe.load_pack()
    answer: dict[str, float] = {}
    for form in ("old", "metadata", "layers"):
        for format in ("float8_e4m3fn", "float8_e5m2", "nvfp4"):
            if form == "old" and format != "float8_e4m3fn":
                continue
            file = scratch / f"{form}-{format}.safetensors"
            _write(file, form, format)
            answer[file.stem] = _largest_error(file)
    return answer


def _write(file: Path, form: str, format: str) -> None:
    """Quantise random weights with ComfyUI's layouts, and store what its layers save."""
    import torch
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    said: dict[str, object] = {}
    for layer, sides in zip(LAYERS, ((384, 128), (144, 640)), strict=True):
        weight = torch.randn(sides, generator=generator)
        kind = QUANT_ALGOS[format]["comfy_tensor_layout"]
        stored: Any = QuantizedTensor.from_float(weight, kind, scale="recalculate")
        for ending, tensor in stored.state_dict(f"{layer}.weight").items():
            state[ending] = tensor.contiguous()
        said[layer] = {"format": format}
        if form == "old":
            state[layer + ".scale_weight"] = state.pop(layer + ".weight_scale")
            state["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
        if form == "layers":
            words = json.dumps(said[layer]).encode()
            state[layer + ".comfy_quant"] = torch.tensor(list(words), dtype=torch.uint8)
    metadata = {"_quantization_metadata": json.dumps({"layers": said})}
    save_file(state, str(file), metadata if form == "metadata" else None)


def _largest_error(file: Path) -> float:
    """Compare what ComfyUI's mixed-precision layers hold with what we read."""
    import comfy.ops
    import comfy.utils
    import torch
    from custom_pack.flux_core.weights.quantised import open_dequantised  # type: ignore[import]

    state, metadata = comfy.utils.load_torch_file(str(file), return_metadata=True)
    state, _ = comfy.utils.convert_old_quants(state, "", metadata or {})
    layers: Any = comfy.ops.mixed_precision_ops({}, torch.float32)
    ours = open_dequantised(file).read()
    assert len(ours) == len(LAYERS)
    errors: list[float] = []
    for layer in LAYERS:
        rows, columns = ours[f"{layer}.weight"].shape
        linear = layers.Linear(columns, rows, bias=False, device="cpu")
        mine = {k.removeprefix(f"{layer}."): v for k, v in state.items() if k.startswith(layer)}
        linear.load_state_dict(mine)
        assert linear.quant_format is not None
        errors.append(float((linear.weight.dequantize() - ours[f"{layer}.weight"]).abs().max()))
        assert float(ours[f"{layer}.weight"].abs().max()) > 2
    return max(errors)


if __name__ == "__main__":
    probe.run(main)
