"""The library names settings and no node; every setting it may name has a place in the nodes."""

import importlib.util
import re
from pathlib import Path

import pytest

from glassbox.flux_core.errors import SETTINGS, SettingError, name_settings

ROOT = Path(__file__).parents[2]
TITLE = re.compile(r"'([A-Z][^']* \(FLUX\))'")


@pytest.fixture(scope="module")
def table() -> dict[str, str]:
    """The table in `nodes/`, which has no need of ComfyUI, loaded without the rest of `nodes/`."""
    spec = importlib.util.spec_from_file_location(
        "glassbox.loose.settings", ROOT / "nodes" / "settings.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SETTINGS


def test_every_setting_has_its_place_in_the_nodes(table: dict[str, str]) -> None:
    assert set(table) == SETTINGS


def test_the_library_names_no_node() -> None:
    named = {
        path.relative_to(ROOT): TITLE.findall(path.read_text(encoding="utf-8"))
        for path in (ROOT / "flux_core").rglob("*.py")
    }
    assert {path: titles for path, titles in named.items() if titles} == {}


def test_an_error_names_its_settings_and_whoever_shows_it_says_where_they_are() -> None:
    error = SettingError("steps is 0.", "1 or more.", "set [steps] for FLUX.1 [dev].")
    assert error.settings == ("steps",)
    assert str(error).endswith("Fix: set steps for FLUX.1 [dev].")
    error.name_settings({"steps": "the first box"})
    assert str(error).endswith("Fix: set the first box for FLUX.1 [dev].")


@pytest.mark.parametrize("text", ["FLUX.1 [schnell]", "tuple[int, int]", "[IMG]", "[no setting]"])
def test_other_words_in_brackets_stay(text: str) -> None:
    assert name_settings(text, {"schnell": "wrong"}) == text
