"""How the keys of a file become the keys of our modules, known before any weight is read.

Our modules carry the published (BFL) names. A `KeyMap` holds one `KeyRule` for each of them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, shorten
from ..types import Shapes
from .files import ANOTHER_FILE

MOST_BLOCKS = 200  # of one kind in one network; the largest has 48
_LONGEST = 150  # characters of one fault: a name, or a name with two shapes


@dataclass(frozen=True, slots=True)
class KeyRule:
    """One tensor of ours, made of one or several of the file."""

    sources: tuple[str, ...]  # keys of the file, stacked along the first axis
    change: Literal["none", "swap halves", "1x1 kernel"] = "none"

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Returns the shape of what `apply` makes.

        Raises:
            CheckpointError: the sources do not fit one another.
        """
        first, *others = (shapes[source] for source in self.sources)
        if others and (not first or any(other[1:] != first[1:] for other in others)):
            names = " and ".join(map(shorten, self.sources))
            sides = (shorten(str(shape)) for shape in (first, *others))
            raise CheckpointError(
                f"{names} are {' and '.join(sides)}.",
                "shapes that fit one another, to be stacked.",
                ANOTHER_FILE,
            )
        if others:
            first = (first[0] + sum(other[0] for other in others), *first[1:])
        return (*first, 1, 1) if self.change == "1x1 kernel" and len(first) == 2 else first

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        """Makes our tensor of its sources; a single unchanged one is returned without a copy."""
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self.change == "swap halves":
            return swap_halves(tensor)
        if self.change == "1x1 kernel" and tensor.ndim == 2:
            return tensor[:, :, None, None]
        return tensor


@dataclass(frozen=True, slots=True)
class KeyMap:
    """The keys of one file, and what each of our tensors is made of."""

    layout: str  # "BFL" or "diffusers"
    prefix: str  # before every key
    rules: dict[str, KeyRule]  # by our key; every source is in the file
    names: Callable[[str], tuple[str, ...]]  # our key to the file's, there or not
    unused: tuple[str, ...]  # keys with the prefix that no rule uses
    others: int  # how many keys have no prefix: other parts of a whole checkpoint

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each of our tensors."""
        return {key: rule.shape(shapes) for key, rule in self.rules.items()}

    def missing(self, key: str, shapes: Shapes) -> list[str]:
        """Lists the file's keys that our `key` lacks."""
        return [name for name in self.names(key) if name not in shapes]


def map_keys(
    layout: str,
    prefix: str,
    keys: Collection[str],
    rules: Mapping[str, KeyRule],
    names: Callable[[str], tuple[str, ...]] | None = None,
) -> KeyMap:
    """Builds the key map of a file.

    Args:
        layout: its name.
        prefix: which the sources of rules, and what `names` returns, carry already.
        keys: all keys of the file.
        rules: by our key; those without all their sources are dropped.
        names: our key to the file's; None where only the prefix is added.
    """
    mine = {key for key in keys if key.startswith(prefix)}
    used = {source for rule in rules.values() for source in rule.sources}
    return KeyMap(
        layout=layout,
        prefix=prefix,
        rules={key: rule for key, rule in rules.items() if mine.issuperset(rule.sources)},
        names=names or (lambda key: (prefix + key,)),
        unused=tuple(sorted(mine - used)),
        others=len(keys) - len(mine),
    )


def find_prefix(
    keys: Collection[str], prefixes: Iterable[str], stems: tuple[str, ...]
) -> str | None:
    """Returns the first prefix after which some key goes on with one of the stems."""
    for prefix in prefixes:
        starts = tuple(prefix + stem for stem in stems)
        if any(key.startswith(starts) for key in keys):
            return prefix
    return None


