"""Models beside each other, freed, cancelled: ComfyUI's model management stays in charge."""

from typing import TYPE_CHECKING, Any

import pytest

from glassbox.tests.graph import tiny
from glassbox.tests.graph.graphs import edit

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph


def ended(history: dict[str, Any]) -> str:
    return history["status"]["status_str"]


def test_two_prompts_with_different_models_run_one_after_the_other(tiny_comfy: "Comfy") -> None:
    queued = [
        tiny_comfy.queue(edit(model=file, references=0, seed=41).nodes)
        for file in (tiny.KONTEXT_FILE, tiny.SCHNELL_FILE, tiny.DEV_FILE)
    ]
    histories = [tiny_comfy.wait(one) for one in queued]
    assert [ended(one) for one in histories] == ["success"] * 3
    pictures = {tiny_comfy.images(one)[0] for one in histories}
    assert len(pictures) == 3


def test_free_between_two_prompts_unloads_and_the_next_one_loads_again(tiny_comfy: "Comfy") -> None:
    for seed in (42, 43):
        loads = tiny_comfy.log().count("Requested to load FluxBlocks")
        tiny_comfy.free()
        assert len(tiny_comfy.images(tiny_comfy.run(edit(seed=seed).nodes))) == 1
        assert tiny_comfy.log().count("Requested to load FluxBlocks") == loads + 1


def test_free_while_another_prompt_waits_harms_neither(tiny_comfy: "Comfy") -> None:
    first = tiny_comfy.queue(edit(seed=44, steps=20).nodes)
    tiny_comfy.free()
    second = tiny_comfy.queue(edit(seed=45, model=tiny.DEV_FILE, references=0).nodes)
    assert [ended(tiny_comfy.wait(one)) for one in (first, second)] == ["success"] * 2


@pytest.mark.parametrize("node", ["GlassboxSampleGuided"])
def test_cancel_stops_within_one_step_and_the_next_prompt_runs(
    tiny_comfy: "Comfy", node: str
) -> None:
    graph = edit(steps=1000, size=384, references=2, seed=46).nodes
    sampler = next(i for i, one in graph.items() if one["class_type"] == node)
    asked = last = 0
    kinds: list[str] = []
    for message in tiny_comfy.watch(graph):
        if isinstance(message, bytes):
            continue
        kinds.append(message["type"])
        if message["type"] == "progress" and message["data"]["node"] == sampler:
            last = message["data"]["value"]
            if last >= 2 and not asked:
                tiny_comfy.interrupt()
                asked = last
    assert kinds[-1] == "execution_interrupted"
    # One step was running when the cancel arrived; one message may have been on its way.
    assert asked <= last <= asked + 2
    assert len(tiny_comfy.images(tiny_comfy.run(edit(seed=47).nodes))) == 1


def test_cancel_while_planning_stops_too(tiny_comfy: "Comfy") -> None:
    graph = edit(steps=1000, seed=48).nodes
    prompt = tiny_comfy.queue(graph)
    tiny_comfy.interrupt()
    history = tiny_comfy.wait(prompt)
    assert ended(history) in ("error", "success")  # it may have ended before the cancel arrived
    assert len(tiny_comfy.images(tiny_comfy.run(edit(seed=49).nodes))) == 1
