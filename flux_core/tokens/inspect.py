"""The sequence the transformer reads, described for a person and for the web part."""

from typing import TypedDict

from ..specs import LatentSpec, ReferenceSpec, SegmentKind
from ..types import Ids
from ..values import Conditioning, Tokens
from .ids import text_ids


class Segment(TypedDict):
    """One stretch of the sequence."""

    kind: SegmentKind
    name: str
    count: int
    grid: list[int] | None  # rows, columns
    ids: list[tuple[str, float, float]]  # axis, smallest, largest


class TokenSequence(TypedDict):
    """The whole sequence, in the order the transformer reads it."""

    segments: list[Segment]
    total: int
    notes: list[str]  # who sees whom, where not everybody sees all


def describe_sequence(
    conditioning: Conditioning, target: Tokens | None, rule: ReferenceSpec | None = None
) -> TokenSequence:
    """Describe text, target and references in their order.

    Args:
        conditioning: text and placed references.
        target: the noise, when it is known.
        rule: the family's, when the model is known; None is the order of most.
    """
    text = conditioning.text.txt.shape[1]
    pictures = [] if target is None else [_segment("target", "target", target)]
    pictures += [
        _segment("reference", f"reference {number}", tokens)
        for number, tokens in enumerate(conditioning.references, 1)
    ]
    first = target or next(iter(conditioning.references), None)  # names the id axes
    places = _ranges(text_ids(text, first.latent), first.latent) if first and text else []
    segments = [Segment(kind="text", name="text", count=text, grid=None, ids=places), *pictures]
    notes: list[str] = []
    if rule is not None:
        segments.sort(key=lambda segment: rule.sequence.index(segment["kind"]))
        if rule.see_only_themselves and conditioning.references:
            notes.append(
                "references see themselves alone, at t = 0: text and target see them too, so "
                "what they are seen as is computed once, not in every step"
            )
    total = sum(segment["count"] for segment in segments)
    return TokenSequence(segments=segments, total=total, notes=notes)


def sequence_report(sequence: TokenSequence) -> str:
    """Write the sequence down, one line a segment."""
    lines = [_line(segment) for segment in sequence["segments"]]
    return "\n".join([*lines, f"{sequence['total']} tokens in all", *sequence["notes"]])


def _segment(kind: SegmentKind, name: str, tokens: Tokens) -> Segment:
    return Segment(
        kind=kind,
        name=name,
        count=tokens.ids.shape[0],
        grid=list(tokens.grid),
        ids=_ranges(tokens.ids, tokens.latent),
    )


def _ranges(ids: Ids, spec: LatentSpec) -> list[tuple[str, float, float]]:
    return [
        (axis, float(ids[:, number].min()), float(ids[:, number].max()))
        for number, axis in enumerate(spec.id_axes)
    ]


def _line(segment: Segment) -> str:
    grid = segment["grid"]
    size = f" = {grid[0]} rows x {grid[1]} columns" if grid else ""
    places = ", ".join(
        f"{axis} {low:g}" if low == high else f"{axis} {low:g} to {high:g}"
        for axis, low, high in segment["ids"]
    )
    return f"{segment['name']}: {segment['count']} tokens{size}{'; ' if places else ''}{places}"
