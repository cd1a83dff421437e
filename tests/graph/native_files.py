"""Random files for graphs that load with ComfyUI's own loaders, under the names people have.

Transformers and text encoders are tiny; the autoencoders have their full shapes, which ComfyUI's
loader fixes, and are bfloat16 as some published ones are.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from glassbox.flux_core.families import (
    FLUX1_AUTOENCODER,
    FLUX2_AUTOENCODER,
    FLUX2_KLEIN_4B,
    QWEN3_4B,
)
from glassbox.flux_core.specs import TransformerSpec
from glassbox.flux_core.text.modules import LanguageModelShape
from glassbox.tests.core.quantised_files import scaled_float8
from glassbox.tests.graph import tiny, tiny_flux2

KONTEXT_FP8_FILE = "flux1-dev-kontext_fp8_scaled.safetensors"
KONTEXT_FILE = "flux1-kontext-dev.safetensors"
CLIP_FILE, T5_FILE = "clip_l.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors"
STYLED_CLIP_FILE = "clip_l_styled.safetensors"
LORA_FILES = {"FLUX.1": "style-kontext.safetensors", "FLUX.2": "style-klein.safetensors"}
CONTROL_FILE = "control.safetensors"
CLIP_KEY = "text_model.encoder.layers.0.mlp.fc1"
CLIP_STRENGTH = 0.5
FOLDER = "native"  # below ComfyUI's: other tests have other files under these names
QWEN_LAYERS = 28  # one more than FLUX.2 reads, as ComfyUI's class wants
State = dict[str, Tensor]


def make_native_files(models: Path, inputs: Path) -> None:
    """Write every file, and small photographs, into a folder of their own in each of ComfyUI's."""
    names = ("diffusion_models", "text_encoders", "vae", "loras", "controlnet")
    diffusion, text, vae, loras, control = (models / name / FOLDER for name in names)
    inputs = inputs / FOLDER
    for folder in (diffusion, text, vae, loras, control, inputs):
        folder.mkdir(parents=True)
    _transformers(diffusion, loras)
    _text_encoders(text, loras)
    tiny.save(control_net_state(tiny.TRANSFORMER), control / CONTROL_FILE)
    autoencoders = {
        "ae.safetensors": tiny.autoencoder_state(FLUX1_AUTOENCODER),
        tiny_flux2.AUTOENCODER_FILE: tiny_flux2.autoencoder_state(FLUX2_AUTOENCODER),
    }
    for name, state in autoencoders.items():
        half = {
            key: tensor.bfloat16() if tensor.is_floating_point() else tensor
            for key, tensor in state.items()
        }
        tiny.save(half, vae / name)
    picture = Image.radial_gradient("L").resize((100, 70)).convert("RGB")
    picture.save(inputs / "example.png")
    picture.rotate(90).resize((64, 80)).save(inputs / "nano_scene_2.png")


def _transformers(folder: Path, loras: Path) -> None:
    kontext = tiny.transformer_state(seed=1)
    stored, metadata, _ = scaled_float8(kontext, "old")
    save_file(stored, str(folder / KONTEXT_FP8_FILE), metadata=metadata)
    tiny.save(kontext, folder / KONTEXT_FILE)
    klein = tiny_flux2.transformer_state(FLUX2_KLEIN_4B, tiny_flux2.KLEIN, seed=2)
    tiny.save(klein, folder / tiny_flux2.KLEIN_FILE)
    for number, (generation, state) in enumerate({"FLUX.1": kontext, "FLUX.2": klein}.items()):
        layers = {key.removesuffix(".weight"): one for key, one in state.items() if one.ndim == 2}
        tiny.save(lora("lora_unet_", layers, seed=number), loras / LORA_FILES[generation])


def _text_encoders(folder: Path, loras: Path) -> None:
    clip = tiny.clip_state(replace(tiny.CLIP, layers=2))  # ComfyUI tells CLIP by its second layer
    tiny.save(clip, folder / CLIP_FILE)
    tiny.save(tiny.t5_state(), folder / T5_FILE)
    tiny.save(qwen_state(), folder / tiny_flux2.QWEN_4B_FILE)
    weight = clip[f"{CLIP_KEY}.weight"]
    style = lora("lora_te1_", {CLIP_KEY: weight}, seed=7)
    down, up, _ = style.values()
    styled = {**clip, f"{CLIP_KEY}.weight": weight + CLIP_STRENGTH * up @ down}
    tiny.save(styled, folder / STYLED_CLIP_FILE)
    path = loras / LORA_FILES["FLUX.1"]
    tiny.save({**load_file(str(path)), **style}, path)


def lora(prefix: str, layers: Mapping[str, Tensor], *, seed: int, rank: int = 4) -> State:
    """A LoRA in kohya's names, with an alpha that leaves its strength as it is."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for layer, weight in layers.items():
        name = prefix + layer.replace(".", "_")
        state[f"{name}.lora_down.weight"] = 0.1 * torch.randn(
            (rank, weight.shape[1]), generator=generator
        )
        state[f"{name}.lora_up.weight"] = 0.1 * torch.randn(
            (weight.shape[0], rank), generator=generator
        )
        state[f"{name}.alpha"] = torch.tensor(float(rank))
    return state


def qwen_state() -> State:
    """Random weights of a narrow Qwen3, float32, as deep as ComfyUI's class asks for."""
    width = tiny_flux2.WIDTH
    shape = LanguageModelShape(
        architecture=QWEN3_4B.architecture,
        hidden=width,
        layers=QWEN_LAYERS,
        heads=1,
        kv_heads=1,
        head_dim=QWEN3_4B.head_dim,
        ffn=2 * width,
        vocabulary=tiny_flux2.QWEN_VOCABULARY,
        theta=QWEN3_4B.theta,
        norm_eps=QWEN3_4B.norm_eps,
    )
    return tiny.random_state(shape.shapes(), "model.", seed=4)


def control_net_state(spec: TransformerSpec) -> State:
    """Random weights of a FLUX.1 ControlNet in XLabs' names, of a model's widths."""
    spec = replace(spec, double_blocks=2, single_blocks=1)
    state = tiny.transformer_state(spec, seed=8)
    state = {key: one for key, one in state.items() if not key.startswith("final_layer.")}
    sizes: dict[str, tuple[int, ...]] = {"pos_embed_input": (spec.hidden, spec.in_channels)}
    for name in ("blocks.0", "blocks.1", "single_blocks.0"):
        sizes[f"controlnet_{name}"] = (spec.hidden, spec.hidden)
    for number, (inputs, outputs) in enumerate(pairwise((3, *[16] * 8))):
        sizes[f"input_hint_block.{2 * number}"] = (outputs, inputs, 3, 3)
    generator = torch.Generator().manual_seed(9)
    for name, size in sizes.items():
        state[f"{name}.weight"] = 0.05 * torch.randn(size, generator=generator)
        state[f"{name}.bias"] = 0.05 * torch.randn(size[0], generator=generator)
    return state
