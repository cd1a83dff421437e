"""Training in several processes of one thread each, which average their gradients.

On a shared machine this is faster than one process of several threads: threads wait for the
slowest after every operation, processes only after every step.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the processes."""

    index: int
    count: int

    @property
    def leads(self) -> bool:
        """Whether this process writes logs and files."""
        return self.index == 0


def run_ranks(count: int, work: Callable[..., None], *args: object) -> None:
    """Runs work(rank, *args) in `count` processes and waits; `work` is a function of a module."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        mp.spawn(_enter, args=(count, meeting, work, args), nprocs=count)  # pyright: ignore


def _enter(
    index: int, count: int, meeting: str, work: Callable[..., None], args: Sequence[object]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=index, world_size=count)
    try:
        work(Rank(index, count), *args)
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[Tensor], rank: Rank) -> None:
    """Replaces every gradient by the mean over all processes."""
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    if rank.count > 1:
        dist.all_reduce(flat)
        flat /= rank.count
    parts = _split(flat, gradients)
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def _split(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Splits a flat tensor into parts of the sizes of others."""
    return cast("Sequence[Tensor]", flat.split([one.numel() for one in like]))


def share_from_lead(values: Sequence[float], rank: Rank) -> list[float]:
    """Returns the first process's numbers in every process, so that all follow one clock."""
    numbers = torch.tensor(values, dtype=torch.float64)
    if rank.count > 1:
        dist.broadcast(numbers, 0)
    return [float(number) for number in numbers]


def gather_updates(owned: Sequence[Sequence[Tensor]], rank: Rank) -> None:
    """Copies updated tensors to all processes; owned[i] are those that process i has updated."""
    if rank.count == 1:
        return
    for owner, tensors in enumerate(owned):
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.broadcast(flat, owner)
        if owner != rank.index:
            for tensor, part in zip(tensors, _split(flat, tensors), strict=True):
                tensor.detach().copy_(part.view_as(tensor))
