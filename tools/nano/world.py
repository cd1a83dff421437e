"""The scenes of the nano models: coloured shapes on plain backgrounds, and their edits.

A `Scene` is one or two shapes (or none) on a background; an `Edit` is two scenes that differ in
one thing and an instruction that names it. The right result of every edit is known, so a model's
result can be judged (`judge.py`). Pixels are drawn by `drawing.py`.
"""

import random
import zlib
from dataclasses import dataclass, replace
from typing import Literal

from .wording import (
    add_like_sentence,
    add_sentence,
    background_like_sentence,
    background_sentence,
    caption_sentence,
    recolour_like_sentence,
    recolour_sentence,
    remove_sentence,
)

Action = Literal["recolour", "background", "remove", "add", "caption"]

KINDS = ("circle", "square", "triangle", "star", "diamond")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (250, 220, 50),
    "orange": (250, 130, 20),
    "purple": (140, 60, 170),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}
EDITS: tuple[Action, ...] = ("recolour", "background", "remove", "add")
SAMPLED: tuple[Action, ...] = ("recolour", "background", "add")  # a second image can show it
SIDE_PX = 96
SIZE_PX = (37.0, 42.0)  # larger extent of a shape; that of an added one is ADDED_PX
ADDED_PX = 40.0
PLACES: dict[str, tuple[float, float]] = {  # (x, y) of a shape's centre, in px
    "left": (24.0, 48.0),
    "right": (72.0, 48.0),
    "top": (48.0, 24.0),
    "bottom": (48.0, 72.0),
    "top left": (24.0, 24.0),
    "top right": (72.0, 24.0),
    "bottom left": (24.0, 72.0),
    "bottom right": (72.0, 72.0),
    "middle": (48.0, 48.0),
}
OPPOSITE = {
    "left": "right",
    "right": "left",
    "top": "bottom",
    "bottom": "top",
    "top left": "bottom right",
    "top right": "bottom left",
    "bottom left": "top right",
    "bottom right": "top left",
}
_JITTER_PX = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A plain shape; x, y is the centre and size the larger extent, all in px."""

    kind: str
    colour: str
    x: float
    y: float
    size: float = ADDED_PX


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Shapes, which never touch, on a background of another colour."""

    background: str
    shapes: tuple[Shape, ...] = ()

    @property
    def is_held_out(self) -> bool:
        """Whether it is one of the tenth of all combinations that no training sees."""
        if not self.shapes:
            return False
        parts = sorted(f"{shape.colour} {shape.kind}" for shape in self.shapes)
        return zlib.crc32(" ".join([self.background, *parts]).encode()) % 10 == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Scenes before and after, and the instruction between them; a caption has none before."""

    action: Action
    before: Scene | None
    after: Scene
    text: str
    shape: int = -1  # index in the scene with more shapes; -1: the background
    colour: str = ""  # the one asked for
    sample: Scene | None = None  # of a second image, which shows what is asked for

    @property
    def shapes(self) -> int:
        """Number of shapes in the scene that has more: 1 or 2."""
        return max(len(self.after.shapes), len(self.before.shapes) if self.before else 0)


def random_scene(rng: random.Random, shapes: int, *, at_places: bool = False) -> Scene:
    """Returns a random scene of one or two shapes.

    Args:
        rng: random source.
        shapes: 1 or 2.
        at_places: whether shapes are near the named places, at opposite ones.
    """
    background, *colours = rng.sample(list(COLOURS), 3)
    if rng.random() < 0.12:
        colours[1] = colours[0]
    kinds = rng.sample(KINDS, 2)
    if colours[0] != colours[1] and rng.random() < 0.1:
        kinds[1] = kinds[0]
    centres = _centres_at_places(rng) if at_places else _centres(rng, shapes)
    made = tuple(
        Shape(kind=kind, colour=colour, x=x, y=y, size=round(rng.uniform(*SIZE_PX), 2))
        for kind, colour, (x, y) in zip(kinds, colours, centres, strict=False)
    )
    return Scene(background=background, shapes=made[:shapes])


def _centres(rng: random.Random, shapes: int) -> list[tuple[float, float]]:
    """Returns centres of shapes that are inside the image and apart on at least one axis."""
    low, high = SIZE_PX[1] / 2, SIDE_PX - SIZE_PX[1] / 2
    first = (round(rng.uniform(low, high), 2), round(rng.uniform(low, high), 2))
    if shapes == 1:
        return [first]
    apart = SIZE_PX[1] + 1.0
    near = rng.uniform(low, high - apart)
    far = rng.uniform(near + apart, high)
    along = [near, far] if rng.random() < 0.5 else [far, near]
    across = [rng.uniform(low, high), rng.uniform(low, high)]
    sides = (along, across) if rng.random() < 0.5 else (across, along)
    return [(round(x, 2), round(y, 2)) for x, y in zip(*sides, strict=True)]


def _centres_at_places(rng: random.Random) -> list[tuple[float, float]]:
    place = rng.choice(list(OPPOSITE))
    return [
        (
            round(PLACES[name][0] + rng.uniform(-_JITTER_PX, _JITTER_PX), 2),
            round(PLACES[name][1] + rng.uniform(-_JITTER_PX, _JITTER_PX), 2),
        )
        for name in (place, OPPOSITE[place])
    ]


def nearest_place(shape: Shape) -> str:
    """Returns the name of the place closest to a shape's centre."""
    return min(
        PLACES, key=lambda name: (PLACES[name][0] - shape.x) ** 2 + (PLACES[name][1] - shape.y) ** 2
    )


