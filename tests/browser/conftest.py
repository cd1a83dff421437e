"""A browser and its two pages, one for each of ComfyUI's renderers, shared by all tests here."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from glassbox.tests.browser.frontend import Frontend, chromium
from glassbox.tests.graph.server import Comfy
from glassbox.tests.graph.workflows import upload_pictures


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="session", params=["classic", "nodes 2.0"])
def frontend(request: pytest.FixtureRequest, browser: Browser, comfy: Comfy) -> Iterator[Frontend]:
    """ComfyUI's page, in either renderer."""
    upload_pictures(comfy)
    with browser.new_context(viewport={"width": 1600, "height": 1000}) as context:
        shown = Frontend(context.new_page(), comfy, nodes_2=request.param == "nodes 2.0")
        shown.open()
        yield shown


@pytest.fixture(autouse=True)
def no_trouble_in_the_console(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test here fails if a script of this pack, or the page because of it, complains."""
    shown = request.getfixturevalue("frontend") if "frontend" in request.fixturenames else None
    if shown:
        shown.troubles.clear()
    yield
    assert not shown or not shown.troubles
