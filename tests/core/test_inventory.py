"""The keys, shapes and sizes of the published checkpoints, at full size on the meta device."""

import math

import pytest

from glassbox.flux_core.families import (
    FLUX1_AUTOENCODER,
    FLUX1_DEV,
    FLUX1_KONTEXT,
    FLUX1_KREA,
    FLUX1_SCHNELL,
)
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.specs import FluxFamily
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.weights.check import shapes_of
from glassbox.flux_core.weights.detect import spec_of_autoencoder, spec_of_flux

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


@pytest.mark.parametrize(
    ("family", "tensors", "parameters"),
    [
        (FLUX1_DEV, 780, 11_901_408_320),
        (FLUX1_KONTEXT, 780, 11_901_408_320),
        (FLUX1_KREA, 780, 11_901_408_320),
        (FLUX1_SCHNELL, 776, 11_891_178_560),
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
    assert shapes == published_shapes(family)
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters


@pytest.mark.parametrize("family", [FLUX1_DEV, FLUX1_SCHNELL], ids=lambda one: one.name)
def test_sampling_needs_at_most_74_percent_of_the_checkpoint(family: FluxFamily) -> None:
    network = build_flux(family, device="meta")
    blocks = sum(map(math.prod, shapes_of(network.blocks).values()))
    modulation = sum(map(math.prod, shapes_of(network.modulation).values()))
    assert blocks / (blocks + modulation) <= 0.74


@pytest.mark.parametrize("family", [FLUX1_DEV, FLUX1_SCHNELL], ids=lambda one: one.name)
def test_the_sizes_of_a_transformer_are_read_back_from_its_shapes(family: FluxFamily) -> None:
    assert spec_of_flux(published_shapes(family)) == family.transformer


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
    spec, known = spec_of_autoencoder(shapes, {})
    assert (spec, known.guessed) == (FLUX1_AUTOENCODER, True)
