"""Tiny random-weight models in the published layouts, real enough for every node to run.

FLUX.1 with two 128-wide heads, an autoencoder of one width, CLIP and T5 with FLUX.1's own
vocabularies, so that ComfyUI's tokenizers fit them.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from glassbox.flux_core.families import FLUX1_AUTOENCODER, FLUX1_DEV
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.specs import AutoencoderSpec, TransformerSpec
from glassbox.flux_core.text.modules import ClipSpec, T5Spec
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.types import Shapes

CLIP = ClipSpec(width=64, layers=1, ffn=64, vocabulary=49408, positions=77)
T5 = T5Spec(width=64, layers=1, ffn=64, vocabulary=32128, heads=1, head_dim=64)
TRANSFORMER: TransformerSpec = replace(
    FLUX1_DEV.transformer,
    hidden=256,
    double_blocks=1,
    single_blocks=2,
    context_width=T5.width,
    pooled_width=CLIP.width,
)
SCHNELL = replace(TRANSFORMER, has_guidance=False)
AUTOENCODER: AutoencoderSpec = replace(
    FLUX1_AUTOENCODER, channels=32, channel_mult=(1, 1, 1, 1), res_blocks=1
)

KONTEXT_FILE = "tiny-kontext.safetensors"
DEV_FILE = "tiny-flux1-dev.safetensors"
SCHNELL_FILE = "tiny-schnell.safetensors"
CLIP_FILE = "tiny_clip_l.safetensors"
T5_FILE = "tiny_t5.safetensors"
AUTOENCODER_FILE = "tiny_ae.safetensors"


def make_models(models: Path) -> None:
    """Write every tiny model into ComfyUI's models folder."""
    diffusion, text, vae = (models / one for one in ("diffusion_models", "text_encoders", "vae"))
    for folder in (diffusion, text, vae):
        folder.mkdir(parents=True, exist_ok=True)
    save(transformer_state(seed=1), diffusion / KONTEXT_FILE)
    save(transformer_state(seed=2), diffusion / DEV_FILE)
    save(transformer_state(SCHNELL, seed=3), diffusion / SCHNELL_FILE)
    save(clip_state(), text / CLIP_FILE)
    save(t5_state(), text / T5_FILE)
    save(autoencoder_state(), vae / AUTOENCODER_FILE)


def save(state: Mapping[str, Tensor], path: Path) -> Path:
    """Write one file."""
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, str(path))
    return path


def transformer_state(spec: TransformerSpec = TRANSFORMER, *, seed: int = 1) -> dict[str, Tensor]:
    """Random weights of a FLUX.1 transformer, under their published names."""
    network = build_flux(FLUX1_DEV, spec)
    fill(network, seed)
    return {**network.modulation.state_dict(), **network.blocks.state_dict()}


def autoencoder_state(spec: AutoencoderSpec = AUTOENCODER, *, seed: int = 4) -> dict[str, Tensor]:
    """Random weights of an autoencoder, under their published names."""
    autoencoder = Autoencoder(spec)
    fill(autoencoder, seed)
    return autoencoder.state_dict()


def clip_state(spec: ClipSpec = CLIP) -> dict[str, Tensor]:
    """Random weights of CLIP's text tower, as ComfyUI's clip_l.safetensors names them."""
    return random_state(spec.shapes(), "text_model.", seed=5)


def t5_state(spec: T5Spec = T5) -> dict[str, Tensor]:
    """Random weights of T5's encoder, as ComfyUI's t5xxl files name them."""
    state = random_state(spec.shapes(), "encoder.", seed=6)
    state["shared.weight"] = state.pop("encoder.embed_tokens.weight")
    return state


def fill(module: nn.Module, seed: int) -> None:
    """Give every parameter random values, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        centre = 1.0 if ".norm" in name and name.endswith(("weight", "scale")) else 0.0
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(centre + 0.05 * noise)


def random_state(shapes: Shapes, prefix: str, *, seed: int) -> dict[str, Tensor]:
    """Random tensors of these shapes, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + name: (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        + 0.05 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
