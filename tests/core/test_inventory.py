"""The keys, shapes and sizes of the published checkpoints, at full size on the meta device."""

import math

import pytest

from glassbox.flux_core.families import (
    FLUX1_AUTOENCODER,
    FLUX1_DEV,
    FLUX1_KONTEXT,
    FLUX1_KREA,
    FLUX1_SCHNELL,
    FLUX2_AUTOENCODER,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    FLUX2_KLEIN_9B_KV,
    FLUX2_KLEIN_BASE_4B,
    FLUX2_KLEIN_BASE_9B,
    FLUX2_SMALL_DECODER,
)
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.specs import AutoencoderSpec, FluxFamily
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.weights.detect import (
    DetectedAutoencoder,
    detect_autoencoder,
    detect_transformer,
)
from glassbox.flux_core.weights.key_map import shapes_of

D = 3072
# Weights of one layer, rows x columns; every layer has a bias of as many rows as well.
OUTER = {
    "img_in": (D, 64),
    "txt_in": (D, 4096),
    "time_in.in_layer": (D, 256),
    "time_in.out_layer": (D, D),
    "vector_in.in_layer": (D, 768),
    "vector_in.out_layer": (D, D),
    "guidance_in.in_layer": (D, 256),
    "guidance_in.out_layer": (D, D),
    "final_layer.linear": (64, D),
    "final_layer.adaLN_modulation.1": (6144, D),
}
DOUBLE = {
    f"{stream}_{name}": shape
    for stream in ("img", "txt")
    for name, shape in {
        "mod.lin": (18432, D),
        "attn.qkv": (9216, D),
        "attn.proj": (D, D),
        "mlp.0": (12288, D),
        "mlp.2": (D, 12288),
    }.items()
}
SINGLE = {"linear1": (21504, D), "linear2": (D, 15360), "modulation.lin": (9216, D)}
DOUBLE_NORMS = [
    f"{stream}_attn.norm.{name}_norm.scale"
    for stream in ("img", "txt")
    for name in ("query", "key")
]
SINGLE_NORMS = ["norm.query_norm.scale", "norm.key_norm.scale"]


def published_shapes(family: FluxFamily) -> dict[str, tuple[int, ...]]:
    layers = {k: v for k, v in OUTER.items() if family.is_guidance_distilled or "guidance" not in k}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, count, linears, norms in (
        ("double_blocks", 19, DOUBLE, DOUBLE_NORMS),
        ("single_blocks", 38, SINGLE, SINGLE_NORMS),
    ):
        for i in range(count):
            layers |= {f"{name}.{i}.{key}": shape for key, shape in linears.items()}
            shapes |= {f"{name}.{i}.{key}": (128,) for key in norms}
    for key, shape in layers.items():
        shapes |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
    return shapes


# FLUX.2: width, text features, blocks of both kinds; rows and columns are multiples of the width.
FLUX2_SIZES = {
    FLUX2_DEV: (6144, 15360, 8, 48),
    FLUX2_KLEIN_9B: (4096, 12288, 8, 24),
    FLUX2_KLEIN_9B_KV: (4096, 12288, 8, 24),
    FLUX2_KLEIN_BASE_9B: (4096, 12288, 8, 24),
    FLUX2_KLEIN_4B: (3072, 7680, 5, 20),
    FLUX2_KLEIN_BASE_4B: (3072, 7680, 5, 20),
}
FLUX2_STREAM = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (6, 1), "mlp.2": (1, 3)}
FLUX2_SHARED = {
    "double_stream_modulation_img.lin": 6,
    "double_stream_modulation_txt.lin": 6,
    "single_stream_modulation.lin": 3,
    "final_layer.adaLN_modulation.1": 2,
}


def published_flux2_shapes(family: FluxFamily) -> dict[str, tuple[int, ...]]:
    width, context, doubles, singles = FLUX2_SIZES[family]
    layers = {
        "img_in": (width, 128),
        "txt_in": (width, context),
        "time_in.in_layer": (width, 256),
        "time_in.out_layer": (width, width),
        "final_layer.linear": (128, width),
    } | {key: (rows * width, width) for key, rows in FLUX2_SHARED.items()}
    if family is FLUX2_DEV:
        layers |= {
            "guidance_in.in_layer": (width, 256),
            "guidance_in.out_layer": (width, width),
        }
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(doubles):
        for stream in ("img", "txt"):
            for key, (rows, columns) in FLUX2_STREAM.items():
                layers[f"double_blocks.{i}.{stream}_{key}"] = (rows * width, columns * width)
        shapes |= {f"double_blocks.{i}.{key}": (128,) for key in DOUBLE_NORMS}
    for i in range(singles):
        layers[f"single_blocks.{i}.linear1"] = (9 * width, width)
        layers[f"single_blocks.{i}.linear2"] = (width, 4 * width)
        shapes |= {f"single_blocks.{i}.{key}": (128,) for key in SINGLE_NORMS}
    return shapes | {f"{key}.weight": shape for key, shape in layers.items()}


def listed(family: FluxFamily) -> dict[str, tuple[int, ...]]:
    return published_flux2_shapes(family) if family in FLUX2_SIZES else published_shapes(family)


