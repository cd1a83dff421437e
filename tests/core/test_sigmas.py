"""Sigmas: their ends, their order, denoise, and what is refused."""

import math

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import SettingError
from glassbox.flux_core.families import FLUX1_DEV, FLUX1_SCHNELL, FLUX2_DEV
from glassbox.flux_core.sampling.sigmas import (
    check_sigmas,
    exponential_sigmas,
    flux_sigmas,
    karras_sigmas,
    make_sigmas,
    parse_sigmas,
)
from glassbox.flux_core.specs import FluxFamily

SCHEDULE = FLUX1_DEV.schedule


@pytest.mark.parametrize("steps", [1, 2, 28, 1000, 10_000])
@pytest.mark.parametrize("kind", ["flux", "linear", "karras", "exponential"])
def test_every_kind_falls_from_one_to_zero(kind: str, steps: int) -> None:
    sigmas = make_sigmas(SCHEDULE, 1024, steps, kind=kind)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert torch.equal(check_sigmas(sigmas), sigmas)


def test_the_shift_is_extrapolated_not_clamped() -> None:
    assert SCHEDULE.mu(64, 4) < SCHEDULE.base_shift
    assert SCHEDULE.mu(16384, 4) == pytest.approx(3.23)
    assert SCHEDULE.mu(4081, 4) == pytest.approx(1.1474609375)
    assert SCHEDULE.mu(4080, 4) == pytest.approx(1.1472916667)


def test_the_empirical_shift_depends_on_the_steps_up_to_a_size_and_breaks_right_above_it() -> None:
    shift = FLUX2_DEV.schedule.mu
    assert shift(4300, 4) == pytest.approx(2.3084780705)
    assert shift(4300, 50) == pytest.approx(2.0446937905)
    assert shift(4301, 4) == shift(4301, 50) == pytest.approx(1.18469693)
    # the 10 and 200 of the published names are steps, where the line meets its two ends
    assert shift(1024, 10) == pytest.approx(8.73809524e-05 * 1024 + 1.89833333)
    assert shift(1024, 200) == pytest.approx(0.00016927 * 1024 + 0.45666666)


def test_a_family_without_shift_falls_evenly() -> None:
    assert flux_sigmas(FLUX1_SCHNELL.schedule, 4096, 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_picture_too_large_for_the_shift_is_refused_with_its_numbers() -> None:
    with pytest.raises(SettingError, match=r"250000 target tokens is mu 42\.77") as caught:
        flux_sigmas(SCHEDULE, 250_000, 28)
    assert caught.value.settings == ("width", "height", "steps", "schedule kind")
    assert len(flux_sigmas(SCHEDULE, 65_536, 28)) == 29
    with pytest.raises(SettingError, match=r"mu 118\.95"):
        flux_sigmas(FLUX2_DEV.schedule, 700_000, 4)


def test_karras_and_exponential_run_between_the_ends_they_are_given() -> None:
    for sigmas in (karras_sigmas(5, 0.1, 0.9), exponential_sigmas(5, 0.1, 0.9)):
        assert sigmas[0] == pytest.approx(0.9)
        assert sigmas[-2] == pytest.approx(0.1)
        assert sigmas[-1] == 0.0
    middle = float(exponential_sigmas(3, 0.1, 0.9)[1])
    assert middle == pytest.approx(math.sqrt(0.09))
    middle = float(karras_sigmas(3, 0.1, 0.9, rho=1.0)[1])
    assert middle == pytest.approx(0.5)


@pytest.mark.parametrize(
    "text",
    ["1.0, 0.5, 0", "1 .5 0", "1.0\n0.5\n0.0\n", "[1.0; 0.5; 0]", " 1e0,\t5e-1,, 0 "],
)
def test_sigmas_by_hand_may_be_set_apart_in_any_way(text: str) -> None:
    assert parse_sigmas(text).tolist() == [1.0, 0.5, 0.0]
    assert make_sigmas(SCHEDULE, 1024, 0, kind="by hand", by_hand=text).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "are empty"),
        (" \n ", "are empty"),
        ("1.0, high, 0", "'high', which is no number"),
        ("1.0, 0.5", "end in 0.5, not in 0"),
        ("1.0, 0.5, 0.5, 0", "do not fall at position 3: 0.5 after 0.5"),
        ("0.5, 1.0, 0", "do not fall at position 2: 1 after 0.5"),
        ("14.6, 3, 0", "14.6 to 0, outside 0..1"),
        ("1.0, 0.5, -0.1", "outside 0..1"),
        ("1.0, nan, 0", "not all finite"),
        ("inf, 0.5, 0", "not all finite"),
        ("0", "2 to 10001 numbers"),
    ],
)
def test_wrong_sigmas_by_hand_are_named_and_never_repaired(text: str, words: str) -> None:
    with pytest.raises(SettingError) as error:
        parse_sigmas(text)
    assert words in str(error.value)
    assert set(error.value.settings) <= {"sigmas", "schedule"}


@pytest.mark.parametrize("steps", [0, -1, 10_001])
@pytest.mark.parametrize("kind", ["flux", "linear", "karras", "exponential"])
def test_steps_out_of_range_are_refused(kind: str, steps: int) -> None:
    for denoise in (1.0, 0.5):
        with pytest.raises(SettingError) as caught:
            make_sigmas(SCHEDULE, 1024, steps, kind=kind, denoise=denoise)
        assert caught.value.found == f"steps is {steps}."
        assert caught.value.settings == ("steps",)


