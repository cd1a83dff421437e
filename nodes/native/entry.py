"""The entry of a ComfyUI CONDITIONING: which keys are read, and which are refused by name.

A CONDITIONING is a list of entries, each a text and a dict of whatever nodes have added to it.
Keys that only ComfyUI's samplers read change the image, so none of them is silently ignored.
"""

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from ...flux_core.checks import check_finite
from ...flux_core.errors import SettingError, ShapeError, shorten
from ...flux_core.values import MAX_GUIDANCE

Settings = dict[object, Any]  # the dict beside the text; any key may hold anything

_COMMON = (torch.float32, torch.bfloat16, torch.float16)
_READ = {
    "pooled_output",
    "guidance",
    "reference_latents",
    "reference_latents_method",
    "attention_mask",  # comes with FLUX.2's text; ComfyUI's FLUX reads it only together with a size
}
_WHOLE: dict[object, float] = {  # values that mean "everywhere and always", so nothing changes
    "strength": 1.0,
    "set_area_to_bounds": False,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "clip_start_percent": 0.0,
    "clip_end_percent": 1.0,
}


class _Foreign(NamedTuple):
    """Keys that only ComfyUI's samplers read."""

    keys: tuple[str, ...]
    what: str
    node: str  # the node that sets them


_FOREIGN = (
    _Foreign(
        ("mask", "mask_strength", "set_area_to_bounds"),
        "a mask, so the prompt holds for a part of the picture",
        "'Conditioning (Set Mask)'",
    ),
    _Foreign(
        ("area",),
        "an area, so the prompt holds for a part of the picture",
        "'Conditioning (Set Area)'",
    ),
    _Foreign(("strength",), "a strength of its own", "'Conditioning (Set Area Strength)'"),
    _Foreign(
        ("start_percent", "end_percent", "clip_start_percent", "clip_end_percent"),
        "a range, so the prompt holds for a part of the steps",
        "'ConditioningSetTimestepRange'",
    ),
    _Foreign(("control", "control_apply_to_uncond"), "a ControlNet", "'Apply ControlNet'"),
    _Foreign(("gligen",), "boxes of GLIGEN", "'Apply GLIGEN Text Box'"),
    _Foreign(
        ("hooks",),
        "hooks, so the weights change with the prompt or the step",
        "'Cond Set Props' or 'Set CLIP Hooks'",
    ),
    _Foreign(
        ("concat_latent_image", "concat_mask", "noise_concat", "concat_image"),
        "a picture to fill in, for an inpaint or control model",
        "'InpaintModelConditioning' or 'InstructPixToPixConditioning'",
    ),
    _Foreign(("unclip_conditioning",), "a picture for unCLIP", "'unCLIPConditioning'"),
    _Foreign(
        ("default",), "the place of a default for what masks leave", "'Cond Set Default Combine'"
    ),
    _Foreign(
        ("attention_mask_img_shape",),
        "a weight of its style picture, as an attention mask",
        "'Apply Style Model' with strength_type attn_bias (multiply can be used)",
    ),
)
_MAX_BITS = 1024  # of an integer that a message quotes
_ELSEWHERE = "or sample with ComfyUI's own KSampler, which reads it."


def open_entry(wired: object, name: str) -> tuple[Tensor, Settings]:
    """Returns the text and the dict of a CONDITIONING's only entry.

    Raises:
        SettingError: not a CONDITIONING, an empty one, or one with several entries.
    """
    if not isinstance(wired, list | tuple):
        raise _no_conditioning(name, "nothing" if wired is None else _kind(wired))
    entries = list(cast("list[object] | tuple[object, ...]", wired))
    if not entries:
        raise _no_conditioning(name, "an empty CONDITIONING")
    for entry in entries:
        if not isinstance(entry, list | tuple):
            raise _no_conditioning(name, f"a list of {_kind(entry)}")
        parts = list(cast("list[object] | tuple[object, ...]", entry))
        if len(parts) != 2 or not isinstance(parts[0], Tensor) or not isinstance(parts[1], dict):
            inside = ", ".join(type(one).__name__ for one in parts[:3]) or "nothing"
            raise _no_conditioning(name, f"a list of {inside} where text and its settings go")
    if len(entries) > 1:
        raise SettingError(
            f"The {name} input holds {len(entries)} prompts at once.",
            "one: ComfyUI's samplers weigh several against each other, these read one.",
            "take 'Conditioning (Combine)' off, or whatever else puts several together, or "
            "sample with ComfyUI's own KSampler.",
        )
    text, settings = cast("tuple[Tensor, Settings]", entries[0])
    return text, settings


