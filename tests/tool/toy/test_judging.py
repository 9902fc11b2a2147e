"""The judge of scene accuracy: true pictures pass, and whatever is wrong with a picture is noticed."""

import dataclasses
import random

import numpy as np
import pytest

from benchmarks.judge import spoil
from minicn import toy
from minicn.toy import judging

SCENES = [toy.scene(i, "test") for i in range(1000, 1064)]


@pytest.fixture(scope="module")
def judge():
    return judging.Judge.load()


def test_true_scenes_are_right(judge):
    """Held-out ones, never used in its training; the classifier decides by argmax, so one in 64 may tip elsewhere."""
    found = judging.scene_accuracy(judge, [scene.image for scene in SCENES], SCENES)
    assert found["all"] >= 0.98
    assert {"1", "2", "3", *toy.THINGS} < set(found)


def test_spoiled_scenes_are_wrong(judge):
    """A part cut out or added, two shapes fused, a thing drawn twice."""
    spoiled = [(spoil(scene, random.Random(i)), scene) for i, scene in enumerate(SCENES)]
    wrong = [not judge.agrees(image, scene) for (image, shown), scene in spoiled if "other" in shown.values()]
    assert len(wrong) > 50
    assert np.mean(wrong) > 0.85  # 0.93 of 387


def test_each_picture_is_right_for_its_own_caption_alone(judge):
    """Of 32 scenes with other things, colours or backgrounds, a picture agrees with its own."""
    for scene in SCENES[:3]:
        others = [dataclasses.replace(scene, background=name) for name in toy.BACKGROUNDS if name != scene.background]
        assert not any(judge.agrees(scene.image, other) for other in others)
        assert [other for other in SCENES[:32] if judge.agrees(scene.image, other)] == [scene]


def test_accuracy_counts_by_number_and_by_kind(judge):
    """Two pictures exchanged: both wrong as wholes, and their things missed by kind."""
    one, two = (next(s for s in SCENES if [t.kind for t in s.things] == [kind]) for kind in ("ball", "person"))
    other = next(colour for colour in toy.COLOURS if colour != one.things[0].colour)
    recoloured = dataclasses.replace(one, things=(dataclasses.replace(one.things[0], colour=other),))
    assert judging.scene_accuracy(judge, [one.image], [recoloured])["ball"] == 0
    assert judging.scene_accuracy(judge, [one.image, two.image], [one, two]) == dict.fromkeys(
        ("1", "all", "ball", "person"), 1
    )
    assert judging.scene_accuracy(judge, [two.image, two.image], [one, two]) == {
        "1": 0.5,
        "all": 0.5,
        "ball": 0,
        "person": 1,
    }
