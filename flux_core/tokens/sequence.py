"""The sequence the transformer reads: text, target and every reference, each with its range."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..specs import SegmentKind
from ..types import Ids
from ..values import Reference, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One stretch of the sequence."""

    kind: SegmentKind
    name: str
    start: int  # of its first token in the sequence
    ids: Ids
    grid: tuple[int, int] | None = None  # rows, columns; None for text
    reference: Reference | None = None  # the reference it holds

    @property
    def count(self) -> int:
        """The number of its tokens."""
        return self.ids.shape[0]

    @property
    def range(self) -> slice:
        """The range of its tokens in the sequence."""
        return slice(self.start, self.start + self.count)


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Segments one after the other, in the order the transformer reads them."""

    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return sum(segment.count for segment in self.segments)

    @property
    def ids(self) -> Ids:
        """Position ids of every token, (L, A) float32 on the CPU."""
        return torch.cat([segment.ids.cpu() for segment in self.segments])

    def of(self, *kinds: SegmentKind) -> Iterator[Segment]:
        """Yields the segments of these kinds."""
        return (segment for segment in self.segments if segment.kind in kinds)

    def only(self, *kinds: SegmentKind) -> "TokenSequence":
        """Returns a sequence of the segments of these kinds alone."""
        return _in_a_row(self.of(*kinds))

    def range_of(self, *kinds: SegmentKind) -> slice:
        """Returns the range of all tokens of these kinds, whose segments adjoin; may be empty."""
        found = list(self.of(*kinds))
        if not found:
            return slice(len(self), len(self))
        return slice(found[0].start, found[-1].range.stop)


def arrange(
    *,
    text: Ids | None = None,
    target: Tokens | None = None,
    references: Sequence[Reference] = (),
    order: Sequence[SegmentKind] = ("text", "target", "reference"),
) -> TokenSequence:
    """Returns the sequence of text, target and references.

    Args:
        text: (T, A) ids of the text tokens.
        target: its ids and grid are used.
        references: in their order.
        order: of the kinds; the family's.
    """
    parts: dict[SegmentKind, list[tuple[str, Ids, Tokens | None, Reference | None]]] = {
        "text": [] if text is None else [("text", text, None, None)],
        "target": [] if target is None else [("target", target.ids, target, None)],
        "reference": [
            (one.name or f"reference {number}", one.tokens.ids, one.tokens, one)
            for number, one in enumerate(references, 1)
        ],
    }
    return _in_a_row(
        Segment(
            kind=kind,
            name=name,
            start=0,
            ids=ids,
            grid=None if tokens is None else tokens.grid,
            reference=reference,
        )
        for kind in order
        for name, ids, tokens, reference in parts[kind]
    )


def _in_a_row(segments: Iterable[Segment]) -> TokenSequence:
    """Sets the start of each segment to the end of the previous one."""
    start, placed = 0, list[Segment]()
    for segment in segments:
        placed.append(replace(segment, start=start))
        start += segment.count
    return TokenSequence(tuple(placed))
