"""Our network and autoencoder compute attention with what ComfyUI was started with."""

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph


@pytest.mark.parametrize(
    ("flag", "function"),
    [
        ("--use-split-cross-attention", "attention_split"),
        ("--use-quad-cross-attention", "attention_sub_quad"),
        ("--use-pytorch-cross-attention", "attention_pytorch"),
        ("--use-sage-attention", "attention_sage"),
    ],
)
def test_a_flag_chooses_the_attention_of_every_block(flag: str, function: str) -> None:
    """A flag is not known to a process that is already there: each starts afresh."""
    found = run_probe("probe_attention", flag, is_forked=False)
    assert found["chosen"] == function
    assert found["calls_per_step"] == found["blocks"] == 6
    assert found["autoencoder_calls"] == 2  # one to encode, one to decode
    assert found["apart"] <= 1e-3
    assert found["shape"] == [1, 64, 64, 3]


def test_on_a_cpu_without_a_flag_pytorch_computes_it() -> None:
    found = run_probe("probe_attention")
    assert found["backend"].startswith("pytorch")
    assert found["calls_per_step"] == found["autoencoder_calls"] == 0
    assert found["apart"] == 0.0
