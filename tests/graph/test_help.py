"""Every node's help is served where the browser looks for it, and speaks of the node as it is."""

import re
from typing import Any

import pytest

from glassbox.tests.graph.server import PACK, ROOT, Comfy
from glassbox.tests.graph.workflows import choices

pytestmark = pytest.mark.graph

NODES = sorted(folder.name for folder in (ROOT / "web" / "docs").iterdir())
HEADINGS = ["## Inputs", "## Outputs", "## Example", "## Common mistakes"]
Json = dict[str, Any]


@pytest.fixture(scope="module")
def schemas(comfy: Comfy) -> Json:
    info = comfy.object_info()
    return {name: schema for name, schema in info.items() if name.startswith("Glassbox")}


def test_every_node_has_help_and_every_help_has_its_node(schemas: Json) -> None:
    assert sorted(schemas) == NODES


@pytest.mark.parametrize("node", NODES)
def test_help_names_every_input_choice_and_output(node: str, comfy: Comfy, schemas: Json) -> None:
    text = comfy.fetch(f"/extensions/{PACK}/docs/{node}/en.md").decode()
    schema = schemas[node]
    assert text.startswith(f"# {schema['display_name']}\n")
    assert [line for line in text.splitlines() if line.startswith("## ")] == HEADINGS
    inputs, outputs = text.split("## Inputs")[1].split("## Outputs")
    given = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
    for name, spec in given.items():
        assert re.search(rf"^\| [^|]*\b{name}\b[^|]*\|", inputs, re.MULTILINE), name
        if name not in ("file", "file_2"):
            for choice in choices(spec) or []:
                assert choice in inputs, (name, choice)
    for name in schema["output_name"]:
        assert re.search(rf"^\| [^|]*\b{name}\b[^|]*\|", outputs, re.MULTILINE), name


def test_workflows_named_in_help_exist() -> None:
    for node in NODES:
        text = (ROOT / "web" / "docs" / node / "en.md").read_text(encoding="utf-8")
        for path in re.findall(r"workflows/[\w/]+\.json", text):
            assert (ROOT / path).is_file()
