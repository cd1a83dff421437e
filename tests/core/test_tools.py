"""The developers' tools run from a checkout, and are not shipped."""

import subprocess
import sys
from pathlib import Path

from glassbox.tools.run import TOOLS

ROOT = Path(__file__).resolve().parents[2]


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "run.py"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_training_starts_from_any_folder(tmp_path: Path) -> None:
    done = _run(tmp_path, "nano.train", "--help")
    assert done.returncode == 0, done.stderr
    assert "run.py nano.train" in done.stdout


def test_the_processes_of_the_evaluation_find_the_pack(tmp_path: Path) -> None:
    """They are spawned: each imports the tool anew, under the name that run.py gives the pack."""
    done = _run(tmp_path, "nano.evaluate", "--processes", "1", "--folder", str(tmp_path))
    assert done.returncode == 1
    assert "glassbox_nano_kontext.safetensors is not there" in done.stderr


def test_an_unknown_tool_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    done = _run(tmp_path, "nano.paint")
    assert done.returncode == 1
    assert all(tool in done.stderr for tool in TOOLS)


def test_the_registry_package_leaves_the_tools_out() -> None:
    assert "/tools/" in (ROOT / ".comfyignore").read_text().splitlines()
