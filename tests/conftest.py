"""Gives the pack the name `glassbox`, and the tests a running ComfyUI when they ask for one."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The root must never be on sys.path: its `nodes` folder would hide ComfyUI's own nodes.py.
_pack = types.ModuleType("glassbox")
_pack.__path__ = [str(ROOT)]
sys.modules.setdefault("glassbox", _pack)

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy


@pytest.fixture(scope="session")
def comfy() -> Iterator["Comfy"]:
    """One real ComfyUI with the pack linked in, shared by all graph and browser tests."""
    from glassbox.tests.graph.server import FOR_TESTS, NATIVE_PARTS, Comfy

    with Comfy.start(packs=[FOR_TESTS, NATIVE_PARTS]) as server:
        yield server


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked `gpu` out where there is no CUDA device."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that skipped a test or passed none has not tested the pack: it fails."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly or session.exitstatus != 0:
        return
    skipped, passed = len(reporter.stats.get("skipped", [])), len(reporter.stats.get("passed", []))
    if skipped or not passed:
        reporter.write_line(f"FAILED: {skipped} tests were skipped, {passed} passed.", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
