"""Small checkpoints for tests: transformers and autoencoders of FLUX with random weights."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from glassbox.flux_core.families import (
    FLUX1_AUTOENCODER,
    FLUX1_DEV,
    FLUX1_SCHNELL,
    FLUX2_AUTOENCODER,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
)
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.specs import AutoencoderSpec, FluxFamily, TransformerSpec
from glassbox.flux_core.transformer.flux import build_flux

TINY_FLUX1 = replace(
    FLUX1_DEV.transformer,
    hidden=128,
    double_blocks=2,
    single_blocks=3,
    context_width=48,
    pooled_width=32,
)
TINY_SCHNELL = replace(TINY_FLUX1, has_guidance=False)
TINY_FLUX2 = replace(
    FLUX2_DEV.transformer, hidden=128, double_blocks=2, single_blocks=3, context_width=48
)
TINY_KLEIN = replace(TINY_FLUX2, has_guidance=False)
TINY_AUTOENCODER = replace(FLUX1_AUTOENCODER, channels=32)
TINY_FLUX2_AUTOENCODER = replace(FLUX2_AUTOENCODER, channels=32)
TINY_SMALL_DECODER = replace(
    TINY_FLUX2_AUTOENCODER, channels=64, channel_mult=(1, 1, 1, 2), decoder_channels=32
)


def randomise(*modules: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Set every value, so that no swapped pair of tensors stays unseen; give the state."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for module in modules:
        for key, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                tensor.fill_(12_345)
                state[key] = tensor
                continue
            centre = 1.0 if tensor.ndim == 1 and not key.endswith("bias") else 0.0
            tensor.copy_(centre + 0.05 * torch.randn(tensor.shape, generator=generator))
            state[key] = tensor
    return state


def flux1_state(*, guidance: bool = True, seed: int = 0) -> dict[str, Tensor]:
    family = FLUX1_DEV if guidance else FLUX1_SCHNELL
    return _copied(_transformer_state(family, TINY_FLUX1 if guidance else TINY_SCHNELL, seed))


def flux2_state(*, guidance: bool = True, seed: int = 0) -> dict[str, Tensor]:
    family = FLUX2_DEV if guidance else FLUX2_KLEIN_4B
    return _copied(_transformer_state(family, TINY_FLUX2 if guidance else TINY_KLEIN, seed))


def autoencoder_state(spec: AutoencoderSpec = TINY_AUTOENCODER) -> dict[str, Tensor]:
    return _copied(_autoencoder_state(spec))


# Made once, without PyTorch's own first values, which take longer than most tests.
@cache
def _transformer_state(family: FluxFamily, spec: TransformerSpec, seed: int) -> dict[str, Tensor]:
    network = build_flux(family, spec, device="meta")
    halves = (network.modulation.to_empty(device="cpu"), network.blocks.to_empty(device="cpu"))
    return randomise(*halves, seed=seed)


@cache
def _autoencoder_state(spec: AutoencoderSpec) -> dict[str, Tensor]:
    return randomise(Autoencoder(spec, device="meta").to_empty(device="cpu"))


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


def write(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, str(path), metadata)
    return path


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit, names and types included."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )
