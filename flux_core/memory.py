"""How much memory a job will take, so that one that cannot fit is refused before it starts."""

import math

from .errors import MemoryLimitError
from .families import AutoencoderSpec, TransformerSpec

# Activations alive at once in a single block, in widths of the hidden state: the stream and its
# normed copy, linear1's output (3 + mlp_ratio), q and k rotated in float32 and cast, the attention
# and its join with the MLP, and the velocity's way out.
_BLOCK_WIDTHS = 18
# Bytes of one element, per pixel, for 128 channels. Source: Comfy-Org/ComfyUI@14b05228
# comfy/sd.py VAE.__init__ memory_used_encode, memory_used_decode.
_ENCODE_PER_PIXEL, _DECODE_PER_PIXEL, _CHANNELS = 1767, 2178, 128


def transformer_bytes(spec: TransformerSpec, tokens: int, batch: int, element_bytes: int) -> int:
    """Estimate the activations of one step.

    Args:
        spec: the transformer.
        tokens: of the whole sequence: text, target and references.
        batch: pictures at once; true CFG in one pass doubles it.
        element_bytes: size of one activation.
    """
    widths = _BLOCK_WIDTHS + 2 * spec.mlp_ratio
    return math.ceil(batch * tokens * spec.hidden * widths * element_bytes)


def plan_bytes(spec: TransformerSpec, steps: int, batch: int, element_bytes: int) -> int:
    """Count what the modulation of every block takes for so many steps."""
    vectors = 12 * spec.double_blocks + 3 * spec.single_blocks + 2
    return steps * batch * vectors * spec.hidden * element_bytes


def encode_bytes(spec: AutoencoderSpec, pixels: int, element_bytes: int) -> int:
    """Estimate what encoding one picture of so many pixels takes."""
    return pixels * _ENCODE_PER_PIXEL * element_bytes * spec.channels // _CHANNELS


def decode_bytes(spec: AutoencoderSpec, pixels: int, element_bytes: int) -> int:
    """Estimate what decoding one picture of so many pixels takes."""
    return pixels * _DECODE_PER_PIXEL * element_bytes * spec.channels // _CHANNELS


def require_memory(needed: float, available: float, job: str, fix: str) -> None:
    """Refuse a job that cannot fit.

    Args:
        needed, available: in bytes.
        job: what is to be done, as the beginning of a sentence.
        fix: what to change.

    Raises:
        MemoryLimitError: it needs more than there is.
    """
    if needed > available:
        raise MemoryLimitError(
            f"{job} takes about {_gigabytes(needed)}.",
            f"at most the {_gigabytes(available)} that are free or can be freed.",
            fix,
        )


def _gigabytes(size: float) -> str:
    return f"{size / 1024**3:.1f} GB"
