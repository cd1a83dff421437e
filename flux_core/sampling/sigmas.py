"""Schedules: the noise level (sigma) at which each step starts, from 1, noise, to 0, the image.

Every function returns steps + 1 values: the sigma of each step, then 0. They are computed on the
CPU with operations that round the same everywhere, so that a schedule is the same on every machine.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch

from ..errors import SettingError
from ..specs import ShiftSpec
from ..types import Sigmas

SigmaKind = Literal["flux", "linear", "karras", "exponential", "by hand"]

MAX_STEPS = 10_000
KARRAS_RHO = 7.0
_FULL_DENOISE = 0.9999  # a denoise above it counts as 1, as in ComfyUI


def make_sigmas(
    schedule: ShiftSpec,
    tokens: int,
    steps: int,
    *,
    kind: SigmaKind = "flux",
    by_hand: str = "",
    denoise: float = 1.0,
) -> Sigmas:
    """Returns the sigmas of a kind of schedule.

    Karras and exponential run between the first and the last sigma above 0 of the model's own
    schedule, as in diffusers with `use_karras_sigmas` and `use_exponential_sigmas`.

    Args:
        schedule: the family's.
        tokens: tokens of the target only; text and references do not count.
        steps: 1..10000; ignored when the sigmas are written by hand.
        kind: which curve.
        by_hand: numbers for kind "by hand".
        denoise: above 0, at most 1: the part of the way from noise to image that is sampled. Below
            1 the sigmas are the last steps + 1 of a schedule of int(steps / denoise) steps.

    Returns:
        (steps + 1,) float32 on the CPU, falling from at most 1 to 0.

    Raises:
        SettingError: a setting is out of range, the text is not a list of falling sigmas, or
            denoise is below 1 with sigmas by hand.

    Source: huggingface/diffusers@0.42.1 schedulers/scheduling_flow_match_euler_discrete.py
        set_timesteps; denoise as Comfy-Org/ComfyUI@14b05228 comfy/samplers.py KSampler.set_steps.
    """
    total = _total_steps(steps, denoise, kind)
    if kind == "by hand":
        return parse_sigmas(by_hand)
    return _whole_schedule(schedule, tokens, total, kind)[-(steps + 1) :]


def _whole_schedule(schedule: ShiftSpec, tokens: int, steps: int, kind: SigmaKind) -> Sigmas:
    if kind == "linear":
        return linear_sigmas(steps)
    own = flux_sigmas(schedule, tokens, steps)
    if kind == "karras":
        return karras_sigmas(steps, float(own[-2]), float(own[0]))
    if kind == "exponential":
        return exponential_sigmas(steps, float(own[-2]), float(own[0]))
    return own


def flux_sigmas(schedule: ShiftSpec, tokens: int, steps: int) -> Sigmas:
    """Returns evenly spaced sigmas, shifted by the size of the image: large ones stay noisy longer.

    Args:
        schedule: the family's; None for no shift.
        tokens: tokens of the target only, at least 1; mu is extrapolated outside the trained range.
        steps: 1..10000.

    Returns:
        (steps + 1,) float32 on the CPU.

    Raises:
        SettingError: steps or tokens are out of range, or there are so many tokens that float32
            cannot tell the shifted sigmas apart.

    Source: black-forest-labs/flux@802fb47 src/flux/sampling.py get_schedule, time_shift;
        rounded as huggingface/diffusers@0.42.1 FlowMatchEulerDiscreteScheduler.
    """
    if tokens < 1:
        raise SettingError(
            f"The target has {tokens} tokens.", "at least 1.", "wire [noise] to [schedule]."
        )
    if schedule is None:
        return linear_sigmas(steps)
    mu = schedule.mu(tokens, steps)
    even = linear_sigmas(steps)[:-1]
    # float32 as in diffusers, bit for bit: multiplied by 1000, the last bit shows in the image
    strength = torch.tensor(math.exp(min(mu, 88.0)), dtype=torch.float32)  # e^89 is infinite
    sigmas = torch.cat((strength / (strength + (1.0 / even - 1.0)), torch.zeros(1)))
    if not _falls(sigmas):
        raise SettingError(
            f"The schedule's shift for {tokens} target tokens is mu {mu:.2f}, so {steps} steps "
            "fall on the same sigma in float32.",
            "sigmas that fall at every step.",
            "make the picture smaller with [width] and [height], use fewer [steps], or set "
            "[schedule kind] to linear or by hand.",
        )
    return sigmas


def linear_sigmas(steps: int) -> Sigmas:
    """Returns evenly spaced sigmas: 1, ..., 1 / steps, 0."""
    _check_steps(steps)
    return _as_sigmas([1.0 - index / steps for index in range(steps)])


def karras_sigmas(
    steps: int, sigma_min: float, sigma_max: float, rho: float = KARRAS_RHO
) -> Sigmas:
    """Returns sigmas evenly spaced in sigma ** (1 / rho): small steps near the image.

    Args:
        steps: 1..10000.
        sigma_min, sigma_max: last sigma above 0 and first sigma; 0 < min <= max <= 1.
        rho: above 0; 7 is the paper's choice.

    Returns:
        (steps + 1,) float32 on the CPU.

    Raises:
        SettingError: steps, the range or rho is out of range.

    Source: Karras et al. 2022 (arXiv 2206.00364), equation 5; end points as
        huggingface/diffusers@0.42.1 FlowMatchEulerDiscreteScheduler._convert_to_karras.
    """
    _check_steps(steps)
    _check_range(steps, sigma_min, sigma_max)
    if not (math.isfinite(rho) and rho > 0):
        raise SettingError(f"rho is {rho}.", "a number above 0.", "set rho to 7.")
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return check_sigmas(_as_sigmas([root**rho for root in _spaced(first, last, steps)]))


def exponential_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Sigmas:
    """Returns sigmas evenly spaced in log(sigma).

    Args:
        steps: 1..10000.
        sigma_min, sigma_max: last sigma above 0 and first sigma; 0 < min <= max <= 1.

    Returns:
        (steps + 1,) float32 on the CPU.

    Raises:
        SettingError: steps or the range is out of range.

    Source: huggingface/diffusers@0.42.1 schedulers/scheduling_flow_match_euler_discrete.py
        _convert_to_exponential.
    """
    _check_steps(steps)
    _check_range(steps, sigma_min, sigma_max)
    first, last = math.log(sigma_max), math.log(sigma_min)
    return check_sigmas(_as_sigmas([math.exp(log) for log in _spaced(first, last, steps)]))


def parse_sigmas(text: str) -> Sigmas:
    """Parses sigmas written by hand, without adding, sorting or dropping any.

    Args:
        text: numbers separated by commas, semicolons, spaces or new lines, including the 0 at the
            end: "1.0, 0.8, 0.5, 0".

    Returns:
        (numbers,) float32 on the CPU.

    Raises:
        SettingError: a word is not a number, or the numbers are not falling sigmas that end in 0.
    """
    values: list[float] = []
    for word in re.split(r"[\s,;]+", text.strip(" \t\r\n,;[]()")):
        try:
            values.append(float(word))
        except ValueError:
            raise SettingError(
                f"The sigmas by hand hold {word!r}, which is no number."
                if word
                else "The sigmas by hand are empty.",
                "numbers falling from at most 1 to 0, such as 1.0, 0.8, 0.5, 0.",
                "write the list in [sigmas].",
            ) from None
    return check_sigmas(torch.tensor(values, dtype=torch.float64))


def check_sigmas(sigmas: Sigmas, *, may_stop: bool = False) -> Sigmas:
    """Checks that sigmas, from any source, suit a flow model.

    Args:
        sigmas: (S + 1,) of any float type on any device, S = 1..10000.
        may_stop: they may end above 0, to be continued by another run.

    Returns:
        The same values, float32 on the CPU.

    Raises:
        SettingError: they are not one row of finite numbers, falling strictly from at most 1 to 0.
    """
    if sigmas.ndim != 1 or not 2 <= len(sigmas) <= MAX_STEPS + 1:
        raise SettingError(
            f"The sigmas have shape {tuple(sigmas.shape)}.",
            f"2 to {MAX_STEPS + 1} numbers in one row: one for each step, and the 0 at the end.",
            "take them from [schedule].",
        )
    checked = sigmas.detach().to(device="cpu", dtype=torch.float32)
    values = [float(sigma) for sigma in checked]
    if not all(math.isfinite(value) for value in values):
        raise _bad_sigmas("are not all finite", values)
    if values[0] > 1.0 or values[-1] < 0.0:
        raise _bad_sigmas(
            f"reach from {values[0]:g} to {values[-1]:g}, outside 0..1 (schedules of "
            "non-flow models start far above 1)",
            values,
        )
    if values[-1] != 0.0 and not may_stop:
        raise _bad_sigmas(f"end in {values[-1]:g}, not in 0, so noise would be left", values)
    for index, (value, following) in enumerate(pairwise(values)):
        if following >= value:
            raise _bad_sigmas(
                f"do not fall at position {index + 2}: {following:g} after {value:g}", values
            )
    return checked


def _bad_sigmas(what: str, values: Sequence[float]) -> SettingError:
    shown = ", ".join(f"{value:g}" for value in values[:6])
    return SettingError(
        f"The sigmas {what} (they begin {shown}).",
        "finite numbers, falling strictly from at most 1 to exactly 0.",
        "take them from [schedule], or write them so in [sigmas].",
    )


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= MAX_STEPS:
        raise SettingError(f"steps is {steps}.", f"1 to {MAX_STEPS}.", "set [steps].")


def _total_steps(steps: int, denoise: float, kind: SigmaKind) -> int:
    """Returns the steps of the whole schedule, of which the last `steps` are sampled."""
    if not 0.0 < denoise <= 1.0:  # NaN, too
        raise SettingError(f"denoise is {denoise}.", "above 0, at most 1.", "set [denoise].")
    if denoise > _FULL_DENOISE:
        return steps
    if kind == "by hand":
        raise SettingError(
            f"denoise is {denoise:g}, and the sigmas are written by hand.",
            "denoise 1: such a list says itself where it begins.",
            "set [denoise] to 1, and begin the list in [sigmas] lower.",
        )
    _check_steps(steps)
    if steps / denoise >= MAX_STEPS + 1:
        raise SettingError(
            f"{steps} steps at denoise {denoise:g} are the last of more than {MAX_STEPS}.",
            f"a whole schedule of at most {MAX_STEPS} steps.",
            "raise [denoise] or lower [steps].",
        )
    return int(steps / denoise)


def _check_range(steps: int, sigma_min: float, sigma_max: float) -> None:
    if not 0.0 < sigma_min <= sigma_max <= 1.0 or (steps > 1 and sigma_min == sigma_max):
        raise SettingError(
            f"The sigmas are to run from {sigma_max} to {sigma_min} in {steps} steps.",
            "0 < smallest < largest <= 1.",
            "set the two ends apart, inside 0..1.",
        )


def _spaced(first: float, last: float, steps: int) -> list[float]:
    """Returns `steps` evenly spaced numbers from first to last; for one step, first."""
    return [first + (last - first) * index / max(steps - 1, 1) for index in range(steps)]


def _as_sigmas(values: Sequence[float]) -> Sigmas:
    return torch.tensor([*values, 0.0], dtype=torch.float64).to(torch.float32)


def _falls(sigmas: Sigmas) -> bool:
    return bool((sigmas[1:] < sigmas[:-1]).all())
