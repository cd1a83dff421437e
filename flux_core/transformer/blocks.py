"""The blocks of FLUX without their modulation: joint attention and feed-forward.

Key names are the published ones.
Source: black-forest-labs/flux@802fb47 src/flux/modules/layers.py DoubleStreamBlock,
SingleStreamBlock; black-forest-labs/flux2@ab7cca6 src/flux2/model.py for FLUX.2's, with SwiGLU and
without biases. Deviation: query/key normalisation, scale and rotation stay in float32 until the
attention (published code rounds to the model's dtype in between); the last single block is asked
for the target's tokens alone, which is all that is read of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .build import Build
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


@dataclass(frozen=True, slots=True)
class KeyValue:
    """Rotated keys and values (1 or B, R, H, D) that tokens of one block attend to as well."""

    key: Tensor
    value: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, more: KeyValue | None = None) -> Tensor:
    """Attention without a mask: q, k, v (B, L, H, D) to (B, L of q, H D)."""
    if more is not None:
        batch = k.shape[0]
        k = torch.cat((more.key.expand(batch, -1, -1, -1), k), dim=1)
        v = torch.cat((more.value.expand(batch, -1, -1, -1), v), dim=1)
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


class _SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return gated(x)


class _Attention(nn.Module):
    """Projections of one stream of a double block."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        spec = build.spec
        self.heads = spec.heads
        self.qkv = build.linear(spec.hidden, 3 * spec.hidden)
        self.norm = _QueryKeyNorm(spec.head_dim, **build.where)
        self.proj = build.linear(spec.hidden, spec.hidden)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return (*self.norm(q, k, rope), v)


def _mlp(build: Build) -> nn.Sequential:
    spec = build.spec
    inner = spec.mlp_width
    return nn.Sequential(
        build.linear(spec.hidden, 2 * inner if spec.is_gated else inner),
        _SwiGLU() if spec.is_gated else nn.GELU(approximate="tanh"),
        build.linear(inner, spec.hidden),
    )


def gated(x: Tensor) -> Tensor:
    """SwiGLU: the first half of the channels, through SiLU, times the second."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class DoubleBlock(nn.Module):
    """Text and image with weights of their own, attending jointly."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.img_attn = _Attention(build)
        self.img_mlp = _mlp(build)
        self.txt_attn = _Attention(build)
        self.txt_mlp = _mlp(build)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: tuple[Shift, ...],
        txt_mod: tuple[Shift, ...],
        rope: Rope,
        kept: KeyValue | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Update img (B, N, hidden) and txt (B, T, hidden); rope covers text, then image."""
        length = txt.shape[1]
        txt_qkv = self.txt_attn.project(modulate(txt, txt_mod[0]), rope[:length])
        img_qkv = self.img_attn.project(modulate(img, img_mod[0]), rope[length:])
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(txt_qkv, img_qkv, strict=True))
        joint = attend(q, k, v, kept)
        img = self._finish_image(img, joint[:, length:], img_mod)
        txt = add_gated(txt, txt_mod[0], self.txt_attn.proj(joint[:, :length]))
        txt = add_gated(txt, txt_mod[1], self.txt_mlp(modulate(txt, txt_mod[1])))
        return img, keep_finite(txt)

    def references(
        self, x: Tensor, mod: tuple[Shift, ...], rope: Rope, *, is_last: bool
    ) -> tuple[Tensor, KeyValue]:
        """Update references x (B, R, hidden) that see themselves alone; also what others see."""
        q, k, v = self.img_attn.project(modulate(x, mod[0]), rope)
        kept = KeyValue(k, v.contiguous())  # v is a view into a wide projection
        return (x if is_last else self._finish_image(x, attend(q, k, v), mod)), kept

    def _finish_image(self, img: Tensor, attention: Tensor, mod: tuple[Shift, ...]) -> Tensor:
        img = add_gated(img, mod[0], self.img_attn.proj(attention))
        return add_gated(img, mod[1], self.img_mlp(modulate(img, mod[1])))


class SingleBlock(nn.Module):
    """Text and image in one sequence; attention and feed-forward side by side."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        spec = build.spec
        self.heads, self.hidden, self.is_gated = spec.heads, spec.hidden, spec.is_gated
        inner = spec.mlp_width
        wide = 2 * inner if spec.is_gated else inner
        self.linear1 = build.linear(spec.hidden, 3 * spec.hidden + wide)
        self.linear2 = build.linear(spec.hidden + inner, spec.hidden)
        self.norm = _QueryKeyNorm(spec.head_dim, **build.where)

    def forward(
        self,
        x: Tensor,
        mod: Shift,
        rope: Rope,
        wanted: slice = slice(None),
        kept: KeyValue | None = None,
    ) -> Tensor:
        """Update x (B, L, hidden); the result holds the `wanted` tokens only."""
        projected, q, k, v = self._project(x, mod, rope)
        return self._finish(
            x[:, wanted], projected[:, wanted], attend(q[:, wanted], k, v, kept), mod
        )

    def references(
        self, x: Tensor, mod: Shift, rope: Rope, *, is_last: bool
    ) -> tuple[Tensor, KeyValue]:
        """Update references x (B, R, hidden) that see themselves alone; also what others see."""
        projected, q, k, v = self._project(x, mod, rope)
        kept = KeyValue(k, v.contiguous())  # v is a view into a wide projection
        return (x if is_last else self._finish(x, projected, attend(q, k, v), mod)), kept

    def _project(self, x: Tensor, mod: Shift, rope: Rope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        projected = self.linear1(modulate(x, mod))
        q, k, v = projected[..., : 3 * self.hidden].unflatten(-1, (3, self.heads, -1)).unbind(2)
        return projected, *self.norm(q, k, rope), v

    def _finish(self, x: Tensor, projected: Tensor, attention: Tensor, mod: Shift) -> Tensor:
        inner = projected[..., 3 * self.hidden :]
        inner = gated(inner) if self.is_gated else F.gelu(inner, approximate="tanh")
        change = self.linear2(torch.cat((attention, inner), dim=-1))
        return keep_finite(add_gated(x, mod, change))
