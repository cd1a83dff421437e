"""Noise levels: their ends, their order, and what is refused."""

import math

import pytest
import torch

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
    with pytest.raises(SettingError, match=r"250000 target tokens is mu 42\.77"):
        flux_sigmas(SCHEDULE, 250_000, 28)
    assert len(flux_sigmas(SCHEDULE, 65_536, 28)) == 29
    with pytest.raises(SettingError, match=r"700000 target tokens is mu 118\.95"):
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
        ("1.0, 0.5, 0.5, 0", "do not fall at place 3: 0.5 after 0.5"),
        ("0.5, 1.0, 0", "do not fall at place 2: 1 after 0.5"),
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


@pytest.mark.parametrize("steps", [0, -1, 10_001])
@pytest.mark.parametrize("kind", ["flux", "linear", "karras", "exponential"])
def test_steps_out_of_range_are_refused(kind: str, steps: int) -> None:
    with pytest.raises(SettingError, match=f"steps is {steps}"):
        make_sigmas(SCHEDULE, 1024, steps, kind=kind)


def test_ranges_that_cannot_be_computed_are_refused() -> None:
    with pytest.raises(SettingError, match="0 < smallest"):
        exponential_sigmas(4, 0.0, 1.0)
    with pytest.raises(SettingError, match="0 < smallest"):
        karras_sigmas(4, 0.5, 0.5)
    with pytest.raises(SettingError, match="rho"):
        karras_sigmas(4, 0.1, 1.0, rho=0.0)
    with pytest.raises(SettingError, match="0 tokens"):
        flux_sigmas(SCHEDULE, 0, 4)
    with pytest.raises(SettingError, match="shape"):
        check_sigmas(torch.ones(2, 3))


def test_sigmas_of_other_nodes_come_back_as_float32() -> None:
    sigmas = check_sigmas(torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64))
    assert sigmas.dtype == torch.float32
