"""Pairs of encoded scenes for training a nano model, in a pool that grows while it trains.

Scenes come in clusters: one scene, and the same with one thing changed. Any two pictures of a
cluster that differ in one thing are a pair in both directions, so nine encodings give some thirty
edits, and the same picture comes with instructions that name now one shape, now the other.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...flux_core.image.autoencoder import Autoencoder
from ...flux_core.specs import LatentSpec
from ...flux_core.tokens.pack import pack_latent
from .autoencoder import SHARPNESS
from .drawing import Floats, compose, coverage
from .wording import speak
from .world import (
    COLOURS,
    KINDS,
    SIDE_PX,
    Action,
    Edit,
    Scene,
    add,
    add_scene,
    at_place,
    caption_scene,
    describe,
    free_colours,
    nearest_place,
    random_scene,
    recolour,
    remove,
    repaint,
    sample_scene,
    with_colour,
    without,
)

TOKEN_PX = 16
_NO_LABEL = -100
_ENCODED_AT_ONCE = 64
_CHANGED = 0.02  # of a cell's mean colour
Say = Callable[[random.Random], Edit]


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded scene with what its tokens show."""

    scene: Scene
    tokens: Tensor  # (N, D) bfloat16, in the transformer's scale
    cells: Tensor  # (N, 12): mean colour of each token's four cells
    kinds: Tensor  # (N,) 0: background, 1..: KINDS, -100: an edge
    colours: Tensor  # (N,) place in COLOURS of the shape, or the background


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures and how to ask for the second."""

    before: Picture | None
    after: Picture
    action: Action
    say: Say
    index: int  # the shape that is meant, in the fuller scene; -1: the background
    sample: Picture | None = None  # a second picture
    is_sampled: bool = False  # it shows what is asked for


@dataclass(frozen=True, slots=True)
class Cluster:
    """All pairs of one scene, by action."""

    pairs: dict[Action, list[Pair]]


class ScenePool:
    """Clusters of pictures, newest last; the oldest go when it is full.

    Args:
        autoencoder: encodes the pictures.
        seed: of the scenes.
        capacity: clusters kept.
    """

    def __init__(self, autoencoder: Autoencoder, *, seed: int, capacity: int) -> None:
        self._autoencoder = autoencoder
        self._capacity = capacity
        self._rng = random.Random(seed)
        self.clusters: list[Cluster] = []
        self.captions: list[Pair] = []
        self.samples: list[Picture] = []
        self._place = 0

    def grow(self) -> None:
        """Add one cluster, and one captioned picture."""
        rng = self._rng
        shapes = 2 if rng.random() < 0.75 else 1
        cluster = self._cluster(shapes)
        if len(self.clusters) < self._capacity:
            self.clusters.append(cluster)
        else:
            self.clusters[self._place % self._capacity] = cluster
        self._place += 1

    def grow_captions(self, count: int) -> None:
        """Add captioned pictures."""
        scenes = [caption_scene(self._rng) for _ in range(count)]
        kept = [scene for scene in scenes if not scene.is_held_out]
        for picture in self._encode(kept, [None] * len(kept)):
            scene = picture.scene
            say: Say = lambda rng, scene=scene: describe(scene, rng)  # noqa: E731
            self.captions.append(Pair(None, picture, "caption", say, -1))

    def grow_samples(self, count: int) -> None:
        """Add second pictures, of one shape each."""
        scenes = [sample_scene(self._rng) for _ in range(count)]
        kept = [scene for scene in scenes if not scene.is_held_out]
        for start in range(0, len(kept), _ENCODED_AT_ONCE):
            part = kept[start : start + _ENCODED_AT_ONCE]
            self.samples += self._encode(part, [None] * len(part))

    def sample(self, rng: random.Random, **wanted: str) -> Picture | None:
        """Pick a second picture by its shape's kind and colour or its background, if one fits."""
        for picture in rng.sample(self.samples, min(len(self.samples), 400)):
            shape = picture.scene.shapes[0]
            shown = {
                "kind": shape.kind,
                "colour": shape.colour,
                "background": picture.scene.background,
            }
            if all(shown[name] == value for name, value in wanted.items()):
                return picture
        return None

    def _cluster(self, shapes: int) -> Cluster:
        rng = self._rng
        base = add_scene(rng, shapes)
        if rng.random() < 0.4:
            base = random_scene(rng, shapes, at_places=rng.random() < 0.25)
        families: list[list[Scene]] = [[base], *([base] for _ in base.shapes)]
        for place, family in enumerate(families):
            free = free_colours(base, place - 1)
            family += [with_colour(base, place - 1, one) for one in rng.sample(free, 2)]
        absent = [without(base, index) for index in range(shapes)]
        scenes = [base, *(one for family in families for one in family[1:]), *absent]
        covers = [coverage(shape, sharpness=rng.uniform(*SHARPNESS)) for shape in base.shapes]
        kept = [scene for scene in scenes if not scene.is_held_out]
        masks = [self._masks(scene, base, covers) for scene in kept]
        pictures = dict(zip(map(id, kept), self._encode(kept, masks), strict=True))
        return Cluster(_pairs(families, absent, pictures))

    @staticmethod
    def _masks(scene: Scene, base: Scene, covers: Sequence[Floats]) -> list[Floats]:
        """Pick the coverages of the shapes that a variant of the base still has."""
        places = [(shape.x, shape.y) for shape in base.shapes]
        return [covers[places.index((shape.x, shape.y))] for shape in scene.shapes]

    @torch.no_grad()
    def _encode(
        self, scenes: Sequence[Scene], masks: Sequence[Sequence[Floats] | None]
    ) -> list[Picture]:
        if not scenes:
            return []
        spec = self._autoencoder.spec.latent
        all_masks = [
            mask if mask is not None else [coverage(shape) for shape in scene.shapes]
            for scene, mask in zip(scenes, masks, strict=True)
        ]
        drawn = np.stack(
            [
                compose(
                    scene.background,
                    [(s.colour, cover) for s, cover in zip(scene.shapes, mask, strict=True)],
                )
                for scene, mask in zip(scenes, all_masks, strict=True)
            ]
        )
        pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous() * 2.0 - 1.0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latent = self._autoencoder.encode(pixels)
        tokens = scaled_tokens(latent.float(), spec).bfloat16()
        cells = _cell_means(pixels)
        labels = [token_labels(s, mask) for s, mask in zip(scenes, all_masks, strict=True)]
        return [
            Picture(scene, tokens[row], cells[row], *labels[row])
            for row, scene in enumerate(scenes)
        ]


