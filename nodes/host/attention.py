"""ComfyUI's own attention, as its flags and the device choose it.

Imported with the first model: what it builds on takes time to import.
"""

from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.ldm.modules.diffusionmodules.model as vae
import comfy.model_management as mm
import torch
from comfy.cli_args import args
from torch import Tensor

from ...flux_core.image.autoencoder import AttendCells, attend_cells
from ...flux_core.transformer.attention import Attention, PyTorchAttention, Where

_FLAGS = (
    "use_split_cross_attention",
    "use_quad_cross_attention",
    "use_pytorch_cross_attention",
    "use_sage_attention",
    "use_flash_attention",
)


def transformer_attention(device: torch.device) -> Attention:
    """Returns the attention for a transformer: ComfyUI's choice.

    On a CPU it is PyTorch's unless a flag says otherwise: ComfyUI's default there, sub-quadratic,
    dates from when PyTorch held the whole matrix in memory.
    """
    return PyTorchAttention() if _is_plain(device) else ComfyAttention()


def autoencoder_attention(device: torch.device) -> AttendCells:
    """Returns the attention for an autoencoder, chosen as for transformers."""
    return attend_cells if _is_plain(device) else vae.vae_attention()


def _is_plain(device: torch.device) -> bool:
    return mm.is_device_cpu(device) and not any(getattr(args, flag, False) for flag in _FLAGS)


class ComfyAttention:
    """`optimized_attention`, looked up at every call: other packs replace it."""

    @property
    def name(self) -> str:
        """The function's name, and the kernels that PyTorch may choose from."""
        chosen = attention.optimized_attention
        function = getattr(chosen, "__qualname__", None) or repr(chosen)  # it may be any callable
        return f"{getattr(chosen, '__module__', '')}.{function}, {PyTorchAttention().name}"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        """Attends from q (B, Q, H, D) to k, v (B, L, H, D); returns (B, Q, H D)."""
        del where
        compute: Any = attention.optimized_attention
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return compute(q, k, v, q.shape[1], skip_reshape=True)

    def with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, where: Where
    ) -> tuple[Tensor, Tensor] | None:
        """The same with the log-sum-exp if ComfyUI's choice is PyTorch; None for other backends."""
        if attention.optimized_attention is not attention.attention_pytorch:
            return None
        return PyTorchAttention().with_lse(q, k, v, where)
