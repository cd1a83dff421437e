import time
from pathlib import Path

import pytest
import torch

from glassbox.flux_core.errors import CheckpointError
from glassbox.flux_core.weights.kinds import lora_title
from glassbox.flux_core.weights.load import load_flux
from glassbox.tests.core.checkpoints import write

Sizes = dict[str, tuple[int, int]]
KLEIN_4B = "a LoRA for FLUX.2 [klein] base 4B or FLUX.2 [klein] 4B"
KLEIN_9B = "a LoRA for FLUX.2 [klein] base 9B, FLUX.2 [klein] 9B KV or FLUX.2 [klein] 9B"


def lora(layers: Sizes, prefix: str = "", ending: str = "A B") -> dict[str, tuple[int, ...]]:
    """Shapes of a LoRA of rank 16 on layers of so many outputs and inputs."""
    down, up = (f".lora_{part}.weight" for part in ending.split())
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (outputs, inputs) in layers.items():
        name = name.replace(".", "_") if ending == "down up" else name
        shapes |= {prefix + name + down: (16, inputs), prefix + name + up: (outputs, 16)}
        shapes[prefix + name + ".alpha"] = ()
    return shapes


@pytest.mark.parametrize(
    ("layers", "title"),
    [
        ({"single_blocks.19.linear1": (27648, 3072)}, KLEIN_4B),
        ({"single_blocks.23.linear2": (4096, 16384)}, KLEIN_9B),
        ({"double_blocks.7.img_mlp.0": (36864, 6144)}, "a LoRA for FLUX.2 [dev]"),
        ({"double_stream_modulation_img.lin": (18432, 3072)}, KLEIN_4B),
        (
            {"single_blocks.37.linear1": (21504, 3072)},
            "a LoRA for FLUX.1 Kontext [dev], FLUX.1 Krea [dev], FLUX.1 [schnell] or FLUX.1 [dev]",
        ),
        (
            {"guidance_in.in_layer": (3072, 256), "vector_in.in_layer": (3072, 768)},
            "a LoRA for FLUX.1 Kontext [dev], FLUX.1 Krea [dev] or FLUX.1 [dev]",
        ),
        # Both generations have blocks whose attention is 3072 wide, FLUX.1 more of them.
        (
            {"double_blocks.4.img_attn.proj": (3072, 3072)},
            "a LoRA for FLUX.1 Kontext [dev], FLUX.1 Krea [dev], FLUX.1 [schnell], FLUX.1 [dev], "
            "FLUX.2 [klein] base 4B or FLUX.2 [klein] 4B",
        ),
        (
            {"double_blocks.5.img_attn.proj": (3072, 3072)},
            "a LoRA for FLUX.1 Kontext [dev], FLUX.1 Krea [dev], FLUX.1 [schnell] or FLUX.1 [dev]",
        ),
        ({"single_stream_modulation.lin": (99, 33)}, "a LoRA for a FLUX.2 transformer of another"),
        ({"single_blocks.0.modulation.lin": (99, 33)}, "a LoRA for a FLUX.1 transformer of anoth"),
        ({"down_blocks.0.to_q": (320, 320)}, "a LoRA for Stable Diffusion 1.5 or XL"),
        ({"somebodys.own.layer": (320, 320)}, "a LoRA"),
    ],
)
@pytest.mark.parametrize(
    ("prefix", "ending"),
    [
        ("", "A B"),
        ("diffusion_model.", "A B"),
        ("diffusion_model.", "down up"),
        ("base_model.model.", "A B"),
        ("lora_unet_", "down up"),
    ],
)
def test_a_lora_is_named_with_the_models_it_fits(
    layers: Sizes, title: str, prefix: str, ending: str
) -> None:
    found = lora_title(lora(layers, prefix, ending))
    assert found == title or (title.endswith(("another", "anoth")) and found.startswith(title))


@pytest.mark.parametrize(
    ("layers", "title"),
    [
        (
            {"single_transformer_blocks.0.attn.to_qkv_mlp_proj": (36864, 4096)},
            KLEIN_9B,
        ),
        ({"transformer_blocks.1.ff.linear_in": (18432, 3072)}, KLEIN_4B),
        (
            {"single_transformer_blocks.2.proj_mlp": (12288, 3072)},
            "a LoRA for FLUX.1 Kontext [dev], FLUX.1 Krea [dev], FLUX.1 [schnell] or FLUX.1 [dev]",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model.transformer."])
def test_a_lora_in_diffusers_names_is_named_too(layers: Sizes, title: str, prefix: str) -> None:
    assert lora_title(lora(layers, prefix)) == title


def test_a_lora_whose_layers_contradict_one_another_fits_nothing() -> None:
    layers = {"single_blocks.0.linear1": (27648, 3072), "single_blocks.1.linear1": (36864, 4096)}
    assert lora_title(lora(layers)) == "a LoRA"
    assert lora_title({"a.lora_A.weight": (), "b.lora_B.weight": (1, 2, 3)}) == "a LoRA"


def test_a_lora_in_the_place_of_a_model_is_refused_with_its_family(tmp_path: Path) -> None:
    shapes = lora({"single_blocks.19.linear1": (27648, 3072)}, "diffusion_model.")
    file = write(tmp_path / "a.safetensors", {key: torch.zeros(one) for key, one in shapes.items()})
    with pytest.raises(CheckpointError, match=r"is a LoRA for FLUX\.2 \[klein\].*FLUX.1 or FLUX.2"):
        load_flux(file)


@pytest.mark.parametrize("unit", ["transformer.", "lora_unet_", "blocks_1_", "double_blocks.0."])
def test_a_lora_of_very_many_or_very_long_names_costs_little(unit: str) -> None:
    start = time.process_time()
    assert lora_title({unit * 100_000 + ".lora_A.weight": (4, 4)}) == "a LoRA"
    many = {f"double_blocks.{i}.img_attn.qkv.lora_A.weight": (4, 3072) for i in range(20_000)}
    assert lora_title(many).startswith("a LoRA for a FLUX") or lora_title(many) == "a LoRA"
    assert time.process_time() - start < 5
