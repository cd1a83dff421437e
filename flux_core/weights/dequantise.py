"""Quantised weights, and the exact arithmetic that dequantises them.

Deviation: scales are multiplied in float32 and the product is rounded once; ComfyUI rounds both
factors to the computing dtype first.

Source: Comfy-Org/ComfyUI 0.30.0 QUANTIZATION.md and comfy/quant_ops.py; the order of nvfp4's
block scales is cuBLAS's, docs.nvidia.com/cuda/cublas "1D Block Scaling Factors Layout".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError, shorten
from .files import ANOTHER_FILE

BLOCK = 16  # neighbours of one row that share an nvfp4 scale
_TILE_ROWS, _TILE_BLOCKS = 128, 4  # scales lie in the file in tiles of this size
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1; the fourth bit is the sign


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How one tensor of a file is quantised."""

    format: str  # as ComfyUI or GGUF names it
    file_bytes: int  # with its scales
    compute: Callable[[Tensor, Sequence[Tensor]], Tensor]  # raw tensor and scales → float32
    scales: tuple[str, ...] = ()  # their keys in the file

    def dequantise(self, key: str, raw: Tensor, scales: Sequence[Tensor]) -> Tensor:
        """Returns the weight in float32.

        Raises:
            CheckpointError: a scale is not finite or below 0, or a value is not finite.
        """
        self._check_scales(key, scales)
        values = self.compute(raw, scales)
        self._check_finite(key, values.sum())  # one that is not finite spoils the sum
        return values

    def check(self, key: str, raw: Tensor, scales: Sequence[Tensor]) -> None:
        """Refuses what `dequantise` refuses, from the largest value alone; float8 and nvfp4.

        Raises:
            CheckpointError: as there.
        """
        self._check_scales(key, scales)
        self._check_finite(key, _largest(raw, scales))

    def _check_scales(self, key: str, scales: Sequence[Tensor]) -> None:
        for name, scale in zip(self.scales, scales, strict=True):
            values = _scale_values(scale)
            bad = int((~values.isfinite() | (values < 0)).sum())
            if bad:
                raise CheckpointError(
                    f"{bad:,} of the {values.numel():,} scales of '{shorten(key)}' "
                    f"({shorten(name)}) cannot be.",
                    "finite scales, not below 0.",
                    ANOTHER_FILE,
                )

    def _check_finite(self, key: str, value: Tensor) -> None:
        if not value.isfinite():
            raise CheckpointError(
                f"'{shorten(key)}' holds numbers as {self.format} that are not finite.",
                "finite numbers.",
                ANOTHER_FILE,
            )


def _largest(raw: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """Returns an upper bound of the values that float8 or nvfp4 weights dequantise to."""
    if raw.dtype == torch.uint8:
        largest = torch.tensor(_FP4[-1])
    else:
        # Without the sign, bytes of float8 are in the order of their numbers, and NaN comes last.
        # The last byte is the largest below 0, if any is; the last signed byte the largest above.
        last = raw.view(torch.uint8).max(), raw.view(torch.int8).max().view(torch.uint8)
        largest = (torch.stack(last) & 127).max().view(raw.dtype).to(torch.float32)
    for scale in scales:
        largest = largest * _scale_values(scale).max()
    return largest


def _scale_values(scale: Tensor) -> Tensor:
    """Returns scales in float32; bytes are float8."""
    return (scale.view(torch.float8_e4m3fn) if scale.dtype == torch.uint8 else scale).float()


def dequantise_float8(raw: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """Scales float8 numbers: one scale for the whole tensor, or one for each row."""
    (scale,) = (one.to(torch.float32) for one in scales)
    return raw.to(torch.float32) * (scale.reshape(()) if scale.numel() == 1 else scale)


def dequantise_nvfp4(raw: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """Unpacks 4-bit numbers and scales each block of 16.

    Args:
        raw: (rows, columns / 2) bytes; the high half comes first.
        scales: of the blocks, as many as `tiled_shape` has; of the tensor; and, where the layer
            smooths its input, one for each column, which belongs to the weight as well here.
    """
    blocks, whole, *smoothing = scales
    rows, columns = raw.shape[0], raw.shape[1] * 2
    values = torch.tensor((*_FP4, *(-value for value in _FP4)))
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=-1)  # (256, 2)
    weight = pairs[raw.int()].view(rows, columns // BLOCK, BLOCK)
    weight *= (_in_rows(blocks, rows, columns // BLOCK) * whole.to(torch.float32).reshape(()))[
        ..., None
    ]
    weight = weight.view(rows, columns)
    return weight * smoothing[0].to(torch.float32).reshape(columns) if smoothing else weight


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Returns the shape of the block scales of an nvfp4 weight: whole tiles, at its edges too."""
    down, across = -(-rows // _TILE_ROWS), -(-(columns // BLOCK) // _TILE_BLOCKS)
    return down * _TILE_ROWS, across * _TILE_BLOCKS


def _in_rows(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Reorders tiled block scales as the weight has them, (rows, columns) in float32.

    In a tile, rows 0, 32, 64 and 96 lie together, then 1, 33, …
    """
    down, across = -(-rows // _TILE_ROWS), -(-columns // _TILE_BLOCKS)
    tiles = blocks.contiguous().view(torch.float8_e4m3fn).to(torch.float32)
    tiles = tiles.view(down, across, 32, _TILE_ROWS // 32, _TILE_BLOCKS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * _TILE_ROWS, across * _TILE_BLOCKS)[:rows, :columns]