@pytest.mark.parametrize(
    ("family", "tensors", "parameters"),
    [
        (FLUX1_DEV, 780, 11_901_408_320),
        (FLUX1_KONTEXT, 780, 11_901_408_320),
        (FLUX1_KREA, 780, 11_901_408_320),
        (FLUX1_SCHNELL, 776, 11_891_178_560),
        (FLUX2_DEV, 299, 32_223_281_152),
        (FLUX2_KLEIN_9B, 201, 9_078_581_248),
        (FLUX2_KLEIN_9B_KV, 201, 9_078_581_248),
        (FLUX2_KLEIN_BASE_9B, 201, 9_078_581_248),
        (FLUX2_KLEIN_4B, 149, 3_875_544_576),
        (FLUX2_KLEIN_BASE_4B, 149, 3_875_544_576),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_transformer_has_the_published_tensors_and_no_others(
    family: FluxFamily, tensors: int, parameters: int
) -> None:
    network = build_flux(family, device="meta")
    modulation, blocks = shapes_of(network.modulation), shapes_of(network.blocks)
    assert not modulation.keys() & blocks.keys()
    shapes = modulation | blocks
    assert shapes == listed(family)
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters


@pytest.mark.parametrize("family", [FLUX1_DEV, FLUX1_SCHNELL], ids=lambda one: one.name)
def test_sampling_needs_at_most_74_percent_of_the_checkpoint(family: FluxFamily) -> None:
    network = build_flux(family, device="meta")
    blocks = sum(map(math.prod, shapes_of(network.blocks).values()))
    modulation = sum(map(math.prod, shapes_of(network.modulation).values()))
    assert blocks / (blocks + modulation) <= 0.74


@pytest.mark.parametrize(
    "family",
    [FLUX1_DEV, FLUX1_SCHNELL, FLUX2_DEV, FLUX2_KLEIN_9B, FLUX2_KLEIN_4B],
    ids=lambda one: one.name,
)
def test_the_sizes_of_a_transformer_are_read_back_from_its_shapes(family: FluxFamily) -> None:
    assert detect_transformer(listed(family)) == family.transformer


def test_the_autoencoder_has_the_published_tensors() -> None:
    shapes = shapes_of(Autoencoder(FLUX1_AUTOENCODER, device="meta"))
    assert len(shapes) == 244
    assert sum(map(math.prod, shapes.values())) == 83_819_683
    # A line of every kind from the published list; the latent has 16 channels.
    assert {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.conv1.weight": (256, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.2.downsample.conv.bias": (512,),
        "encoder.mid.attn_1.norm.weight": (512,),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.mid.attn_1.proj_out.bias": (512,),
        "encoder.conv_out.weight": (32, 512, 3, 3),
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.up.1.block.0.conv1.weight": (256, 512, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.norm_out.weight": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }.items() <= shapes.items()
    detected = detect_autoencoder(shapes, {})
    assert (detected.spec, detected.guessed) == (FLUX1_AUTOENCODER, True)


# Lines of every kind from FLUX.2's published list that FLUX.1's has not.
FLUX2_BOTTLENECK = {
    "encoder.quant_conv.weight": (64, 64, 1, 1),
    "encoder.quant_conv.bias": (64,),
    "encoder.conv_out.weight": (64, 512, 3, 3),
    "decoder.post_quant_conv.weight": (32, 32, 1, 1),
    "decoder.post_quant_conv.bias": (32,),
    "bn.running_mean": (128,),
    "bn.running_var": (128,),
    "bn.num_batches_tracked": (),
}


@pytest.mark.parametrize(
    ("spec", "parameters", "lines"),
    [
        (
            FLUX2_AUTOENCODER,
            84_046_372,
            {
                "decoder.conv_in.weight": (512, 32, 3, 3),
                "decoder.up.0.block.0.conv1.bias": (128,),
                "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
                "decoder.conv_out.weight": (3, 128, 3, 3),
            },
        ),
        (
            FLUX2_SMALL_DECODER,
            None,
            {
                "decoder.conv_in.weight": (384, 32, 3, 3),
                "decoder.up.0.block.0.conv1.bias": (96,),
                "decoder.up.1.block.0.nin_shortcut.weight": (192, 384, 1, 1),
                "decoder.conv_out.weight": (3, 96, 3, 3),
            },
        ),
    ],
    ids=["full", "small decoder"],
)
def test_flux2s_autoencoder_has_the_published_tensors(
    spec: AutoencoderSpec, parameters: int | None, lines: dict[str, tuple[int, ...]]
) -> None:
    shapes = shapes_of(Autoencoder(spec, device="meta"))
    flux1 = shapes_of(Autoencoder(FLUX1_AUTOENCODER, device="meta"))
    assert len(shapes) == 251
    added = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    added |= {key for key in FLUX2_BOTTLENECK if "quant" in key}
    assert shapes.keys() - flux1.keys() == added
    assert (FLUX2_BOTTLENECK | lines).items() <= shapes.items()
    if parameters is not None:
        assert sum(map(math.prod, shapes.values())) == parameters
    encoder = {key for key in flux1 if key.startswith("encoder.") and "conv_out" not in key}
    assert all(shapes[key] == flux1[key] for key in encoder)
    detected = detect_autoencoder(shapes, {})
    assert detected == DetectedAutoencoder(spec, False, "known by its shape")