def read_text(text: Tensor, settings: Settings, name: str) -> tuple[Tensor, Tensor | None]:
    """Returns txt (B, T, E), and pooled (B or 1, P) or None.

    Raises:
        ShapeError: wrong rank, empty, or batches that differ.
        SettingError: not a floating-point tensor.
        NonFiniteError: NaN or infinity.
    """
    pooled = settings.get("pooled_output")
    parts: list[tuple[str, Any, int]] = [("text", text, 3), ("pooled text", pooled, 2)]
    for part, values, rank in parts if pooled is not None else parts[:1]:
        whose = f"{part} of the {name} input's CONDITIONING"
        if not _is_float_tensor(values):
            raise SettingError(
                f"The {whose} is {_kind(values)}.",
                "a tensor of numbers with a fraction.",
                "wire what a text encoder made.",
            )
        if values.ndim != rank or not values.numel():
            needed = "(batch, tokens, width)" if rank == 3 else "(batch, width)"
            raise ShapeError(
                f"The {whose} has shape {tuple(values.shape)}.",
                f"{needed}, with something in it.",
                "wire what a text encoder made.",
            )
        check_finite(_computable(values), whose)
    if pooled is not None and pooled.shape[0] not in (1, text.shape[0]):
        raise ShapeError(
            f"The {name} input's CONDITIONING has a batch of {text.shape[0]} of text and of "
            f"{pooled.shape[0]} of pooled text.",
            "the same for both, or 1.",
            "wire what one text encoder made.",
        )
    return _computable(text), None if pooled is None else _computable(pooled)


def check_keys(settings: Settings, name: str) -> None:
    """Raises for keys that only ComfyUI's samplers read, and for unknown ones.

    Raises:
        SettingError: there is such a key.
    """
    present = [key for key, value in settings.items() if value is not None]
    present = [key for key in present if not _is_whole(key, settings[key])]
    known = [one for one in _FOREIGN if any(key in present for key in one.keys)]
    if known:
        carried = [
            f"{one.what} ({', '.join(key for key in one.keys if key in present)})" for one in known
        ]
        raise SettingError(
            f"The {name} input's CONDITIONING carries {' and '.join(carried)}.",
            "text, references and guidance alone, for the whole picture and every step.",
            f"take {' and '.join(one.node for one in known)} off, {_ELSEWHERE}",
        )
    unknown = [shorten(str(key)) for key in present if key not in _READ]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise SettingError(
            f"The {name} input's CONDITIONING carries what is not known here: "
            f"{', '.join(unknown[:3])}{more}.",
            "text, references and guidance alone.",
            f"take the node off that adds it, {_ELSEWHERE}",
        )


def read_guidance(settings: Settings, name: str) -> float | Literal["absent", "off"]:
    """Returns the guidance; "off" is what FluxDisableGuidance sets.

    Raises:
        SettingError: not a number from 0 to 100.
    """
    found = settings.get("guidance", "absent")
    if "guidance" not in settings or found is None:
        return "absent" if "guidance" not in settings else "off"
    if not isinstance(found, int | float) or isinstance(found, bool) or not _in_range(found):
        is_too_long = isinstance(found, int) and found.bit_length() > _MAX_BITS
        said = "beyond all numbers" if is_too_long else shorten(str(found))
        raise SettingError(
            f"The {name} input's CONDITIONING carries guidance {said}.",
            f"a number from 0 to {MAX_GUIDANCE:g}.",
            "set it in 'FluxGuidance'.",
        )
    return float(found)


def read_references(settings: Settings, name: str) -> tuple[list[Tensor], str | None]:
    """Returns the reference latents, (B, C, h, w) each, and the name of the placement method.

    Raises:
        SettingError: they are not latents.
    """
    found = settings.get("reference_latents")
    if found is None:
        return [], None
    latents = list(cast("list[object]", found)) if isinstance(found, list | tuple) else []
    wrong = [_kind(one) for one in latents if not _is_float_tensor(one)]
    if not isinstance(found, list | tuple):
        wrong = [_kind(found)]
    if wrong:
        raise SettingError(
            f"The {name} input's CONDITIONING holds {wrong[0]} where its references go.",
            "a list of latents, as 'Set Reference Latent' makes it.",
            "wire the LATENT of a picture to 'Set Reference Latent'.",
        )
    method = settings.get("reference_latents_method")
    tensors = [_computable(one) for one in cast("list[Tensor]", latents)]
    return tensors, None if method is None else shorten(str(method))


def _no_conditioning(name: str, found: str) -> SettingError:
    return SettingError(
        f"The {name} input holds {found}.",
        "one prompt, as ComfyUI's CONDITIONING or from this pack.",
        "wire 'Reference Conditioner (FLUX)' or 'CLIP Text Encode (Prompt)' to it; to the text "
        "input 'Encode Text (FLUX)' instead.",
    )


def _is_whole(key: object, value: object) -> bool:
    return isinstance(value, int | float) and _WHOLE.get(key) == value


def _in_range(number: float) -> bool:
    return 0.0 <= number <= MAX_GUIDANCE


def _is_float_tensor(value: object) -> bool:
    """Whether this is a strided floating-point tensor with data, not nested, sparse or meta."""
    return (
        isinstance(value, Tensor)
        and torch.is_floating_point(value)
        and value.layout is torch.strided
        and not (value.is_nested or value.is_meta)
    )


def _kind(value: object) -> str:
    """Describes a value for the object of a sentence."""
    if isinstance(value, Tensor):
        form = "nested " if value.is_nested else "" if value.layout is torch.strided else "sparse "
        empty = " without values" if value.is_meta else ""
        return f"a {form}tensor of {str(value.dtype).removeprefix('torch.')}{empty}"
    return f"a value of type {shorten(type(value).__name__)}"


def _computable(values: Tensor) -> Tensor:
    """Converts rarer dtypes, such as float64 and float8, to float32, which every backend takes."""
    return values if values.dtype in _COMMON else values.float()
