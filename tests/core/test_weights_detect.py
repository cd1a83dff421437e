from dataclasses import replace
from pathlib import Path

import pytest

from glassbox.flux_core.errors import CheckpointError, FamilyMismatchError
from glassbox.flux_core.families import (
    FAMILIES,
    FLUX1_AUTOENCODER,
    FLUX1_DEV,
    FLUX1_KONTEXT,
    FLUX1_KREA,
    FLUX1_SCHNELL,
    NANO_AUTOENCODER,
    NANO_KONTEXT,
)
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.specs import AutoencoderSpec, TransformerSpec
from glassbox.flux_core.weights.check import shapes_of
from glassbox.flux_core.weights.choose import choose_family, differences
from glassbox.flux_core.weights.detect import spec_of_autoencoder, spec_of_flux
from glassbox.flux_core.weights.kinds import (
    AUTOENCODERS,
    PARTS,
    QUANTISED,
    TRANSFORMERS,
    identify,
)
from glassbox.tests.core.checkpoints import TINY_FLUX1, TINY_SCHNELL, flux1_state

FULL, UNGUIDED = FLUX1_DEV.transformer, FLUX1_SCHNELL.transformer


def tiny_shapes() -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in flux1_state().items()}


def test_sizes_are_read_from_shapes() -> None:
    assert spec_of_flux(tiny_shapes()) == TINY_FLUX1
    assert differences(TINY_FLUX1, FLUX1_DEV) == (
        "a custom size: width 128, 2 + 3 blocks, text 48 wide"
    )
    assert differences(FULL, FLUX1_DEV) == ""


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("img_in.weight", (128, 384), "FLUX.1 Fill"),
        ("img_in.weight", (128, 128), "Canny or Depth"),
        ("img_in.weight", (96, 64), "96 wide"),
        ("img_in.weight", (0, 64), "is empty"),
        ("txt_in.weight", (128, 48, 1), "3 axes"),
        ("final_layer.linear.weight", None, "is missing"),
    ],
)
def test_what_cannot_be_flux1_is_refused(
    key: str, shape: tuple[int, ...] | None, said: str
) -> None:
    shapes = tiny_shapes() | ({} if shape is None else {key: shape})
    if shape is None:
        del shapes[key]
    with pytest.raises(CheckpointError, match=said):
        spec_of_flux(shapes)


@pytest.mark.parametrize(
    ("spec", "path", "family", "guessed"),
    [
        (FULL, "flux1-dev-kontext_fp8_scaled.safetensors", FLUX1_KONTEXT, True),
        (FULL, "flux1-kontext-dev.safetensors", FLUX1_KONTEXT, True),
        (FULL, "FLUX.1-Kontext-dev/transformer", FLUX1_KONTEXT, True),
        (
            FULL,
            "FLUX.1-Krea-dev/transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
            FLUX1_KREA,
            True,
        ),
        (FULL, "flux1-krea-dev.safetensors", FLUX1_KREA, True),
        (FULL, "Flux.1_Dev-bf16.safetensors", FLUX1_DEV, True),
        (FULL, "kontext/somebody's mix.safetensors", FLUX1_DEV, True),
        (FULL, "flux1-schnell.safetensors", FLUX1_DEV, True),
        (UNGUIDED, "flux1-schnell.safetensors", FLUX1_SCHNELL, False),
        (UNGUIDED, "anything.safetensors", FLUX1_SCHNELL, False),
        (TINY_SCHNELL, "anything.safetensors", FLUX1_SCHNELL, True),
        (NANO_KONTEXT.transformer, "anything.safetensors", NANO_KONTEXT, False),
        (TINY_FLUX1, "glassbox_nano_kontext.safetensors", NANO_KONTEXT, True),
        (TINY_FLUX1, "anything.safetensors", FLUX1_DEV, True),
    ],
)
def test_a_family_is_known_by_shape_or_guessed_from_the_name(
    spec: TransformerSpec, path: str, family: object, guessed: bool
) -> None:
    chosen, known = choose_family(spec, Path("models") / path, {}, None)
    assert (chosen, known.guessed) == (family, guessed)
    assert ("guessed" in known.why) == guessed


def test_what_the_user_or_the_file_says_goes_before_the_name() -> None:
    path = Path("flux1-kontext-dev.safetensors")
    assert choose_family(FULL, path, {}, FLUX1_DEV)[0] == FLUX1_DEV
    chosen, known = choose_family(FULL, path, {"glassbox_family": "flux1-krea"}, None)
    assert (chosen, known.why, known.guessed) == (FLUX1_KREA, "named in the file", False)


@pytest.mark.parametrize(
    ("spec", "asked", "said"),
    [
        (FULL, FLUX1_SCHNELL, "has a guidance input"),
        (UNGUIDED, FLUX1_KONTEXT, "has no guidance input"),
        (replace(FULL, out_channels=128), FLUX1_DEV, "128 out"),
        (replace(FULL, in_channels=96), None, "96 channels in"),
    ],
)
def test_a_family_that_the_keys_contradict_is_refused(
    spec: TransformerSpec, asked: object, said: str
) -> None:
    with pytest.raises(FamilyMismatchError, match=said):
        choose_family(spec, Path("a.safetensors"), {}, asked)