def free_colours(scene: Scene, index: int) -> list[str]:
    """Returns colours that leave shape `index` (-1: the background) visible and nameable."""
    if index < 0:
        taken = {scene.background, *(shape.colour for shape in scene.shapes)}
    else:
        own = scene.shapes[index]
        twins = {s.colour for s in scene.shapes if s is not own and s.kind == own.kind}
        taken = {scene.background, own.colour, *twins}
    return [colour for colour in COLOURS if colour not in taken]


def with_colour(scene: Scene, index: int, colour: str) -> Scene:
    """Returns the scene with shape `index` (-1: the background) in another colour."""
    if index < 0:
        return replace(scene, background=colour)
    shapes = list(scene.shapes)
    shapes[index] = replace(shapes[index], colour=colour)
    return replace(scene, shapes=tuple(shapes))


def without(scene: Scene, index: int) -> Scene:
    """Returns the scene without shape `index`."""
    rest = tuple(shape for number, shape in enumerate(scene.shapes) if number != index)
    return replace(scene, shapes=rest)


def recolour(
    scene: Scene, index: int, colour: str, rng: random.Random, sample: Scene | None = None
) -> Edit:
    """Returns an edit of one shape's colour; with a sample, to the colour of its shape."""
    after = with_colour(scene, index, colour)
    name = name_shape(scene, index, rng)
    text = recolour_sentence(name, colour, rng)
    if sample is not None:
        text = recolour_like_sentence(name, rng)
    return Edit(
        action="recolour",
        before=scene,
        after=after,
        text=text,
        shape=index,
        colour=colour,
        sample=sample,
    )


def repaint(scene: Scene, colour: str, rng: random.Random, sample: Scene | None = None) -> Edit:
    """Returns an edit of the background; with a sample, to its background."""
    after = with_colour(scene, -1, colour)
    text = background_sentence(colour, rng)
    if sample is not None:
        text = background_like_sentence(rng)
    return Edit(
        action="background", before=scene, after=after, text=text, colour=colour, sample=sample
    )


def remove(scene: Scene, index: int, rng: random.Random) -> Edit:
    """Returns an edit that removes one shape."""
    text = remove_sentence(name_shape(scene, index, rng), rng)
    return Edit(action="remove", before=scene, after=without(scene, index), text=text, shape=index)


def add(scene: Scene, index: int, rng: random.Random, sample: Scene | None = None) -> Edit:
    """Returns an edit that adds shape `index` of a scene to the rest of it; a sample shows it.

    The shape is exactly at a named place. An instruction without a place means the place opposite
    the other shape, or the middle of an empty image.
    """
    before, shape = without(scene, index), scene.shapes[index]
    place = nearest_place(shape)
    default = OPPOSITE[nearest_place(before.shapes[0])] if before.shapes else "middle"
    named = "" if place == default and rng.random() < 0.5 else place
    text = add_sentence(shape.kind, shape.colour, named, rng)
    if sample is not None:
        text = add_like_sentence(named, rng)
    return Edit(
        action="add",
        before=before,
        after=scene,
        text=text,
        shape=index,
        colour=shape.colour,
        sample=sample,
    )


