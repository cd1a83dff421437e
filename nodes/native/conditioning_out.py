"""Our conditioning as ComfyUI's own CONDITIONING.

`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

from typing import Any

from ...flux_core.sampling.check import check_controls
from ...flux_core.tokens.native import native_method, own_method
from ...flux_core.tokens.pack import tokens_latent
from ...flux_core.values import Conditioning
from .conditioning import AnyConditioning, as_conditioning, is_guidance_off

_BY_HAND = "position ids by hand: needs 'Apply To Model (FLUX)' before the sampler."
_NO_GUIDANCE = (
    "no guidance is set: ComfyUI takes 3.5 where the model reads one. Kontext's is 2.5, FLUX.2 "
    "[dev]'s 4: set guidance on 'Reference Conditioner (FLUX)'."
)


def to_native(wired: AnyConditioning) -> tuple[Any, str, list[str]]:
    """Returns a CONDITIONING, a report on it, and its notes: what a CONDITIONING cannot carry."""
    conditioning = as_conditioning(wired)
    check_controls(conditioning, frozenset(), "ComfyUI's CONDITIONING")
    settings, notes = _settings(conditioning, is_off=is_guidance_off(wired))
    notes += conditioning.notes
    report = "\n".join([_describe(conditioning), *notes])
    return [[conditioning.text.txt, settings]], report, notes


def _settings(conditioning: Conditioning, *, is_off: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns the dict that goes with the text, and notes on what it cannot carry."""
    settings, notes = dict[str, Any](), list[str]()
    if conditioning.text.pooled is not None:
        settings["pooled_output"] = conditioning.text.pooled
    if is_off:
        settings["guidance"] = None  # as FluxDisableGuidance sets it
    elif conditioning.guidance is None:
        notes.append(_NO_GUIDANCE)
    else:
        settings["guidance"] = conditioning.guidance
    references = [one.tokens for one in conditioning.references]
    if references:
        method = native_method(references)
        if method is None:
            notes.append(_BY_HAND)
        settings["reference_latents"] = [tokens_latent(one) for one in references]
        # Not set where it is the network's default: a node on the MODEL may have changed that.
        if (method or "index") != own_method(references[0].latent):
            settings["reference_latents_method"] = method or "index"
    return settings, notes


def _describe(conditioning: Conditioning) -> str:
    references = len(conditioning.references)
    method = native_method([one.tokens for one in conditioning.references])
    placed = f", {f'method {method}' if method else 'placed by hand'}" if references else ""
    return f"{conditioning.text.txt.shape[1]} text tokens; {references} references{placed}"
