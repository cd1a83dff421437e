"""Quantised weights in memory as they are stored: exact, small, and changed by LoRAs exactly."""

from typing import TYPE_CHECKING, Any

import pytest

from glassbox.tests.core.checkpoints import write
from glassbox.tests.core.quantised_files import nvfp4, scaled_float8
from glassbox.tests.graph import tiny
from glassbox.tests.graph.graphs import Link, Pipeline
from glassbox.tests.graph.probe import run_probe
from glassbox.tests.graph.test_lora import STYLE, apply, picture, pixels, write_style

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph

FAMILIES = ("flux1-dev", "flux2-klein-9b-kv")
Json = dict[str, Any]


@pytest.fixture(scope="module")
def seen() -> Json:
    return run_probe("probe_stored")


@pytest.fixture(scope="module")
def forms(seen: Json) -> Json:
    return {name: one for name, one in seen.items() if "reports" in one}


def test_as_stored_computes_what_plain_weights_do(forms: Json) -> None:
    """References, true CFG and kept references included; smoothing rounds in another place."""
    assert len(forms) == 10
    apart = {name: one["plain"] for name, one in forms.items()}
    assert {name: far for name, far in apart.items() if far > 1e-6} == {}
    exact = [far for name, far in apart.items() if not name.endswith("smoothed")]
    assert max(exact) == 0
    assert min(one["layers"] for one in forms.values()) >= 12


def test_memory_is_that_of_the_file(forms: Json) -> None:
    """Counted in the storage behind the weights, and by ComfyUI."""
    for name, one in forms.items():
        held, plain, file = one["bytes"]
        assert abs(held - file) <= 0.05 * file, name
        assert held <= 0.5 * plain, name
        assert one["counted"] == held, name
        assert one["unchanged"], name


def test_the_report_says_what_is_kept_and_how_large_it_is(forms: Json) -> None:
    kept, plain = forms["flux1-dev old"]["reports"]
    assert "60 tensors, 4,854,336 parameters, float32, 0.01 GB" in kept
    assert "kept as scaled float8_e4m3fn: 16 tensors, 0.00 GB; each becomes float32" in kept
    assert "dequantised" not in kept
    assert "float32, 0.02 GB" in plain
    assert "dequantised from scaled float8_e4m3fn to float32: 16 tensors" in plain


def test_a_lora_is_added_exactly_and_leaves_the_model_as_it_was(forms: Json) -> None:
    """Rows of fused weights, low rank, LoKr, full changes and a bias; one set, then two."""
    for name, one in forms.items():
        assert one["again"], name
        assert one["lora"] <= 1e-6, name
        assert one["loras"] <= 1e-6, name
        assert one["lora differs"] > 0.01, name
        assert one["identities"] == 3, name
        assert one["shared"], name


def test_room_is_asked_for_the_numbers_of_the_largest_layer(forms: Json) -> None:
    for name, one in forms.items():
        alone, changed, plain = one["made"]
        assert 0 < alone <= changed, name
        assert plain == 0, name


def test_in_bfloat16_rounded_scales_cost_no_more_than_bfloat16_does(forms: Json) -> None:
    """ComfyUI's layers round a scale to bfloat16; a scale of one has nothing to round."""
    for name, one in forms.items():
        stored, plain = one["bfloat16 off"]
        assert one["bfloat16"] <= 2 * plain, name
        assert stored <= 1.5 * plain, name
    assert forms["flux1-dev raw"]["bfloat16"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_device_unloading_and_coming_back_change_nothing(seen: Json, family: str) -> None:
    assert seen[f"{family} partly"] == {"waiting": True, "gone": 0, "equal": True}
    assert seen[f"{family} life"] == {"held": [True, True], "freed": [True] * 5}


def test_kept_references_are_not_reused_under_another_lora(seen: Json) -> None:
    assert seen["flux2-klein-9b-kv kept"] == {"passes": [1, 1, 0, 0, 1, 0], "equal": True}


@pytest.mark.parametrize("family", ["flux1-dev", "flux2-klein-4b"])
def test_comfyuis_own_loader_of_the_same_file_makes_the_same_picture(
    seen: Json, family: str
) -> None:
    for form, one in seen[f"{family} native"].items():
        assert one["apart"] <= 1e-6, form
        ours, native = one["sizes"]
        assert ours <= native, form


@pytest.fixture(scope="module")
def stored_comfy(tiny_comfy: "Comfy") -> "Comfy":
    """ComfyUI with the tiny model in float8 and NVFP4, and a LoRA for it."""
    folder = tiny_comfy.models_dir
    (folder / "loras").mkdir(parents=True, exist_ok=True)
    write_style(folder / "loras" / STYLE)
    state = tiny.transformer_state(seed=1)
    for name, (stored, metadata, _) in {
        "small-fp8-kontext.safetensors": scaled_float8(state, "old"),
        "small-nvfp4-kontext.safetensors": nvfp4(state),
    }.items():
        write(folder / "diffusion_models" / name, stored, metadata)
    return tiny_comfy


def graph_of(file: str, weights: str | None, *, lora: bool = False) -> tuple[Pipeline, Link]:
    graph = Pipeline()
    model = graph.model(file, "auto")
    if weights is not None:
        graph.nodes[model[0]]["inputs"]["weights"] = weights
    report = graph.out(model[0], 1)
    graph.show(report)
    if lora:
        model = graph.out(apply(graph, model, STYLE), 0)
    picture(graph, model)
    return graph, model


@pytest.mark.parametrize(
    "file", ["small-fp8-kontext.safetensors", "small-nvfp4-kontext.safetensors"]
)
@pytest.mark.parametrize("lora", [False, True])
def test_a_graph_makes_the_same_picture_either_way(
    stored_comfy: "Comfy", file: str, lora: bool
) -> None:
    """A graph that was saved without the input keeps weights as they are stored."""
    runs = {
        weights: stored_comfy.run(graph_of(file, weights, lora=lora)[0].nodes)
        for weights in (None, "as stored", "plain")
    }
    pictures = [pixels(stored_comfy, history)[0] for history in runs.values()]
    assert pictures[0] == pictures[1]
    apart = max(abs(one - other) for one, other in zip(*pictures[1:], strict=True))
    assert apart <= 1
    said = [str(history["outputs"]) for history in runs.values()]
    assert ["kept as" in one for one in said] == [True, True, False]
    assert ["dequantised" in one for one in said] == [False, False, True]
