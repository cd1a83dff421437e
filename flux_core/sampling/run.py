"""Sampling: checks a job, plans it, steps, and returns an image's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import NonFiniteError
from ..types import TokenValues
from ..values import Conditioning, Tokens
from .check import check_job
from .guidance import Guided, Network, guided
from .job import Job
from .notes import run_notes
from .sigmas import check_sigmas
from .solvers import SOLVERS, Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A checked and planned job; iterating over it computes one step at a time."""

    job: Job
    plan: Guided
    sigmas: Sequence[float]
    notes: tuple[str, ...]  # on what it does that its settings may not suggest

    def __iter__(self) -> Steps:
        """Yields every step; the last one's x is the image, which `finish` turns into tokens."""
        steps = torch.no_grad()(SOLVERS[self.job.solver].steps)
        x = _begin(self.job.noise, self.sigmas[0], self.job.start).to(self.plan.device)
        return steps(self.plan.velocity, x, self.sigmas, self._edit)

    def _edit(self, x: TokenValues, sigma_next: float) -> TokenValues:
        for edit in self.job.edits:
            x = edit(x, sigma_next)
        return x


@torch.no_grad()
def run(network: Network, job: Job, *, may_stop: bool = False) -> Run:
    """Checks and plans a job; iterating over the result computes its steps.

    References are part of the plan, so no step can change them.

    Args:
        network: the transformer.
        job: everything else.
        may_stop: sigmas may end above 0, to be continued by another run.

    Raises:
        FamilyMismatchError: a part belongs to another family.
        ShapeError: batches or sizes do not match.
        NonFiniteError: NaN or infinity in an input.
        SettingError: sigmas, a solver, guidance or a control that the network cannot follow.

    Source: black-forest-labs/flux@802fb47 src/flux/sampling.py denoise; start as
        Comfy-Org/ComfyUI@14b05228 comfy/model_sampling.py CONST.noise_scaling.
    """
    sigmas = check_sigmas(job.sigmas, may_stop=may_stop)
    check_job(network, job)
    notes = run_notes(network, job)
    cfg = job.cfg
    if cfg is not None:
        cfg = replace(cfg, negative=_with_guidance(cfg.negative, network))
    levels = [float(sigma) for sigma in sigmas]
    plan = guided(
        network,
        _with_guidance(job.conditioning, network),
        job.noise,
        levels,
        SOLVERS[job.solver].asks(levels),
        cfg,
    )
    return Run(job=job, plan=plan, sigmas=levels, notes=notes)


def finish(x: TokenValues, target: Tokens) -> Tokens:
    """Turns a step's x into tokens of the autoencoder's latent.

    Args:
        x: (B, N, D) in the transformer's scale: the last step's `x`, or any step's `denoised`.
        target: the noise that the run started from.

    Returns:
        Tokens of an image, unscaled, with the target's position ids, on x's device.

    Raises:
        NonFiniteError: the network computed NaN or infinity.
    """
    check_computed(x)
    return replace(target, values=target.latent.from_network(x), is_noise=False)


def check_computed(x: TokenValues) -> None:
    """Raises if a result is NaN or infinite.

    Raises:
        NonFiniteError: the network computed NaN or infinity.
    """
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            "The model computed NaN or infinity.",
            "finite values.",
            "set [model dtype] to bfloat16 or float32: float16 overflows on some models and "
            "devices.",
        )


def _begin(noise: Tokens, sigma: float, start: Tokens | None) -> TokenValues:
    """Mixes noise and start image for `sigma`, in the transformer's scale."""
    x = sigma * noise.values.float()
    if start is None or sigma == 1.0 or not bool(start.values.any()):  # zeros: an empty latent
        return x
    return x + (1.0 - sigma) * start.latent.to_network(start.values).to(x.device)


def _with_guidance(conditioning: Conditioning, network: Network) -> Conditioning:
    """Sets the family's default guidance if None, or removes it if the network has no input."""
    guidance = conditioning.guidance
    if not network.spec.has_guidance:
        guidance = None
    elif guidance is None:
        guidance = network.family.default_guidance
    return replace(conditioning, guidance=guidance)
