"""What ComfyUI's own samplers read from a model, and from a guider around it.

`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

from typing import Any

import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import torch
from torch import Tensor

from ...flux_core.specs import FluxFamily
from ...flux_core.types import Latent
from .running import latent_format


class _FlowLevels(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
    """FLUX's noise levels, 1 for noise to 0, by which samplers recognise a flow model."""


class _EvenLevels(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """The same of a model whose schedule has no shift, as ComfyUI has it for FLUX.1 [schnell]."""


def _levels(family: FluxFamily) -> Any:
    """The noise levels by which samplers turn percents into sigmas, with ComfyUI's shift."""
    if family.schedule is None:
        return _EvenLevels(comfy.supported_models.FluxSchnell)
    known = (comfy.supported_models.Flux, comfy.supported_models.Flux2)
    channels = family.latent.channels
    return _FlowLevels(next(one for one in known if one.latent_format.latent_channels == channels))


class SampledModel:
    """FLUX as ComfyUI's samplers see it: latents and noise levels; the guider runs the network."""

    def __init__(self, family: FluxFamily, model_sampling: Any) -> None:
        self.spec = family.latent
        self.latent_format = latent_format(family.latent)
        self.model_sampling = model_sampling or _levels(family)

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
    """The same where samplers look for a MODEL's patcher; `model_sampling` is a MODEL's own."""

    def __init__(self, family: FluxFamily, device: torch.device, model_sampling: Any) -> None:
        self.model, self.load_device = SampledModel(family, model_sampling), device
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
