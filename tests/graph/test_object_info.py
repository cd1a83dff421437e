"""Saved graphs depend on every node id, input and output: the stored list may only grow.

Write it anew after a change that only adds: `GLASSBOX_SNAPSHOT=write make test`.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph

SNAPSHOT = Path(__file__).parents[1] / "data" / "object_info.json"
FILE_INPUTS = {"file", "file_2"}  # their options are the files of a machine
NODES = [
    "GlassboxLoadNano",
    "GlassboxLoadModel",
    "GlassboxLoadTextEncoders",
    "GlassboxLoadAutoencoder",
    "GlassboxEncodeText",
    "GlassboxFitImage",
    "GlassboxEncodeAndPack",
    "GlassboxPositionIds",
    "GlassboxReferenceConditioner",
    "GlassboxNoise",
    "GlassboxSchedule",
    "GlassboxSampleGuided",
    "GlassboxSampleTrueCFG",
    "GlassboxUnpackAndDecode",
    "GlassboxPackLatent",
    "GlassboxUnpackLatent",
    "GlassboxInspectTokens",
    "GlassboxToConditioning",
    "GlassboxApplyToModel",
    "GlassboxApplyLoRA",
    "GlassboxGuider",
]
Json = dict[str, Any]


def stable(info: Json) -> Json:
    """What a saved graph depends on: inputs with types, defaults and choices, and outputs."""
    inputs = [
        _stable_input(name, kind, *spec)
        for kind in ("required", "optional")
        for name, spec in info["input"].get(kind, {}).items()
    ]
    outputs = [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)]
    return {"inputs": inputs, "outputs": outputs, "output_node": info["output_node"]}


def _stable_input(name: str, kind: str, io_type: str, options: Json | None = None) -> Json:
    options = options or {}
    entry: Json = {"id": name, "kind": kind, "type": io_type, "default": options.get("default")}
    for bound in ("min", "max"):
        if bound in options:
            entry[bound] = options[bound]
    if "options" in options and name not in FILE_INPUTS:
        entry["options"] = options["options"]
    if "template" in options:
        entry["names"] = options["template"]["names"]
        entry["min"] = options["template"]["min"]
    return entry


def shrinks(old: Json, new: Json) -> list[str]:
    """What a saved graph would miss; [] when the change only adds."""
    wrong = [f"output {one} changed" for one in _lost(old["outputs"], new["outputs"])]
    before, after = old["inputs"], new["inputs"]
    if [one["id"] for one in after[: len(before)]] != [one["id"] for one in before]:
        return [*wrong, "inputs were removed or are in another order"]
    wrong += [f"new input {one['id']} is required" for one in after[len(before) :] if required(one)]
    for was, now in zip(before, after, strict=False):
        wrong += [f"{was['id']}: {what}" for what in _narrowed(was, now)]
    return wrong


def required(entry: Json) -> bool:
    return entry["kind"] == "required"


def _lost(old: list[Any], new: list[Any]) -> list[Any]:
    return [one for i, one in enumerate(old) if i >= len(new) or new[i] != one]


def _narrowed(was: Json, now: Json) -> list[str]:
    wrong: list[str] = []
    if required(now) and not required(was):
        wrong.append("became required")
    if not set(was["type"].split(",")) <= set(now["type"].split(",")):
        wrong.append(f"type {was['type']} became {now['type']}")
    if not required(was) and was["default"] != now["default"]:  # saved graphs hold the required
        wrong.append(f"default {was['default']} became {now['default']}")
    for choices in ("options", "names"):
        if not set(was.get(choices, ())) <= set(now.get(choices, ())):
            wrong.append(f"{choices} were removed")
    if was.get("min", 0) < now.get("min", 0) or was.get("max", 0) > now.get("max", 0):
        wrong.append("range shrank")
    return wrong


@pytest.fixture(scope="module")
def found(comfy: "Comfy") -> Json:
    info = comfy.object_info()
    return {name: info[name] for name in info if name.startswith("Glassbox")}


def test_every_node_is_there(found: Json) -> None:
    assert set(found) >= set(NODES)


def test_no_node_input_or_output_of_a_saved_graph_is_lost(found: Json) -> None:
    now = {name: stable(info) for name, info in found.items()}
    if os.environ.get("GLASSBOX_SNAPSHOT") == "write":
        SNAPSHOT.write_text(json.dumps(now, indent=1) + "\n")
    old: Json = json.loads(SNAPSHOT.read_text())
    assert set(old) <= set(now)
    wrong = {name: shrinks(old[name], now[name]) for name in old}
    assert not any(wrong.values()), {name: one for name, one in wrong.items() if one}


def test_the_snapshot_holds_every_node(found: Json) -> None:
    old: Json = json.loads(SNAPSHOT.read_text())
    missing = set(found) - set(old)
    assert not missing, f"{missing} are new: run with GLASSBOX_SNAPSHOT=write"


def test_every_input_has_a_tooltip_and_every_node_words(found: Json) -> None:
    for name, info in found.items():
        assert info["description"], name
        assert info["category"].startswith("FLUX Glassbox/"), name
        assert info["display_name"].endswith("(FLUX)"), name
        assert info["search_aliases"], name
        for kind in ("required", "optional"):
            for input_id, spec in info["input"].get(kind, {}).items():
                assert len(spec[1].get("tooltip", "")) > 5, f"{name}.{input_id}"


def test_every_number_says_its_range(found: Json) -> None:
    for name, info in found.items():
        for kind in ("required", "optional"):
            for input_id, spec in info["input"].get(kind, {}).items():
                if spec[0] in ("INT", "FLOAT"):
                    assert {"min", "max", "default"} <= set(spec[1]), f"{name}.{input_id}"


def _entry(**changes: Any) -> Json:
    base = {"id": "a", "kind": "required", "type": "INT", "default": 1, "min": 0, "max": 9}
    return {**base, **changes}


def _node(*inputs: Json) -> Json:
    return {"inputs": list(inputs), "outputs": [["x", "INT"]], "output_node": False}


@pytest.mark.parametrize(
    "after",
    [
        _node(_entry()),
        _node(_entry(max=99)),
        _node(_entry(default=2)),
        _node(_entry(type="INT,FLOAT")),
        _node(_entry(), _entry(id="b", kind="optional")),
        {**_node(_entry()), "outputs": [["x", "INT"], ["y", "INT"]]},
    ],
)
def test_additions_count_as_growth(after: Json) -> None:
    assert shrinks(_node(_entry()), after) == []


@pytest.mark.parametrize(
    "after",
    [
        _node(),
        _node(_entry(id="b")),
        _node(_entry(id="b", kind="optional"), _entry()),
        _node(_entry(), _entry(id="b")),
        _node(_entry(type="FLOAT")),
        _node(_entry(max=8)),
        {**_node(_entry()), "outputs": []},
    ],
)
def test_what_breaks_a_saved_graph_does_not(after: Json) -> None:
    assert shrinks(_node(_entry()), after)


def test_the_default_of_an_optional_input_stays() -> None:
    before, after = (_node(_entry(kind="optional", default=default)) for default in (1, 2))
    assert shrinks(before, after)
