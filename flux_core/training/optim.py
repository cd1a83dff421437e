"""The Muon optimiser, a learning rate schedule, and a moving average of weights."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(slots=True)
class Clock:
    """Training progress by time, not steps: a slow machine makes fewer steps.

    Args:
        budget_s: seconds the whole run may take.
        spent_s: seconds spent before a resumed run.
    """

    budget_s: float
    spent_s: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return self.spent_s + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """From 0 at the start to 1 at the end of the budget."""
        return min(1.0, self.elapsed_s / self.budget_s)


def learning_rate(progress: float, *, warmup: float = 0.01, flat: float = 0.0) -> float:
    """Returns the factor of the peak rate: a linear rise, a plateau, half a cosine down to 0.

    Args:
        progress: of the run, in 0..1.
        warmup: end of the rise, in 0..1.
        flat: end of the plateau, in 0..1.
    """
    if progress < warmup:
        return progress / warmup
    fall = max(0.0, (progress - flat) / (1.0 - flat))
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, fall)))


class MatrixMuon:
    """Muon for weights of two or more axes, flattened to matrices (rows, all other axes).

    Args:
        weights: of linear layers and convolutions.
        rate: peak learning rate; updates are as large as Adam's at a fifth of that rate.
        owner, owners: index and number of processes; each updates every owners-th weight, and the
            caller copies `shares[owner]` to the others.

    Source: Jordan et al. 2024, "Muon"; torch.optim.Muon, which needs torch 2.9.
    """

    def __init__(
        self, weights: Sequence[nn.Parameter], rate: float, *, owner: int = 0, owners: int = 1
    ) -> None:
        from torch.optim import Muon  # imported here: the rest of this file runs with torch 2.7

        self.shares = [list(weights[share::owners]) for share in range(owners)]
        self._own = self.shares[owner]
        self._matrices = [nn.Parameter(weight.data.flatten(1)) for weight in self._own]
        self.optimizer = Muon(
            self._matrices,
            lr=rate,
            weight_decay=0.0,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )

    def step(self) -> None:
        """Updates this process's share from the weights' gradients."""
        for matrix, weight in zip(self._matrices, self._own, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self.optimizer.step()


def set_rates(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Sets every learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * factor


class MovingAverage:
    """Exponential moving average of the weights of several modules.

    Args:
        modules: whose parameters are averaged, in order.
        decay: share of the average that each step retains, after a warm-up; in 0..1.
    """

    def __init__(self, modules: Sequence[nn.Module], decay: float) -> None:
        self._modules = list(modules)
        self._decay = decay
        self._steps = 0
        self.averages: list[Tensor] = [weight.detach().clone() for weight in self._weights()]

    def _weights(self) -> list[nn.Parameter]:
        return [weight for module in self._modules for weight in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Moves every average towards its weight."""
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 10))
        for average, weight in zip(self.averages, self._weights(), strict=True):
            average.lerp_(weight, 1.0 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges weights and averages; a second call restores them."""
        for average, weight in zip(self.averages, self._weights(), strict=True):
            old = weight.detach().clone()
            weight.copy_(average)
            average.copy_(old)
