"""The layer classes every module with weights is built from.

ComfyUI hands in `comfy.ops.*` so that it can cast, move and patch weights; outside it is
`torch.nn`. Both construct as `Linear(in, out, bias=..., dtype=..., device=...)`.
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
