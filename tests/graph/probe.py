"""Loads ComfyUI's modules and the pack into one process without a server, for the probes.

A probe is a script that a test runs in a process of its own; it prints one JSON object.
"""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACK = "custom_pack"  # any name will do


def load_comfyui() -> None:
    """Make ComfyUI's modules importable, on the CPU."""
    sys.path.insert(0, str((ROOT / ".cache" / "comfyui-in-use").resolve()))
    from comfy.cli_args import args

    args.cpu = True


def load_running() -> None:
    """Import ComfyUI, and the pack, with the modules that a running ComfyUI has in memory."""
    load_comfyui()
    for name in ("comfy.samplers", "latent_preview", "server"):
        importlib.import_module(name)
    load_pack()


def load_pack() -> ModuleType:
    """Import the pack as ComfyUI does: from its folder, under a name of the caller's."""
    spec = importlib.util.spec_from_file_location(
        PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_probe(name: str, *arguments: str) -> dict[str, Any]:
    """Run tests/graph/<name>.py in a process of its own; what it printed last."""
    script = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, str(script), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert answer.returncode == 0, answer.stderr[-4000:]
    return json.loads(answer.stdout.strip().splitlines()[-1])
