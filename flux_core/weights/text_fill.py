"""The weights of one text encoder: what they are stored as, and how they get into a module."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..text.encoders import LOADER
from .files import Checkpoint
from .names import shorten
from .text_keys import Part

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class Found:
    """One encoder and the file it lies in."""

    part: Part
    file: Checkpoint


def dtype_of(one: Found, asked: torch.dtype | None) -> torch.dtype:
    """Give the dtype asked for, else what most of the weights have or 8-bit floats are widened to.

    Raises:
        CheckpointError: some are stored in another way, or have scales that do not fit.
    """
    sizes: dict[torch.dtype, int] = {}
    for key in one.part.keys.values():
        stored = one.file.dtypes[key]
        sizes[stored] = sizes.get(stored, 0) + count(one.file.shapes[key])
    odd = [stored for stored in sizes if stored not in (*_FLOATS, *_FP8)]
    if odd:
        raise CheckpointError(
            f"{one.file.path.name} stores {one.part.kind} as {name_of(odd[0])}.",
            "float32, bfloat16, float16 or float8 weights.",
            f"choose a bfloat16, float16 or fp8 file in {LOADER}.",
        )
    _check_scales(one)
    if asked is not None:
        return asked
    most = max(sizes, key=lambda stored: sizes[stored])
    return torch.bfloat16 if most in _FP8 else most


def _check_scales(one: Found) -> None:
    """See that every scale is one number, or one for each row: others would swell the weight."""
    for name, key in one.part.scales.items():
        scale = one.file.shapes[key]
        weight = one.file.shapes.get(one.part.keys.get(name, ""), ())
        if count(scale) != 1 and scale != (*weight[:1], 1):
            raise CheckpointError(
                f"{one.file.path.name} scales '{shorten(name)}' by "
                f"{shorten(' by '.join(map(str, scale)))} numbers.",
                "one number for each weight, or one for each of its rows.",
                f"choose a bfloat16, float16 or fp8 file in {LOADER}.",
            )


def fill(
    module: nn.Module,
    one: Found,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device | None,
) -> None:
    """Hand the file's tensors to an empty module; those that need no change stay mapped."""
    # transformers 4 keeps CLIP's text tower in an attribute, which is part of every name.
    inner = "text_model." if hasattr(module, "text_model") else ""
    names = {key: name for name, key in one.part.keys.items()}
    scales = {name: one.file.read([key])[key] for name, key in one.part.scales.items()}
    state: dict[str, Tensor] = {}
    for key, stored in one.file.stream(names):
        name = names[key]
        if name in scales:
            stored = stored.to(torch.float32) * scales[name].to(torch.float32)
        state[inner + name] = stored.to(device=device, dtype=dtype_of(name))
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def count(shape: tuple[int, ...]) -> int:
    """Count the numbers of a tensor."""
    return int(torch.Size(shape).numel())


def name_of(dtype: torch.dtype) -> str:
    """Give a dtype's name as people write it."""
    return str(dtype).removeprefix("torch.")
