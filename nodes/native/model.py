"""ComfyUI's own MODEL around a FLUX network: checks on it, and our patch on a clone of it.

`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ...flux_core.errors import FamilyMismatchError, SettingError
from ...flux_core.sampling.check import check_controls
from ...flux_core.specs import LatentSpec
from ...flux_core.tokens.native import NativePositions
from ...flux_core.values import Conditioning
from .. import host
from ..runtime.not_native import NotNative
from ..settings import settings_named

_NETWORK = ("comfy.ldm.flux.model", "Flux")
_BASES = ("Flux", "Flux2")  # in comfy.model_base; others use the same network differently
_FORWARDS = ("forward", "_forward", "forward_orig", "process_img")
WATCH = "flux glassbox"  # the key of our wrapper
_GENERATIONS = {3: "FLUX.1", 4: "FLUX.2"}  # by the count of id axes


@dataclass(slots=True, eq=False)
class PositionReferences:
    """A post_input patch: ComfyUI calls it in each pass, once the sequence is assembled."""

    positions: NativePositions
    is_called: bool = False  # in the current pass

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replaces the references' position ids and trims the text to its own length."""
        self.is_called = True
        with settings_named():  # the node that runs is ComfyUI's
            return self._patched(inputs)

    def _patched(self, inputs: dict[str, Any]) -> dict[str, Any]:
        options = inputs["transformer_options"]
        if options.get("rope_options"):
            raise SettingError(
                "'ScaleROPE' moves all position ids of this model, which are set here.",
                "one of the two.",
                "take 'ScaleROPE' off this model.",
            )
        counts = options.get("reference_image_num_tokens", [])
        img_ids = self.positions.place(inputs["img_ids"], counts)
        txt, txt_ids = self.positions.trim(inputs["txt"], inputs["txt_ids"])
        return {**inputs, "img_ids": img_ids, "txt": txt, "txt_ids": txt_ids}

    def watch(self, apply_model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a pass; step caches may skip any pass but the first of a run.

        Raises:
            SettingError: other code ran in place of the network, and never called this patch.
        """
        options = next(one for one in (*args, *kwargs.values()) if _is_options(one))
        applied = options.get("patches", {}).get("post_input", [])
        self.is_called = False
        result = apply_model(*args, **kwargs)
        if any(one is self for one in applied) and _is_first(options) and not self.is_called:
            raise SettingError(
                "The code of another node runs in the network's place, and ignores position ids.",
                "ComfyUI's own, with its patches.",
                "take the node off that speeds the model up, such as TeaCache; 'EasyCache' may "
                "stay after 'Apply To Model (FLUX)'.",
            )
        return result


def _is_options(value: object) -> bool:
    return isinstance(value, dict) and "sigmas" in value


def _is_first(options: dict[str, Any]) -> bool:
    levels = options.get("sample_sigmas")
    return levels is not None and bool(options["sigmas"].reshape(-1)[0] >= levels[0])


def apply_positions(model: Any, conditioning: Conditioning) -> Any:
    """Returns a clone of a MODEL with our position ids for the references, replacing earlier ones.

    Raises:
        FamilyMismatchError: not a FLUX model, or one of the other generation.
        SettingError: a model that takes more than an image, or one with replaced code.
    """
    network = native_network(model)
    check_controls(conditioning, frozenset(), "a MODEL")
    for one in conditioning.references:
        _check_generation(network, one.tokens.latent)
    clone = model.clone()
    patches = clone.model_options["transformer_options"].get("patches", {})
    if "post_input" in patches:
        others = [one for one in patches["post_input"] if not isinstance(one, PositionReferences)]
        patches["post_input"] = others
    positions = NativePositions(
        references=tuple(one.tokens.ids for one in conditioning.references),
        text_tokens=conditioning.text.txt.shape[1],
    )
    patch = PositionReferences(positions)
    clone.set_model_post_input_patch(patch)
    clone.remove_wrappers_with_key("apply_model", WATCH)
    clone.add_wrapper_with_key("apply_model", WATCH, patch.watch)
    return clone


def native_network(model: Any) -> Any:
    """Returns ComfyUI's FLUX network in a MODEL, which must run ComfyUI's own code.

    Raises:
        FamilyMismatchError: another model, or one wrapped in another class.
        SettingError: a model of this pack, an inpaint or control model, or replaced code.
    """
    if isinstance(model, NotNative):
        raise model.not_native()
    base = getattr(model, "model", None)
    network = _uncompiled(model, getattr(base, "diffusion_model", None))
    kind = type(network)
    is_flux = (kind.__module__, kind.__name__) == _NETWORK and type(base).__name__ in _BASES
    params = getattr(network, "params", None)
    if base is None:
        raise _no_model(model)
    if not is_flux or getattr(params, "txt_norm", False) or getattr(params, "yak_mlp", False):
        raise FamilyMismatchError(
            f"The MODEL is {type(base).__name__} around "
            f"{PurePath(kind.__module__).name}.{kind.__name__}.",
            "FLUX.1 or FLUX.2 in ComfyUI's own network.",
            "load FLUX with 'Load Diffusion Model', or with a GGUF loader; a pack that puts a "
            "class of its own in the network's place, such as Nunchaku, cannot be used here: take "
            "an fp8, NVFP4 or GGUF file of the model instead.",
        )
    if network.in_channels != network.out_channels:
        raise SettingError(
            f"The MODEL takes {network.in_channels} channels a token and gives "
            f"{network.out_channels}: it is an inpaint or control model.",
            "a model that takes a noisy picture alone.",
            "load the model without Fill, Canny or Depth in its name.",
        )
    if not isinstance(model, host.Patcher):
        raise _no_model(model)
    replaced = _replaced(model, network)
    if replaced:
        raise SettingError(
            f"Another node has replaced the network's code: {', '.join(replaced)}.",
            "ComfyUI's own.",
            "take that node, or its pack, out: what this pack puts on a MODEL would be ignored.",
        )
    return network


def _no_model(found: object) -> SettingError:
    return SettingError(
        f"A {type(found).__name__} is wired where a MODEL goes.",
        "FLUX.1 or FLUX.2, as ComfyUI's loaders give it.",
        "wire 'Load Diffusion Model' or 'Load Model (FLUX)' to it.",
    )


def _uncompiled(model: Any, loaded: Any) -> Any:
    """Returns the network itself: while loaded it may be replaced by its compiled version.

    `loaded` is what is there now, set by whichever clone of the MODEL ran last.
    """
    backup = getattr(model, "object_patches_backup", {})
    own = getattr(model, "object_patches", {})
    network = own.get("diffusion_model", backup.get("diffusion_model", loaded))
    return getattr(network, "_orig_mod", network)


def _replaced(model: Any, network: Any) -> list[str]:
    """Lists the network's methods that are no longer ComfyUI's, and where they come from.

    Patches of another clone that is loaded do not count: ComfyUI removes them before this one runs.
    """
    backup = getattr(model, "object_patches_backup", {})
    found = [key for key in model.object_patches if key.split(".")[-1] in _FORWARDS]
    for name in _FORWARDS:
        method = backup.get(f"diffusion_model.{name}", getattr(network, name))
        code = getattr(method, "__func__", method)
        where = getattr(code, "__globals__", {}).get("__name__", "an object")
        if where != _NETWORK[0] or getattr(method, "__self__", None) is not network:
            found.append(f"{name} (from {PurePath(where).name})")
    return found


def _check_generation(network: Any, latent: LatentSpec) -> None:
    """Raises for references of the other generation."""
    axes = len(network.params.axes_dim)
    if axes != len(latent.id_axes):
        raise FamilyMismatchError(
            f"The references are {latent.name}'s, the MODEL is {_GENERATIONS.get(axes, 'other')}.",
            "one generation throughout.",
            "use the autoencoder of the model in 'Encode and Pack (FLUX)', or load a MODEL of the "
            "references' generation.",
        )
