"""How the keys of a file become the keys of our modules, known before any weight is read.

Our modules carry the published (BFL) names. A `Layout` holds one `Recipe` for each of them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import CheckpointError
from .names import MOST_BLOCKS, shorten

Shapes = Mapping[str, tuple[int, ...]]
Change = Literal["none", "swap halves", "1x1 kernel"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One tensor of ours, out of one or several of the file."""

    parts: tuple[str, ...]  # keys of the file, stacked along the first axis
    change: Change = "none"

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Tell the shape of what `make` gives.

        Raises:
            CheckpointError: the parts do not fit one another.
        """
        first, *others = (shapes[part] for part in self.parts)
        if others and (not first or any(other[1:] != first[1:] for other in others)):
            names = " and ".join(map(shorten, self.parts))
            sides = (shorten(str(shape)) for shape in (first, *others))
            raise CheckpointError(
                f"{names} are {' and '.join(sides)}.",
                "shapes that fit one another, to be stacked.",
                "download the file again, or choose another in the loader.",
            )
        if others:
            first = (first[0] + sum(other[0] for other in others), *first[1:])
        return (*first, 1, 1) if self.change == "1x1 kernel" and len(first) == 2 else first

    def make(self, tensors: Sequence[Tensor]) -> Tensor:
        """Make the tensor; a single unchanged part is handed on without a copy."""
        made = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self.change == "swap halves":
            return torch.cat(made.chunk(2)[::-1])
        if self.change == "1x1 kernel" and made.ndim == 2:
            return made[:, :, None, None]
        return made


@dataclass(frozen=True, slots=True)
class Layout:
    """One file's keys, sorted out."""

    name: str  # "BFL" or "diffusers"
    prefix: str  # what stands before every key
    recipes: dict[str, Recipe]  # by our key; every part is in the file
    names: Callable[[str], tuple[str, ...]]  # our key to the file's, there or not
    left: tuple[str, ...]  # file keys under the prefix that no recipe uses
    others: int  # keys without the prefix: other parts of a whole checkpoint

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Tell the shape of each of our tensors."""
        return {key: recipe.shape(shapes) for key, recipe in self.recipes.items()}

    def missing(self, key: str, shapes: Shapes) -> list[str]:
        """Name the file's keys that our `key` lacks."""
        return [name for name in self.names(key) if name not in shapes]


def find_prefix(
    keys: Collection[str], prefixes: Iterable[str], stems: tuple[str, ...]
) -> str | None:
    """Find the first prefix after which some key goes on with one of the stems."""
    for prefix in prefixes:
        starts = tuple(prefix + stem for stem in stems)
        if any(key.startswith(starts) for key in keys):
            return prefix
    return None


def lay_out(
    name: str,
    prefix: str,
    keys: Collection[str],
    recipes: Mapping[str, Recipe],
    names: Callable[[str], tuple[str, ...]] | None = None,
) -> Layout:
    """Sort out keys; parts of recipes carry the prefix, and so does what `names` gives."""
    mine = {key for key in keys if key.startswith(prefix)}
    used = {part for recipe in recipes.values() for part in recipe.parts}
    return Layout(
        name=name,
        prefix=prefix,
        recipes={key: one for key, one in recipes.items() if mine.issuperset(one.parts)},
        names=names or (lambda key: (prefix + key,)),
        left=tuple(sorted(mine - used)),
        others=len(keys) - len(mine),
    )


def count_numbers(keys: Iterable[str], stem: str, most: int = MOST_BLOCKS) -> int:
    """Count the blocks or levels `stem`0., `stem`1., … of which there are keys.

    Raises:
        CheckpointError: there are more than `most`, for which no network shall be built, or a
            number is missing between them.
    """
    rests = (key[len(stem) :].split(".")[0] for key in keys if key.startswith(stem))
    numbers = {int(rest) for rest in rests if rest.isdecimal() and len(rest) < 6}
    if len(numbers) > most:
        raise CheckpointError(
            f"The file numbers {len(numbers):,} {stem.rstrip('.')}.",
            f"at most {most}.",
            "download the file again, or choose another in the loader.",
        )
    gaps = sorted(set(range(len(numbers))) - numbers)
    if gaps:
        raise CheckpointError(
            f"{stem}{gaps[0]} is missing, while {stem}{max(numbers)} is there.",
            f"every {stem.rstrip('.')} from 0 on.",
            "download the file again, or choose another in the loader.",
        )
    return len(numbers)
