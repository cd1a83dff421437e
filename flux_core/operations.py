"""The layer classes that every module with weights is built from.

Inside ComfyUI they are those of `comfy.ops`, so that it can cast, move and patch weights; outside,
`torch.nn`. Both are called as `Linear(in, out, bias=..., dtype=..., device=...)`.

Layers that keep weights quantised, such as those of ComfyUI's `mixed_precision_ops`, are built
without a weight, on the device where it will be. Besides `weight` and `bias`, their
`load_state_dict` accepts:

- `comfy_quant`: bytes of JSON, {"format": "float8_e4m3fn", "float8_e5m2" or "nvfp4"}; without it
  the weight is plain.
- `weight_scale`: the tensor's scale, float32 (); or nvfp4's block scales, in cuBLAS's tiles.
- `weight_scale_2`: nvfp4's scale of the whole tensor, float32 ().
- `pre_quant_scale`: nvfp4's smoothing, float32 (inputs,): the layer's input is multiplied by it.
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
    """Returns PyTorch's own layers."""
    return nn  # type: ignore[return-value]
