"""ComfyUI's own CONDITIONING on our sockets.

Our samplers compute the same from a CONDITIONING as KSampler does. `Any` stands for
ComfyUI's own classes, which carry no usable types.

Source: Comfy-Org/ComfyUI@14b05228 comfy/model_base.py Flux.extra_conds, Flux2.extra_conds;
comfy/ldm/flux/model.py _forward.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...flux_core.errors import FamilyMismatchError, SettingError
from ...flux_core.families import FAMILIES
from ...flux_core.specs import LatentSpec
from ...flux_core.tokens.native import own_method
from ...flux_core.tokens.references import place_references, tile
from ...flux_core.values import Conditioning, Reference, TextFeatures, Tokens
from ..runtime.handles import ModelHandle
from .entry import (
    Settings,
    check_keys,
    open_entry,
    read_guidance,
    read_references,
    read_text,
)
from .handle import NativeModelHandle
from .latent import as_tokens, latent_spec

AnyConditioning: TypeAlias = Conditioning | Any  # the other is ComfyUI's CONDITIONING
AnyText: TypeAlias = TextFeatures | Any  # likewise
_Model: TypeAlias = ModelHandle | NativeModelHandle | None  # None where the model is not known yet

_COMFY_GUIDANCE = 3.5  # ComfyUI's default where a CONDITIONING sets none
_PADDED = 512  # tokens; ComfyUI pads a shorter text of FLUX.2 with empty ones, on the left
_SOURCE = "ComfyUI's CONDITIONING"
# Text of other models, by token width and pooled width; 0: no pooled text.
_OTHERS = {
    (768, 768): "SD 1.5's, or CLIP-L's alone",
    (768, 0): "CLIP-L's alone",
    (1024, 1024): "SD 2's",
    (1280, 1280): "the SDXL refiner's, or CLIP-G's alone",
    (2048, 1280): "SDXL's",
    (4096, 2048): "SD 3's",
    (4096, 0): "T5's alone, as Chroma, Wan and LTX read it",
    (2560, 0): "Z-Image's",
    (3584, 0): "Qwen-Image's",
}


def as_conditioning(
    wired: AnyConditioning, model: _Model = None, name: str = "conditioning"
) -> Conditioning:
    """Returns the conditioning wired to a socket: ours as it is, or a CONDITIONING converted.

    Args:
        wired: what is wired.
        model: the model that will read it, if known; else widths and channels tell the family.
        name: the socket's, for messages.

    Raises:
        FamilyMismatchError: text or references of another model.
        ShapeError, NonFiniteError: tensors that cannot be read.
        SettingError: it carries what only ComfyUI's samplers read, or is not a CONDITIONING.
    """
    if isinstance(wired, Conditioning):
        return wired
    txt, settings = open_entry(wired, name)
    text = _text(txt, settings, model, name)
    check_keys(settings, name)
    references, notes = _references(settings, model, name)
    guidance, guidance_notes = _guidance(settings, model, name)
    return Conditioning(
        text=text,
        references=tuple(Reference(tokens=one) for one in references),
        guidance=guidance,
        notes=(*notes, *guidance_notes),
    )


def as_text(wired: AnyText, guidance: float | None) -> tuple[TextFeatures, float | None, list[str]]:
    """Returns the text wired to a text socket: encoded text, or that of a CONDITIONING.

    Args:
        wired: what is wired.
        guidance: the node's own, which overrides the CONDITIONING's; None: the CONDITIONING's,
            else the model's default.

    Returns:
        The text, the guidance, and notes on what of the CONDITIONING is overridden.

    Raises:
        GlassboxError: as `as_conditioning`; or it carries references, which have their own inputs.
    """
    if isinstance(wired, TextFeatures):
        return wired, guidance, []
    txt, settings = open_entry(wired, "text")
    text = _text(txt, settings, None, "text")
    check_keys(settings, "text")
    latents, _ = read_references(settings, "text")
    if latents:
        raise SettingError(
            f"The text input's CONDITIONING carries {len(latents)} references.",
            "text alone: references are wired to this node, in their order.",
            "take 'Set Reference Latent' off and wire its latent to reference_1; or wire the "
            "CONDITIONING straight to the sampler.",
        )
    found = read_guidance(settings, "text")
    if guidance is None and isinstance(found, float):
        return text, found, [f"guidance is {found:g}, as the CONDITIONING says."]
    if found in ("absent", guidance) or guidance is None:
        return text, guidance, []
    said = "'FluxDisableGuidance'" if found == "off" else f"guidance {found:g} of the CONDITIONING"
    return text, guidance, [f"{said} is replaced by guidance {guidance:g}, set here."]


def is_guidance_off(wired: AnyConditioning) -> bool:
    """Whether a CONDITIONING disables guidance."""
    if isinstance(wired, Conditioning):
        return False
    return read_guidance(open_entry(wired, "conditioning")[1], "conditioning") == "off"


def _text(txt: Tensor, settings: Settings, model: _Model, name: str) -> TextFeatures:
    """Returns text and pooled text, padded as ComfyUI pads it."""
    txt, pooled = read_text(txt, settings, name)
    widths = (txt.shape[-1], 0 if pooled is None else pooled.shape[-1])
    if model is None:
        counts_text = pooled is None or _is_counted(widths[0])
        is_other = widths in _OTHERS
    else:
        counts_text = model.family.latent.text_axis is not None
        spec = model.network.spec
        pooled_width = 0 if counts_text else widths[1]  # it may be there, unread
        is_other = (widths[0], pooled_width) != (spec.context_width, spec.pooled_width)
    if is_other:
        raise _other_text(widths, model, name)
    if counts_text:
        missing = max(0, _PADDED - txt.shape[1])
        txt, pooled = torch.nn.functional.pad(txt, (0, 0, missing, 0)), None
    return TextFeatures(txt=txt, pooled=pooled, source=_SOURCE)


def _is_counted(width: int) -> bool:
    """Whether text of this width belongs to a model with position ids for text tokens."""
    counting = (one for one in FAMILIES.values() if one.latent.text_axis is not None)
    return any(one.transformer.context_width == width for one in counting)


def _other_text(widths: tuple[int, int], model: _Model, name: str) -> FamilyMismatchError:
    owners = dict.fromkeys(
        f"{one.latent.name}'s, from {one.text.title}"
        for one in FAMILIES.values()
        if one.transformer.context_width == widths[0]
        and one.transformer.pooled_width in (0, widths[1])
    )
    whose = _OTHERS.get(widths) or " or ".join(owners)
    needed = "FLUX.1's, from CLIP-L and T5, or FLUX.2's, from Mistral or Qwen3."
    if model is not None:
        spec = model.network.spec
        wide = f"{spec.context_width} wide, {_pooled(spec.pooled_width)}"
        needed = f"{wide}, for {model.family.title}: from {model.family.text.title}."
    return FamilyMismatchError(
        f"The text of the {name} input's CONDITIONING is {widths[0]} wide, {_pooled(widths[1])}"
        f"{f': {whose}' if whose else ''}.",
        needed,
        "encode the prompt with this model's text encoders: in 'Encode Text (FLUX)', or from "
        "'Load CLIP (Dual)' with type flux for FLUX.1, 'Load CLIP' with type flux2 for FLUX.2.",
    )


def _pooled(width: int) -> str:
    return f"pooled {width}" if width else "none pooled"


def _references(
    settings: Settings, model: _Model, name: str
) -> tuple[tuple[Tokens, ...], list[str]]:
    """Packs the reference latents with ComfyUI's position ids; returns them and notes."""
    latents, method = read_references(settings, name)
    own = None if model is None else model.family.latent
    packed, notes = list[Tokens](), list[str]()
    for number, latent in enumerate(latents, 1):
        spec = latent_spec(latent, own)
        packed.append(as_tokens({"samples": _padded(latent, spec)}, spec))
        if packed[-1].values.shape[1] * spec.patch**2 != latent.shape[2] * latent.shape[3]:
            notes.append(
                f"reference {number} does not divide into tokens: its first row or column is "
                "repeated at its end, as ComfyUI does."
            )
    if not packed:
        return (), []
    if method is None:
        method = own_method(packed[0].latent)
    if method == "offset":
        return tile(packed, [(one.shape[2], one.shape[3]) for one in latents]), notes
    if method == "index":
        return place_references(packed, "index"), notes
    raise SettingError(
        f"The {name} input's CONDITIONING places its references by '{method}'.",
        "offset or index, which FLUX.1 and FLUX.2 know.",
        "choose one of them in 'Edit Model Reference Method', or take it off.",
    )


def _padded(latent: Tensor, spec: LatentSpec) -> Tensor:
    """Pads (B, C, h, w) circularly at bottom and right until it divides into tokens."""
    height, width = (-side % spec.patch for side in latent.shape[2:])
    if not (height or width) or not latent.numel():
        return latent
    return torch.nn.functional.pad(latent, (0, width, 0, height), mode="circular")


def _guidance(settings: Settings, model: _Model, name: str) -> tuple[float | None, list[str]]:
    """Returns the guidance that ComfyUI uses, and a note where it is ComfyUI's default."""
    found = read_guidance(settings, name)
    if isinstance(found, float):
        return found, []
    if model is None or not model.network.spec.has_guidance:
        return None, []
    if found == "off":
        raise SettingError(
            f"The {name} input's CONDITIONING has its guidance switched off.",
            f"a number: {model.family.title} was distilled with guidance.",
            "take 'FluxDisableGuidance' off, or put 'FluxGuidance' after it.",
        )
    note = f"the CONDITIONING sets no guidance: {_COMFY_GUIDANCE} is taken, as ComfyUI does."
    return _COMFY_GUIDANCE, [note]
