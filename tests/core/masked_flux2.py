"""FLUX.2's forward written from its weights alone, in one sequence and with a plain mask.

Independent of the pack's blocks: text | references | target, where reference rows see reference
columns only and are modulated at a time of their own, and every other row sees everything.
Source: black-forest-labs/flux2 src/flux2/model.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glassbox.flux_core.transformer.flux import Flux
from glassbox.flux_core.values import Conditioning, Tokens

EPS = 1e-6


def masked_velocity(
    network: Flux,
    one: Conditioning,
    noise: Tokens,
    sigma: float,
    *,
    masked: bool = True,
    reference_time: float = 0.0,
) -> Tensor:
    """Predicts the velocity of the target; without the mask everybody sees everything."""
    references = torch.cat([seen.tokens.values for seen in one.references], dim=1)
    text, count, target = one.text.txt.shape[1], references.shape[1], noise.values.shape[1]
    allowed = torch.ones(text + count + target, text + count + target, dtype=torch.bool)
    if masked:
        allowed[text : text + count] = False
        allowed[text : text + count, text : text + count] = True
    ids = torch.zeros(text, 4)
    ids[:, 3] = torch.arange(text)
    published = _Published(
        weights={**network.modulation.state_dict(), **network.blocks.state_dict()},
        doubles=network.spec.double_blocks,
        singles=network.spec.single_blocks,
        head_dim=network.spec.head_dim,
        turn=_turns(
            torch.cat([ids, *(seen.tokens.ids for seen in one.references), noise.ids]),
            network.spec.axes_dim,
        ),
        allowed=allowed,
        times=torch.tensor([sigma] * text + [reference_time] * count + [sigma] * target),
    )
    img = torch.cat((references, noise.values), dim=1)
    return published.velocity(one.text.txt, img)[:, -target:]


@dataclass(frozen=True)
class _Published:
    weights: dict[str, Tensor]
    doubles: int
    singles: int
    head_dim: int
    turn: Tensor  # (L, head_dim / 2), complex
    allowed: Tensor  # (L, L): may this row see this column?
    times: Tensor  # (L,): what each token is modulated at

    def velocity(self, txt: Tensor, img: Tensor) -> Tensor:
        text = txt.shape[1]
        streams = {"txt": self.linear("txt_in", txt), "img": self.linear("img_in", img)}
        places = {"txt": slice(0, text), "img": slice(text, None)}
        for number in range(self.doubles):
            self.double(f"double_blocks.{number}", streams, places)
        x = torch.cat((streams["txt"], streams["img"]), dim=1)
        for number in range(self.singles):
            x = self.single(f"single_blocks.{number}", x)
        shift, scale = self.modulation("final_layer.adaLN_modulation.1", 2)
        return self.linear("final_layer.linear", _modulate(x, shift, scale))

    def double(self, block: str, streams: dict[str, Tensor], places: dict[str, slice]) -> None:
        mods, projected = {}, []
        for name, x in streams.items():
            mod = self.modulation(f"double_stream_modulation_{name}.lin", 6)
            mods[name] = mod = [part[:, places[name]] for part in mod]
            qkv = self.linear(f"{block}.{name}_attn.qkv", _modulate(x, mod[0], mod[1]))
            projected.append(self.split(qkv, f"{block}.{name}_attn.norm", self.turn[places[name]]))
        joint = self.attend(*(torch.cat(pair, dim=1) for pair in zip(*projected, strict=True)))
        for name, x in streams.items():
            mod = mods[name]
            x = x + mod[2] * self.linear(f"{block}.{name}_attn.proj", joint[:, places[name]])
            inner = _gated(self.linear(f"{block}.{name}_mlp.0", _modulate(x, mod[3], mod[4])))
            streams[name] = x + mod[5] * self.linear(f"{block}.{name}_mlp.2", inner)

    def single(self, block: str, x: Tensor) -> Tensor:
        shift, scale, gate = self.modulation("single_stream_modulation.lin", 3)
        fused = self.linear(f"{block}.linear1", _modulate(x, shift, scale))
        width = 3 * x.shape[-1]
        joint = self.attend(*self.split(fused[..., :width], f"{block}.norm", self.turn))
        change = torch.cat((joint, _gated(fused[..., width:])), dim=-1)
        return x + gate * self.linear(f"{block}.linear2", change)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def modulation(self, name: str, parts: int) -> tuple[Tensor, ...]:
        """Give every token its own: (1, L, hidden) for each part."""
        # rounded as published: the angle is 1000 times larger than its last bit
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(128.0) / 128)
        angle = 1000.0 * self.times[:, None] * frequencies
        embedded = torch.cat((angle.cos(), angle.sin()), dim=-1)
        vec = self.linear("time_in.out_layer", F.silu(self.linear("time_in.in_layer", embedded)))
        return self.linear(name, F.silu(vec))[None].chunk(parts, dim=-1)

    def split(self, qkv: Tensor, norm: str, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        q = q * (q.square().mean(-1, keepdim=True) + EPS).rsqrt()
        k = k * (k.square().mean(-1, keepdim=True) + EPS).rsqrt()
        q = _rotate(q * self.weights[f"{norm}.query_norm.scale"], turn)
        return q, _rotate(k * self.weights[f"{norm}.key_norm.scale"], turn), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.head_dim**0.5
        weights = scores.masked_fill(~self.allowed, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def _turns(ids: Tensor, axes_dim: tuple[int, ...]) -> Tensor:
    angles = [
        ids[:, axis, None].double() / 2000.0 ** (torch.arange(0, dim, 2).double() / dim)
        for axis, dim in enumerate(axes_dim)
    ]
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = turn.real[:, None], turn.imag[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return normed * (1 + scale) + shift


def _gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
