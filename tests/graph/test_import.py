"""The pack costs ComfyUI next to nothing until a node runs."""

from collections.abc import Callable
from typing import Any

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    """The import alone, with network and CUDA forbidden: reaching for either fails the probe."""
    return run_probe("probe_import", is_forked=False)


def test_importing_the_pack_takes_at_most_50_ms(
    probe: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    """Counted in CPU time, the least of five, and in proportion to work of the same kind.

    So a busy machine does not decide it. The first of the five compiles the pack's files, as its
    first start does.
    """
    record_property("import_cpu_ms", probe["cpu_ms"])
    assert probe["cpu_ms"] <= 50 * probe["slowness"]


def test_importing_the_pack_brings_no_heavy_module(probe: dict[str, Any]) -> None:
    heavy = ("transformers", "diffusers", "torchvision", "sentencepiece", "PIL", "scipy")
    assert [name for name in probe["new"] if name.split(".")[0] in heavy] == []
