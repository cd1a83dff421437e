"""The sequence the transformer reads, described for a person and for the web part."""

from typing import TypedDict

from ..specs import LatentSpec, ReferenceSpec, SegmentKind
from ..types import Ids
from ..values import Conditioning, Tokens
from .ids import text_ids
from .sequence import Segment, arrange


class SegmentDescription(TypedDict):
    """One stretch of the sequence."""

    kind: SegmentKind
    name: str
    count: int
    grid: list[int] | None  # rows, columns
    ids: list[tuple[str, float, float]]  # axis, smallest, largest


class SequenceDescription(TypedDict):
    """The whole sequence, in the order the transformer reads it."""

    segments: list[SegmentDescription]
    total: int
    notes: list[str]  # which tokens attend to which, where attention is not full


def describe_sequence(
    conditioning: Conditioning, target: Tokens | None, rule: ReferenceSpec | None = None
) -> SequenceDescription:
    """Describes text, target and references in their order.

    Args:
        conditioning: text and placed references.
        target: the noise, when it is known.
        rule: the family's, when the model is known; None: the order that most families have.
    """
    images = [one.tokens for one in conditioning.references]
    latent = next((one.latent for one in [target, *images] if one is not None), None)
    length = conditioning.text.txt.shape[1]
    rule = rule or ReferenceSpec(trained=0)
    sequence = arrange(
        text=None if latent is None else text_ids(length, latent),
        target=target,
        references=conditioning.references,
        order=rule.sequence,
    )
    segments = [_describe(segment, latent) for segment in sequence.segments]
    if latent is None:  # text alone: no latent names the id axes
        segments = [SegmentDescription(kind="text", name="text", count=length, grid=None, ids=[])]
    notes: list[str] = []
    if rule.isolated and images:
        notes.append(
            "references see themselves alone, at t = 0: text and target see them too, so their "
            "keys and values are computed once, not in every step"
        )
    total = sum(segment["count"] for segment in segments)
    return SequenceDescription(segments=segments, total=total, notes=notes)


def sequence_report(sequence: SequenceDescription) -> str:
    """Returns the sequence as text, one line per segment."""
    lines = [_line(segment) for segment in sequence["segments"]]
    return "\n".join([*lines, f"{sequence['total']} tokens in all", *sequence["notes"]])


def _describe(segment: Segment, latent: LatentSpec | None) -> SegmentDescription:
    return SegmentDescription(
        kind=segment.kind,
        name=segment.name,
        count=segment.count,
        grid=None if segment.grid is None else list(segment.grid),
        ids=[] if latent is None or not segment.count else _ranges(segment.ids, latent),
    )


def _ranges(ids: Ids, spec: LatentSpec) -> list[tuple[str, float, float]]:
    return [
        (axis, float(ids[:, number].min()), float(ids[:, number].max()))
        for number, axis in enumerate(spec.id_axes)
    ]


def _line(segment: SegmentDescription) -> str:
    grid = segment["grid"]
    size = f" = {grid[0]} rows x {grid[1]} columns" if grid else ""
    ranges = ", ".join(
        f"{axis} {low:g}" if low == high else f"{axis} {low:g} to {high:g}"
        for axis, low, high in segment["ids"]
    )
    return f"{segment['name']}: {segment['count']} tokens{size}{'; ' if ranges else ''}{ranges}"
