"""Strict success of an edit, from pixels alone.

An edit has succeeded when the image shows the whole scene that was asked for: every shape has its
colour, position and kind, and everything else is background.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .drawing import Floats, colour_values, coverage, kind_coverages
from .world import COLOURS, Scene, Shape

_FIRM = 0.9  # least share of a shape's pixels with its colour
_FIRM_BACKGROUND = 0.97  # the same, of all pixels outside shapes
_COLOUR_OFF = 0.12  # largest mean distance from the colour, per channel, in 0..1
_OVERLAP = 0.75  # least intersection over union with the expected shape
_EDGE_PX = 2

Names = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which parts of an image are right."""

    background: bool
    shapes: tuple[bool, ...]

    @property
    def is_success(self) -> bool:
        """Whether everything is right."""
        return self.background and all(self.shapes)


def nearest_colours(image: Floats) -> Names:
    """Returns the index in COLOURS of the colour closest to each pixel, (H, W)."""
    palette = np.stack([colour_values(name) for name in COLOURS])
    distance = np.square(image[:, :, None, :] - palette).sum(axis=-1)
    return distance.argmin(axis=-1)


def judge(image: Floats, expected: Scene, before: Scene | None = None) -> Verdict:
    """Compares an image with the scene it should show.

    Args:
        image: a model's result, (SIDE_PX, SIDE_PX, 3), 0..1.
        expected: the scene asked for.
        before: the scene that was edited; the area of a removed shape is checked by itself.
    """
    named = nearest_colours(image)
    shapes = [coverage(shape) for shape in expected.shapes]
    empty = np.ones(named.shape, dtype=bool)
    for cover in shapes:
        empty &= ~_grown(cover > 0.0, _EDGE_PX)
    background = _has_colour(image, named, empty, expected.background, _FIRM_BACKGROUND)
    remaining = {(shape.x, shape.y) for shape in expected.shapes}
    for shape in before.shapes if before else ():
        if (shape.x, shape.y) not in remaining:
            removed = coverage(shape) == 1.0
            background &= _has_colour(image, named, removed, expected.background)
    verdicts: list[bool] = []
    for index, shape in enumerate(expected.shapes):
        others = [cover for other, cover in enumerate(shapes) if other != index]
        elsewhere = np.zeros(named.shape, dtype=bool)
        for cover in others:
            elsewhere |= _grown(cover > 0.0, _EDGE_PX)
        verdicts.append(_shows(image, named, shape, elsewhere))
    return Verdict(background, tuple(verdicts))


def _shows(image: Floats, named: Names, shape: Shape, elsewhere: Mask) -> bool:
    """Whether a shape is where it should be, has its colour and is of its kind."""
    inside = ~_grown(coverage(shape) < 1.0, 1)
    if not _has_colour(image, named, inside, shape.colour):
        return False
    painted = (named == list(COLOURS).index(shape.colour)) & ~elsewhere
    overlaps: dict[str, float] = {}
    for kind, cover in kind_coverages(shape).items():
        mask = cover > 0.5
        overlaps[kind] = float((mask & painted).sum() / (mask | painted).sum())
    best = max(overlaps, key=lambda kind: overlaps[kind])
    return best == shape.kind and overlaps[best] >= _OVERLAP


def _has_colour(
    image: Floats, named: Names, region: Mask, colour: str, firm: float = _FIRM
) -> bool:
    share = float((named[region] == list(COLOURS).index(colour)).mean())
    off = float(np.abs(image[region].mean(axis=0) - colour_values(colour)).max())
    return share >= firm and off <= _COLOUR_OFF


def _grown(mask: Mask, pixels: int) -> Mask:
    """Returns a mask grown by some pixels on every side."""
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        mask = (
            padded[1:-1, 1:-1]
            | padded[:-2, 1:-1]
            | padded[2:, 1:-1]
            | padded[1:-1, :-2]
            | padded[1:-1, 2:]
        )
    return mask
