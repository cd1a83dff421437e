"""What `make edit` does around the graph: checks the picture, fills the graph, keeps results."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glassbox.tests.graph import run_edit


@pytest.fixture
def graph() -> dict[str, Any]:
    return json.loads(run_edit.WORKFLOW.read_text())


def test_the_workflow_names_a_committed_picture_that_the_model_can_edit(
    graph: dict[str, Any],
) -> None:
    picture = run_edit.PICTURES / run_edit.node(graph, "LoadImage")["image"]
    assert run_edit.fit_picture(graph, picture) == ""


def test_the_instruction_of_the_user_replaces_the_one_of_the_graph(graph: dict[str, Any]) -> None:
    assert run_edit.set_prompt(graph, "remove the star") == "remove the star"
    assert run_edit.node(graph, "GlassboxEncodeText")["prompt"] == "remove the star"
    assert run_edit.set_prompt(graph, "") == "remove the star"


def test_a_photograph_is_fitted_and_the_user_is_told(graph: dict[str, Any], tmp_path: Path) -> None:
    picture = tmp_path / "a photo.jpg"
    Image.new("RGB", (400, 300)).save(picture)
    assert "400×300" in run_edit.fit_picture(graph, picture)
    fitted = run_edit.node(graph, "GlassboxFitImage")
    assert (fitted["size"], fitted["width"], fitted["height"]) == ("exact", 96, 96)


@pytest.mark.parametrize("content", [b"", b"words", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_picture_gets_clear_words(
    graph: dict[str, Any], tmp_path: Path, content: bytes
) -> None:
    picture = tmp_path / "broken.png"
    picture.write_bytes(content)
    with pytest.raises(run_edit.EditError, match=r"broken\.png cannot be read as a picture"):
        run_edit.fit_picture(graph, picture)


def test_a_picture_that_is_not_there_gets_clear_words(
    graph: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(run_edit.EditError, match="there is no picture"):
        run_edit.fit_picture(graph, tmp_path / "none.png")
    with pytest.raises(run_edit.EditError, match="cannot be read"):
        run_edit.fit_picture(graph, tmp_path)


def test_results_never_replace_each_other(tmp_path: Path) -> None:
    saved = [run_edit.save(b"x", tmp_path / "out", Path("a b.png")) for _ in range(3)]
    assert [path.name for path in saved] == [f"a b_edited_{n:03d}.png" for n in (1, 2, 3)]
