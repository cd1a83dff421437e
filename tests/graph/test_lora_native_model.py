"""Apply LoRA on ComfyUI's own MODEL: every weight as it should be, and usable on both sides."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from glassbox.tests.graph import tiny
from glassbox.tests.graph.probe import run_probe
from glassbox.tests.graph.server import ComfyError
from glassbox.tests.graph.workflows import api_form, pixels, upload_pictures

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph

LAYERS = {"FLUX.1": 42, "FLUX.2": 21}  # of the probe's models
OF_XLABS = {"FLUX.1": 16, "FLUX.2": 8}
NATIVELY_READ = ("kohya", "ai-toolkit", "diffusers", "OneTrainer")
STYLE = "native-style.safetensors"
SHIFTS = {"max_shift": 1.15, "base_shift": 0.5, "width": 512, "height": 512}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def seen() -> Json:
    return run_probe("probe_lora_model")


def test_a_patched_weight_is_the_weight_plus_the_scaled_product(seen: Json) -> None:
    """Seven formats on both generations, loaded by ComfyUI; each layer is changed once."""
    formats = seen["formats"]
    assert len(formats) == 14
    assert {name: one["furthest"] for name, one in formats.items() if one["furthest"] > 1e-6} == {}
    counts = {name: one["patched"] for name, one in formats.items()}
    assert counts == {
        name: (OF_XLABS if name.endswith("XLabs") else LAYERS)[name[:6]] for name in counts
    }


def test_comfyuis_own_loader_makes_the_same_weights_of_what_it_reads(seen: Json) -> None:
    """Bit for bit; of FLUX.2 in diffusers' names it leaves five layers of these models out."""
    formats = seen["formats"]
    assert all(one["from native"] == 0.0 for one in formats.values())
    read = {name[7:] for name, one in formats.items() if one["native reads"]}
    assert read == set(NATIVELY_READ)
    for name, one in formats.items():
        if name[7:] in NATIVELY_READ:
            is_split = name in ("FLUX.2 diffusers", "FLUX.2 OneTrainer")
            assert one["only ours"] == (5 if is_split else 0), name


def test_the_model_that_came_in_is_untouched(seen: Json) -> None:
    """Its weights bit for bit, and its pictures: alone, with a LoRA, alone again."""
    assert all(one["restored"] for one in seen["formats"].values())
    for generation in LAYERS:
        assert seen[generation]["untouched"]
        for sampler in ("our sampler", "KSampler"):
            found = seen[generation][sampler]
            assert found["again"]
            assert found["far"] > 0.01
            assert found["from native"] == 0.0


def test_loras_add_up_behind_one_of_comfyuis_loader(seen: Json) -> None:
    assert len(seen["stacked"]) == 4
    assert max(seen["stacked"].values()) <= 1e-6


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8_e4m3fn", "e4m3fn"), ("fp8_e5m2", "e5m2"), ("mixed", "e4m3fn")]
)
def test_quantised_weights_stay_so_and_are_patched_as_by_comfyuis_loader(
    name: str, dtype: str, seen: Json
) -> None:
    found = seen["quantised"][name]
    assert found["dtype"] == f"torch.float8_{dtype}"
    assert found["equal"]
    assert found["differ"]
    assert found["restored"]


def test_a_patcher_with_its_own_way_of_patching_keeps_it(seen: Json) -> None:
    """As GGUF loaders have one, which adds patches where a layer computes."""
    found = seen["quantised"]["own class"]
    assert found["kept"]
    assert found["weights untouched"]
    assert found["furthest"] <= 1e-6
    assert found["beside"] == 0


def test_what_only_comfyuis_samplers_call_stays_on_the_model(seen: Json) -> None:
    assert seen["taken"] == ["easycache", "manual_cast_dtype", "sampler_post_cfg_function"]


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (
            "family",
            (
                "FamilyMismatchError: style.safetensors is a LoRA for a FLUX.2 transformer",
                "Needed: a LoRA for Glassbox nano Kontext.",
            ),
        ),
        (
            "generation",
            (
                "FamilyMismatchError: style.safetensors is a LoRA for Glassbox nano Kontext",
                "Needed: a LoRA for FLUX.2 [klein] base 4B",
            ),
        ),
        ("half", ("CheckpointError", "lora_unet_img_in", "without its other half")),
        ("blocks", ("SettingError", "double blocks 0-99", "from 0 to 1")),
        ("forward", ("SettingError: Another node has replaced the network's code",)),
        ("fill", ("SettingError: The MODEL takes 384 channels a token",)),
        ("compiled", ("SettingError: The MODEL's network has no 'img_in.weight'", "unload")),
        ("sdxl", ("FamilyMismatchError: The MODEL is SDXL", "FLUX.1 or FLUX.2")),
    ],
)
def test_what_does_not_fit_is_refused_by_name_within_a_second(
    use: str, words: tuple[str, ...], seen: Json
) -> None:
    found = seen["refused"][use]
    assert all(word in found["said"] for word in words), found["said"]
    assert found["seconds"] < 1.0


