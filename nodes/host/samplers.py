"""What ComfyUI's own samplers ask of a model, and of a guider around it.

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
    """FLUX's noise levels, 1 for noise to 0, by which samplers know a flow model."""


class SampledModel:
    """FLUX to ComfyUI's samplers: its latents and noise levels; the guider does its work."""

    def __init__(self, latent: LatentSpec) -> None:
        self.spec = latent
        self.latent_format = latent_format(latent)
        self.model_sampling = _FlowLevels()

    def process_latent_in(self, latent: Latent) -> Latent:
        """An image's latent in the transformer's scale."""
        return self.spec.to_network(latent)

    def process_latent_out(self, latent: Latent) -> Latent:
        """The inverse."""
        return self.spec.from_network(latent)

    def scale_latent_inpaint(
        self, sigma: Tensor, noise: Latent, latent_image: Latent, **_: object
    ) -> Latent:
        """What a masked-out area is at a noise level."""
        return self.model_sampling.noise_scaling(sigma, noise, latent_image)


class SampledPatcher:
    """The same where samplers look for a MODEL's patcher."""

    def __init__(self, latent: LatentSpec, device: torch.device) -> None:
        self.model, self.load_device = SampledModel(latent), device
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def get_model_object(self, name: str) -> Any:
        """A part of the model by its name."""
        return getattr(self.model, name)


def is_sampler(value: object) -> bool:
    """Whether this is a SAMPLER."""
    return isinstance(value, comfy.samplers.Sampler)


def fitted_mask(mask: Tensor, latent: Latent, device: torch.device) -> Tensor:
    """A noise mask brought to a latent's shape, as ComfyUI's samplers do."""
    return comfy.sampler_helpers.prepare_mask(mask, latent.shape, device).float()