def scaled_tokens(latent: Tensor, spec: LatentSpec) -> Tensor:
    """Give a latent (B, C, h, w) as tokens (B, N, D) in the transformer's scale."""
    return pack_latent((latent - spec.shift) * spec.scale, spec)


def changed_tokens(before: Picture, after: Picture) -> Tensor:
    """Mark the tokens (N,) whose pixels an edit changes."""
    return (before.cells - after.cells).abs().amax(dim=-1) > _CHANGED


def _cell_means(pixels: Tensor) -> Tensor:
    """Mean colours of 8 x 8 px cells, (B, N, 12), four cells a token."""
    means = torch.nn.functional.avg_pool2d(pixels / 2.0, TOKEN_PX // 2)
    return torch.nn.functional.pixel_unshuffle(means, 2).flatten(2).transpose(1, 2)


def token_labels(scene: Scene, masks: Sequence[Floats]) -> tuple[Tensor, Tensor]:
    """Say what every token shows: kind (N,) and colour (N,), -100 where it is hardly there."""
    side = SIDE_PX // TOKEN_PX
    kinds = np.zeros(side * side, dtype=np.int64)
    colours = np.full(side * side, list(COLOURS).index(scene.background), dtype=np.int64)
    for shape, mask in zip(scene.shapes, masks, strict=True):
        parts = mask.reshape(side, TOKEN_PX, side, TOKEN_PX).mean(axis=(1, 3)).reshape(-1)
        kinds[parts > 0.02] = _NO_LABEL
        colours[parts > 0.02] = _NO_LABEL
        kinds[parts > 0.12] = KINDS.index(shape.kind) + 1
        colours[parts > 0.12] = list(COLOURS).index(shape.colour)
    return torch.from_numpy(kinds), torch.from_numpy(colours)


def _pairs(
    families: Sequence[Sequence[Scene]], absent: Sequence[Scene], pictures: dict[int, Picture]
) -> dict[Action, list[Pair]]:
    """List every edit between two pictures of a cluster."""
    found: dict[Action, list[Pair]] = {"recolour": [], "background": [], "remove": [], "add": []}
    for place, family in enumerate(families):
        there = [pictures[id(scene)] for scene in family if id(scene) in pictures]
        for before in there:
            for after in there:
                if before is not after:
                    action: Action = "recolour" if place else "background"
                    pair = _colour_pair(before, after, place - 1)
                    found[action].append(Pair(before, after, action, pair, place - 1))
        if place == 0 or id(absent[place - 1]) not in pictures:
            continue
        without_it, index = pictures[id(absent[place - 1])], place - 1
        for picture in there:
            scene = picture.scene
            say: Say = lambda rng, scene=scene, index=index: remove(  # noqa: E731
                scene, index, rng
            )
            found["remove"].append(Pair(picture, without_it, "remove", say, index))
            shape = scene.shapes[index]
            if shape == at_place(shape, nearest_place(shape)):
                say = lambda rng, scene=scene, index=index: add(scene, index, rng)  # noqa: E731
                found["add"].append(Pair(without_it, picture, "add", say, index))
    return found


def _colour_pair(before: Picture, after: Picture, index: int) -> Say:
    scene, goal = before.scene, after.scene
    if index < 0:
        return lambda rng: repaint(scene, goal.background, rng)
    return lambda rng: recolour(scene, index, goal.shapes[index].colour, rng)


def spoken(pair: Pair, rng: random.Random) -> str:
    """Ask for a pair's edit in words."""
    return speak(pair.say(rng).text, rng)


def draw_pairs(pool: ScenePool, count: int, rng: random.Random) -> list[Pair]:
    """Draw edits for a step; where two shapes could be meant, both are asked for.

    Args:
        pool: clusters.
        count: pairs, at least.
        rng: source of chance.
    """
    actions: tuple[Action, ...] = ("recolour", "remove", "add", "background")
    drawn: list[Pair] = []
    while len(drawn) < count:
        pairs = rng.choice(pool.clusters).pairs
        action = rng.choices(actions, (34, 24, 32, 10))[0]
        if not pairs[action]:
            continue
        first = rng.choice(pairs[action])
        drawn.append(first)
        if action in ("recolour", "remove"):
            rivals = [
                pair
                for pair in pairs[action]
                if pair.before is first.before and pair.index != first.index
            ]
            if rivals:
                drawn.append(rng.choice(rivals))
    return drawn[:count]


_SAMPLED: dict[Action, int] = {"recolour": 40, "add": 40, "background": 20}
_IDLE_SAMPLES = 0.2  # pairs whose second picture has nothing to do with what is asked


def draw_sampled_pairs(pool: ScenePool, count: int, rng: random.Random) -> list[Pair]:
    """Draw edits with a second picture, which mostly shows what is asked for."""
    drawn: list[Pair] = []
    while len(drawn) < count:
        if rng.random() < _IDLE_SAMPLES:
            (pair,) = draw_pairs(pool, 1, rng)
            drawn.append(replace(pair, sample=rng.choice(pool.samples)))
            continue
        action = rng.choices(list(_SAMPLED), list(_SAMPLED.values()))[0]
        pairs = rng.choice(pool.clusters).pairs[action]
        sampled = _sampled(rng.choice(pairs), pool, rng) if pairs else None
        if sampled is not None:
            drawn.append(sampled)
    return drawn


def _sampled(pair: Pair, pool: ScenePool, rng: random.Random) -> Pair | None:
    """Ask for the same edit by showing it, if a second picture that does is at hand."""
    after, index = pair.after.scene, pair.index
    if pair.action == "background":
        wanted = {"background": after.background}
    else:
        shape = after.shapes[index]
        wanted = {"colour": shape.colour}
        if pair.action == "add":
            wanted["kind"] = shape.kind
    sample = pool.sample(rng, **wanted)
    if sample is None or pair.before is None:
        return None
    before, scene = pair.before.scene, sample.scene
    says: dict[str, Say] = {
        "background": lambda rng: repaint(before, after.background, rng, scene),
        "recolour": lambda rng: recolour(before, index, after.shapes[index].colour, rng, scene),
        "add": lambda rng: add(after, index, rng, scene),
    }
    return replace(pair, say=says[pair.action], sample=sample, is_sampled=True)
