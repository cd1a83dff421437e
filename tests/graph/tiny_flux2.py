"""Tiny random-weight FLUX.2 models under the names that the published files have.

A transformer of two heads, an autoencoder of one width, and language models one head wide but as
deep as the layers FLUX.2 reads: 27 of Qwen3 with its vocabulary, which ComfyUI's tokenizer speaks,
and 30 of Mistral with a vocabulary of bytes in the file.
"""

import base64
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from glassbox.flux_core.families import (
    FLUX2_AUTOENCODER,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    MISTRAL_SMALL_3,
    QWEN3_4B,
)
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.specs import AutoencoderSpec, FluxFamily, LanguageModelSpec, TransformerSpec
from glassbox.flux_core.text.modules import LanguageModelShape
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.tests.graph import tiny

WIDTH = 32  # of the language models
_SMALL = {"hidden": 256, "double_blocks": 1, "single_blocks": 2, "context_width": 3 * WIDTH}
KLEIN: TransformerSpec = replace(FLUX2_KLEIN_4B.transformer, **_SMALL)
DEV: TransformerSpec = replace(FLUX2_DEV.transformer, **_SMALL)
AUTOENCODER: AutoencoderSpec = replace(
    FLUX2_AUTOENCODER, channels=32, channel_mult=(1, 1, 1, 1), res_blocks=1
)
QWEN_VOCABULARY = 151_936

KLEIN_FILE = "flux-2-klein-4b.safetensors"
BASE_FILE = "flux-2-klein-base-4b.safetensors"
KV_FILE = "flux-2-klein-9b-kv.safetensors"
DEV_FILE = "flux2-dev.safetensors"
QWEN_4B_FILE = "qwen_3_4b.safetensors"
QWEN_8B_FILE = "qwen_3_8b.safetensors"
MISTRAL_FILE = "mistral_3_small_flux2_bf16.safetensors"
AUTOENCODER_FILE = "flux2-vae.safetensors"


def make_published(models: Path) -> None:
    """Write every file into ComfyUI's models folder, once."""
    diffusion, text, vae = (models / one for one in ("diffusion_models", "text_encoders", "vae"))
    if (vae / AUTOENCODER_FILE).is_file():
        return
    for folder in (diffusion, text, vae):
        folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate((KLEIN_FILE, BASE_FILE, KV_FILE)):
        tiny.save(transformer_state(FLUX2_KLEIN_4B, KLEIN, seed=seed), diffusion / name)
    tiny.save(transformer_state(FLUX2_DEV, DEV, seed=3), diffusion / DEV_FILE)
    qwen = tiny.save(language_state(QWEN3_4B, QWEN_VOCABULARY, seed=4), text / QWEN_4B_FILE)
    (text / QWEN_8B_FILE).hardlink_to(qwen)
    tiny.save(mistral_state(), text / MISTRAL_FILE)
    tiny.save(autoencoder_state(), vae / AUTOENCODER_FILE)


def transformer_state(
    family: FluxFamily, spec: TransformerSpec, *, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights of a FLUX.2 transformer, under their published names."""
    network = build_flux(family, spec)
    tiny.fill(network, seed)
    return {**network.modulation.state_dict(), **network.blocks.state_dict()}


def autoencoder_state(spec: AutoencoderSpec = AUTOENCODER, *, seed: int = 5) -> dict[str, Tensor]:
    """Random weights of an autoencoder, under their published names."""
    autoencoder = Autoencoder(spec)
    tiny.fill(autoencoder, seed)
    state = autoencoder.state_dict()
    generator = torch.Generator().manual_seed(seed)
    state["bn.running_mean"] = torch.randn(128, generator=generator)
    state["bn.running_var"] = 0.5 + torch.rand(128, generator=generator)
    return state


def language_state(spec: LanguageModelSpec, vocabulary: int, *, seed: int) -> dict[str, Tensor]:
    """Random weights of a narrow language model, as ComfyUI's single files name them."""
    shape = LanguageModelShape(
        architecture=spec.architecture,
        hidden=WIDTH,
        layers=max(spec.layers),
        heads=1,
        kv_heads=1,
        head_dim=spec.head_dim,
        ffn=2 * WIDTH,
        vocabulary=vocabulary,
        theta=spec.theta,
        norm_eps=spec.norm_eps,
    )
    state = tiny.random_state(shape.shapes(), "model.", seed=seed)
    return {key: tensor.bfloat16() for key, tensor in state.items()}


def mistral_state() -> dict[str, Tensor]:
    """Random weights of a narrow Mistral with its vocabulary, as ComfyUI's file carries it."""
    marks = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    marks += ["[IMG]", "<pad>"]
    tekken = {
        "config": {
            "default_num_special_tokens": len(marks),
            "default_vocab_size": len(marks) + 256,
        },
        "special_tokens": [{"rank": i, "token_str": one} for i, one in enumerate(marks)],
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()}
            for byte in range(256)
        ],
    }
    written = torch.frombuffer(bytearray(json.dumps(tekken).encode()), dtype=torch.uint8)
    state = language_state(MISTRAL_SMALL_3, len(marks) + 256, seed=6)
    return {**state, "tekken_model": written}
