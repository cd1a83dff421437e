"""The nano world: scenes, sentences, two renderers and the judge."""

import random
from dataclasses import replace

import numpy as np
import pytest

from glassbox.tools.nano.drawing import coverage, draw, draw_pillow
from glassbox.tools.nano.judge import judge
from glassbox.tools.nano.world import (
    COLOURS,
    EDITS,
    KINDS,
    SIDE_PX,
    Scene,
    Shape,
    name_shape,
    random_edit,
    random_scene,
)

CASES = [(action, shapes) for action in EDITS for shapes in (1, 2)]


@pytest.mark.parametrize(("action", "shapes"), CASES)
def test_every_edit_changes_the_picture_and_its_answer_passes(action: str, shapes: int) -> None:
    rng = random.Random(f"{action} {shapes}")
    for _ in range(20):
        edit = random_edit(action, shapes, rng, held_out=True)
        assert edit.before is not None
        assert edit.shapes == shapes
        assert np.abs(draw(edit.before) - draw(edit.after)).max() > 0.1
        assert judge(draw(edit.after), edit.after, edit.before).is_success
        assert judge(draw_pillow(edit.after), edit.after, edit.before).is_success
        assert not judge(draw(edit.before), edit.after, edit.before).is_success


def test_shapes_of_a_scene_never_touch_and_stay_inside() -> None:
    rng = random.Random(1)
    for number in range(100):
        scene = random_scene(rng, 2, at_places=number % 2 == 0)
        first, second = (coverage(shape) for shape in scene.shapes)
        assert (first * second).max() == 0.0
        assert len({scene.background, *(shape.colour for shape in scene.shapes)}) >= 2
        assert all(shape.colour != scene.background for shape in scene.shapes)


def test_a_name_means_one_shape_only() -> None:
    rng = random.Random(2)
    for _ in range(200):
        scene = random_scene(rng, 2)
        words = set(name_shape(scene, 0, rng).split()) - {"shape"}
        other = scene.shapes[1]
        assert not words <= {other.kind, other.colour}


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_tells_kinds_apart(kind: str) -> None:
    asked = Scene(background="green", shapes=(Shape(kind=kind, colour="red", x=40, y=50),))
    for other in KINDS:
        drawn = replace(asked, shapes=(replace(asked.shapes[0], kind=other),))
        assert judge(draw(drawn), asked).is_success == (other == kind)


def test_the_judge_sees_a_changed_bystander() -> None:
    """A lenient rule would count it: the circle is red, but the star is red too."""
    circle = Shape(kind="circle", colour="red", x=24, y=48)
    star = Shape(kind="star", colour="yellow", x=72, y=48)
    asked = Scene(background="green", shapes=(circle, star))
    assert judge(draw(asked), asked).is_success
    both_red = replace(asked, shapes=(circle, replace(star, colour="red")))
    assert not judge(draw(both_red), asked).is_success
    assert not judge(draw(replace(asked, shapes=(circle,))), asked).is_success
    assert not judge(draw(replace(asked, background="blue")), asked).is_success


def test_held_out_scenes_are_a_tenth_of_all() -> None:
    rng = random.Random(3)
    share = np.mean([random_scene(rng, 2).is_held_out for _ in range(2000)])
    assert 0.06 < share < 0.14
    assert not any(Scene(background=colour).is_held_out for colour in COLOURS)


def test_both_renderers_draw_the_same_scene() -> None:
    rng = random.Random(4)
    for _ in range(20):
        scene = random_scene(rng, 2)
        ours, theirs = draw(scene), draw_pillow(scene)
        assert ours.shape == theirs.shape == (SIDE_PX, SIDE_PX, 3)
        assert np.abs(ours - theirs).mean() < 0.01
        assert np.abs(ours - theirs).max() > 0.0
