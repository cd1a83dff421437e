"""The blocks of FLUX.1 without their modulation: joint attention and feed-forward.

Key names are the published ones.
Source: black-forest-labs/flux@802fb47 src/flux/modules/layers.py DoubleStreamBlock,
SingleStreamBlock. Deviation: query/key normalisation, scale and rotation stay in float32 until the
attention (published code rounds to the model's dtype in between); the last single block is asked
for the target's tokens alone, which is all that is read of it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families import TransformerSpec
from ..operations import Operations
from .modulation import Shift
from .rope import Rope, rotate

NORM_EPS = 1e-6
_HALF_MAX = 65504.0


def modulate(x: Tensor, mod: Shift) -> Tensor:
    """Normalise x (B, L, hidden) without weights, then scale and shift it."""
    width = (x.shape[-1],)
    if mod.shift.shape[0] == 1:  # one vector for all rows: the norm's own affine, one pass
        weight, bias = mod.one_plus_scale.flatten(), mod.shift.flatten()
        return F.layer_norm(x, width, weight, bias, NORM_EPS)
    return torch.addcmul(mod.shift, F.layer_norm(x, width, eps=NORM_EPS), mod.one_plus_scale)


def add_gated(x: Tensor, mod: Shift, change: Tensor) -> Tensor:
    """Add a block's output through its gate."""
    assert mod.gate is not None
    return torch.addcmul(x, mod.gate, change)


def keep_finite(x: Tensor) -> Tensor:
    """Clip float16 to what it can hold, where the published weights overflow it.

    Source: huggingface/diffusers 0.42.1 models/transformers/transformer_flux.py.
    """
    return x.clip(-_HALF_MAX, _HALF_MAX) if x.dtype == torch.float16 else x


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask: q, k, v (B, L, H, D) to (B, L of q, H D)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Scale(nn.Module):
    def __init__(self, width: int, **where: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, **where))


class _QueryKeyNorm(nn.Module):
    """RMS norm over a head, learned scale, rotation: for queries and keys."""

    def __init__(self, head_dim: int, **where: Any) -> None:
        super().__init__()
        self.query_norm = _Scale(head_dim, **where)
        self.key_norm = _Scale(head_dim, **where)

    def forward(self, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        return (
            self._one(q, self.query_norm.scale, rope),
            self._one(k, self.key_norm.scale, rope),
        )

    @staticmethod
    def _one(x: Tensor, scale: Tensor, rope: Rope) -> Tensor:
        wide = x.float()
        normed = F.rms_norm(wide, (wide.shape[-1],), scale.to(wide), NORM_EPS)
        return rotate(normed, rope).to(x.dtype)


class _Attention(nn.Module):
    """Projections of one stream of a double block."""

    def __init__(self, spec: TransformerSpec, operations: Operations, **where: Any) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = operations.Linear(spec.hidden, 3 * spec.hidden, bias=True, **where)
        self.norm = _QueryKeyNorm(spec.head_dim, **where)
        self.proj = operations.Linear(spec.hidden, spec.hidden, bias=True, **where)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return (*self.norm(q, k, rope), v)


def _mlp(spec: TransformerSpec, operations: Operations, **where: Any) -> nn.Sequential:
    inner = int(spec.hidden * spec.mlp_ratio)
    return nn.Sequential(
        operations.Linear(spec.hidden, inner, bias=True, **where),
        nn.GELU(approximate="tanh"),
        operations.Linear(inner, spec.hidden, bias=True, **where),
    )


class DoubleBlock(nn.Module):
    """Text and image with weights of their own, attending jointly."""

    def __init__(self, spec: TransformerSpec, operations: Operations, **where: Any) -> None:
        super().__init__()
        self.img_attn = _Attention(spec, operations, **where)
        self.img_mlp = _mlp(spec, operations, **where)
        self.txt_attn = _Attention(spec, operations, **where)
        self.txt_mlp = _mlp(spec, operations, **where)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: tuple[Shift, ...],
        txt_mod: tuple[Shift, ...],
        rope: Rope,
    ) -> tuple[Tensor, Tensor]:
        """Update img (B, N, hidden) and txt (B, T, hidden); rope covers text, then image."""
        length = txt.shape[1]
        txt_qkv = self.txt_attn.project(modulate(txt, txt_mod[0]), rope[:length])
        img_qkv = self.img_attn.project(modulate(img, img_mod[0]), rope[length:])
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(txt_qkv, img_qkv, strict=True))
        joint = attend(q, k, v)
        img = add_gated(img, img_mod[0], self.img_attn.proj(joint[:, length:]))
        img = add_gated(img, img_mod[1], self.img_mlp(modulate(img, img_mod[1])))
        txt = add_gated(txt, txt_mod[0], self.txt_attn.proj(joint[:, :length]))
        txt = add_gated(txt, txt_mod[1], self.txt_mlp(modulate(txt, txt_mod[1])))
        return img, keep_finite(txt)


class SingleBlock(nn.Module):
    """Text and image in one sequence; attention and feed-forward side by side."""

    def __init__(self, spec: TransformerSpec, operations: Operations, **where: Any) -> None:
        super().__init__()
        self.heads, self.hidden = spec.heads, spec.hidden
        inner = int(spec.hidden * spec.mlp_ratio)
        self.linear1 = operations.Linear(spec.hidden, 3 * spec.hidden + inner, bias=True, **where)
        self.linear2 = operations.Linear(spec.hidden + inner, spec.hidden, bias=True, **where)
        self.norm = _QueryKeyNorm(spec.head_dim, **where)

    def forward(self, x: Tensor, mod: Shift, rope: Rope, wanted: slice = slice(None)) -> Tensor:
        """Update x (B, L, hidden); the result holds the `wanted` tokens only."""
        projected = self.linear1(modulate(x, mod))
        q, k, v = projected[..., : 3 * self.hidden].unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = self.norm(q, k, rope)
        attention = attend(q[:, wanted], k, v)
        inner = F.gelu(projected[:, wanted, 3 * self.hidden :], approximate="tanh")
        change = self.linear2(torch.cat((attention, inner), dim=-1))
        return keep_finite(add_gated(x[:, wanted], mod, change))
