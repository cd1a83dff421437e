"""One set of random weights in three networks: ours, diffusers' and ComfyUI's own."""

import copy
from dataclasses import dataclass, replace

import comfy.ldm.flux.model as native
import comfy.ldm.modules.attention as native_attention
import comfy.ops
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from glassbox.flux_core.families import FLUX1_KONTEXT
from glassbox.flux_core.specs import TransformerSpec
from glassbox.flux_core.tokens.ids import place
from glassbox.flux_core.tokens.pack import latent_tokens, pack_latent
from glassbox.flux_core.transformer.flux import Flux, build_flux
from glassbox.flux_core.transformer.plan import Plan
from glassbox.flux_core.values import Conditioning, TextFeatures, Tokens
from glassbox.flux_core.weights.transformer_keys import to_diffusers

LATENT = FLUX1_KONTEXT.latent
# FLUX.1's proportions in the middle: 8 heads, 3 + 6 blocks.
MID_SPEC = replace(FLUX1_KONTEXT.transformer, hidden=1024, double_blocks=3, single_blocks=6)
SIGMA, GUIDANCE, TEXT_TOKENS = 0.7, 2.5, 512


@dataclass
class Networks:
    ours: Flux
    diffusers: nn.Module
    comfyui: nn.Module


def build(spec: TransformerSpec, dtype: torch.dtype) -> Networks:
    """Random weights of a spread that keeps activations of order one."""
    if native_attention.optimized_attention is not native_attention.attention_pytorch:
        raise RuntimeError("ComfyUI must use PyTorch attention for a fair comparison")
    torch.manual_seed(0)
    ours = build_flux(FLUX1_KONTEXT, spec).eval().requires_grad_(False)
    state = {**ours.modulation.state_dict(), **ours.blocks.state_dict()}
    theirs = FluxTransformer2DModel(
        in_channels=spec.in_channels,
        num_layers=spec.double_blocks,
        num_single_layers=spec.single_blocks,
        attention_head_dim=spec.head_dim,
        num_attention_heads=spec.heads,
        joint_attention_dim=spec.context_width,
        pooled_projection_dim=spec.pooled_width,
        guidance_embeds=spec.has_guidance,
        axes_dims_rope=spec.axes_dim,
    )
    theirs.load_state_dict(to_diffusers(state))
    comfyui = native.Flux(
        image_model="flux",
        in_channels=LATENT.channels,
        out_channels=LATENT.channels,
        patch_size=LATENT.patch,
        vec_in_dim=spec.pooled_width,
        context_in_dim=spec.context_width,
        hidden_size=spec.hidden,
        mlp_ratio=spec.mlp_ratio,
        num_heads=spec.heads,
        depth=spec.double_blocks,
        depth_single_blocks=spec.single_blocks,
        axes_dim=list(spec.axes_dim),
        theta=int(spec.theta),
        qkv_bias=True,
        guidance_embed=spec.has_guidance,
        txt_ids_dims=[],
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
        device="cpu",
    )
    comfyui.load_state_dict(
        {name.replace("_norm.scale", "_norm.weight"): value for name, value in state.items()}
    )
    for network in (theirs, comfyui):
        network.eval().requires_grad_(False)
    return Networks(*(copy.deepcopy(one).to(dtype) for one in (ours, theirs, comfyui)))


@dataclass
class Step:
    """One step of a picture with references, in each network's own form."""

    networks: Networks
    latent: Tensor
    references: list[Tensor]
    text: TextFeatures
    plan: Plan
    target: Tokens
    conditioning: Conditioning

    @classmethod
    def make(cls, networks: Networks, side_tokens: int, references: int) -> "Step":
        spec, dtype = networks.ours.spec, next(networks.ours.parameters()).dtype
        shape = (1, LATENT.channels, side_tokens * LATENT.patch, side_tokens * LATENT.patch)
        latent, *latents = torch.randn(1 + references, *shape).unbind()
        target = latent_tokens(latent.to(dtype), LATENT)
        # ComfyUI's own placement for several references.
        placed = tuple(
            place(latent_tokens(one, LATENT), index=1, row=row, column=column)
            for one, (row, column) in zip(latents, [(0, 0), (side_tokens, 0)], strict=False)
        )
        text = TextFeatures(
            txt=torch.randn(1, TEXT_TOKENS, spec.context_width, dtype=dtype),
            pooled=torch.randn(1, spec.pooled_width, dtype=dtype),
        )
        conditioning = Conditioning(text=text, references=placed, guidance=GUIDANCE)
        plan = networks.ours.plan(conditioning, target, torch.tensor([SIGMA, 0.0]))
        scaled = [((one - LATENT.shift) * LATENT.scale).to(dtype) for one in latents]
        return cls(networks, latent.to(dtype), scaled, text, plan, target, conditioning)

    def ours(self) -> Tensor:
        return self.plan.velocity(self.target.values, 0)

    def diffusers(self) -> Tensor:
        placed = self.conditioning.references
        packed = [self.target.values, *(pack_latent(one, LATENT) for one in self.references)]
        out = self.networks.diffusers(
            hidden_states=torch.cat(packed, dim=1),
            encoder_hidden_states=self.text.txt,
            pooled_projections=self.text.pooled,
            timestep=torch.tensor([SIGMA]),
            img_ids=torch.cat([self.target.ids, *(one.ids for one in placed)]),
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
            guidance=torch.tensor([GUIDANCE]),
        ).sample
        return out[:, : self.target.values.shape[1]]

    def comfyui(self) -> Tensor:
        out = self.networks.comfyui(
            self.latent,
            torch.tensor([SIGMA]),
            self.text.txt,
            y=self.text.pooled,
            guidance=torch.tensor([GUIDANCE]),
            ref_latents=self.references or None,
            transformer_options={},
        )
        return pack_latent(out, LATENT)
