"""Rotary position embedding over several id axes.

Source: black-forest-labs/flux@802fb47 src/flux/math.py rope, apply_rope. Deviation: the
frequencies are made in float64, as diffusers and ComfyUI do; float32 differs by about 1e-7.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Ids


class Rope(NamedTuple):
    """Cosines and sines of every token, (L, 1, head_dim / 2) float32 each."""

    cos: Tensor
    sin: Tensor

    def rows(self, start: int, stop: int) -> "Rope":
        """Give the part of the tokens from `start` up to `stop`."""
        return Rope(self.cos[start:stop], self.sin[start:stop])


def rope_tables(
    ids: Ids, axes_dim: tuple[int, ...], theta: float, device: torch.device | str | None = None
) -> Rope:
    """Compute the rotation of every token.

    Args:
        ids: (L, A) positions.
        axes_dim: channels of a head that each axis rotates; their sum is the head width.
        theta: base of the frequencies.
        device: where the result goes; the float64 work is done on the CPU (MPS has none).
    """
    positions = ids.detach().to("cpu", torch.float64)
    angles = [
        positions[:, axis, None] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for axis, dim in enumerate(axes_dim)
    ]
    angle = torch.cat(angles, dim=-1)[:, None, :]
    return Rope(angle.cos().to(device, torch.float32), angle.sin().to(device, torch.float32))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent channel pairs of x (B, L, H, D), in float32; the result is float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(
        (even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos), dim=-1
    ).flatten(-2)
