"""What ComfyUI's own samplers read from a model, and from a guider around it.

`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

from typing import Any

import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...flux_core.specs import LatentSpec
from ...flux_core.types import Latent
from .running import latent_format


class _FlowLevels(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
    """FLUX's noise levels, 1 for noise to 0, by which samplers recognise a flow model."""


class SampledModel:
    """FLUX as ComfyUI's samplers see it: latents and noise levels; the guider runs the network."""

    def __init__(self, latent: LatentSpec) -> None:
        self.spec = latent
        self.latent_format = latent_format(latent)
        self.model_sampling = _FlowLevels()

    def process_latent_in(self, latent: Latent) -> Latent:
        """Converts an image's latent to the transformer's scale."""
        return self.spec.to_network(latent)

    def process_latent_out(self, latent: Latent) -> Latent:
        """The inverse of `process_latent_in`."""
        return self.spec.from_network(latent)

    def scale_latent_inpaint(
        self, sigma: Tensor, noise: Latent, latent_image: Latent, **_: object
    ) -> Latent:
        """Returns latent_image noised to sigma, for the area outside the mask."""
        return self.model_sampling.noise_scaling(sigma, noise, latent_image)


class SampledPatcher:
    """A `SampledModel` where samplers expect a MODEL's patcher."""

    def __init__(self, latent: LatentSpec, device: torch.device) -> None:
        self.model, self.load_device = SampledModel(latent), device
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def get_model_object(self, name: str) -> Any:
        """Returns a part of the model by its name."""
        return getattr(self.model, name)


def is_sampler(value: object) -> bool:
    """Whether a value is a SAMPLER."""
    return isinstance(value, comfy.samplers.Sampler)


def fitted_mask(mask: Tensor, latent: Latent, device: torch.device) -> Tensor:
    """Resizes a noise mask to a latent's shape, as ComfyUI's samplers do."""
    return comfy.sampler_helpers.prepare_mask(mask, latent.shape, device).float()
