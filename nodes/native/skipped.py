"""What nodes add to a MODEL that only ComfyUI's own samplers follow: it is refused by name.

Ignored silently, each of these would give another image than the person asked for.
`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

from pathlib import PurePath
from typing import Any

import torch

from ...flux_core.errors import SettingError

_WRAPPERS = (
    "outer_sample",
    "prepare_sampling",
    "sampler_sample",
    "predict_noise",
    "calc_cond_batch",
)
_OPTIONS = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    "denoise_mask_function",
    "context_handler",
    "multigpu_clones",
    "disable_cfg1_optimization",  # asks for both prompts in one batch, at any cfg
)
# Parts of ComfyUI's model that we call, so they may be replaced; our samplers bypass the others.
_CALLED = ("_apply_model", "apply_model", "diffusion_model", "manual_cast_dtype", "model_sampling")
_SETTINGS = ("diffusion_model.params.", "diffusion_model.default_ref_method")
_NODES = {
    "disable_cfg1_optimization": "Normalized Attention Guidance",
    "diffusion_model.params.default_ref_method": "Flux KV Cache",
}


def merged_wrappers(patcher: Any) -> dict[str, dict[Any, list[Any]]]:
    """Merges the wrappers on the patcher with those in its options."""
    merged: dict[str, dict[Any, list[Any]]] = {}
    options = patcher.model_options["transformer_options"]
    for source in (options.get("wrappers", {}), patcher.wrappers):
        for kind, named in source.items():
            for key, functions in named.items():
                merged.setdefault(kind, {}).setdefault(key, []).extend(functions)
    return merged


def check_skipped(patcher: Any) -> None:
    """Raises for what ComfyUI's samplers follow and ours do not.

    Raises:
        SettingError: there is such a thing on the MODEL.
    """
    skipped = _skipped_wrappers(patcher) + _skipped_options(patcher) + _skipped_patches(patcher)
    if any(patcher.callbacks.get("on_prepare_state", {}).values()):
        skipped.append("on_prepare_state")
    if skipped:
        raise SettingError(
            f"The MODEL carries what only ComfyUI's samplers call: {', '.join(skipped)}.",
            "LoRAs, attention patches, and wrappers of the model itself.",
            "take that node off, or sample with KSampler after 'To Conditioning (FLUX)' and "
            "'Apply To Model (FLUX)'.",
        )
    _check_levels(patcher.get_model_object("model_sampling"))


def shift_notes(model: Any) -> list[str]:
    """Returns a note where a node set a shift on a MODEL, which our schedules do not follow."""
    if "model_sampling" not in getattr(model, "object_patches", {}):
        return []
    return [
        "the shift that 'ModelSamplingFlux' or another node puts on this MODEL is not followed. "
        "To follow it, wire ComfyUI's 'BasicScheduler' to the sampler's sigmas."
    ]


def _skipped_wrappers(patcher: Any) -> list[str]:
    wrappers = merged_wrappers(patcher)
    return [
        f"{kind} of {key or _origin(one) or 'a node'}"
        for kind in _WRAPPERS
        for key, functions in wrappers.get(kind, {}).items()
        for one in functions[:1]
    ]


def _skipped_options(patcher: Any) -> list[str]:
    found: list[str] = []
    for name in _OPTIONS:
        value = patcher.model_options.get(name)
        if value:
            one = value[-1] if isinstance(value, list) else value
            found.append(_named(name, _origin(one)))
    return found


def _skipped_patches(patcher: Any) -> list[str]:
    """Lists replaced parts that we never call; parts of the network are always called."""
    return [
        _named(key, "")
        for key in patcher.object_patches
        if key.startswith(_SETTINGS) or not (key in _CALLED or key.startswith("diffusion_model."))
    ]


def _named(name: str, origin: str) -> str:
    if name in _NODES:
        return f"{name}, as '{_NODES[name]}' sets it"
    return f"{name} of {origin}" if origin else name


def _origin(part: object) -> str:
    """The module that a function or an object comes from, without its folder."""
    module = getattr(part, "__module__", None)
    return PurePath(module).name if isinstance(module, str) else ""


def _check_levels(sampling: Any) -> None:
    """Raises for noise levels of another kind of model; their shift is the schedule's business.

    FLUX was trained so that the image is x - sigma * output, and the network reads x and sigma as
    they are.

    Raises:
        SettingError: a node set others.
    """
    sigma, x, output = (torch.tensor([one]) for one in (0.25, 0.5, 2.0))
    levels = (
        (sampling.calculate_input(sigma, x), x),
        (sampling.timestep(sigma), sigma),
        (sampling.calculate_denoised(sigma, output, x), x - sigma * output),
    )
    scale = getattr(sampling, "noise_scale", 1.0)
    if scale == 1 and all(torch.allclose(one.float().cpu(), other) for one, other in levels):
        return
    kinds = ", ".join(one.__name__ for one in type(sampling).__bases__)
    kinds += "" if scale == 1 else f", and noise {scale:g} times as strong"
    raise SettingError(
        f"Another node has put noise levels of another kind on the MODEL: {kinds}.",
        "FLUX's own, from 1 for noise to 0, as 'Load Diffusion Model' gives them.",
        "take 'ModelSamplingDiscrete', 'ModelSamplingSD3', 'ModelNoiseScale' or whatever sets them "
        "off this MODEL; 'ModelSamplingFlux' may stay.",
    )