def describe(scene: Scene, rng: random.Random) -> Edit:
    """Returns a caption of a scene, for text-to-image."""
    parts = [(shape.kind, shape.colour, nearest_place(shape)) for shape in scene.shapes]
    text = caption_sentence(parts, scene.background, rng)
    return Edit(action="caption", before=None, after=scene, text=text)


def caption_scene(rng: random.Random) -> Scene:
    """Returns a random scene with a shape in the middle, or two at opposite places."""
    count = rng.choice((1, 2, 2))
    scene = random_scene(rng, count, at_places=True)
    places = ("middle",) if count == 1 else rng.choice((("left", "right"), ("top", "bottom")))
    shapes = [at_place(shape, name) for shape, name in zip(scene.shapes, places, strict=True)]
    return replace(scene, shapes=tuple(shapes))


def at_place(shape: Shape, place: str) -> Shape:
    """Returns the shape as an added one: exactly at a place, and ADDED_PX large."""
    return replace(shape, x=PLACES[place][0], y=PLACES[place][1], size=ADDED_PX)


def name_shape(scene: Scene, index: int, rng: random.Random) -> str:
    """Returns a name that means only this shape: "circle", "red circle" or "red shape"."""
    own = scene.shapes[index]
    others = [shape for number, shape in enumerate(scene.shapes) if number != index]
    names = [f"{own.colour} {own.kind}"] * 4
    if all(other.kind != own.kind for other in others):
        names += [own.kind] * 5
    if all(other.colour != own.colour for other in others):
        names += [f"{own.colour} shape"]
    return rng.choice(names)


def random_edit(
    action: Action, shapes: int, rng: random.Random, *, held_out: bool, sampled: bool = False
) -> Edit:
    """Returns a random edit of one kind.

    Args:
        action: kind of edit, in SAMPLED for one with a second image.
        shapes: 1 or 2, in the scene that has more.
        rng: random source.
        held_out: whether the scene before or after is one that no training sees.
        sampled: whether a second image shows what is asked for.
    """
    while True:
        edit = _draw_edit(action, shapes, rng, sampled)
        sides = [scene for scene in (edit.before, edit.after) if scene is not None]
        if any(scene.is_held_out for scene in sides) == held_out:
            return edit


def _draw_edit(action: Action, shapes: int, rng: random.Random, sampled: bool) -> Edit:
    if action == "caption":
        return describe(caption_scene(rng), rng)
    if action == "add":
        scene = add_scene(rng, shapes)
        wanted = scene.shapes[-1]
        sample = sample_scene(rng, kind=wanted.kind, colour=wanted.colour) if sampled else None
        return add(scene, shapes - 1, rng, sample)
    scene = random_scene(rng, shapes, at_places=rng.random() < 0.3)
    index = rng.randrange(shapes)
    if action == "remove":
        return remove(scene, index, rng)
    colour = rng.choice(free_colours(scene, index if action == "recolour" else -1))
    if action == "recolour":
        sample = sample_scene(rng, colour=colour) if sampled else None
        return recolour(scene, index, colour, rng, sample)
    sample = sample_scene(rng, background=colour) if sampled else None
    return repaint(scene, colour, rng, sample)


def sample_scene(
    rng: random.Random, *, kind: str = "", colour: str = "", background: str = ""
) -> Scene:
    """Returns a scene of one shape; kind and colours are random where they are empty."""
    ground = background or rng.choice([name for name in COLOURS if name != colour])
    paint = colour or rng.choice([name for name in COLOURS if name != ground])
    shape = random_scene(rng, 1).shapes[0]
    shape = replace(shape, kind=kind or shape.kind, colour=paint)
    return Scene(background=ground, shapes=(shape,))


def add_scene(rng: random.Random, shapes: int) -> Scene:
    """Returns a random scene whose last shape is exactly at a place that the other leaves free."""
    scene = random_scene(rng, shapes, at_places=True)
    if shapes == 1:
        place = "middle" if rng.random() < 0.4 else rng.choice(list(PLACES))
        return replace(scene, shapes=(at_place(scene.shapes[0], place),))
    first = nearest_place(scene.shapes[0])
    here = PLACES[first]
    free = [
        name
        for name, (x, y) in PLACES.items()
        if max(abs(x - here[0]), abs(y - here[1])) > SIZE_PX[1] + _JITTER_PX
    ]
    place = OPPOSITE[first] if rng.random() < 0.5 else rng.choice(free)
    return replace(scene, shapes=(scene.shapes[0], at_place(scene.shapes[1], place)))
