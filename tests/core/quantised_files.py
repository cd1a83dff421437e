"""Quantised files in the layouts ComfyUI and llama.cpp write, and the weights they stand for."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

State = dict[str, Tensor]
Chosen = Callable[[str, Tensor], bool]
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def is_quantised(key: str, tensor: Tensor) -> bool:
    """What quantisers choose: the blocks' matrices."""
    return "blocks." in key and tensor.ndim == 2


def scaled_float8(
    state: State,
    form: str,
    dtype: torch.dtype = torch.float8_e4m3fn,
    prefix: str = "",
    chosen: Chosen = is_quantised,
) -> tuple[State, dict[str, str], State]:
    """The file's tensors and metadata, and what they stand for in float32.

    Args:
        form: "old" (scaled_fp8), "layers" (comfy_quant), "metadata" or "bare" (nothing said).
        chosen: tells which tensors are quantised.
    """
    stored: State = {"scaled_fp8": torch.empty(0, dtype=dtype)} if form == "old" else {}
    plain: State = {}
    layers: dict[str, dict[str, str]] = {}
    for key, tensor in state.items():
        if not chosen(key, tensor):
            stored[key] = plain[key] = tensor
            continue
        scale = tensor.abs().max() / torch.finfo(dtype).max
        layer = key.removesuffix(".weight")
        layers[prefix + layer] = {"format": str(dtype).removeprefix("torch.")}
        stored[key] = (tensor / scale).to(dtype)
        stored[layer + (".scale_weight" if form == "old" else ".weight_scale")] = scale
        stored[layer + (".scale_input" if form == "old" else ".input_scale")] = torch.tensor(0.5)
        if form == "layers":
            stored[layer + ".comfy_quant"] = as_bytes(layers[prefix + layer])
        plain[key] = stored[key].double().mul(scale.double()).float()
    stored = {prefix + key: tensor for key, tensor in stored.items()}
    return stored, header(layers) if form == "metadata" else {}, plain


def header(layers: Mapping[str, object]) -> dict[str, str]:
    said = {"format_version": "1.0", "layers": layers}
    return {"_quantization_metadata": json.dumps(said)}


def as_bytes(said: object) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def nvfp4(state: State, chosen: Chosen = is_quantised) -> tuple[State, dict[str, str], State]:
    """The same for nvfp4, number by number as the format is described."""
    stored: State = {}
    plain: State = {}
    layers: dict[str, object] = {}
    values = torch.tensor((*FP4, *(-one for one in FP4)))
    for key, tensor in state.items():
        if not chosen(key, tensor):
            stored[key] = plain[key] = tensor
            continue
        rows, columns = tensor.shape
        whole = tensor.abs().max() / (448 * 6)
        blocks = tensor.view(rows, columns // 16, 16)
        scales = (blocks.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
        steps = (scales.float() * whole)[..., None]
        codes = (blocks / steps - values[:, None, None, None]).abs().argmin(0).view(rows, columns)
        plain[key] = values.double()[codes].view_as(blocks).mul(steps.double()).float()
        plain[key] = plain[key].view(rows, columns)
        layer = key.removesuffix(".weight")
        stored[key] = (codes[:, 0::2] * 16 + codes[:, 1::2]).to(torch.uint8)
        stored[layer + ".weight_scale"] = in_tiles(scales)
        stored[layer + ".weight_scale_2"] = whole
        layers[layer] = {"format": "nvfp4"}
    return stored, header(layers), plain


def in_tiles(scales: Tensor) -> Tensor:
    """Lay scales out as cuBLAS reads them: in tiles of 128 rows and 4 columns, each 512 bytes."""
    rows, columns = scales.shape
    down, across = -(-rows // 128), -(-columns // 4)
    laid = torch.zeros(down * across * 512)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128 * across + column // 4) * 512
            inside = row % 128
            place = tile + inside % 32 * 16 + inside // 32 * 4 + column % 4
            laid[place] = scales[row, column].float()
    return laid.to(torch.float8_e4m3fn).view(down * 128, across * 4)


# ---- GGUF


def text(words: str | bytes) -> bytes:
    data = words if isinstance(words, bytes) else words.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_bytes(
    tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]],
    metadata: bytes = text("general.architecture") + struct.pack("<I", 8) + text("flux"),
    entries: int = 1,
    version: int = 3,
) -> bytes:
    """A GGUF file.

    Args:
        tensors: by name: format, sides as PyTorch counts them, data.
    """
    head, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", side) for side in reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % 32)
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), entries) + metadata + head
    return start + bytes(-len(start) % 32) + data


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
