"""`make edit`, run as a user runs it, with a ComfyUI of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from glassbox.tests.graph import run_edit
from glassbox.tests.graph.server import Comfy
from glassbox.tests.graph.workflows import upload_pictures

pytestmark = pytest.mark.graph


def edit(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.graph.run_edit", *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "GLASSBOX_TEST": "edit"}
    return subprocess.run(
        command, cwd=run_edit.ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_make_edit_saves_the_picture_and_stops_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "with spaces"
    folder.mkdir()
    picture = shutil.copy(run_edit.PICTURES / "nano_scene.png", folder / "my scene.png")
    done = edit(
        "--image", str(picture), "--prompt", 'make the "circle" blue', "--output", str(folder)
    )
    assert done.returncode == 0, done.stderr
    result = folder / "my scene_edited_001.png"
    assert str(result) in done.stdout
    assert "s for the edit" in done.stdout
    assert "only coloured shapes" in done.stdout
    with Image.open(picture) as before, Image.open(result) as after:
        assert after.size == before.size
        assert before.convert("RGB").tobytes() != after.convert("RGB").tobytes()
    assert not servers()


def test_a_node_that_fails_speaks_through_comfy_cli(comfy: Comfy) -> None:
    graph = json.loads(run_edit.WORKFLOW.read_text())
    run_edit.node(graph, "SaveImage")["filename_prefix"] = "../../outside"
    upload_pictures(comfy)
    with pytest.raises(run_edit.EditError, match="outside the output folder") as error:
        run_edit.run_graph(comfy, graph)
    assert "SaveImage" in str(error.value)


def test_make_edit_fails_in_words(tmp_path: Path) -> None:
    done = edit("--image", str(tmp_path / "none.png"), "--output", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"make edit failed: there is no picture {tmp_path / 'none.png'}.\n"
    assert not list(tmp_path.glob("*.png"))
    assert not servers()


def servers() -> list[str]:
    """Command lines of servers that this test process started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
            command = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        if b"GLASSBOX_TEST=edit" in environment and b"main.py" in command:
            found.append(command.decode())
    return found