def count_numbers(keys: Iterable[str], stem: str, most: int = MOST_BLOCKS) -> int:
    """Counts the blocks or levels `stem`0., `stem`1., … of which there are keys.

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
            ANOTHER_FILE,
        )
    gaps = sorted(set(range(len(numbers))) - numbers)
    if gaps:
        raise CheckpointError(
            f"{stem}{gaps[0]} is missing, while {stem}{max(numbers)} is there.",
            f"every {stem.rstrip('.')} from 0 on.",
            ANOTHER_FILE,
        )
    return len(numbers)


def swap_halves(tensor: Tensor) -> Tensor:
    """Exchanges the two halves of the first axis."""
    return torch.cat(tensor.chunk(2)[::-1])


def matrix_sides(shapes: Shapes, key: str, title: str = "FLUX") -> tuple[int, int]:
    """Returns rows and columns of a tensor that a model's sizes are read from.

    Raises:
        CheckpointError: it is missing, empty or no matrix.
    """
    shape = sized_shape(shapes, key, title)
    if len(shape) != 2:
        raise CheckpointError(
            f"'{shorten(key)}' is {by(shape)}, which is no matrix.",
            f"a complete {title} file.",
            ANOTHER_FILE,
        )
    return shape[0], shape[1]


def sized_shape(shapes: Shapes, key: str, title: str = "FLUX") -> tuple[int, ...]:
    """Returns the shape of a tensor that a model's sizes are read from.

    Raises:
        CheckpointError: it is missing, empty or a single value.
    """
    shape = shapes.get(key)
    if shape is None or not shape or 0 in shape:
        found = "missing" if shape is None else f"{by(shape)}, which tells no size"
        raise CheckpointError(
            f"'{shorten(key)}' is {found}.", f"a complete {title} file.", ANOTHER_FILE
        )
    return shape


def by(shape: tuple[int, ...]) -> str:
    """Returns a shape as people write it: 128x64."""
    return shorten("x".join(map(str, shape))) or "a single value"


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Lists the tensors a module needs; build it on the meta device to list them only."""
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def complete_shapes(
    source: str, key_map: KeyMap, shapes: Shapes, sizing: Iterable[str], title: str
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a file's tensors under our names.

    Args:
        source: the file's name.
        key_map, shapes: of the file.
        sizing: our names of the tensors that tell the model's sizes.
        title: of the model, for the message.

    Raises:
        CheckpointError: one of the tensors in `sizing` is missing.
    """
    lost = [key for name in sizing for key in key_map.missing(name, shapes)]
    if lost:
        raise _misfit(source, title, [_some(lost, "missing")], "every tensor of it")
    return key_map.shapes(shapes)


def check_shapes(source: str, key_map: KeyMap, shapes: Shapes, needed: Shapes, title: str) -> None:
    """Compares a file's tensors with a module's, name by name and shape by shape.

    Args:
        source: the file's name.
        key_map, shapes: of the file.
        needed: of the module's tensors.
        title: of the model, for the message.

    Raises:
        CheckpointError: tensors are missing, not known or of another shape; all of it is said.
    """
    ours = key_map.shapes(shapes)
    lost = [key for name in needed if name not in ours for key in key_map.missing(name, shapes)]
    surplus = {name for name in ours if name not in needed}
    unknown = [*key_map.unused, *(one for name in surplus for one in key_map.rules[name].sources)]
    wrong = [
        f"{shorten(name)} is {by(ours[name])} and not {by(shape)}"
        for name, shape in needed.items()
        if ours.get(name, shape) != shape
    ]
    faults = [
        _some(names, what)
        for names, what in (
            (lost, "missing"),
            (sorted(unknown), "not known"),
            (wrong, "of another shape"),
        )
        if names
    ]
    if faults:
        raise _misfit(source, title, faults, f"its {len(needed)} tensors and no others")


def _some(names: list[str], what: str) -> str:
    rest = ", …" if len(names) > 3 else ""
    verb = "is" if len(names) == 1 else "are"
    first = ", ".join(shorten(name, _LONGEST) for name in names[:3])
    return f"{len(names)} {verb} {what} ({first}{rest})"


def _misfit(source: str, title: str, faults: list[str], needed: str) -> CheckpointError:
    return CheckpointError(
        f"{source} does not fit {title}: of its tensors {'; '.join(faults)}.",
        f"{needed}.",
        ANOTHER_FILE,
    )
