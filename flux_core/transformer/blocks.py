"""The blocks of FLUX without their modulation: joint attention and feed-forward.

Key names are the published ones.
Source: black-forest-labs/flux@802fb47 src/flux/modules/layers.py DoubleStreamBlock,
SingleStreamBlock; black-forest-labs/flux2@ab7cca6 src/flux2/model.py for FLUX.2's, with SwiGLU and
without biases. Deviation: query/key normalisation, scale and rotation stay in float32 until the
attention (published code rounds to the model's dtype in between); the last single block computes
the target's tokens alone, since only they are read.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, Where
from .build import Build
from .modulation import Modulation
from .rope import Rope, rotate

NORM_EPS = 1e-6
_HALF_MAX = 65504.0


def modulate(x: Tensor, mod: Modulation) -> Tensor:
    """Normalises x (B, L, hidden) without weights, then scales and shifts it."""
    width = (x.shape[-1],)
    if mod.shift.shape[0] == 1:  # one vector for the whole batch: the norm's own affine, one pass
        weight, bias = mod.one_plus_scale.flatten(), mod.shift.flatten()
        return F.layer_norm(x, width, weight, bias, NORM_EPS)
    return torch.addcmul(mod.shift, F.layer_norm(x, width, eps=NORM_EPS), mod.one_plus_scale)


def add_gated(x: Tensor, mod: Modulation, change: Tensor) -> Tensor:
    """Adds a block's output times its gate."""
    assert mod.gate is not None
    return torch.addcmul(x, mod.gate, change)


def keep_finite(x: Tensor) -> Tensor:
    """Clips float16 to its range, which activations of the published weights exceed.

    Source: huggingface/diffusers 0.42.1 models/transformers/transformer_flux.py.
    """
    return x.clip(-_HALF_MAX, _HALF_MAX) if x.dtype == torch.float16 else x


class _Scale(nn.Module):
    def __init__(self, width: int, **where: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, **where))


class _QueryKeyNorm(nn.Module):
    """RMS norm of queries and keys over each head, with learned scales; float32."""

    def __init__(self, head_dim: int, **where: Any) -> None:
        super().__init__()
        self.query_norm = _Scale(head_dim, **where)
        self.key_norm = _Scale(head_dim, **where)

    def query(self, q: Tensor) -> Tensor:
        return _rms_norm(q, self.query_norm.scale)

    def key(self, k: Tensor) -> Tensor:
        return _rms_norm(k, self.key_norm.scale)


def _rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return F.rms_norm(wide, (wide.shape[-1],), scale.to(wide), NORM_EPS)


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

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, L, hidden): (B, L, H, D) each."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return q, k, v


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
        img_mod: tuple[Modulation, ...],
        txt_mod: tuple[Modulation, ...],
        rope: Rope,
        attention: Attention,
        where: Where,
    ) -> tuple[Tensor, Tensor]:
        """Updates img (B, N, hidden) and txt (B, T, hidden); rope covers text, then image.

        Without text (T = 0) the text weights are not read.
        """
        length = txt.shape[1]
        heads: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer, x, mod, rotation in (
            (self.txt_attn, txt, txt_mod[0], rope[:length]),
            (self.img_attn, img, img_mod[0], rope[length:]),
        ):
            if x.shape[1]:
                q, k, v = layer.split(modulate(x, mod))
                q = rotate(layer.norm.query(q), rotation).to(v.dtype)
                k = rotate(layer.norm.key(k), rotation).to(v.dtype)
                heads.append((q, k, v))
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*heads, strict=True))
        joint = attention(q, k, v, where)
        img = add_gated(img, img_mod[0], self.img_attn.proj(joint[:, length:]))
        img = add_gated(img, img_mod[1], self.img_mlp(modulate(img, img_mod[1])))
        if length:
            txt = add_gated(txt, txt_mod[0], self.txt_attn.proj(joint[:, :length]))
            txt = add_gated(txt, txt_mod[1], self.txt_mlp(modulate(txt, txt_mod[1])))
        return img, keep_finite(txt)


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
        mod: Modulation,
        rope: Rope,
        attention: Attention,
        where: Where,
        wanted: slice = slice(None),
    ) -> Tensor:
        """Updates x (B, L, hidden); returns the `wanted` tokens, which alone are queries."""
        projected = self.linear1(modulate(x, mod))
        q, k, v = projected[..., : 3 * self.hidden].unflatten(-1, (3, self.heads, -1)).unbind(2)
        q = rotate(self.norm.query(q), rope).to(v.dtype)
        k = rotate(self.norm.key(k), rope).to(v.dtype)
        attended = attention(q[:, wanted], k, v, where)
        if not attended.shape[1]:
            return x[:, wanted]  # no token asks; the attention has seen the keys and values
        inner = projected[:, wanted, 3 * self.hidden :]
        inner = gated(inner) if self.is_gated else F.gelu(inner, approximate="tanh")
        change = self.linear2(torch.cat((attended, inner), dim=-1))
        return keep_finite(add_gated(x[:, wanted], mod, change))
