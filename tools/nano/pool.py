"""Pairs of encoded scenes for training a nano model, in a pool that grows while it trains.

Scenes come in clusters: one scene, and the same with one thing changed. Any two images of a cluster
that differ in one thing are a pair in both directions, so nine encodings give some thirty edits,
and the instructions for one image name now one shape, now the other.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...flux_core.image.autoencoder import Autoencoder
from ...flux_core.specs import LatentSpec
from ...flux_core.tokens.pack import pack_latent
from .autoencoder import SHARPNESS
from .drawing import Floats, compose, coverage
from .wording import add_fillers
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
MakeEdit = Callable[[random.Random], Edit]


@dataclass(frozen=True, slots=True)
class EncodedScene:
    """A scene's tokens, and what they show."""

    scene: Scene
    tokens: Tensor  # (N, D) bfloat16, in the transformer's scale
    cells: Tensor  # (N, 12): mean colour of each token's four cells
    kinds: Tensor  # (N,) 0: background, 1..: KINDS, -100: an edge
    colours: Tensor  # (N,) index in COLOURS of the shape's, or the background's


@dataclass(frozen=True, slots=True)
class Pair:
    """Two encoded scenes and the instructions that lead from one to the other."""

    before: EncodedScene | None
    after: EncodedScene
    action: Action
    make_edit: MakeEdit
    index: int  # of the shape, in the scene that has more; -1: the background
    sample: EncodedScene | None = None  # a second image
    is_sampled: bool = False  # the second image shows what is asked for


@dataclass(frozen=True, slots=True)
class Cluster:
    """All pairs of one scene, by action."""

    pairs: dict[Action, list[Pair]]


class ScenePool:
    """Clusters of encoded scenes; when it is full, new ones replace the oldest.

    Args:
        autoencoder: encodes the images.
        seed: of the scenes.
        capacity: largest number of clusters.
    """

    def __init__(self, autoencoder: Autoencoder, *, seed: int, capacity: int) -> None:
        self._autoencoder = autoencoder
        self._capacity = capacity
        self._rng = random.Random(seed)
        self.clusters: list[Cluster] = []
        self.captions: list[Pair] = []
        self.samples: list[EncodedScene] = []
        self._grown = 0

    def grow(self) -> None:
        """Adds one cluster."""
        rng = self._rng
        shapes = 2 if rng.random() < 0.75 else 1
        cluster = self._cluster(shapes)
        if len(self.clusters) < self._capacity:
            self.clusters.append(cluster)
        else:
            self.clusters[self._grown % self._capacity] = cluster
        self._grown += 1

    def grow_captions(self, count: int) -> None:
        """Adds captioned scenes."""
        scenes = [caption_scene(self._rng) for _ in range(count)]
        trained = [scene for scene in scenes if not scene.is_held_out]
        for encoded in self._encode(trained, [None] * len(trained)):
            make_edit = partial(describe, encoded.scene)
            self.captions.append(Pair(None, encoded, "caption", make_edit, -1))

    def grow_samples(self, count: int) -> None:
        """Adds second images, of one shape each."""
        scenes = [sample_scene(self._rng) for _ in range(count)]
        trained = [scene for scene in scenes if not scene.is_held_out]
        for start in range(0, len(trained), _ENCODED_AT_ONCE):
            part = trained[start : start + _ENCODED_AT_ONCE]
            self.samples += self._encode(part, [None] * len(part))

    def sample(self, rng: random.Random, **wanted: str) -> EncodedScene | None:
        """Returns a random second image of the wanted kind, colour or background, if any."""
        for encoded in rng.sample(self.samples, min(len(self.samples), 400)):
            shape = encoded.scene.shapes[0]
            shown = {
                "kind": shape.kind,
                "colour": shape.colour,
                "background": encoded.scene.background,
            }
            if all(shown[name] == value for name, value in wanted.items()):
                return encoded
        return None

    def _cluster(self, shapes: int) -> Cluster:
        rng = self._rng
        base = add_scene(rng, shapes)
        if rng.random() < 0.4:
            base = random_scene(rng, shapes, at_places=rng.random() < 0.25)
        families: list[list[Scene]] = [[base], *([base] for _ in base.shapes)]
        for number, family in enumerate(families):
            free = free_colours(base, number - 1)
            family += [with_colour(base, number - 1, one) for one in rng.sample(free, 2)]
        absent = [without(base, index) for index in range(shapes)]
        scenes = [base, *(one for family in families for one in family[1:]), *absent]
        covers = [coverage(shape, sharpness=rng.uniform(*SHARPNESS)) for shape in base.shapes]
        trained = [scene for scene in scenes if not scene.is_held_out]
        masks = [self._masks(scene, base, covers) for scene in trained]
        encoded = dict(zip(map(id, trained), self._encode(trained, masks), strict=True))
        return Cluster(_pairs(families, absent, encoded))

    @staticmethod
    def _masks(scene: Scene, base: Scene, covers: Sequence[Floats]) -> list[Floats]:
        """Returns the coverages of those shapes of the base that a variant still has."""
        centres = [(shape.x, shape.y) for shape in base.shapes]
        return [covers[centres.index((shape.x, shape.y))] for shape in scene.shapes]

    @torch.no_grad()
    def _encode(
        self, scenes: Sequence[Scene], masks: Sequence[Sequence[Floats] | None]
    ) -> list[EncodedScene]:
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
            EncodedScene(scene, tokens[row], cells[row], *labels[row])
            for row, scene in enumerate(scenes)
        ]