def test_a_control_lora_widens_a_native_model_and_replaces_its_norms(seen: Json) -> None:
    """As ComfyUI's own loader does it; at strength 0 nothing is put on."""
    found = seen["control"]
    assert found["furthest"] <= 1e-6
    assert found["norms"] == 16
    assert found["from native"] == 0.0
    assert found["restored"]
    assert found["sampled alike"]
    assert found["sampled apart"] > 0.1
    assert found["at 0"] == {}


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("sampled", ("SettingError: A LoRA on the MODEL makes its 'img_in.weight' 256x128",)),
        ("sampled from native", ("SettingError: A LoRA on the MODEL makes its 'img_in.weight'",)),
        ("behind", ("SettingError: A LoRA on the MODEL", "'img_in.weight' larger")),
        ("twice", ("SettingError: A LoRA on the MODEL", "'img_in.weight' larger")),
        ("our own", ("CheckpointError", "Canny or Depth LoRA", "ComfyUI's own MODEL of FLUX.1")),
        ("other", ("FamilyMismatchError", "Canny or Depth LoRA", "FLUX.2 [klein] base 4B")),
    ],
)
def test_a_control_lora_is_refused_by_name_where_its_picture_has_no_input(
    use: str, words: tuple[str, ...], seen: Json
) -> None:
    said = seen["control"]["said"][use]
    assert all(word in said for word in words), said


def test_no_weight_of_a_refused_lora_is_read(seen: Json) -> None:
    assert seen["reads"] == 0


@pytest.fixture(scope="module")
def lora_comfy(comfy: "Comfy") -> "Comfy":
    """ComfyUI with a LoRA for the embedded model, which its own loader also lists."""
    upload_pictures(comfy)
    folder = comfy.models_dir / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    write_style(folder / STYLE)
    return comfy


def write_style(path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    sizes = {"lora_down": (2, 256), "lora_up": (1792, 2)}
    state = {
        f"lora_unet_single_blocks_{block}_linear1.{end}.weight": 0.2
        * torch.randn(size, generator=generator)
        for block in range(4)
        for end, size in sizes.items()
    }
    tiny.save(state, path)


Step = tuple[str, Json, int]  # a node's class, its inputs and the output that goes on
OURS: Step = ("GlassboxApplyLoRA", {"file": STYLE, "strength": 0.5}, 2)
OURS_FOR_OURS: Step = (OURS[0], OURS[1], 0)
THEIRS: Step = ("LoraLoaderModelOnly", {"lora_name": STYLE, "strength_model": 0.5}, 0)


def with_lora(*steps: Step, after: str = "UNETLoader") -> Json:
    """Workflow 12, in which the MODEL comes through more nodes to ComfyUI's sampler."""
    graph = copy.deepcopy(api_form("12_native_nano_ksampler"))
    kinds = {node["class_type"]: number for number, node in graph.items()}
    link: list[Any] = [kinds[after], 0]
    for number, (kind, inputs, out) in enumerate(steps, 100):
        graph[str(number)] = {"class_type": kind, "inputs": {"model": link, **inputs}}
        link = [str(number), out]
    graph[kinds["GlassboxApplyToModel"]]["inputs"]["model"] = link
    return graph


def picture(comfy: "Comfy", graph: Json) -> bytes:
    (image,) = comfy.images(comfy.run(graph))
    return pixels(image).tobytes()


def test_comfyuis_samplers_take_the_native_output(lora_comfy: "Comfy") -> None:
    """Two LoRAs, from either loader, make the picture that two of ComfyUI's loader make."""
    plain, natively, *ours = (
        picture(lora_comfy, with_lora(*steps))
        for steps in (
            (),
            (THEIRS, THEIRS),
            (OURS, OURS),
            (OURS_FOR_OURS, OURS),
            (THEIRS, OURS),
            (OURS, THEIRS),
        )
    )
    assert ours == [natively] * 4
    assert natively != plain


@pytest.mark.parametrize(
    ("steps", "node"),
    [
        ((OURS,), "GlassboxApplyToModel"),
        ((OURS, THEIRS), "LoraLoaderModelOnly"),
        ((OURS, ("ModelSamplingFlux", SHIFTS, 0)), "ModelSamplingFlux"),
    ],
)
def test_our_own_model_says_what_it_is_in_a_native_node(
    steps: tuple[Step, ...], node: str, lora_comfy: "Comfy"
) -> None:
    with pytest.raises(ComfyError) as error:
        lora_comfy.run(with_lora(*steps, after="GlassboxLoadNano"))
    assert error.value.details["node_type"] == node
    message = error.value.details["exception_message"]
    assert "Glassbox nano Kontext was loaded by this pack's loader" in message
    assert "Fix: load it with 'Load Diffusion Model'" in message


def test_our_own_model_goes_on_to_our_nodes_through_either_output(lora_comfy: "Comfy") -> None:
    graph = api_form("01_nano_kontext_edit")
    kinds = {node["class_type"]: number for number, node in graph.items()}
    pictures: list[bytes] = []
    for out in (0, 2):
        changed = copy.deepcopy(graph)
        inputs = {"model": [kinds["GlassboxLoadNano"], 0], **OURS[1]}
        changed["100"] = {"class_type": OURS[0], "inputs": inputs}
        changed[kinds["GlassboxSampleGuided"]]["inputs"]["model"] = ["100", out]
        pictures.append(picture(lora_comfy, changed))
    assert pictures[0] == pictures[1] != picture(lora_comfy, graph)


def test_the_output_for_our_nodes_is_refused_by_a_native_one_before_the_run(
    lora_comfy: "Comfy",
) -> None:
    with pytest.raises(ComfyError, match="GLASSBOX_MODEL"):
        lora_comfy.queue(with_lora(OURS_FOR_OURS))
