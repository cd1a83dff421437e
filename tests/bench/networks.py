"""One set of random weights in three networks: ours, diffusers' and ComfyUI's own."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import comfy.ldm.flux.model as native
import comfy.ldm.modules.attention as native_attention
import comfy.ops
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from torch import Tensor, nn

from glassbox.flux_core.families import FLUX1_KONTEXT, FLUX2_KLEIN_9B
from glassbox.flux_core.specs import FluxFamily, TransformerSpec
from glassbox.flux_core.tokens.ids import text_ids
from glassbox.flux_core.tokens.pack import latent_tokens, pack_latent
from glassbox.flux_core.tokens.references import place_references
from glassbox.flux_core.transformer.flux import Flux, build_flux
from glassbox.flux_core.transformer.plan import Plan
from glassbox.flux_core.values import Conditioning, Reference, TextFeatures, Tokens
from glassbox.flux_core.weights.transformer_keys import to_diffusers

# Each family's proportions in the middle: 8 heads, and blocks of both kinds.
MID_SPECS = {
    FLUX1_KONTEXT.name: replace(
        FLUX1_KONTEXT.transformer, hidden=1024, double_blocks=3, single_blocks=6
    ),
    FLUX2_KLEIN_9B.name: replace(
        FLUX2_KLEIN_9B.transformer,
        hidden=1024,
        double_blocks=2,
        single_blocks=6,
        context_width=3072,
    ),
}
SIGMA, TEXT_TOKENS = 0.7, 512


@dataclass
class Networks:
    family: FluxFamily
    ours: Flux
    diffusers: nn.Module
    comfyui: nn.Module


def build(family: FluxFamily, spec: TransformerSpec, dtype: torch.dtype) -> Networks:
    """Random weights of a spread that keeps activations of order one."""
    if native_attention.optimized_attention is not native_attention.attention_pytorch:
        raise RuntimeError("ComfyUI must use PyTorch attention for a fair comparison")
    torch.manual_seed(0)
    ours = build_flux(family, spec).eval().requires_grad_(False)
    state = {**ours.modulation.state_dict(), **ours.blocks.state_dict()}
    theirs = _diffusers(spec)
    theirs.load_state_dict(to_diffusers(state))
    comfyui = _comfyui(family, spec)
    comfyui.load_state_dict(
        {name.replace("_norm.scale", "_norm.weight"): value for name, value in state.items()}
    )
    for network in (theirs, comfyui):
        network.eval().requires_grad_(False)
    return Networks(family, *(copy.deepcopy(one).to(dtype) for one in (ours, theirs, comfyui)))


def _diffusers(spec: TransformerSpec) -> nn.Module:
    common: dict[str, Any] = {
        "in_channels": spec.in_channels,
        "num_layers": spec.double_blocks,
        "num_single_layers": spec.single_blocks,
        "attention_head_dim": spec.head_dim,
        "num_attention_heads": spec.heads,
        "joint_attention_dim": spec.context_width,
        "guidance_embeds": spec.has_guidance,
        "axes_dims_rope": spec.axes_dim,
    }
    if spec.pooled_width:
        return FluxTransformer2DModel(**common, pooled_projection_dim=spec.pooled_width)
    return Flux2Transformer2DModel(**common, mlp_ratio=spec.mlp_ratio, rope_theta=int(spec.theta))


def _comfyui(family: FluxFamily, spec: TransformerSpec) -> nn.Module:
    latent, second = family.latent, spec.shares_modulation
    return native.Flux(
        image_model="flux2" if second else "flux",
        in_channels=latent.channels,
        out_channels=latent.channels,
        patch_size=latent.patch,
        vec_in_dim=spec.pooled_width or None,
        context_in_dim=spec.context_width,
        hidden_size=spec.hidden,
        mlp_ratio=spec.mlp_ratio,
        num_heads=spec.heads,
        depth=spec.double_blocks,
        depth_single_blocks=spec.single_blocks,
        axes_dim=list(spec.axes_dim),
        theta=int(spec.theta),
        qkv_bias=spec.has_bias,
        ops_bias=spec.has_bias,
        guidance_embed=spec.has_guidance,
        global_modulation=second,
        mlp_silu_act=spec.is_gated,
        txt_ids_dims=[] if latent.text_axis is None else [latent.text_axis],
        default_ref_method="index" if second else "offset",
        ref_index_scale=latent.index_step,
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
        device="cpu",
    )


@dataclass
class Inputs:
    """One picture with references, in every network's form."""

    latent: Tensor  # in the transformer's scale
    references: list[Tensor]
    target: Tokens
    conditioning: Conditioning

    @classmethod
    def make(
        cls, networks: Networks, side_tokens: int, references: int, text_tokens: int
    ) -> "Inputs":
        family, spec = networks.family, networks.ours.spec
        latent, dtype = family.latent, next(networks.ours.parameters()).dtype
        cells = side_tokens * latent.patch
        pictures = torch.randn(1 + references, 1, latent.channels, cells, cells).to(dtype)
        target, *seen = (latent_tokens(one, latent) for one in pictures)
        placed = place_references(seen, "auto")  # as ComfyUI does
        pooled = torch.randn(1, spec.pooled_width, dtype=dtype) if spec.pooled_width else None
        conditioning = Conditioning(
            text=TextFeatures(
                txt=torch.randn(1, text_tokens, spec.context_width, dtype=dtype), pooled=pooled
            ),
            references=tuple(Reference(tokens=one) for one in placed),
            guidance=family.default_guidance if spec.has_guidance else None,
        )
        scaled = [((one - latent.shift) * latent.scale).to(dtype) for one in pictures[1:]]
        return cls(pictures[0], scaled, target, conditioning)

    def guidance(self) -> Tensor | None:
        strength = self.conditioning.guidance
        return None if strength is None else torch.tensor([strength])

    def ids(self) -> list[Tensor]:
        """Position ids of the references."""
        return [one.tokens.ids for one in self.conditioning.references]

    def text_ids(self) -> Tensor:
        return text_ids(self.conditioning.text.txt.shape[1], self.target.latent)


