"""Two renderers of scenes: by distances, which is trained on, and by Pillow."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageDraw

from .world import COLOURS, KINDS, SIDE_PX, Scene, Shape

Floats = NDArray[np.float32]
_STAR_INNER = 0.44  # inner radius of a star over its outer radius
_OVERSAMPLE = 4


def outline(shape: Shape) -> list[tuple[float, float]]:
    """Returns the corners of a shape in px, (x, y); a circle has none."""
    half = shape.size / 2
    if shape.kind == "square":
        side = half * 0.9
        points = [(-side, -side), (side, -side), (side, side), (-side, side)]
    elif shape.kind == "triangle":
        points = [(0.0, -half * 0.95), (half, half * 0.85), (-half, half * 0.85)]
    elif shape.kind == "diamond":
        points = [(0.0, -half), (half * 0.72, 0.0), (0.0, half), (-half * 0.72, 0.0)]
    elif shape.kind == "star":
        points = [_star_corner(corner, half * 1.04) for corner in range(10)]
    else:
        return []
    return [(shape.x + x, shape.y + y) for x, y in points]


def _star_corner(corner: int, radius: float) -> tuple[float, float]:
    reach = radius if corner % 2 == 0 else radius * _STAR_INNER
    angle = math.pi * corner / 5
    return reach * math.sin(angle), -reach * math.cos(angle) + radius * 0.05


def coverage(shape: Shape, *, sharpness: float = 1.0) -> Floats:
    """Returns how much of every pixel a shape covers, (SIDE_PX, SIDE_PX), 0..1.

    Edges are 1 / sharpness pixels soft.
    """
    axis = np.arange(SIDE_PX, dtype=np.float32) + 0.5
    x, y = np.meshgrid(axis, axis)
    corners = outline(shape)
    if corners:
        distance = _polygon_distance(x, y, corners)
    else:
        distance = np.hypot(x - shape.x, y - shape.y) - shape.size / 2
    return np.clip(0.5 - sharpness * distance, 0.0, 1.0).astype(np.float32)


def _polygon_distance(x: Floats, y: Floats, corners: Sequence[tuple[float, float]]) -> Floats:
    """Returns the signed distance to a closed polygon, negative inside."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        nearest = np.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ey != 0.0:
            crosses = ((y >= ay) != (y >= by)) & (x < (y - ay) * (ex / ey) + ax)
            inside ^= crosses
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance).astype(np.float32)


def colour_values(name: str) -> Floats:
    """Returns red, green and blue of a colour, (3,), 0..1."""
    return np.asarray(COLOURS[name], dtype=np.float32) / 255.0


def compose(background: str, layers: Sequence[tuple[str, Floats]]) -> Floats:
    """Returns an image of coloured coverages on a background, (SIDE_PX, SIDE_PX, 3), 0..1."""
    image: Floats = np.tile(colour_values(background), (SIDE_PX, SIDE_PX, 1))
    for colour, cover in layers:
        image += cover[..., None] * (colour_values(colour) - image)
    return image


def draw(scene: Scene, *, sharpness: float = 1.0) -> Floats:
    """Returns the image of a scene that models are trained on, (SIDE_PX, SIDE_PX, 3), 0..1."""
    layers = [(shape.colour, coverage(shape, sharpness=sharpness)) for shape in scene.shapes]
    return compose(scene.background, layers)


def draw_pillow(scene: Scene) -> Floats:
    """Returns the scene drawn by Pillow, anti-aliased, (SIDE_PX, SIDE_PX, 3), 0..1."""
    side = SIDE_PX * _OVERSAMPLE
    canvas = PillowImage.new("RGB", (side, side), COLOURS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        corners = [(x * _OVERSAMPLE, y * _OVERSAMPLE) for x, y in outline(shape)]
        if corners:
            pen.polygon(corners, fill=COLOURS[shape.colour])
        else:
            reach = shape.size / 2
            box = (shape.x - reach, shape.y - reach, shape.x + reach, shape.y + reach)
            pen.ellipse([value * _OVERSAMPLE for value in box], fill=COLOURS[shape.colour])
    small = canvas.resize((SIDE_PX, SIDE_PX), PillowImage.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float32) / 255.0


def kind_coverages(shape: Shape) -> dict[str, Floats]:
    """Returns the coverage of every kind of shape at one shape's position and size."""
    return {
        kind: coverage(Shape(kind=kind, colour=shape.colour, x=shape.x, y=shape.y, size=shape.size))
        for kind in KINDS
    }
