"""Every example workflow fits the nodes as they are, in both forms, and the nano ones run."""

import io
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glassbox.tests.graph import tiny_flux2
from glassbox.tests.graph.server import Comfy, comfyui_path
from glassbox.tests.graph.workflows import (
    FOLDER,
    NAMES,
    NANO_NAMES,
    NATIVE_NAMES,
    NOTES,
    PICTURES,
    PUBLISHED_NAMES,
    api_form,
    choices,
    input_specs,
    model_files,
    required_inputs,
    saved_widgets,
    to_api,
    ui_form,
    upload_pictures,
)

pytestmark = pytest.mark.graph
Json = dict[str, Any]
_LOADERS = ("GlassboxLoad", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader")
# One has no small random file to run with, the others only with ComfyUI's own parts.
_RUN_ELSEWHERE = {"03_kontext_edit", *NATIVE_NAMES}


@pytest.fixture(scope="module")
def schemas(comfy: Comfy) -> Json:
    upload_pictures(comfy)
    return comfy.object_info()


def test_every_workflow_has_both_forms() -> None:
    assert [path.stem for path in sorted((FOLDER / "api").glob("*.json"))] == NAMES
    assert len(NANO_NAMES) == 10
    assert len(NAMES) == 18


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_say_the_same(name: str, schemas: Json) -> None:
    assert to_api(ui_form(name), schemas) == api_form(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_node_and_input_exists_and_every_required_one_is_given(
    name: str, schemas: Json
) -> None:
    for node in api_form(name).values():
        schema = schemas[node["class_type"]]
        given = set(node["inputs"])
        assert given <= set(input_specs(schema)), node["class_type"]
        assert required_inputs(schema) <= given, node["class_type"]


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_one_its_input_takes(name: str, schemas: Json) -> None:
    files = model_files(ui_form(name))
    shipped = {comfyui_path() / "input" / "example.png"}  # comes with every ComfyUI
    pictures = {path.name for path in shipped | set(PICTURES) if path.is_file()}
    for node in api_form(name).values():
        specs = input_specs(schemas[node["class_type"]])
        for key, value in node["inputs"].items():
            if isinstance(value, list) or value in files:
                continue
            if node["class_type"] == "LoadImage":
                assert value in pictures
                continue
            assert _is_legal(value, specs[key]), (node["class_type"], key, value)


def _is_legal(value: Any, spec: list[Any]) -> bool:
    offered = choices(spec)
    if offered is not None:
        return value in offered
    if spec[0] == "STRING":
        return isinstance(value, str)
    low, high = spec[1].get("min", value), spec[1].get("max", value)
    whole = spec[0] != "INT" or isinstance(value, int)
    on_step = spec[0] != "INT" or (value - low) % spec[1].get("step", 1) == 0
    return whole and on_step and low <= value <= high


@pytest.mark.parametrize("name", NAMES)
def test_every_link_joins_two_sockets_of_one_type(name: str, schemas: Json) -> None:
    graph = api_form(name)
    for node in graph.values():
        specs = input_specs(schemas[node["class_type"]])
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                source = schemas[graph[value[0]]["class_type"]]
                # An input that takes several types lists them with commas.
                assert source["output"][value[1]] in specs[key][0].split(","), (name, key)


@pytest.mark.parametrize("name", NAMES)
def test_links_and_nodes_of_the_saved_form_name_each_other(name: str) -> None:
    ui = ui_form(name)
    nodes = {node["id"]: node for node in ui["nodes"]}
    assert ui["version"] == 0.4
    assert len(nodes) == len(ui["nodes"])
    assert ui["last_node_id"] == max(nodes)
    assert ui["last_link_id"] == max(link[0] for link in ui["links"])
    for number, source, out_slot, target, in_slot, kind in ui["links"]:
        output, slot = nodes[source]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
        assert number in output["links"]
        assert slot["link"] == number
        assert output["type"] == kind
    ends = [slot.get("link") for node in ui["nodes"] for slot in node.get("inputs", [])]
    assert sorted(end for end in ends if end is not None) == sorted(x[0] for x in ui["links"])


@pytest.mark.parametrize("name", NAMES)
def test_every_widget_has_its_saved_value_and_every_node_its_name(name: str, schemas: Json) -> None:
    for node in ui_form(name)["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node["properties"]["Node name for S&R"] == node["type"]
        saved_widgets(node, schemas[node["type"]])  # refuses a value too many or too few


@pytest.mark.parametrize("name", NAMES)
def test_no_seed_changes_by_itself(name: str, schemas: Json) -> None:
    for node in ui_form(name)["nodes"]:
        if node["type"] not in NOTES:
            values = saved_widgets(node, schemas[node["type"]])
            assert values.get("control_after_generate", "fixed") == "fixed"


@pytest.mark.parametrize("name", NAMES)
def test_pictures_keep_their_size_through_the_graph(name: str) -> None:
    graph = api_form(name)
    decode = next(n for n in graph.values() if n["class_type"] == "GlassboxUnpackAndDecode")
    targets = ("GlassboxNoise", "EmptyFlux2LatentImage")
    noise = next(n for n in graph.values() if n["class_type"] in targets)
    if "fit" in decode["inputs"]:
        fit = decode["inputs"]["fit"][0]
        assert noise["inputs"]["width"] == [fit, 2]
        assert noise["inputs"]["height"] == [fit, 3]
        assert graph[fit]["inputs"]["method"] in ("pad", "stretch")  # a crop would not come back


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_loaders_of_published_files_say_where_to_get_them(name: str) -> None:
    ui = ui_form(name)
    loaders = [n for n in ui["nodes"] if n["type"].startswith(_LOADERS)]
    (note,) = (n["widgets_values"][0] for n in ui["nodes"] if n["type"] in NOTES)
    assert len(loaders) == 3
    for node in loaders:
        chosen = {value for value in node["widgets_values"] if str(value).endswith(".safetensors")}
        assert {model["name"] for model in node["properties"]["models"]} == chosen
        assert chosen
        for model in node["properties"]["models"]:
            assert model["directory"] in {"diffusion_models", "text_encoders", "vae"}
            assert re.fullmatch(r"https://huggingface\.co/\S+/resolve/main/\S+", model["url"])
            assert model["url"].endswith("/" + model["name"])
            assert model["name"] in note


@pytest.mark.parametrize("name", [one for one in PUBLISHED_NAMES if one not in _RUN_ELSEWHERE])
def test_workflows_of_flux2_run_with_files_of_the_published_names(
    name: str, comfy: Comfy, schemas: Json
) -> None:
    """Random weights of the published layouts and a small photograph; all else as it is saved."""
    tiny_flux2.make_published(comfy.models_dir)
    with tempfile.TemporaryDirectory() as folder:
        photograph = Path(folder) / "example.png"
        Image.radial_gradient("L").resize((100, 70)).convert("RGB").save(photograph)
        comfy.upload(photograph)
    pictures = comfy.images(comfy.run(api_form(name)))
    assert len(pictures) == 1
    with Image.open(io.BytesIO(pictures[0])) as picture:
        assert picture.size == (100, 70)
        assert len(picture.convert("RGB").getcolors(100 * 70) or []) > 1


@pytest.mark.parametrize("name", NANO_NAMES)
def test_nano_workflows_run_and_give_a_picture_of_the_scene_size(name: str, comfy: Comfy) -> None:
    upload_pictures(comfy)
    pictures = comfy.images(comfy.run(api_form(name)))
    assert len(pictures) == 1
    with Image.open(io.BytesIO(pictures[0])) as picture:
        assert picture.size == (96, 96)
        assert len(picture.convert("RGB").getcolors(96 * 96) or []) > 1
