"""The weights of one text encoder: what they are stored as, and how they get into a module."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .convert import describe_dequantised
from .files import Checkpoint
from .text_files import WAY_OUT
from .text_keys import Part

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class Found:
    """One encoder and the file it lies in."""

    part: Part
    file: Checkpoint


def dtype_of(one: Found, asked: torch.dtype | None) -> torch.dtype:
    """Give the dtype asked for, else what most of the weights have or quantised ones widen to.

    Raises:
        CheckpointError: some are stored in another way.
    """
    sizes: dict[torch.dtype, int] = {}
    for key in one.part.keys.values():
        stored = torch.bfloat16 if key in one.file.quantised else one.file.dtypes[key]
        sizes[stored] = sizes.get(stored, 0) + count(one.file.shapes[key])
    odd = [stored for stored in sizes if stored not in (*_FLOATS, *_FP8)]
    if odd:
        raise CheckpointError(
            f"{one.file.path.name} stores {one.part.kind} as {name_of(odd[0])}.",
            "float32, bfloat16, float16 or float8 weights, or quantised ones that say how.",
            WAY_OUT,
        )
    if asked is not None:
        return asked
    most = max(sizes, key=lambda stored: sizes[stored])
    return torch.bfloat16 if most in _FP8 else most


def fill(
    module: nn.Module,
    one: Found,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device | None,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Hand the file's tensors to an empty module; those that need no change stay mapped.

    Args:
        module: on `meta`; its names are those of the part.
        one: the encoder and its file.
        dtype_of: gives a weight's dtype by its name.
        device: where the weights go; None leaves them where they are.
        change: makes our tensor of the file's, by our name.
    """
    # transformers 4 keeps CLIP's text tower in an attribute, which is part of every name.
    inner = "text_model." if hasattr(module, "text_model") else ""
    names = {key: name for name, key in one.part.keys.items()}
    state: dict[str, Tensor] = {}
    for key, stored in one.file.stream(names):
        name = names[key]
        made = stored if change is None else change(name, stored)
        state[inner + name] = made.to(device=device, dtype=dtype_of(name))
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def dequantised(one: Found, dtype_of: Callable[[str], torch.dtype]) -> Iterator[str]:
    """Tell for each format how many weights were made plain, and what that costs."""
    parts = ((key, dtype_of(name)) for name, key in one.part.keys.items())
    return describe_dequantised(one.file, parts)


def count(shape: tuple[int, ...]) -> int:
    """Count the numbers of a tensor."""
    return int(torch.Size(shape).numel())


def name_of(dtype: torch.dtype) -> str:
    """Give a dtype's name as people write it."""
    return str(dtype).removeprefix("torch.")
