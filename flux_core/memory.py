"""Estimates of a job's memory, so that one that cannot fit is refused before it starts."""

import math

from .errors import MemoryLimitError
from .specs import AutoencoderSpec, LatentSpec, TransformerSpec

# Activations alive at once in a block, in hidden widths, beside the MLP's. Measured on a CPU with
# 8,704 tokens: 30 in all in float32, 38 in bfloat16, which rotates in float32. With SwiGLU, 4,352
# tokens: 26 and 35; its gate takes what GELU's wider MLP does.
_BLOCK_WIDTHS = 30
# Elements for each pixel at 128 channels. Measured on a CPU in float32, 256 to 1024 px: 700 to 815
# and 1,010 to 1,195. comfy/sd.py of Comfy-Org/ComfyUI@14b05228 plans with about twice as much.
_ENCODE_PER_PIXEL, _DECODE_PER_PIXEL, _CHANNELS = 850, 1250, 128


def transformer_bytes(spec: TransformerSpec, tokens: int, batch: int, element_bytes: int) -> int:
    """Estimates the bytes of one step's activations.

    Args:
        spec: the transformer.
        tokens: of the whole sequence: text, target and references.
        batch: batch size, doubled by true CFG in one pass.
        element_bytes: bytes of one activation.
    """
    widths = _BLOCK_WIDTHS + 2 * spec.mlp_ratio
    return math.ceil(batch * tokens * spec.hidden * widths * element_bytes)


def attended_bytes(spec: TransformerSpec, tokens: int, batch: int, element_bytes: int) -> int:
    """Estimates the bytes a block takes to attend to so many tokens outside the sequence.

    Their cached keys and values are joined with the sequence's: 6 widths each, measured on a CPU.
    """
    return 6 * batch * tokens * spec.hidden * element_bytes


def plan_bytes(spec: TransformerSpec, steps: int, batch: int, element_bytes: int) -> int:
    """Returns the bytes of modulation for so many steps: every block's, or the shared one's.

    Shift, scale and gate are views of their layer's output; 1 + scale is stored beside it.
    """
    doubles, singles = spec.double_blocks, spec.single_blocks
    if spec.shares_modulation:
        doubles = singles = 1
    vectors = 16 * doubles + 4 * singles + 3
    return steps * batch * vectors * spec.hidden * element_bytes


def encode_bytes(spec: AutoencoderSpec, pixels: int, element_bytes: int) -> int:
    """Estimates the bytes that encoding one image of so many pixels takes."""
    return pixels * _ENCODE_PER_PIXEL * element_bytes * spec.channels // _CHANNELS


def decode_bytes(spec: AutoencoderSpec, pixels: int, element_bytes: int) -> int:
    """Estimates the bytes that decoding one image of so many pixels takes."""
    channels = spec.decoder_channels or spec.channels
    return pixels * _DECODE_PER_PIXEL * element_bytes * channels // _CHANNELS


def noise_bytes(latent: LatentSpec, height_px: int, width_px: int, batch: int) -> int:
    """Returns the bytes of noise while it is drawn and packed, in float32."""
    pixels = max(batch, 0) * max(height_px, 0) * max(width_px, 0)
    return 2 * 4 * latent.channels * pixels // latent.downscale**2


def fit_bytes(batch: int, height_px: int, width_px: int) -> int:
    """Estimates the bytes that resizing a batch to this size takes: result and one copy."""
    return 2 * 3 * 4 * max(batch, 0) * max(height_px, 0) * max(width_px, 0)


def require_memory(needed: float, available: float, job: str, fix: str) -> None:
    """Checks that a job fits into memory.

    Args:
        needed, available: bytes.
        job: what takes the memory, as the beginning of a sentence.
        fix: what to change.

    Raises:
        MemoryLimitError: more is needed than available.
    """
    if needed > available:
        raise MemoryLimitError(
            f"{job} takes about {_gigabytes(needed)}.",
            f"at most the {_gigabytes(available)} that are free or can be freed.",
            fix,
        )


def _gigabytes(size: float) -> str:
    return f"{size / 1024**3:.1f} GB"
