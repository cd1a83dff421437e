"""Our sigmas against the published schedule and diffusers' scheduler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from glassbox.flux_core.families import FLUX1_DEV, FLUX1_SCHNELL
from glassbox.flux_core.sampling.sigmas import make_sigmas
from glassbox.flux_core.specs import ShiftSpec

TOLERANCE = 1e-6
TOKENS = [64, 256, 1024, 4080, 4081, 4096, 16384]
STEPS = [1, 2, 4, 8, 20, 28, 100]

# What black-forest-labs/flux get_schedule gives: (tokens, steps) to six places.
PUBLISHED = {
    (256, 4): """
        1.000000 0.831824 0.622459 0.354661 0.000000
    """,
    (256, 8): """
        1.000000 0.920262 0.831824 0.733182 0.622459 0.497294 0.354661 0.190632 0.000000
    """,
    (256, 20): """
        1.000000 0.969065 0.936863 0.903314 0.868332 0.831824 0.793687 0.753810 0.712071 0.668336
        0.622459 0.574279 0.523616 0.470275 0.414038 0.354661 0.291875 0.225377 0.154828 0.079846
        0.000000
    """,
    (256, 28): """
        1.000000 0.978029 0.955424 0.932154 0.908192 0.883506 0.858062 0.831824 0.804756 0.776817
        0.747965 0.718153 0.687333 0.655454 0.622459 0.588290 0.552881 0.516165 0.478067 0.438509
        0.397405 0.354661 0.310179 0.263849 0.215555 0.165169 0.112551 0.057550 0.000000
    """,
    (1024, 4): """
        1.000000 0.849235 0.652489 0.384945 0.000000
    """,
    (1024, 8): """
        1.000000 0.929295 0.849235 0.757831 0.652489 0.529758 0.384945 0.211500 0.000000
    """,
    (1024, 20): """
        1.000000 0.972733 0.944129 0.914088 0.882497 0.849235 0.814164 0.777133 0.737974 0.696497
        0.652489 0.605714 0.555899 0.502740 0.445888 0.384945 0.319451 0.248879 0.172612 0.089934
        0.000000
    """,
    (1024, 28): """
        1.000000 0.980656 0.960644 0.939928 0.918472 0.896233 0.873170 0.849235 0.824377 0.798543
        0.771674 0.743706 0.714570 0.684191 0.652489 0.619376 0.584754 0.548517 0.510552 0.470730
        0.428912 0.384945 0.338657 0.289862 0.238348 0.183882 0.126204 0.065020 0.000000
    """,
    (4096, 4): """
        1.000000 0.904531 0.759511 0.512844 0.000000
    """,
    (4096, 8): """
        1.000000 0.956724 0.904531 0.840349 0.759511 0.654567 0.512844 0.310901 0.000000
    """,
    (4096, 20): """
        1.000000 0.983608 0.966014 0.947080 0.926647 0.904531 0.880513 0.854338 0.825702 0.794239
        0.759511 0.720980 0.677987 0.629707 0.575103 0.512844 0.441200 0.357875 0.259758 0.142529
        0.000000
    """,
    (4096, 28): """
        1.000000 0.988409 0.976222 0.963394 0.949873 0.935599 0.920509 0.904531 0.887583 0.869576
        0.850406 0.829956 0.808095 0.784672 0.759511 0.732413 0.703145 0.671435 0.636964 0.599357
        0.558163 0.512844 0.462748 0.407078 0.344849 0.274828 0.195455 0.104721 0.000000
    """,
}


def scheduler_sigmas(schedule: ShiftSpec, tokens: int, steps: int, **kind: bool):
    """Run diffusers' scheduler with the configuration published beside the weights."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0 if schedule is None else 3.0,
        use_dynamic_shifting=schedule is not None,
        base_shift=schedule.base_shift,
        max_shift=schedule.max_shift,
        base_image_seq_len=schedule.base_tokens,
        max_image_seq_len=schedule.max_tokens,
        **kind,
    )
    mu = None if schedule is None else schedule.mu(tokens, steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize(("tokens", "steps"), PUBLISHED)
def test_sigmas_equal_the_published_table(tokens: int, steps: int) -> None:
    published = torch.tensor([float(word) for word in PUBLISHED[tokens, steps].split()])
    ours = make_sigmas(FLUX1_DEV.schedule, tokens, steps)
    torch.testing.assert_close(ours, published, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("family", [FLUX1_DEV, FLUX1_SCHNELL], ids=lambda family: family.name)
def test_sigmas_equal_the_scheduler_bit_for_bit(family, tokens: int, steps: int) -> None:
    """The network embeds 1000 sigma, so even a last bit would show in a comparison of pictures."""
    theirs = scheduler_sigmas(family.schedule, tokens, steps)
    assert torch.equal(make_sigmas(family.schedule, tokens, steps), theirs)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", ["karras", "exponential"])
@pytest.mark.parametrize("family", [FLUX1_DEV, FLUX1_SCHNELL], ids=lambda family: family.name)
def test_other_curves_equal_the_scheduler(family, kind: str, tokens: int, steps: int) -> None:
    theirs = scheduler_sigmas(family.schedule, tokens, steps, **{f"use_{kind}_sigmas": True})
    ours = make_sigmas(family.schedule, tokens, steps, kind=kind)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
