"""What the nodes show after a run: the token sequence, and the prompt text that was not read."""

import random
import re
from typing import Any

import pytest
from playwright.sync_api import Locator, expect

from glassbox.tests.browser.frontend import Frontend
from glassbox.tests.graph import tiny
from glassbox.tests.graph.graphs import edit
from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.browser

INSPECT, ENCODE = "GlassboxInspectTokens", "GlassboxEncodeText"
SEQUENCE, COUNTS = "Token sequence", "Tokens of the prompt"
HINT = "Run the graph to see the sequence."
MARKUP = "<img src=x onerror=window.hurt=1><b>"


@pytest.fixture(scope="module", autouse=True)
def models(comfy: Comfy) -> None:
    tiny.make_models(comfy.models_dir)


def _graph(*, references: int = 1, prompt: str = "make it red") -> dict[str, Any]:
    """An edit of 64x64 px: 16 target tokens, 512 of text, 16 a reference, with an inspector."""
    graph = edit(references=references, prompt=prompt, steps=1)
    ids = {node["class_type"]: number for number, node in graph.nodes.items()}
    conditioning = graph.out(ids["GlassboxReferenceConditioner"])
    graph.add(INSPECT, conditioning=conditioning, noise=graph.out(ids["GlassboxNoise"]))
    return graph.nodes


def _words(count: int) -> str:
    """A prompt nobody has run yet, so that no earlier result is shown."""
    return " ".join(f"{random.randrange(10**6)} red" for _ in range(count))


def test_sequence_is_drawn_to_scale_and_told_in_words(frontend: Frontend) -> None:
    frontend.load_api(_graph(references=2, prompt=_words(1)))
    frontend.focus(INSPECT)
    view = frontend.view(SEQUENCE)
    expect(view).to_have_text(HINT)
    frontend.run()
    frontend.focus(INSPECT)
    boxes = view.locator(".glassbox-box")
    expect(boxes).to_have_count(4)
    widths = [_box(box)["width"] for box in boxes.all()]
    shares = [width / _box(view.get_by_role("img"))["width"] for width in widths]
    assert shares == pytest.approx([512 / 560, 16 / 560, 16 / 560, 16 / 560], abs=0.005)
    rows = [row.locator("th, td").all_inner_texts() for row in view.locator("tbody tr").all()]
    assert [row[:2] for row in rows] == [
        ["text", "512"],
        ["target", "16"],
        ["reference 1", "16"],
        ["reference 2", "16"],
    ]
    assert rows[1][3:] == ["4 × 4", "index 0, row 0 to 3, column 0 to 3"]
    assert rows[3][3:] == ["4 × 4", "index 1, row 4 to 7, column 0 to 3"]
    told = re.compile("A sequence of 560 tokens: text, 512 tokens.*reference 2, 16 tokens")
    expect(view.get_by_role("img")).to_have_attribute("aria-label", told)
    frontend.screenshot(f"sequence-{frontend.nodes_2}")

    size = frontend.on_node(INSPECT, "(node) => [...node.size]")
    last = _box(view.locator("tbody tr").last)
    assert 200 < last["y"] < 200 + size[1] - last["height"]  # inside the node, at y 200


def test_sequence_outlives_a_reload_and_is_not_copied_to_a_clone(frontend: Frontend) -> None:
    frontend.load_api(_graph(prompt=_words(1)))
    frontend.run()
    saved = frontend.saved()
    frontend.open()
    frontend.load(saved)
    views = frontend.view(SEQUENCE)
    expect(views.locator(".glassbox-box")).to_have_count(3)

    frontend.on_node(
        INSPECT,
        """(node) => {
            const copy = node.clone();
            node.graph.add(copy);
            copy.pos = [node.pos[0], node.pos[1] + 400];
            node.inputs.forEach((slot, i) => {
                if (slot.link == null) return;
                const link = node.graph.links.get(slot.link);
                node.graph.getNodeById(link.origin_id).connect(link.origin_slot, copy, i);
            });
        }""",
    )
    expect(views).to_have_count(2)
    expect(views.filter(has_text=HINT)).to_have_count(1)
    frontend.run()
    expect(views.locator(".glassbox-box")).to_have_count(6)


def test_collapsing_hides_the_view_and_removing_takes_it_away(frontend: Frontend) -> None:
    frontend.load_api(_graph())
    frontend.focus(INSPECT)
    view = frontend.view(SEQUENCE)
    expect(view).to_be_visible()
    frontend.on_node(INSPECT, "(node) => node.collapse()")
    expect(view).not_to_be_visible()
    frontend.on_node(INSPECT, "(node) => node.collapse()")
    expect(view).to_be_visible()
    frontend.on_node(INSPECT, "(node) => node.graph.remove(node)")
    expect(view).to_have_count(0)


def test_sequence_is_drawn_inside_a_subgraph(frontend: Frontend) -> None:
    frontend.load_api(_graph(prompt=_words(1)))
    frontend.on_node(INSPECT, "(node) => window.app.canvas.selectItems([node])")
    frontend.command("Comfy.Graph.ConvertToSubgraph")
    frontend.run()
    frontend.page.evaluate(
        """() => {
            const outer = window.app.graph.nodes.find((node) => node.subgraph);
            window.app.canvas.openSubgraph(outer.subgraph, outer);
        }"""
    )
    frontend.settle()
    frontend.focus(INSPECT)
    expect(frontend.view(SEQUENCE).locator(".glassbox-box")).to_have_count(3)
    frontend.page.evaluate("() => window.app.canvas.setGraph(window.app.rootGraph)")


def test_unread_text_is_struck_out_until_the_prompt_changes(frontend: Frontend) -> None:
    frontend.load_api(_graph(prompt=f"{_words(60)} {MARKUP}"))
    before = [node.get("widgets_values") for node in frontend.saved()["nodes"]]
    frontend.run()
    frontend.focus(ENCODE)
    view = frontend.view(COUNTS)
    cut = view.locator("del")
    expect(cut).to_be_visible()
    expect(cut).to_have_css("text-decoration-line", "line-through")
    expect(view).to_contain_text("CLIP-L is full at 77 tokens and did not read:")
    expect(view).to_contain_text("T5 read")
    frontend.screenshot(f"unread-{frontend.nodes_2}")

    # Whatever the text holds, it is shown as text.
    expect(cut).to_contain_text("onerror")
    expect(view.locator("img, b")).to_have_count(0)
    assert frontend.page.evaluate("() => window.hurt === undefined")

    # A result is no part of the graph.
    assert [node.get("widgets_values") for node in frontend.saved()["nodes"]] == before
    assert not any("glassbox_text" in node["inputs"] for node in frontend.api_form().values())

    change = "(node) => { node.widgets.find((w) => w.name === 'prompt').value = 'short'; }"
    frontend.on_node(ENCODE, change)
    expect(cut).to_have_count(0)


def test_info_button_shows_the_help_of_a_node(frontend: Frontend) -> None:
    frontend.load_api(_graph())
    frontend.focus(INSPECT)
    frontend.on_node(INSPECT, "(node) => window.app.canvas.selectItems([node])")
    frontend.page.get_by_test_id("info-button").click()
    page = frontend.page
    expect(page.get_by_role("heading", name="Inspect Tokens (FLUX)").last).to_be_visible()
    expect(page.get_by_role("heading", name="Common mistakes")).to_be_visible()
    page.get_by_label("Toggle properties panel").click()


def _box(locator: Locator) -> Any:
    """Where an element is on the page, in px."""
    box = locator.bounding_box()
    assert box
    return box
