"""What was found in a LoRA, for people to read."""

from dataclasses import dataclass

from .names import shorten

_LISTED = 5  # names of each list


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraReport:
    """One LoRA, every key of its file accounted for."""

    source: str  # the file, by name
    title: str  # which models it is for
    writer: str  # which program's way of naming it is
    ranks: tuple[int, ...]  # each once; none of a LoKr without a product
    scales: tuple[float, ...]  # alpha / rank, each once
    layers: int
    matched: tuple[str, ...]  # keys that change this model
    absent: tuple[str, ...]  # of layers that this model does not have
    text: tuple[str, ...]  # of text encoders
    unknown: tuple[str, ...]  # of nothing that is known

    @property
    def keys(self) -> int:
        """Count all keys of the file."""
        return len(self.matched) + len(self.unmatched)

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The keys that change nothing."""
        return (*self.absent, *self.text, *self.unknown)

    def __str__(self) -> str:
        """Write one fact per line."""
        lines = [
            f"{self.source} is {self.title}",
            f"format: {self.writer}",
            f"rank {_range(self.ranks) or 'full'}, alpha / rank {_range(self.scales)}",
            f"matched: {len(self.matched)} of {self.keys} keys, {self.layers} layers",
            f"unmatched: {len(self.unmatched)} keys",
        ]
        for keys, what in (
            (self.absent, "layers that this model does not have"),
            (self.text, "a text encoder, left alone"),
            (self.unknown, "not known"),
        ):
            if keys:
                rest = ", …" if len(keys) > _LISTED else ""
                lines.append(f"- {what}: {', '.join(map(shorten, keys[:_LISTED]))}{rest}")
        return "\n".join(lines)


def _range(numbers: tuple[float, ...]) -> str:
    if len(numbers) > 1:
        return f"{numbers[0]:g} to {numbers[-1]:g}"
    return "".join(f"{one:g}" for one in numbers)