def test_ranges_that_cannot_be_computed_are_refused() -> None:
    for call, settings in (
        (lambda: exponential_sigmas(4, 0.0, 1.0), ()),
        (lambda: karras_sigmas(4, 0.5, 0.5), ()),
        (lambda: karras_sigmas(4, 0.1, 1.0, rho=0.0), ()),
        (lambda: flux_sigmas(SCHEDULE, 0, 4), ("noise", "schedule")),
        (lambda: check_sigmas(torch.ones(2, 3)), ("schedule",)),
    ):
        with pytest.raises(SettingError) as caught:
            call()
        assert caught.value.settings == settings


def test_sigmas_of_other_nodes_come_back_as_float32() -> None:
    sigmas = check_sigmas(torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64))
    assert sigmas.dtype == torch.float32


def test_denoise_takes_the_end_of_a_longer_schedule() -> None:
    half = make_sigmas(SCHEDULE, 1024, 2, kind="linear", denoise=0.5)
    assert half.tolist() == [0.5, 0.25, 0.0]
    third = make_sigmas(SCHEDULE, 1024, 3, kind="linear", denoise=0.3)
    assert third.tolist() == pytest.approx([0.3, 0.2, 0.1, 0.0])
    assert make_sigmas(SCHEDULE, 1024, 1, kind="linear", denoise=0.2).tolist() == pytest.approx(
        [0.2, 0.0]
    )
    # FLUX.1 at 4096 tokens, mu 1.15: e^1.15 / (e^1.15 + 1 / even - 1) for even 0.5 and 0.25
    assert make_sigmas(SCHEDULE, 4096, 2, denoise=0.5).tolist() == pytest.approx(
        [0.7595109, 0.5128441, 0.0]
    )


def last_of_more(kind: str, family: FluxFamily, steps: int, denoise: float) -> Tensor:
    """KSampler's rule: int(steps / denoise) steps are made, and the last steps + 1 sigmas taken."""
    total = int(steps / denoise)
    even = torch.tensor([1 - index / total for index in range(total)], dtype=torch.float64)
    own = even
    if kind != "linear":
        strength = math.exp(family.schedule.mu(1024, total))
        own = strength / (strength + 1 / even - 1)
    first, last, spaced = float(own[0]), float(own[-1]), torch.linspace(0, 1, total).double()
    if kind == "karras":
        own = (first ** (1 / 7) + spaced * (last ** (1 / 7) - first ** (1 / 7))) ** 7
    if kind == "exponential":
        own = torch.exp(math.log(first) + spaced * (math.log(last) - math.log(first)))
    return torch.cat((own, torch.zeros(1).double()))[-(steps + 1) :].float()


@pytest.mark.parametrize("kind", ["flux", "linear", "karras", "exponential"])
@pytest.mark.parametrize("family", [FLUX1_DEV, FLUX2_DEV], ids=["1", "2"])
def test_denoise_follows_ksamplers_rule(kind: str, family: FluxFamily) -> None:
    for steps, denoise in ((20, 0.6), (7, 0.7), (28, 0.35), (1, 0.01), (50, 0.999), (3, 0.05)):
        ours = make_sigmas(family.schedule, 1024, steps, kind=kind, denoise=denoise)
        assert ours.shape == (steps + 1,)
        torch.testing.assert_close(
            ours, last_of_more(kind, family, steps, denoise), rtol=2e-5, atol=1e-7
        )
        assert torch.equal(check_sigmas(ours), ours)


@pytest.mark.parametrize("kind", ["flux", "linear", "karras", "exponential"])
def test_denoise_of_almost_one_is_one(kind: str) -> None:
    whole = make_sigmas(SCHEDULE, 1024, 28, kind=kind)
    for denoise in (1.0, 0.99995):
        assert torch.equal(make_sigmas(SCHEDULE, 1024, 28, kind=kind, denoise=denoise), whole)


@pytest.mark.parametrize("denoise", [0.0, -0.5, 1.01, math.nan, math.inf])
@pytest.mark.parametrize("kind", ["flux", "linear", "karras", "exponential", "by hand"])
def test_denoise_out_of_range_is_refused(kind: str, denoise: float) -> None:
    with pytest.raises(SettingError, match=r"^denoise is") as caught:
        make_sigmas(SCHEDULE, 1024, 4, kind=kind, by_hand="1, 0.5, 0", denoise=denoise)
    assert caught.value.settings == ("denoise",)


def test_sigmas_by_hand_say_themselves_where_they_begin() -> None:
    with pytest.raises(SettingError) as caught:
        make_sigmas(SCHEDULE, 1024, 4, kind="by hand", by_hand="1, 0.5, 0", denoise=0.5)
    assert caught.value.settings == ("denoise", "sigmas")


@pytest.mark.parametrize(("steps", "denoise"), [(200, 0.01), (1, 1e-5), (1, 5e-324)])
def test_a_denoise_that_asks_for_endless_steps_is_refused(steps: int, denoise: float) -> None:
    with pytest.raises(SettingError) as caught:
        make_sigmas(SCHEDULE, 1024, steps, denoise=denoise)
    assert caught.value.settings == ("denoise", "steps")
