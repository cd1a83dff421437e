"""Every example workflow opens in the browser as it was saved, and sends what its API form says."""

import io
import json
import time
from typing import Any

import pytest
from PIL import Image, ImageChops

from glassbox.tests.browser.frontend import Frontend
from glassbox.tests.graph.workflows import (
    NAMES,
    NOTES,
    api_form,
    default,
    input_specs,
    saved_widgets,
    ui_form,
    widget_names,
    with_defaults,
)

pytestmark = pytest.mark.browser
Json = dict[str, Any]
_UNKNOWN = """() => window.app.graph.nodes.map((node) => node.type)
    .filter((type) => !window.LiteGraph.registered_node_types[type])"""


@pytest.mark.parametrize("name", NAMES)
def test_workflow_opens_as_saved_and_sends_what_its_api_form_says(
    name: str, frontend: Frontend
) -> None:
    ui = ui_form(name)
    frontend.load(ui, name)
    assert frontend.page.evaluate(_UNKNOWN) == []
    schemas = frontend.comfy.object_info()
    assert _kept(frontend.saved()) == _kept(_with_additions(ui, schemas))
    assert frontend.api_form() == with_defaults(api_form(name), schemas)


def test_editing_in_the_browser_gives_the_pixels_of_the_api(frontend: Frontend) -> None:
    comfy, name = frontend.comfy, "01_nano_kontext_edit"
    by_api = comfy.images(comfy.run(api_form(name)))[0]
    frontend.load(ui_form(name), name)
    in_browser = comfy.images(_run_afresh(frontend))[0]
    with Image.open(io.BytesIO(by_api)) as one, Image.open(io.BytesIO(in_browser)) as other:
        assert one.size == other.size
        assert ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox() is None
        saved = json.loads(other.info["workflow"])
    assert _kept(saved) == _kept(_with_additions(ui_form(name), comfy.object_info()))


def _run_afresh(frontend: Frontend) -> Json:
    """Run the graph without any result of an earlier run; gives the history entry."""
    for _ in range(10):
        frontend.comfy.free()  # done a moment after it is answered
        time.sleep(1)
        history = frontend.comfy.wait(frontend.run())
        messages = history["status"]["messages"]
        cached = [data["nodes"] for kind, data in messages if kind == "execution_cached"]
        if not any(cached):
            return history
    raise AssertionError("ComfyUI has kept results through /free")


def _with_additions(ui: Json, schemas: Json) -> Json:
    """A saved workflow with what nodes have gained since: widgets at their defaults, outputs."""
    ui = json.loads(json.dumps(ui))
    for node in ui["nodes"]:
        if node["type"] in NOTES:
            continue
        schema = schemas[node["type"]]
        values, specs = saved_widgets(node, schema), input_specs(schema)
        added = [name for name in widget_names(schema) if name not in values]
        if added:
            saved = node.get("widgets_values") or []
            node["widgets_values"] = [*saved, *(default(specs[name]) for name in added)]
        missing = len(schema["output"]) - len(node["outputs"])
        node["outputs"] += [{"links": None}] * missing
    return ui


def _kept(ui: Json) -> Json:
    """What a saved workflow means: without sizes, places and the order of its lists."""
    nodes = {
        node["id"]: {
            "type": node["type"],
            "title": node.get("title"),
            "mode": node["mode"],
            "properties": node["properties"],
            "values": node.get("widgets_values") or [],
            "inputs": {
                slot["name"]: slot["link"]
                for slot in node.get("inputs", [])
                if slot.get("link") is not None
            },
            "outputs": [sorted(slot.get("links") or []) for slot in node.get("outputs", [])],
        }
        for node in ui["nodes"]
    }
    return {"nodes": nodes, "links": sorted(ui["links"]), "version": ui["version"]}
