"""The layer classes every module with weights is built from.

ComfyUI hands in `comfy.ops.*` so that it can cast, move and patch weights; outside it is
`torch.nn`. Both construct as `Linear(in, out, bias=..., dtype=..., device=...)`.

Layers that hold quantised weights as they are stored, such as ComfyUI's `mixed_precision_ops`, are
made without a weight, on the device that keeps it. Their `load_state_dict` accepts beside `weight`
and `bias`:

- `comfy_quant`: bytes of JSON, {"format": "float8_e4m3fn", "float8_e5m2" or "nvfp4"}; without it
  the weight is plain.
- `weight_scale`: of the tensor, float32 (); of nvfp4's blocks, in tiles as cuBLAS reads them.
- `weight_scale_2`: nvfp4's scale of the tensor, float32 ().
- `pre_quant_scale`: nvfp4's smoothing, float32 (inputs,), by which the layer multiplies its input.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn


class Operations(Protocol):
    """A namespace of layer classes."""

    Linear: Callable[..., Any]
    Conv2d: Callable[..., Any]
    GroupNorm: Callable[..., Any]
    LayerNorm: Callable[..., Any]
    Embedding: Callable[..., Any]


def torch_operations() -> Operations:
    """Give PyTorch's own layers."""
    return nn  # type: ignore[return-value]
