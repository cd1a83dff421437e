"""ComfyUI's own CONDITIONING on our sockets.

Our samplers compute with a CONDITIONING what KSampler computes with it. `Any` stands for
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
_Model: TypeAlias = ModelHandle | NativeModelHandle | None  # None where it is not known yet

_SILENT_GUIDANCE = 3.5  # what ComfyUI takes where nothing is said
_FILLED = 512  # tokens; ComfyUI puts empty ones before a shorter text of FLUX.2
_SOURCE = "ComfyUI's CONDITIONING"
# Text of other models, by width of its tokens and of what is pooled; 0: nothing is.
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
    """Take what is wired to a conditioning socket: ours, or a CONDITIONING.

    Args:
        wired: what is wired.
        model: what will read it, where that is known; else widths and channels say whose it is.
        name: of the socket.

    Raises:
        FamilyMismatchError: text or references of another model.
        ShapeError, NonFiniteError: tensors that cannot be read.
        SettingError: it carries what only ComfyUI's samplers read, or is no CONDITIONING at all.
    """
    if isinstance(wired, Conditioning):
        return wired
    txt, settings = open_entry(wired, name)
    text = _text(txt, settings, model, name)
    check_keys(settings, name)
    references, notes = _references(settings, model, name)
    guidance, about_it = _guidance(settings, model, name)
    return Conditioning(
        text=text,
        references=tuple(Reference(tokens=one) for one in references),
        guidance=guidance,
        notes=(*notes, *about_it),
    )


def as_text(wired: AnyText, guidance: float | None) -> tuple[TextFeatures, float | None, list[str]]:
    """Takes what is wired to a text socket: encoded text, or a CONDITIONING for its text.

    Args:
        wired: what is wired.
        guidance: the node's own, which holds whatever the CONDITIONING says; None: what the
            CONDITIONING says, else the model's default.

    Returns:
        The text, the guidance, and notes on what of the CONDITIONING does not hold.

    Raises:
        GlassboxError: as `as_conditioning`; or it carries references, which are wired here.
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
    """Tell whether a CONDITIONING says that no guidance is to be read."""
    if isinstance(wired, Conditioning):
        return False
    return read_guidance(open_entry(wired, "conditioning")[1], "conditioning") == "off"


def _text(txt: Tensor, settings: Settings, model: _Model, name: str) -> TextFeatures:
    """Read text and pooled text, as long as ComfyUI makes it."""
    txt, pooled = read_text(txt, settings, name)
    widths = (txt.shape[-1], 0 if pooled is None else pooled.shape[-1])
    if model is None:
        counts_text = pooled is None or _is_counted(widths[0])
        is_other = widths in _OTHERS
    else:
        counts_text = model.family.latent.text_axis is not None
        spec = model.network.spec
        pooled_width = 0 if counts_text else widths[1]  # what is not read may be there
        is_other = (widths[0], pooled_width) != (spec.context_width, spec.pooled_width)
    if is_other:
        raise _other_text(widths, model, name)
    if counts_text:
        missing = max(0, _FILLED - txt.shape[1])
        txt, pooled = torch.nn.functional.pad(txt, (0, 0, missing, 0)), None
    return TextFeatures(txt=txt, pooled=pooled, source=_SOURCE)


def _is_counted(width: int) -> bool:
    """Tell whether this is text of a model that counts its text tokens, by its width."""
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
    """Pack the reference latents and put them where ComfyUI does; notes on what it does to them."""
    latents, method = read_references(settings, name)
    own = None if model is None else model.family.latent
    packed, notes = list[Tokens](), list[str]()
    for number, latent in enumerate(latents, 1):
        spec = latent_spec(latent, own)
        packed.append(as_tokens({"samples": _filled_up(latent, spec)}, spec))
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


def _filled_up(latent: Tensor, spec: LatentSpec) -> Tensor:
    """Repeat first rows and columns behind the last until (B, C, h, w) divides into tokens."""
    height, width = (-side % spec.patch for side in latent.shape[2:])
    if not (height or width) or not latent.numel():
        return latent
    return torch.nn.functional.pad(latent, (0, width, 0, height), mode="circular")


def _guidance(settings: Settings, model: _Model, name: str) -> tuple[float | None, list[str]]:
    """Give the guidance that ComfyUI takes, and a note where nobody has set it."""
    found = read_guidance(settings, name)
    if isinstance(found, float):
        return found, []
    if model is None or not model.network.spec.has_guidance:
        return None, []
    if found == "off":
        raise SettingError(
            f"The {name} input's CONDITIONING has its guidance switched off.",
            f"a number: {model.family.title} was distilled with guidance.",
            "take 'FluxDisableGuidance' off, or put 'FluxGuidance' behind it.",
        )
    note = f"the CONDITIONING sets no guidance: {_SILENT_GUIDANCE} is taken, as ComfyUI does."
    return _SILENT_GUIDANCE, [note]