def test_a_family_that_the_file_contradicts_is_refused() -> None:
    metadata = {"glassbox_family": "nano-kontext"}
    with pytest.raises(FamilyMismatchError, match="says that it is Glassbox nano"):
        choose_family(NANO_KONTEXT.transformer, Path("a"), metadata, FLUX1_KONTEXT)


def test_every_family_is_found_by_its_own_hints() -> None:
    for family in FAMILIES.values():
        for hint in family.file_hints:
            path = Path(f"my-{hint}-model.safetensors")
            assert choose_family(family.transformer, path, {}, None)[0] == family


@pytest.mark.parametrize(
    ("spec", "guessed"),
    [
        (FLUX1_AUTOENCODER, True),  # Stable Diffusion 3's has the same shape
        (NANO_AUTOENCODER, False),
    ],
)
def test_a_known_autoencoder_is_known_by_its_shape(spec: AutoencoderSpec, guessed: bool) -> None:
    found, known = spec_of_autoencoder(shapes_of(Autoencoder(spec, device="meta")), {})
    assert (found, known.guessed) == (spec, guessed)


def test_an_autoencoder_of_another_size_is_taken_for_flux1s_unless_the_file_says() -> None:
    spec = replace(NANO_AUTOENCODER, channels=64)
    shapes = shapes_of(Autoencoder(spec, device="meta"))
    found, known = spec_of_autoencoder(shapes, {"glassbox_family": "nano-kontext"})
    assert (found, known.why) == (spec, "named in the file")
    found, known = spec_of_autoencoder(shapes, {})
    assert (found.latent, found.norm_groups) == (FLUX1_AUTOENCODER.latent, 32)
    assert known.guessed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder.conv_in.weight": (512, 4, 3, 3)}, "4 channels at 1/8"),
        ({"decoder.conv_in.weight": (512,)}, "0 channels"),
        ({"encoder.down.1.block.0.conv1.weight": (200, 128, 3, 3)}, "levels are"),
        ({"encoder.down.4.block.0.conv1.weight": (512, 512, 3, 3)}, "at 1/16"),
    ],
)
def test_what_cannot_be_the_autoencoder_is_refused(
    changes: dict[str, tuple[int, ...]], said: str
) -> None:
    shapes = shapes_of(Autoencoder(FLUX1_AUTOENCODER, device="meta")) | changes
    with pytest.raises(CheckpointError, match=said):
        spec_of_autoencoder(shapes, {})


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("double_stream_modulation_img.lin.weight", "FLUX.2 transformer"),
        ("double_stream_modulation_img.linear.weight", "FLUX.2 transformer"),
        ("early_stream_modulations.image.lin.weight", "FLUX.3 transformer"),
        ("distilled_guidance_layer.layers.0.in_layer.weight", "Chroma"),
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "HunyuanVideo"),
        ("model.diffusion_model.input_blocks.0.0.weight", "UNet"),
        ("time_embedding.linear_1.weight", "UNet"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "LoRA"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "LoRA"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "LoRA"),
        ("controlnet_blocks.0.weight", "ControlNet"),
        ("double_blocks.0.img_attn.qkv.scale_weight", "scaled float8"),
        ("scaled_fp8", "scaled float8"),
        ("double_blocks.0.img_attn.qkv.weight_scale", "scaled float8"),
        ("double_blocks.0.img_attn.qkv.weight_scale_2", "nvfp4"),
        ("double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4", "nf4"),
        ("transformer_blocks.0.mlp_fc1.qweight", "SVDQuant"),
        ("double_blocks.0.img_attn.qkv.comfy_quant", "for ComfyUI"),
        ("bn.running_mean", "FLUX.2 autoencoder"),
        ("post_quant_conv.weight", "quantisation layers"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5"),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", "CLIP"),
        ("model.layers.0.self_attn.q_proj.weight", "language model"),
        ("decoder.up.0.block.0.conv1.weight", "an autoencoder"),
    ],
)
def test_other_kinds_of_file_are_named(key: str, title: str) -> None:
    kind = identify([key], {}, (*QUANTISED, *TRANSFORMERS, *AUTOENCODERS, *PARTS))
    assert kind is not None
    assert title in kind.title


def test_metadata_gives_a_quantised_file_away() -> None:
    kind = identify(tiny_shapes(), {"_quantization_metadata": "{}"}, QUANTISED)
    assert kind is not None
    assert "bfloat16" in kind.fix


def test_a_plain_flux1_file_is_none_of_them() -> None:
    assert identify(tiny_shapes(), {}, (*QUANTISED, *TRANSFORMERS, *AUTOENCODERS)) is None
