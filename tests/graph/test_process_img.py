"""What ComfyUI's own Flux hands to its blocks, ours hands to ours."""

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph


def test_tokens_and_ids_equal_comfyuis_for_each_placement_bit_for_bit() -> None:
    answer = run_probe("probe_process_img")
    assert answer["cases"] > 30
    assert answer["wrong"] == []
