"""How strong a LoRA is in each block, as people write it: "double 0-7: 1.0; single: 0.5"."""

import math
import re
from dataclasses import dataclass

from ..errors import SettingError, shorten
from ..specs import TransformerSpec

_MOST = 100.0  # ComfyUI's own limit of a LoRA's strength
_ENTRY = re.compile(r"(?P<kind>[a-z]+)\s*(?P<blocks>[\d\s,-]*?)\s*[:=]\s*(?P<strength>\S+)")
_RANGE = re.compile(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?")
_EXAMPLE = '"double 0-7: 1.0; single 0,2,5-10: 0.5; other: 0"'
_NEEDED = f"entries such as {_EXAMPLE}."
_FIX = "change [block_strengths], or leave it empty."
_LONGEST = 10_000  # characters


@dataclass(frozen=True, slots=True)
class BlockStrengths:
    """Factors of a LoRA's strength, block by block; 1 where nothing is said."""

    double: tuple[float, ...]
    single: tuple[float, ...]
    other: float  # of all layers outside the blocks

    def of(self, key: str) -> float:
        """Returns the factor of one of our tensors."""
        kind, _, rest = key.partition(".")
        number = rest.partition(".")[0]
        if kind == "double_blocks":
            return self.double[int(number)]
        return self.single[int(number)] if kind == "single_blocks" else self.other


def parse_strengths(text: str, spec: TransformerSpec) -> BlockStrengths:
    """Parses the strengths of blocks.

    Args:
        text: entries "<double|single|other> [blocks]: <strength>", separated by semicolons or
            lines; blocks are numbers and ranges separated by commas, all where none is named. A
            later entry counts for the blocks it names.
        spec: of the model, which says how many blocks there are.

    Raises:
        SettingError: an entry cannot be read, or names blocks that the model does not have.
    """
    if len(text) > _LONGEST:
        raise SettingError(f"block_strengths is {len(text):,} characters long.", _NEEDED, _FIX)
    counts = {"double": spec.double_blocks, "single": spec.single_blocks, "other": 1}
    found = {kind: [1.0] * count for kind, count in counts.items()}
    for entry in filter(None, map(str.strip, re.split(r"[;\n]", text.lower()))):
        said = _ENTRY.fullmatch(entry)
        if said is None or said["kind"] not in counts:
            raise SettingError(f"block_strengths says '{shorten(entry)}'.", _NEEDED, _FIX)
        kind = said["kind"]
        if kind == "other" and said["blocks"]:
            raise SettingError(
                f"block_strengths says '{shorten(entry)}': 'other' has no blocks.", _NEEDED, _FIX
            )
        strength = _strength(said["strength"], entry)
        for block in _blocks(said["blocks"], kind, counts[kind]):
            found[kind][block] = strength
    return BlockStrengths(tuple(found["double"]), tuple(found["single"]), found["other"][0])


def _strength(text: str, entry: str) -> float:
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not abs(strength) <= _MOST:  # also refuses NaN
        raise SettingError(
            f"block_strengths says '{shorten(entry)}', whose strength is no number from "
            f"-{_MOST:g} to {_MOST:g}.",
            _NEEDED,
            _FIX,
        )
    return strength


def _blocks(text: str, kind: str, count: int) -> list[int]:
    """Lists the blocks an entry names; all of them when it names none."""
    if not text:
        return list(range(count))
    blocks: list[int] = []
    for one in text.split(","):
        said = _RANGE.fullmatch(one.strip())
        if said is None:
            raise SettingError(
                f"block_strengths names the {kind} blocks '{shorten(text)}'.", _NEEDED, _FIX
            )
        first, last = int(said[1]), int(said[2] or said[1])
        if not first <= last < count:
            raise SettingError(
                f"block_strengths names {kind} blocks {shorten(one.strip())}.",
                f"{kind} blocks from 0 to {count - 1}, the lower number first.",
                _FIX,
            )
        blocks += range(first, last + 1)
    return blocks