def scaled_tokens(latent: Tensor, spec: LatentSpec) -> Tensor:
    """Returns a latent (B, C, h, w) as tokens (B, N, D) in the transformer's scale."""
    return pack_latent((latent - spec.shift) * spec.scale, spec)


def changed_tokens(before: EncodedScene, after: EncodedScene) -> Tensor:
    """Returns which tokens an edit changes, (N,) bool."""
    return (before.cells - after.cells).abs().amax(dim=-1) > _CHANGED


def _cell_means(pixels: Tensor) -> Tensor:
    """Returns the mean colours of 8 x 8 px cells, (B, N, 12), four cells per token."""
    means = torch.nn.functional.avg_pool2d(pixels / 2.0, TOKEN_PX // 2)
    return torch.nn.functional.pixel_unshuffle(means, 2).flatten(2).transpose(1, 2)


def token_labels(scene: Scene, masks: Sequence[Floats]) -> tuple[Tensor, Tensor]:
    """Returns kind (N,) and colour (N,) of every token's shape, -100 where it covers little."""
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
    families: Sequence[Sequence[Scene]], absent: Sequence[Scene], encoded: dict[int, EncodedScene]
) -> dict[Action, list[Pair]]:
    """Returns every edit between two scenes of a cluster."""
    found: dict[Action, list[Pair]] = {"recolour": [], "background": [], "remove": [], "add": []}
    for number, family in enumerate(families):
        variants = [encoded[id(scene)] for scene in family if id(scene) in encoded]
        for before in variants:
            for after in variants:
                if before is not after:
                    action: Action = "recolour" if number else "background"
                    make_edit = _colour_edit(before, after, number - 1)
                    found[action].append(Pair(before, after, action, make_edit, number - 1))
        if number == 0 or id(absent[number - 1]) not in encoded:
            continue
        without_it, index = encoded[id(absent[number - 1])], number - 1
        for variant in variants:
            scene = variant.scene
            make_edit = partial(remove, scene, index)
            found["remove"].append(Pair(variant, without_it, "remove", make_edit, index))
            shape = scene.shapes[index]
            if shape == at_place(shape, nearest_place(shape)):
                make_edit = partial(add, scene, index)
                found["add"].append(Pair(without_it, variant, "add", make_edit, index))
    return found


def _colour_edit(before: EncodedScene, after: EncodedScene, index: int) -> MakeEdit:
    scene, goal = before.scene, after.scene
    if index < 0:
        return partial(repaint, scene, goal.background)
    return partial(recolour, scene, index, goal.shapes[index].colour)


def instruction(pair: Pair, rng: random.Random) -> str:
    """Returns a random instruction for a pair's edit."""
    return add_fillers(pair.make_edit(rng).text, rng)


def draw_pairs(pool: ScenePool, count: int, rng: random.Random) -> list[Pair]:
    """Returns random edits for a step; where two shapes could be meant, each has an edit.

    Args:
        pool: clusters.
        count: number of pairs.
        rng: random source.
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
            others = [
                pair
                for pair in pairs[action]
                if pair.before is first.before and pair.index != first.index
            ]
            if others:
                drawn.append(rng.choice(others))
    return drawn[:count]


_SAMPLED: dict[Action, int] = {"recolour": 40, "add": 40, "background": 20}
_IDLE_SAMPLES = 0.2  # share of pairs whose second image has nothing to do with the edit


def draw_sampled_pairs(pool: ScenePool, count: int, rng: random.Random) -> list[Pair]:
    """Returns random edits with a second image, which mostly shows what is asked for."""
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
    """Returns the same edit with a second image that shows it, if the pool has one."""
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
    make_edit: dict[str, MakeEdit] = {
        "background": lambda rng: repaint(before, after.background, rng, scene),
        "recolour": lambda rng: recolour(before, index, after.shapes[index].colour, rng, scene),
        "add": lambda rng: add(after, index, rng, scene),
    }
    return replace(pair, make_edit=make_edit[pair.action], sample=sample, is_sampled=True)
