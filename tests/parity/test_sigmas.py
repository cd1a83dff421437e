"""Our sigmas against the published schedule and diffusers' scheduler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from glassbox.flux_core.families import FLUX1_DEV, FLUX1_SCHNELL, FLUX2_DEV
from glassbox.flux_core.sampling.sigmas import make_sigmas
from glassbox.tests.parity import published_sigmas as published

TOLERANCE = 1e-6
MU_TOLERANCE = 1e-9
TOKENS = [64, 256, 1024, 4080, 4081, 4096, 4300, 4301, 16384]
STEPS = [1, 2, 4, 8, 20, 28, 100]
# Each family, and the mu that diffusers' own pipeline would give its scheduler; None: no shift.
MU = {
    FLUX1_DEV: lambda tokens, steps: calculate_shift(tokens),
    FLUX1_SCHNELL: None,
    FLUX2_DEV: compute_empirical_mu,
}
FAMILIES = pytest.mark.parametrize("family", list(MU), ids=lambda family: family.name)


def scheduler_sigmas(family, tokens: int, steps: int, **kind: bool):
    """Run diffusers' scheduler with the configuration published beside FLUX.1's weights.

    FLUX.2's pipelines use the same one; the scheduler's default would not shift at all.
    """
    rule = MU[family]
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0 if rule is None else 3.0,
        use_dynamic_shifting=rule is not None,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        **kind,
    )
    mu = None if rule is None else rule(tokens, steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize(
    ("family", "table"),
    [(FLUX1_DEV, published.FLUX1), (FLUX2_DEV, published.FLUX2)],
    ids=["FLUX.1", "FLUX.2"],
)
def test_sigmas_equal_the_published_table(family, table: dict[tuple[int, int], str]) -> None:
    for (tokens, steps), text in table.items():
        expected = torch.tensor([float(word) for word in text.split()])
        ours = make_sigmas(family.schedule, tokens, steps)
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("tokens", "steps"), published.FLUX2_MU)
def test_the_empirical_shift_is_the_published_number(tokens: int, steps: int) -> None:
    mu = FLUX2_DEV.schedule.mu(tokens, steps)
    assert abs(mu - published.FLUX2_MU[tokens, steps]) <= MU_TOLERANCE
    assert mu == compute_empirical_mu(tokens, steps)


@FAMILIES
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_sigmas_equal_the_scheduler_bit_for_bit(family, tokens: int, steps: int) -> None:
    """The network embeds 1000 sigma, so even a last bit would show in a comparison of pictures."""
    theirs = scheduler_sigmas(family, tokens, steps)
    assert torch.equal(make_sigmas(family.schedule, tokens, steps), theirs)


@FAMILIES
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_other_curves_equal_the_scheduler(family, kind: str, tokens: int, steps: int) -> None:
    theirs = scheduler_sigmas(family, tokens, steps, **{f"use_{kind}_sigmas": True})
    ours = make_sigmas(family.schedule, tokens, steps, kind=kind)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
