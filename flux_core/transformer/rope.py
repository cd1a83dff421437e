"""Rotary position embedding over several id axes.

Source: black-forest-labs/flux@802fb47 src/flux/math.py rope, apply_rope. Deviation: the
frequencies are computed in float64, as diffusers and ComfyUI do; float32 differs by about 1e-7.
"""

from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from ..types import Ids

Rope: TypeAlias = Annotated[Tensor, "L 1 D/2, complex64, of length 1"]  # one per channel pair


def rope_table(
    ids: Ids, axes_dim: tuple[int, ...], theta: float, device: torch.device | str | None = None
) -> Rope:
    """Returns the rotation of every token and channel pair.

    Args:
        ids: (L, A) position ids.
        axes_dim: channels of a head that each axis rotates; their sum is the head width.
        theta: base of the frequencies.
        device: where the result goes; the angles are computed on the CPU (MPS has no float64).
    """
    positions = ids.detach().to("cpu", torch.float64)
    angles = [
        positions[:, axis, None] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for axis, dim in enumerate(axes_dim)
    ]
    angle = torch.cat(angles, dim=-1)[:, None, :]
    return torch.complex(angle.cos().float(), angle.sin().float()).to(device)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates adjacent channel pairs of x (B, L, H, D); the result is float32.

    A pair is one complex number and its rotation one product: a single pass over memory.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2)


def unrotate(x: Tensor, rope: Rope) -> Tensor:
    """The inverse of `rotate`, exact up to rounding."""
    return rotate(x, rope.conj())
