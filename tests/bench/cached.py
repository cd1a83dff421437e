"""Whole runs of klein KV with references: ours with what an earlier run cached, and the peers'."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import comfy.model_patcher
import torch
from comfy_extras.nodes_flux import FluxKVCache
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)
from torch import Tensor, nn

from glassbox.flux_core.families import FLUX2_KLEIN_9B_KV
from glassbox.flux_core.sampling.sigmas import flux_sigmas
from glassbox.flux_core.tokens.pack import pack_latent, unpack_tokens
from glassbox.flux_core.transformer.references import KeyValue, ReferencePass
from glassbox.flux_core.values import Tokens

from .networks import Inputs, Networks, build

# The full-size proportion of text to picture, 1 : 8, at a width a CPU can take.
SIDE_TOKENS, TEXT_TOKENS, STEPS = 16, 32, 4
SPEC = replace(
    FLUX2_KLEIN_9B_KV.transformer, hidden=768, double_blocks=2, single_blocks=6, context_width=2304
)


def build_cached(dtype: torch.dtype) -> Networks:
    networks = build(FLUX2_KLEIN_9B_KV, SPEC, dtype)
    theirs: Any = networks.diffusers
    for block in theirs.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in theirs.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return networks


class _Model(nn.Module):
    """What a ModelPatcher holds, as far as the node asks for it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = network


@dataclass
class CachedRun:
    """Four Euler steps over the same references."""

    networks: Networks
    inputs: Inputs
    sigmas: Tensor
    cached: dict[tuple[int, ...], tuple[KeyValue, ...]]
    comfy_options: dict[str, Any]

    @classmethod
    def make(cls, networks: Networks, references: int) -> "CachedRun":
        inputs = Inputs.make(networks, SIDE_TOKENS, references, TEXT_TOKENS)
        sigmas = flux_sigmas(FLUX2_KLEIN_9B_KV.schedule, SIDE_TOKENS**2, STEPS)
        cpu = torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(_Model(networks.comfyui), cpu, cpu)
        patched: Any = FluxKVCache.execute(patcher)[0]
        patched.patch_model()
        options: dict[str, Any] = patched.model_options["transformer_options"]
        return cls(networks, inputs, sigmas, {}, options)

    def ours(self) -> Tensor:
        """A new prompt or seed with references seen before."""
        network = self.networks.ours
        network.reference_cache = self._cache
        plan = network.plan(self.inputs.conditioning, self.inputs.target, self.sigmas)
        x = self.inputs.target.values
        for here, there in pairwise(map(float, self.sigmas)):
            x = x + (there - here) * plan.velocity(x, here)
        return x

    def _cache(
        self, references: tuple[Tokens, ...], computed: ReferencePass
    ) -> tuple[KeyValue, ...]:
        key = tuple(map(id, references))
        if key not in self.cached:
            self.cached[key] = tuple(computed)
        return self.cached[key]

    def diffusers(self) -> Tensor:
        """As Flux2KleinKVPipeline: keys and values from step 0."""
        inputs, network = self.inputs, self.networks.diffusers
        latent = inputs.target.latent
        seen = torch.cat([pack_latent(one, latent) for one in inputs.references], dim=1)
        common = {
            "encoder_hidden_states": inputs.conditioning.text.txt,
            "txt_ids": inputs.text_ids()[None],
            "guidance": None,
            "return_dict": False,
        }
        x, cache = inputs.target.values, None
        for step, (here, there) in enumerate(pairwise(self.sigmas)):
            if step == 0:
                velocity, cache = network(
                    hidden_states=torch.cat((seen, x), dim=1),
                    img_ids=torch.cat([*inputs.ids(), inputs.target.ids])[None],
                    timestep=here[None],
                    kv_cache_mode="extract",
                    num_ref_tokens=seen.shape[1],
                    **common,
                )
            else:
                (velocity,) = network(
                    hidden_states=x,
                    img_ids=inputs.target.ids[None],
                    timestep=here[None],
                    kv_cache=cache,
                    kv_cache_mode="cached",
                    **common,
                )
            x = x + (there - here) * velocity
        return x

    def comfyui(self) -> Tensor:
        """As a graph with the FluxKVCache node: keys and values of a full step 0."""
        for patches in self.comfy_options["patches"].values():
            for patch in patches:
                if hasattr(patch, "cleanup"):
                    patch.cleanup()
        inputs, latent = self.inputs, self.inputs.target.latent
        x = inputs.target.values
        for here, there in pairwise(self.sigmas):
            out = self.networks.comfyui(
                unpack_tokens(x, inputs.target.grid, latent),
                here[None],
                inputs.conditioning.text.txt,
                ref_latents=inputs.references,
                transformer_options=dict(self.comfy_options),
            )
            x = x + (there - here) * pack_latent(out, latent)
        return x
