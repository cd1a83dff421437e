"""Loads ComfyUI's modules and the pack into one process without a server, for the probes.

A probe is a script that a test runs in a process of its own; it prints one JSON object. Its
`if __name__ == "__main__"` is `probe.run(main)`; it runs by hand, too.
"""

import asyncio
import functools
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACK = "custom_pack"  # any name will do


def load_comfyui() -> None:
    """Import what a running ComfyUI has in memory, on the CPU."""
    sys.path.insert(0, str((ROOT / ".cache" / "comfyui-in-use").resolve()))
    from comfy.cli_args import args

    args.cpu = True
    for name in ("comfy.samplers", "latent_preview", "nodes", "server"):
        importlib.import_module(name)


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


def load_nodes() -> dict[str, Any]:
    """Import the pack; its nodes by id."""

    async def listed() -> list[Any]:
        extension = await load_pack().comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(listed())}


def load_glassbox() -> None:
    """Give the pack the name that the tests' own files import each other by."""
    package = sys.modules["glassbox"] = types.ModuleType("glassbox")
    package.__path__ = [str(ROOT)]


def run(main: Callable[[Path], dict[str, Any]]) -> None:
    """Print what a probe's main returns: given a folder for its files, beside ComfyUI's modules."""
    load_comfyui()
    import torch

    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        answer = main(Path(scratch))
    print(json.dumps(answer))


def run_probe(name: str, *arguments: str, is_forked: bool = True) -> dict[str, Any]:
    """Run tests/graph/<name>.py in a process of its own; what it printed last.

    Args:
        is_forked: out of a process that has imported torch and ComfyUI; else it starts afresh.
    """
    script = str(Path(__file__).with_name(f"{name}.py"))
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch) / "stdout", Path(scratch) / "stderr"
        if is_forked:
            code = _run_forked(json.dumps([script, arguments, str(out), str(err)]))
        else:
            command = [sys.executable, script, *arguments]
            with out.open("wb") as stdout, err.open("wb") as stderr:
                code = subprocess.run(command, stdout=stdout, stderr=stderr, check=False).returncode
        assert code == 0, err.read_text(errors="replace")[-4000:]
        return json.loads(out.read_text().strip().splitlines()[-1])


@functools.cache
def _forking() -> "subprocess.Popen[str]":
    """The process that forks, shared by all tests; it ends when this one closes its stdin."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forking.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _run_forked(request: str) -> int:
    """The exit code of a forked child."""
    forking, answer = _forking(), ""
    assert forking.stdin is not None
    assert forking.stdout is not None
    try:
        print(request, file=forking.stdin, flush=True)
        answer = forking.stdout.readline()
        return int(answer)
    finally:
        if not answer:  # it ended, or the test's time did: the next probe gets another
            os.killpg(forking.pid, signal.SIGKILL)
            _forking.cache_clear()
