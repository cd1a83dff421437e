"""The example workflows as data: both forms, and what ComfyUI's /object_info says about them."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glassbox.tests.graph.server import ROOT, Comfy

FOLDER = ROOT / "workflows"
PICTURES = sorted((FOLDER / "input").glob("*.png"))
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
NANO_NAMES = [name for name in NAMES if "_nano_" in name]
PUBLISHED_NAMES = [name for name in NAMES if "_nano_" not in name]
NATIVE_NAMES = [name for name in NAMES if "_native_" in name]
NOTES = ("Note", "MarkdownNote")  # the browser's own: they are not sent to the server

Json = dict[str, Any]


def ui_form(name: str) -> Json:
    """A workflow as the browser saves it."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api_form(name: str) -> Json:
    """The same workflow as the server takes it."""
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def upload_pictures(comfy: Comfy) -> None:
    """Put the pictures that the workflows load into ComfyUI's input folder."""
    for picture in PICTURES:
        comfy.upload(picture)


def input_specs(schema: Json) -> dict[str, list[Any]]:
    """Every input by the name a graph gives it: [type, options]; growing ones unrolled."""
    given = schema["input"]
    specs: dict[str, list[Any]] = {}
    for name, spec in {**given.get("required", {}), **given.get("optional", {})}.items():
        if spec[0] == "COMFY_AUTOGROW_V3":
            template = spec[1]["template"]
            inner = next(iter(template["input"]["required"].values()))
            specs |= {f"{name}.{slot}": inner for slot in template["names"]}
        else:
            specs[name] = spec
    return specs


def required_inputs(schema: Json) -> set[str]:
    """Names of the inputs without which a node does not run."""
    given = schema["input"].get("required", {})
    return {name for name, spec in given.items() if spec[0] != "COMFY_AUTOGROW_V3"}


def choices(spec: list[Any]) -> list[Any] | None:
    """What a combo offers; None for any other input."""
    if isinstance(spec[0], list):
        return spec[0]
    return spec[1].get("options", []) if spec[0] == "COMBO" else None


def widget_names(schema: Json) -> Iterator[str]:
    """The widgets of a node in the order of its saved values, the browser's own among them."""
    order = schema["input_order"]
    specs = input_specs(schema)
    for name in [*order.get("required", []), *order.get("optional", [])]:
        spec = specs.get(name)
        if spec is None or not _is_widget(spec):
            continue
        yield name
        options = spec[1] if len(spec) > 1 else {}
        if _has_seed_control(name, spec[0], options):
            yield "control_after_generate"
        if options.get("image_upload"):
            yield "upload"


def _is_widget(spec: list[Any]) -> bool:
    return choices(spec) is not None or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN")


def _has_seed_control(name: str, kind: Any, options: Json) -> bool:
    """As the browser decides: where the schema says nothing, a seed has the control."""
    by_name = kind == "INT" and name in ("seed", "noise_seed")
    return bool(options.get("control_after_generate", by_name))


def saved_widgets(node: Json, schema: Json) -> dict[str, Any]:
    """The widgets of a saved node with their values.

    Widgets are only ever appended, as optional inputs: one that was added after the workflow had
    been saved has no value there, and the server takes its default.
    """
    names, values = list(widget_names(schema)), node.get("widgets_values") or []
    added = set(names[len(values) :])
    assert added <= set(schema["input"].get("optional", {})), (node["type"], added)
    assert len(values) <= len(names), node["type"]
    return dict(zip(names, values, strict=False))


def with_defaults(graph: Json, schemas: Json) -> Json:
    """A graph in API form with every widget it leaves to the server, as the browser sends it."""
    filled: Json = {}
    for number, node in graph.items():
        schema = schemas[node["class_type"]]
        specs, added = input_specs(schema), dict[str, Any]()
        for name in widget_names(schema):
            if name in specs and name not in node["inputs"]:
                added[name] = default(specs[name])
        filled[number] = {**node, "inputs": {**node["inputs"], **added}}
    return filled


def default(spec: list[Any]) -> Any:
    """What an input is when nothing is given for it."""
    options = spec[1] if len(spec) > 1 else {}
    offered = choices(spec)
    return options.get("default", offered[0] if offered else None)


def to_api(ui: Json, schemas: Json) -> Json:
    """Turn a saved workflow into the form the server takes, as the browser does."""
    sources = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    graph: Json = {}
    for node in ui["nodes"]:
        if node["type"] in NOTES:
            continue
        schema = schemas[node["type"]]
        values = saved_widgets(node, schema).items()
        inputs = {name: value for name, value in values if name in input_specs(schema)}
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = sources[slot["link"]]
        title = node.get("title", schema["display_name"])
        graph[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": title},
        }
    return graph


def model_files(ui: Json) -> dict[str, Path]:
    """The model files a workflow names: file name -> its place under models/."""
    models = [m for node in ui["nodes"] for m in node["properties"].get("models", [])]
    return {model["name"]: Path(model["directory"]) / model["name"] for model in models}


def pixels(picture: bytes) -> Any:
    """The red, green and blue of a saved picture (H, W, 3), as integers that can be subtracted."""
    with Image.open(io.BytesIO(picture)) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)
