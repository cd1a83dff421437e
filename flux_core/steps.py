"""Which step of a run a noise level belongs to."""

from collections.abc import Sequence


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """Returns the step that a sigma belongs to; a step ends where the next one begins.

    Args:
        sigma: any noise level, in the list or between two of it.
        sigmas: the level at which each step begins, falling.
    """
    return max(sum(1 for level in sigmas if level >= sigma) - 1, 0)
