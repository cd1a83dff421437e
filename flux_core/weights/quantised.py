"""Weights stored in fewer bits, and the exact arithmetic that makes numbers of them again.

Deviation: scales are multiplied in float32 and the product is rounded once; ComfyUI rounds both
factors to the computing dtype first.

Source: Comfy-Org/ComfyUI 0.30.0 QUANTIZATION.md and comfy/quant_ops.py; the order of nvfp4's
block scales is cuBLAS's, docs.nvidia.com/cuda/cublas "1D Block Scaling Factors Layout".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from .header import ANOTHER_FILE
from .names import shorten

BLOCK = 16  # neighbours of one row that share an nvfp4 scale
_TILE_ROWS, _TILE_BLOCKS = 128, 4  # scales are stored in tiles of this size
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1; the fourth bit is the sign


@dataclass(frozen=True, slots=True)
class Quantised:
    """How one tensor of a file is stored."""

    format: str  # as ComfyUI or GGUF names it
    stored_bytes: int  # with its scales
    how: Callable[[Tensor, Sequence[Tensor]], Tensor]  # stored tensor and scales → float32
    scales: tuple[str, ...] = ()  # their keys in the file

    def restore(self, key: str, stored: Tensor, scales: Sequence[Tensor]) -> Tensor:
        """Make the numbers it stands for, in float32.

        Raises:
            CheckpointError: a scale is not finite or below 0, or a number it makes is not finite.
        """
        self._check_scales(key, scales)
        made = self.how(stored, scales)
        self._check_finite(key, made.sum())  # one that is not finite spoils the sum
        return made

    def check(self, key: str, stored: Tensor, scales: Sequence[Tensor]) -> None:
        """Refuse what `restore` refuses, from the largest number alone; float8 and nvfp4.

        Raises:
            CheckpointError: as there.
        """
        self._check_scales(key, scales)
        self._check_finite(key, _largest(stored, scales))

    def _check_scales(self, key: str, scales: Sequence[Tensor]) -> None:
        for name, scale in zip(self.scales, scales, strict=True):
            numbers = scale.view(torch.float8_e4m3fn) if scale.dtype == torch.uint8 else scale
            numbers = numbers.to(torch.float32)
            bad = int((~numbers.isfinite() | (numbers < 0)).sum())
            if bad:
                raise CheckpointError(
                    f"{bad:,} of the {numbers.numel():,} scales of '{shorten(key)}' "
                    f"({shorten(name)}) cannot be.",
                    "finite scales, not below 0.",
                    ANOTHER_FILE,
                )

    def _check_finite(self, key: str, number: Tensor) -> None:
        if not number.isfinite():
            raise CheckpointError(
                f"'{shorten(key)}' holds numbers as {self.format} that are not finite.",
                "finite numbers.",
                ANOTHER_FILE,
            )


def _largest(stored: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """Tell how large a number can be that is made of float8 or nvfp4."""
    if stored.dtype == torch.uint8:
        largest = torch.tensor(_FP4[-1])
    else:
        # Without the sign, bytes of float8 are in the order of their numbers, and NaN comes last.
        # The last byte is the largest below 0, if any is; the last signed byte the largest above.
        last = stored.view(torch.uint8).max(), stored.view(torch.int8).max().view(torch.uint8)
        largest = (torch.stack(last) & 127).max().view(stored.dtype).to(torch.float32)
    for scale in scales:
        numbers = scale.view(torch.float8_e4m3fn) if scale.dtype == torch.uint8 else scale
        largest = largest * numbers.to(torch.float32).max()
    return largest


def restore_float8(stored: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """Scale float8 numbers: one scale for the whole tensor, or one for each row."""
    (scale,) = (one.to(torch.float32) for one in scales)
    return stored.to(torch.float32) * (scale.reshape(()) if scale.numel() == 1 else scale)


def restore_nvfp4(stored: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """Unpack 4-bit numbers and scale each block of 16.

    Args:
        stored: (rows, columns / 2) bytes; the high half comes first.
        scales: of the blocks, as `tiled_scales` counts them; of the tensor; and, where the layer
            smooths its input, one for each column, which belongs to the weight as well here.
    """
    blocks, whole, *smoothing = scales
    rows, columns = stored.shape[0], stored.shape[1] * 2
    values = torch.tensor((*_FP4, *(-value for value in _FP4)))
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=-1)  # (256, 2)
    made = pairs[stored.int()].view(rows, columns // BLOCK, BLOCK)
    made *= (_in_rows(blocks, rows, columns // BLOCK) * whole.to(torch.float32).reshape(()))[
        ..., None
    ]
    made = made.view(rows, columns)
    return made * smoothing[0].to(torch.float32).reshape(columns) if smoothing else made


def tiled_scales(rows: int, columns: int) -> int:
    """Count the block scales of an nvfp4 weight; tiles at its edges are stored whole."""
    return math.prod(tiled_shape(rows, columns))


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Tell the shape ComfyUI gives those scales."""
    down, across = -(-rows // _TILE_ROWS), -(-(columns // BLOCK) // _TILE_BLOCKS)
    return down * _TILE_ROWS, across * _TILE_BLOCKS


def _in_rows(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Bring tiled block scales into the order of the weight, (rows, columns) in float32.

    In a tile, rows 0, 32, 64 and 96 lie together, then 1, 33, …
    """
    down, across = -(-rows // _TILE_ROWS), -(-columns // _TILE_BLOCKS)
    tiles = blocks.contiguous().view(torch.float8_e4m3fn).to(torch.float32)
    tiles = tiles.view(down, across, 32, _TILE_ROWS // 32, _TILE_BLOCKS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * _TILE_ROWS, across * _TILE_BLOCKS)[:rows, :columns]
