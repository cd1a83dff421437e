"""A run as a value: everything it needs except the network."""

from dataclasses import dataclass

from ..types import Sigmas
from ..values import Conditioning, Tokens
from .guidance import TrueCFG
from .solvers import Edit, SolverName


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What `run` computes with a network; `job_file` writes it to disk and reads it.

    Args:
        conditioning: text, references, guidance (None: the family's default).
        noise: (B, N, D) standard normal values, with the position ids of a target.
        sigmas: (S + 1,) falling from at most 1 to 0.
        solver: one of `SOLVERS`.
        cfg: true CFG, or None for one pass.
        start: an image to begin from where sigmas[0] is below 1, (1 or B, N, D) unscaled; None
            begins from an empty latent, as ComfyUI does.
        edits: functions applied to x after each step, in order.
    """

    conditioning: Conditioning
    noise: Tokens
    sigmas: Sigmas
    solver: SolverName = "euler"
    cfg: TrueCFG | None = None
    start: Tokens | None = None
    edits: tuple[Edit, ...] = ()
