"""ComfyUI's own page in a headless Chromium, driven through the objects it gives extensions."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, sync_playwright

from glassbox.tests.graph.server import PACK, Comfy

Json = dict[str, Any]
RUN_TIMEOUT_MS = 120_000
_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_READY = """() => window.app?.vueAppReady && window.app.extensionManager && window.app.graph
    && window.LiteGraph.registered_node_types.GlassboxInspectTokens"""
_RUN = """async (timeout) => {
    const { api } = window.comfyAPI.api;
    const kinds = ['execution_success', 'execution_error', 'execution_interrupted'];
    const stop = new AbortController();
    const ended = new Promise((resolve, reject) => {
        setTimeout(() => reject(new Error('the prompt has not ended')), timeout);
        for (const kind of kinds) {
            const listen = ({ detail }) => resolve({ kind, detail });
            api.addEventListener(kind, listen, { signal: stop.signal });
        }
    });
    if (!(await window.app.queuePrompt(0, 1))) throw new Error('the prompt was refused');
    const { kind, detail } = await ended;
    stop.abort();
    await new Promise((resolve) => setTimeout(resolve, 300));
    if (kind !== 'execution_success') throw new Error(kind + ': ' + detail.exception_message);
    return detail.prompt_id;
}"""


class Frontend:
    """One page of a running ComfyUI.

    Args:
        page: a page of the browser.
        comfy: the server it shows.
        nodes_2: Nodes 2.0 (Vue) draws the nodes, instead of the classic canvas.
    """

    def __init__(self, page: Page, comfy: Comfy, *, nodes_2: bool) -> None:
        self.page, self.comfy, self.nodes_2 = page, comfy, nodes_2
        self.troubles: list[str] = []
        page.on("pageerror", lambda error: self._note(f"{error}\n{error.stack}"))
        page.on("console", self._note_message)

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._note(f"{message.type}: {message.text} {message.location.get('url', '')}")

    def _note(self, trouble: str) -> None:
        """Keep what one of this pack's files did; ComfyUI's page has troubles of its own."""
        if f"/extensions/{PACK}/" in trouble:
            self.troubles.append(trouble)

    def open(self) -> None:
        """Open the page, or reload it."""
        settings = {
            "Comfy.TutorialCompleted": True,
            "Comfy.VueNodes.Enabled": self.nodes_2,
            "Comfy.Workflow.ShowMissingModelsWarning": False,
        }
        self.comfy.post("/api/settings", settings)
        self.page.goto(self.comfy.url, wait_until="load")
        self.page.wait_for_function(_READY, timeout=60_000)

    def load(self, workflow: Json, name: str = "test") -> None:
        """Open a saved workflow."""
        load = "([w, n]) => window.app.loadGraphData(w, true, true, n)"
        self.page.evaluate(load, [workflow, name])
        self.settle()

    def load_api(self, graph: Json, name: str = "test") -> None:
        """Open a graph in API form, as if it had been saved: with an id, and with fixed seeds."""
        self.page.evaluate("([g, n]) => window.app.loadApiJson(g, n)", [graph, name])
        saved = self.saved()
        for node in saved["nodes"]:
            values = node.get("widgets_values") or []
            node["widgets_values"] = ["fixed" if v == "randomize" else v for v in values]
        self.load({**saved, "id": str(uuid.uuid4())}, name)

    def settle(self) -> None:
        """Let the page draw what has changed."""
        self.page.wait_for_timeout(400)

    def saved(self) -> Json:
        """The graph as it would be saved now."""
        return json.loads(self.page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))

    def api_form(self) -> Json:
        """The graph as it would be sent to the server now."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def run(self) -> str:
        """Run the graph as the Run button does; returns the prompt id once it has succeeded."""
        return self.page.evaluate(_RUN, RUN_TIMEOUT_MS)

    def command(self, name: str) -> None:
        """Run one of the page's commands."""
        self.page.evaluate("(n) => window.app.extensionManager.command.execute(n)", name)
        self.settle()

    def on_node(self, kind: str, script: str, argument: Any = None) -> Any:
        """Evaluate `(node, argument) => …` for the first node of a class in the shown graph."""
        finder = f"""async ([kind, argument]) => {{
            const node = window.app.canvas.graph.nodes.find((one) => one.type === kind);
            return await ({script})(node, argument);
        }}"""
        return self.page.evaluate(finder, [kind, argument])

    def focus(self, kind: str) -> None:
        """Bring a node into view at full size."""
        self.on_node(
            kind,
            """(node) => {
                window.app.canvas.ds.scale = 1;
                window.app.canvas.ds.offset = [300 - node.pos[0], 200 - node.pos[1]];
                window.app.canvas.setDirty(true, true);
            }""",
        )
        self.settle()

    def view(self, label: str) -> Locator:
        """The pack's view with this accessible name."""
        return self.page.locator(f'section.glassbox-view[aria-label="{label}"]')

    def screenshot(self, name: str) -> None:
        """Keep a picture of the page where GLASSBOX_SCREENSHOTS says, for a person to look at."""
        folder = os.environ.get("GLASSBOX_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=Path(folder) / f"{name}.png")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the system's Chromium; RuntimeError when there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
    if found is None:
        raise RuntimeError("No Chromium found. Install it: apt-get install chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()
