"""Attention, which is passed to the network: the protocol, and PyTorch's implementation.

The blocks call whatever attention the network was given. Plain PyTorch is the default; under
ComfyUI it is ComfyUI's choice. Anything that changes which tokens attend to which wraps one.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens.sequence import TokenSequence
from .rope import Rope

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MATH_ELEMENTS = 2**26  # of one piece of the attention matrix, where it is computed by hand


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Which of a run's attention calls this is."""

    step: int  # of the run, from 0
    sigma: float
    block: int  # double blocks first, then single blocks
    queries: TokenSequence  # what the tokens of q are, in order
    keys: TokenSequence  # what the tokens of k and v are, in order
    rope: Rope  # of the queries: `unrotate(q, where.rope)` undoes it


class Attention(Protocol):
    """Computes softmax(q k^T / sqrt(D)) v."""

    @property
    def name(self) -> str:
        """The backend's name; the reference cache reuses no results of another."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        """Attends from q (B, Q, H, D) to k, v (B, L, H, D); returns (B, Q, H D)."""
        ...

    def with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, where: Where
    ) -> tuple[Tensor, Tensor] | None:
        """The same with the log-sum-exp of the logits, (B, H, Q) float32; None if there is none."""
        ...


class PyTorchAttention:
    """PyTorch's own choice of kernel."""

    @property
    def name(self) -> str:
        """PyTorch, and the kernels that are enabled."""
        cuda = torch.backends.cuda
        allowed = {
            "flash": cuda.flash_sdp_enabled(),
            "memory efficient": cuda.mem_efficient_sdp_enabled(),
            "math": cuda.math_sdp_enabled(),
            "cudnn": cuda.cudnn_sdp_enabled(),
        }
        return " ".join(["pytorch", *(name for name, is_allowed in allowed.items() if is_allowed)])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        """Attends from q (B, Q, H, D) to k, v (B, L, H, D); returns (B, Q, H D)."""
        del where
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        """The same with the log-sum-exp of the logits, (B, H, Q) float32."""
        del where
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        attended, lse = _attend_with_lse(q, k, v)
        return attended.transpose(1, 2).flatten(2), lse


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels that PyTorch has on the CPU and on CUDA; else by hand, piece by piece.

    Those kernels check nothing: they need neighbouring channels, and stop the process where there
    is no query or no key.
    """
    count = q.shape[2]
    q, k, v = (one if one.stride(-1) == 1 else one.contiguous() for one in (q, k, v))
    has_kernel = q.dtype in _KERNEL_DTYPES and count > 0 and k.shape[2] > 0
    if has_kernel and q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if has_kernel and q.device.type == "cuda":
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        attended, lse, *_ = kernel(q, k, v, None, True)
        return attended, lse[..., :count]  # the kernel pads it
    size = max(1, _MATH_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    pieces = [_by_hand(q[:, :, at : at + size], k, v) for at in range(0, max(count, 1), size)]
    return torch.cat([one for one, _ in pieces], 2), torch.cat([one for _, one in pieces], 2)


def _by_hand(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logits = (q.float() @ k.float().transpose(-1, -2)) / math.sqrt(q.shape[-1])
    lse = logits.logsumexp(-1)
    return ((logits - lse[..., None]).exp() @ v.float()).to(q.dtype), lse
