"""The changes a LoRA makes: W + strength * (alpha / rank) * B A on some rows of a weight.

Source: Hu et al. 2021, "LoRA", equation 3; Yeh et al. 2023, "LyCORIS", section 3 for LoKr.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..transformer.flux import Flux


@dataclass(frozen=True, slots=True)
class LowRank:
    """up @ down: (rows, rank) times (rank, columns)."""

    up: Tensor
    down: Tensor

    def delta(self, device: torch.device) -> Tensor:
        """Compute the change in float32."""
        return self.up.to(device, torch.float32) @ self.down.to(device, torch.float32)

    def swapped(self) -> "LowRank":
        """Exchange the two halves of the rows."""
        return LowRank(_swap(self.up), self.down)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """The Kronecker product of two matrices."""

    first: Tensor
    second: Tensor

    def delta(self, device: torch.device) -> Tensor:
        """Compute the change in float32."""
        first, second = (one.to(device, torch.float32) for one in (self.first, self.second))
        return torch.kron(first.contiguous(), second.contiguous())

    def swapped(self) -> "Kronecker | Full":
        """Exchange the two halves of the rows."""
        if self.first.shape[0] % 2 == 0:
            return Kronecker(_swap(self.first), self.second)
        return Full(_swap(self.delta(torch.device("cpu"))))


@dataclass(frozen=True, slots=True)
class Full:
    """The change as it is: of a weight, or of a bias."""

    values: Tensor

    def delta(self, device: torch.device) -> Tensor:
        """Give the change in float32."""
        return self.values.to(device, torch.float32)

    def swapped(self) -> "Full":
        """Exchange the two halves of the rows."""
        return Full(_swap(self.values))


Change: TypeAlias = LowRank | Kronecker | Full


@dataclass(frozen=True, slots=True)
class LoraPart:
    """One change of some rows of one tensor."""

    key: str  # our name of the tensor
    start: int
    rows: int
    whole: bool  # the rows are all that the tensor has
    change: Change
    scale: float  # alpha / rank, times the strengths


@dataclass(frozen=True, slots=True)
class AddedAtUse:
    """Changes of one weight that stays as it is stored, added to the numbers made of it.

    Args:
        parts: the changes.
        divisor: (columns,), by which the layer multiplies its input before the weight, if it does.
    """

    parts: tuple[LoraPart, ...]
    divisor: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """Change a weight (rows, columns) that was made for this use; the sum is rounded once."""
        made = weight.to(torch.float32)
        _add(made, self.parts, None if self.divisor is None else self.divisor.to(made))
        return made.to(weight.dtype)


def patched(weight: Tensor, parts: Iterable[LoraPart]) -> Tensor:
    """Add changes to a weight, in float32.

    Returns:
        A new tensor of the weight's dtype, on its device.
    """
    made = weight.detach().to(torch.float32, copy=True)
    _add(made, parts)
    return made.to(weight.dtype)


def merge_lora(network: Flux, parts: Iterable[LoraPart]) -> None:
    """Change a network's weights for good; parts of several LoRAs add up before they are rounded.

    Raises:
        KeyError: a part changes a tensor that the network does not have.
    """
    by_key: dict[str, list[LoraPart]] = {}
    for part in parts:
        by_key.setdefault(part.key, []).append(part)
    parameters = {
        **dict(network.modulation.named_parameters()),
        **dict(network.blocks.named_parameters()),
    }
    for key, changes in by_key.items():
        parameters[key].data = patched(parameters[key].data, changes)


def _add(made: Tensor, parts: Iterable[LoraPart], divisor: Tensor | None = None) -> None:
    """Add changes, divided by column where there is a divisor, to a float32 weight in place."""
    for part in parts:
        rows = made.narrow(0, part.start, part.rows)
        if divisor is None:
            rows.add_(part.change.delta(made.device), alpha=part.scale)
        else:
            rows.addcdiv_(part.change.delta(made.device), divisor, value=part.scale)


def _swap(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])
