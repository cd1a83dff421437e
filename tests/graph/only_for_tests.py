"""Nodes for tests alone, linked into ComfyUI beside the pack, or in its place.

They make what ComfyUI's own loaders cannot make small, and use nothing of the pack.
`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

from typing import Any

import comfy.model_patcher
import comfy.nested_tensor
import comfy.supported_models
import torch


class Text:
    """A random CONDITIONING; pooled 0 gives none."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "for tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        sizes = {name: ("INT", {"default": 0}) for name in ("tokens", "width", "pooled", "seed")}
        return {"required": sizes}

    def make(self, tokens: int, width: int, pooled: int, seed: int) -> tuple[Any]:
        """Give the same values for one seed, in every process."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, width, generator=generator)
        beside = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return ([[text, beside]],)


class Latent:
    """A random LATENT, or one as video models have it with sound."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "for tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        kinds = {"shape": ("STRING", {}), "seed": ("INT", {"default": 0}), "kind": ("STRING", {})}
        return {"required": kinds}

    def make(self, shape: str, seed: int, kind: str) -> tuple[Any]:
        """Give the same values for one seed, in every process."""
        generator = torch.Generator().manual_seed(seed)
        samples = torch.randn([int(side) for side in shape.split(",")], generator=generator)
        if kind == "nested":
            samples = comfy.nested_tensor.NestedTensor((samples, torch.zeros(1, 8, 4)))
        return ({"samples": samples},)


class Model:
    """A MODEL that other packs have changed or hidden."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "change", "for tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"model": ("MODEL",), "how": ("STRING", {"default": ""})}}

    def change(self, model: Any, how: str) -> tuple[Any]:
        """Change a clone, or the network itself, until `how` is "as it was"."""
        clone, network = model.clone(), model.model.diffusion_model
        kind = type(network)
        if how == "object patch":
            clone.add_object_patch("diffusion_model.forward_orig", _forward)
        elif how == "instance":
            network.forward_orig = _forward
        elif how == "class":
            kind.first_forward_orig, kind.forward_orig = kind.forward_orig, _forward
        elif how == "hidden":
            network.__class__ = type("ComfyFluxWrapper", (kind,), {"__module__": "nunchaku"})
        elif how == "as it was":
            vars(network).pop("forward_orig", None)
            network.__class__ = kind = kind.__mro__[kind.__module__ == "nunchaku"]
            if hasattr(kind, "first_forward_orig"):
                kind.forward_orig = kind.first_forward_orig
                del kind.first_forward_orig
        return (clone,)

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:  # noqa: N802
        """Run every time: it changes what lives longer than a prompt."""
        return float("nan")


class OtherModel:
    """SDXL, made tiny: its loader takes the published sizes alone."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "for tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {}}

    def make(self) -> tuple[Any]:
        """Build ComfyUI's own classes."""
        channels = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "context_dim": 64}
        depths = {"transformer_depth": [1], "transformer_depth_output": [1, 1]}
        others = {"image_size": 32, "num_res_blocks": [1], "channel_mult": (1,), "num_heads": 1}
        kinds = {"num_classes": "sequential", "use_spatial_transformer": True, "legacy": False}
        sizes = {**channels, **depths, **others, **kinds}
        sizes |= {"transformer_depth_middle": 0, "adm_in_channels": 64}
        config = comfy.supported_models.SDXL(sizes)
        config.set_inference_dtype(torch.float32, None)
        here = torch.device("cpu")
        patcher = comfy.model_patcher.CoreModelPatcher
        return (patcher(config.get_model({}), load_device=here, offload_device=here),)


def _forward(*_: Any, **__: Any) -> Any:
    raise RuntimeError("this forward is there to be refused")


NODE_CLASS_MAPPINGS = {
    "ForTestsText": Text,
    "ForTestsLatent": Latent,
    "ForTestsModel": Model,
    "ForTestsOtherModel": OtherModel,
}
