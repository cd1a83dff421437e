from dataclasses import replace

import pytest

from glassbox.flux_core.errors import CheckpointError, FamilyMismatchError
from glassbox.flux_core.families import (
    FLUX1_AUTOENCODER,
    FLUX2_AUTOENCODER,
    FLUX2_SMALL_DECODER,
    NANO_AUTOENCODER,
    NANO_FLUX2_AUTOENCODER,
)
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.specs import AutoencoderSpec
from glassbox.flux_core.weights.detect import detect_autoencoder, detect_transformer
from glassbox.flux_core.weights.key_map import shapes_of
from glassbox.flux_core.weights.kinds import (
    AUTOENCODERS,
    PARTS,
    QUANTISED,
    TRANSFORMERS,
    identify,
)
from glassbox.tests.core.checkpoints import (
    TINY_FLUX1,
    TINY_FLUX2,
    TINY_KLEIN,
    flux1_state,
    flux2_state,
)


def tiny_shapes() -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in flux1_state().items()}


def test_sizes_are_read_from_shapes() -> None:
    assert detect_transformer(tiny_shapes()) == TINY_FLUX1
    for guidance, spec in ((True, TINY_FLUX2), (False, TINY_KLEIN)):
        state = flux2_state(guidance=guidance)
        assert detect_transformer({key: tuple(one.shape) for key, one in state.items()}) == spec


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("img_in.weight", (128, 384), "FLUX.1 Fill"),
        ("img_in.weight", (128, 128), "Canny or Depth"),
        ("img_in.weight", (96, 64), "96 wide"),
        ("img_in.weight", (0, 64), "is 0x64, which tells no size"),
        ("txt_in.weight", (128, 48, 1), "is 128x48x1, which is no matrix"),
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
        detect_transformer(shapes)


def test_flux2_is_not_taken_for_a_tool_of_flux1_by_its_128_channels() -> None:
    state = flux2_state()
    shapes = {key: tuple(one.shape) for key, one in state.items()}
    assert detect_transformer(shapes).in_channels == 128
    with pytest.raises(CheckpointError, match="no matrix"):
        detect_transformer(shapes | {"txt_in.weight": (128, 48, 1)})


@pytest.mark.parametrize(
    ("spec", "guessed"),
    [
        (FLUX1_AUTOENCODER, True),  # Stable Diffusion 3's has the same shape
        (NANO_AUTOENCODER, False),
        (FLUX2_AUTOENCODER, False),
        (FLUX2_SMALL_DECODER, False),
        (NANO_FLUX2_AUTOENCODER, False),
    ],
)
def test_a_known_autoencoder_is_known_by_its_shape(spec: AutoencoderSpec, guessed: bool) -> None:
    detected = detect_autoencoder(shapes_of(Autoencoder(spec, device="meta")), {})
    assert (detected.spec, detected.guessed) == (spec, guessed)


def test_an_autoencoder_of_another_size_is_taken_for_flux1s_unless_the_file_says() -> None:
    spec = replace(NANO_AUTOENCODER, channels=64)
    shapes = shapes_of(Autoencoder(spec, device="meta"))
    detected = detect_autoencoder(shapes, {"glassbox_family": "nano-kontext"})
    assert (detected.spec, detected.known_by) == (spec, "named in the file")
    detected = detect_autoencoder(shapes, {})
    assert (detected.spec.latent, detected.spec.norm_groups) == (FLUX1_AUTOENCODER.latent, 32)
    assert detected.guessed


def test_what_makes_flux2s_latents_is_told_from_what_makes_flux1s() -> None:
    shapes = shapes_of(Autoencoder(replace(FLUX2_AUTOENCODER, channels=64), device="meta"))
    detected = detect_autoencoder(shapes, {})
    assert (detected.spec.latent, detected.spec.patch) == (FLUX2_AUTOENCODER.latent, 2)
    assert detected.guessed
    detected = detect_autoencoder(shapes, {"glassbox_family": "nano-klein"})
    assert (detected.spec.latent, detected.spec.norm_groups) == (NANO_FLUX2_AUTOENCODER.latent, 2)
    assert not detected.guessed
    with pytest.raises(FamilyMismatchError, match=r"nano Kontext, and is built like FLUX\.2's"):
        detect_autoencoder(shapes, {"glassbox_family": "nano-kontext"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder.conv_in.weight": (512, 16, 3, 3)}, "16 channels at 1/8.*32 channels.*FLUX.2"),
        ({"decoder.up.0.block.0.conv1.weight": (40, 256, 3, 3)}, "decoder 40.*32 must divide both"),
        ({"encoder.down.4.block.0.conv1.weight": (512, 512, 3, 3)}, "at 1/16"),
    ],
)
def test_what_cannot_be_flux2s_autoencoder_is_refused(
    changes: dict[str, tuple[int, ...]], said: str
) -> None:
    shapes = shapes_of(Autoencoder(FLUX2_AUTOENCODER, device="meta")) | changes
    with pytest.raises(CheckpointError, match=said):
        detect_autoencoder(shapes, {})


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
        detect_autoencoder(shapes, {})


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("double_stream_modulation_img.lin.weight", "FLUX.2 transformer"),
        ("double_stream_modulation_img.linear.weight", "FLUX.2 transformer"),
        ("early_stream_modulations.image.lin.weight", "FLUX.3 transformer"),
        ("double_blocks.0.img_mlp.gate_proj.weight", "Ovis-Image"),
        ("distilled_guidance_layer.layers.0.in_layer.weight", "Chroma"),
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "HunyuanVideo"),
        ("model.diffusion_model.input_blocks.0.0.weight", "UNet"),
        ("time_embedding.linear_1.weight", "UNet"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "LoRA"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "LoRA"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "LoRA"),
        ("controlnet_blocks.0.weight", "ControlNet"),
        ("double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4", "nf4"),
        ("transformer_blocks.0.mlp_fc1.qweight", "SVDQuant"),
        ("double_blocks.0.img_attn.qkv.comfy_quant", "for ComfyUI"),
        ("bn.running_mean", "FLUX.2 autoencoder"),
        ("post_quant_conv.weight", "quantisation layers"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5"),
        ("token_embd.weight", "llama.cpp"),
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


def test_a_plain_flux2_file_is_none_of_them() -> None:
    keys = flux2_state()
    assert identify(keys, {}, (*QUANTISED, *TRANSFORMERS)) is None
    shapes = shapes_of(Autoencoder(FLUX2_AUTOENCODER, device="meta"))
    assert identify(shapes, {}, (*QUANTISED, *AUTOENCODERS)) is None
    beside = [key.replace("encoder.quant_conv", "quant_conv") for key in shapes]
    assert identify(beside, {}, (*QUANTISED, *AUTOENCODERS)) is None