@dataclass
class Step:
    """One step of a picture with references."""

    networks: Networks
    inputs: Inputs
    plan: Plan

    @classmethod
    def make(cls, networks: Networks, side_tokens: int, references: int) -> "Step":
        inputs = Inputs.make(networks, side_tokens, references, TEXT_TOKENS)
        plan = networks.ours.plan(inputs.conditioning, inputs.target, [SIGMA, 0.0])
        return cls(networks, inputs, plan)

    def ours(self) -> Tensor:
        return self.plan.velocity(self.inputs.target.values, SIGMA)

    def diffusers(self) -> Tensor:
        inputs, text = self.inputs, self.inputs.conditioning.text
        latent = inputs.target.latent
        packed = [inputs.target.values, *(pack_latent(one, latent) for one in inputs.references)]
        pooled = {} if text.pooled is None else {"pooled_projections": text.pooled}
        out = self.networks.diffusers(
            hidden_states=torch.cat(packed, dim=1),
            encoder_hidden_states=text.txt,
            timestep=torch.tensor([SIGMA]),
            img_ids=torch.cat([inputs.target.ids, *inputs.ids()]),
            txt_ids=inputs.text_ids(),
            guidance=inputs.guidance(),
            **pooled,
        ).sample
        return out[:, : inputs.target.values.shape[1]]

    def comfyui(self) -> Tensor:
        inputs, text = self.inputs, self.inputs.conditioning.text
        out = self.networks.comfyui(
            inputs.latent,
            torch.tensor([SIGMA]),
            text.txt,
            y=text.pooled,
            guidance=inputs.guidance(),
            ref_latents=inputs.references or None,
            transformer_options={},
        )
        return pack_latent(out, inputs.target.latent)
