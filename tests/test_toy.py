"""The toy world: the same on every machine, train and test apart, and its ground truth true."""

import hashlib
import re
from functools import cache

import numpy as np
import pytest

from minicn import conditions, toy

COUNT = 300  # scenes of each split that are looked at


@cache
def scenes(split):
    return [toy.scene(i, split) for i in range(COUNT)]


@cache
def all_scenes():
    return [*scenes("train"), *scenes("test")]


def digest(scene):
    return hashlib.sha256(scene.image.tobytes() + scene.caption.encode()).hexdigest()


def grow(mask, pixels):
    """A mask widened by some pixels in every direction."""
    for _ in range(pixels):
        p = np.pad(mask, 1)
        mask = np.any([p[y : y + 128, x : x + 128] for y in range(3) for x in range(3)], axis=0)
    return mask


# The same on every machine


PINNED = {
    ("train", 0): "e8b56268a547d89aaed7126896619d299f7608c43a45b7292adbae0cd286ff3f",
    ("train", 7): "72d5d2815741a08a16d52b0cd8f646bcecac7833cab00d1a58799d5aaf55ea1a",
    ("train", 1234567): "d32c11107e8f93578b1038a80c5b5b8fbcce1761a635bcea6729f170564cf24f",
    ("test", 0): "cd2e1fe3ee2572bf5ef4687bb80d9ed66a7bbc609a6eeb3e3d0d234b0045f094",
    ("test", 7): "300f239ca069cc7b6fd73dd76808169d6d734f59ff058fa7f1e54d9291baecba",
    ("test", 1234567): "5d5189307f8ef115cdc5506dd799fd8720400d1d899cf157c3d994534b06c03e",
}


@pytest.mark.parametrize(("split", "index"), PINNED)
def test_scenes_are_pinned(split, index):
    """Picture and caption of a scene are fixed for ever: weights that ship were trained on them."""
    assert digest(toy.scene(index, split)) == PINNED[split, index]


def test_a_scene_depends_on_its_index_and_split_alone():
    """Drawn again, after others and in another order, a scene is the same in every field."""
    order = [(5, "test"), (2, "train"), (9, "train"), (2, "test")]
    first = {key: toy.scene(*key) for key in order}
    again = {key: toy.scene(*key) for key in reversed(order)}
    for key in order:
        a, b = first[key], again[key]
        assert (a.caption, a.things, a.background, a.index, a.split) == (b.caption, b.things, b.background, *key)
        for name in ("image", "depth", "normals", "labels", "keypoints"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name


# Train and test


@pytest.mark.parametrize(("split", "odd"), [("train", 0), ("test", 1)])
def test_the_first_thing_tells_train_from_test(split, odd):
    """In train its pixel column is even, in test odd: so no scene can be in both, whatever the index."""
    assert {scene.things[0].x % 2 for scene in scenes(split)} == {odd}


def test_no_two_scenes_are_alike():
    """600 scenes, 600 pictures: none comes twice, in its own split or in the other."""
    assert len({scene.image.tobytes() for scene in all_scenes()}) == 2 * COUNT


# Fields


def test_shapes_and_types_of_every_field():
    """As the docstring of Scene says, for every scene."""
    for scene in all_scenes():
        people = sum(thing.kind == "person" for thing in scene.things)
        fields = {name: (a.shape, a.dtype.name) for name, a in vars(scene).items() if isinstance(a, np.ndarray)}
        assert fields == {
            "image": ((128, 128, 3), "uint8"),
            "depth": ((128, 128), "float32"),
            "normals": ((128, 128, 3), "float32"),
            "labels": ((128, 128), "uint8"),
            "keypoints": ((people, 18, 3), "float32"),
        }
        assert 1 <= len(scene.things) <= 3
    assert {len(scene.things) for scene in all_scenes()} == {1, 2, 3}


def test_normals_have_unit_length_and_face_the_viewer():
    """|n| = 1 to 1e-4, and z is not negative: nothing is seen from behind."""
    for scene in all_scenes():
        assert np.abs(np.linalg.norm(scene.normals, axis=2) - 1).max() < 1e-4
        assert scene.normals[..., 2].min() > -1e-4


def test_background_is_flat_far_and_of_its_colour():
    """Where labels are 0: depth 0, normal (0, 0, 1), and away from edges exactly the colour of its name."""
    for scene in all_scenes():
        empty = scene.labels == 0
        assert not scene.depth[empty].any()
        assert (scene.normals[empty] == (0, 0, 1)).all()
        away = ~grow(~empty, 2)
        assert away.sum() > 1000
        assert (scene.image[away] == toy.BACKGROUNDS[scene.background]).all()


def test_things_have_depth_and_the_labels_of_the_caption():
    """Where labels are not 0: depth from 0.1 to 1, and the labels are those of the scene's things, all of them."""
    for scene in all_scenes():
        something = scene.labels > 0
        assert scene.depth[something].min() >= 0.1
        assert scene.depth.max() < 1  # nothing is cut off at the near end
        names = {toy.THINGS[label - 1] for label in np.unique(scene.labels[something])}
        assert names == {thing.kind for thing in scene.things}


def z_of(scene):
    """Depth in pixels: 0.1..1 stands for -60..120."""
    return (scene.depth.astype(np.float64) - 0.1) / 0.9 * 180 - 60


def slopes(z):
    """The surface normal from central differences of z: x right, y up, z to the viewer; nan at the border."""
    n = np.full((*z.shape, 3), np.nan)
    n[1:-1, 1:-1, 0] = -(z[1:-1, 2:] - z[1:-1, :-2]) / 2
    n[1:-1, 1:-1, 1] = (z[2:, 1:-1] - z[:-2, 1:-1]) / 2
    n[..., 2] = 1
    return n / np.linalg.norm(n, axis=2, keepdims=True)


def test_a_ball_is_the_sphere_of_its_equation():
    """Depth and normals of a ball are those of x^2 + y^2 + z^2 = r^2, and the normal is the slope of the depth."""
    seen = [scene for scene in all_scenes() if [thing.kind for thing in scene.things] == ["ball"]]
    assert len(seen) >= 10
    for scene in seen:
        ball = scene.things[0]
        x = np.arange(128)[None, :] + 0.25 - ball.x  # the first of two samples a pixel stands for it
        y = np.arange(128)[:, None] + 0.25 - ball.y
        rr = x**2 + y**2
        inside = rr < ball.radius**2 * 0.999
        assert (scene.labels[inside] == 1).all()
        assert not scene.labels[rr > ball.radius**2 * 1.001].any()
        z = np.sqrt(np.maximum(ball.radius**2 - rr, 0))
        assert np.abs(z_of(scene) - z)[inside].max() < 0.01
        normal = np.stack(np.broadcast_arrays(x, -y, z), axis=2) / ball.radius
        assert np.abs(scene.normals - normal)[inside].max() < 1e-3
        core = rr < (0.8 * ball.radius) ** 2  # near the rim a difference over two pixels is no derivative
        assert np.abs(slopes(z_of(scene)) - normal)[core].max() < 0.02


@pytest.mark.parametrize("kind", toy.THINGS)
def test_normals_are_the_slope_of_the_depth(kind):
    """For every kind of thing: where the surface is smooth, the normal is the slope of the depth, to 5 degrees."""
    found = 0
    for scene in all_scenes():
        if [thing.kind for thing in scene.things] != [kind]:
            continue
        n = scene.normals.astype(np.float64)
        smooth = ~grow(scene.labels == 0, 2) & (n[..., 2] > 0.4)
        for axis in (0, 1):
            for step in (-1, 1):  # the neighbours' normals are within 10 degrees
                smooth &= (n * np.roll(n, step, axis)).sum(2) > np.cos(np.radians(10))
        cosine = (n * slopes(z_of(scene))).sum(2)[smooth]
        found += len(cosine)
        assert (cosine > np.cos(np.radians(5))).mean() > 0.97
    assert found > 500


def test_what_stands_in_front_is_nearer():
    """ "a in front of b": a is nearer than b, and none of it is hidden where both are."""
    seen = 0
    for scene in all_scenes():
        kinds = [thing.kind for thing in scene.things]
        if " in front of " in scene.caption and kinds[0] != kinds[1]:
            front, behind = (scene.depth[scene.labels == 1 + toy.THINGS.index(kind)] for kind in kinds)
            assert front.min() > behind.max() - 0.15
            assert front.mean() > behind.mean()
            alone = toy._render(scene.things[:1], scene.background)[3] > 0  # labels of the front thing by itself
            assert (scene.labels[alone] == 1 + toy.THINGS.index(kinds[0])).all()
            seen += 1
    assert seen >= 20


# People


def test_points_that_are_seen_lie_on_a_person():
    """Key points are (x, y, seen) with seen 0 or 1, and the pixel of one that is seen is labelled person."""
    person = 1 + toy.THINGS.index("person")
    seen = hidden = 0
    for scene in all_scenes():
        for x, y, visible in scene.keypoints.reshape(-1, 3):
            assert visible in (0, 1)
            if visible:
                assert scene.labels[int(y), int(x)] == person
            seen += visible == 1
            hidden += visible == 0
    assert seen > 9 * hidden > 0


def test_a_person_alone_is_seen_whole_and_upright():
    """Every point of a person who stands alone is seen, but for a raised hand that leaves the picture.

    The points are in OpenPose's order: the person's right is left in the picture.
    """
    place = {name: i for i, name in enumerate(toy.KEYPOINTS)}
    assert len(place) == 18
    alone = [s for s in all_scenes() if [t.kind for t in s.things] == ["person"]]
    assert len(alone) >= 10
    for scene in alone:
        (points,) = scene.keypoints
        inside = ((points[:, :2] >= 0) & (points[:, :2] < 128)).all(1)
        assert np.array_equal(points[:, 2] == 1, inside)
        assert inside.sum() >= 17
        x, y = ({name: points[i, axis] for name, i in place.items()} for axis in (0, 1))
        assert y["nose"] < y["neck"] < y["r_hip"] < y["r_knee"] < y["r_ankle"]
        assert y["l_eye"] < y["nose"]
        assert all(x[f"r_{part}"] < x[f"l_{part}"] for part in ("shoulder", "elbow", "hip", "eye", "ear"))


# Captions


COLOUR, KIND = "|".join(toy.COLOURS), "|".join(toy.THINGS)
THING = rf"(?:a (?!orange)|an (?=orange))(?:{COLOUR}) (?:{KIND})"
GRAMMAR = re.compile(
    rf"(?:{THING}|{THING} (?:beside|above|in front of) {THING}|{THING}, {THING} and {THING})"
    rf" on a (?:{'|'.join(toy.BACKGROUNDS)}) background"
)


def test_captions_follow_the_grammar():
    """One thing; two, beside, above or in front of each other; or three: on a background, with a or an as is right."""
    for text in [*(scene.caption for scene in all_scenes()), *toy.captions()]:
        assert GRAMMAR.fullmatch(text), text


def test_captions_name_the_things_that_are_there():
    """Colours and kinds in the caption are the things' own, pairwise; `colours` ends with the background's."""
    for scene in all_scenes():
        said = re.findall(rf"({COLOUR}) ({KIND})", scene.caption)
        assert sorted(said) == sorted((thing.colour, thing.kind) for thing in scene.things)
        assert f"on a {scene.background} background" in scene.caption
        assert scene.colours == (*(thing.colour for thing in scene.things), scene.background)
        assert len({thing.colour for thing in scene.things}) == len(scene.things)


def test_captions_say_where_things_are():
    """The one said to be above is higher in the picture by its own height; those beside are apart sideways."""
    seen = {"above": 0, "beside": 0}
    for scene in all_scenes():
        by_name = {f"{thing.colour} {thing.kind}": thing for thing in scene.things}
        match = re.match(rf"an? ({COLOUR}) ({KIND}) (above|beside) an? ({COLOUR}) ({KIND})", scene.caption)
        if match:
            first, second = by_name[f"{match[1]} {match[2]}"], by_name[f"{match[4]} {match[5]}"]
            if match[3] == "above":
                assert second.y - first.y > 40
            else:
                assert abs(first.x - second.x) > 40
            seen[match[3]] += 1
    assert min(seen.values()) >= 20


def test_every_word_is_in_the_example_captions():
    """captions() holds every word that a scene's caption can have: what a tokenizer is built from."""
    known = {word for text in toy.captions() for word in re.findall(r"\w+|,", text)}
    assert {word for scene in all_scenes() for word in re.findall(r"\w+|,", scene.caption)} == known


# Colours


def test_name_colours_names_flat_colours():
    """Every colour of the toy world, at every shade, and every background is named as itself."""
    names = [*toy.COLOURS, *toy.BACKGROUNDS]
    for i, rgb in enumerate([*toy.COLOURS.values(), *toy.BACKGROUNDS.values()]):
        for shade in toy.SHADES if i < len(toy.COLOURS) else (1.0,):
            flat = np.full((2, 3, 3), np.round(np.array(rgb) * shade), np.uint8)
            assert (toy.name_colours(flat) == i).all(), (names[i], shade)


def test_every_named_colour_is_shown():
    """200 test scenes show what their captions name: the background most, and each colour on 40 pixels at least."""
    assert all(toy.shows_caption(scene.image, scene) for scene in scenes("test")[:200])


def test_another_picture_does_not_show_the_caption():
    """A flat picture shows no thing; a thing's colour alone is no background; few other scenes do by chance."""
    some = scenes("test")[:100]
    for scene in some[:20]:
        assert not toy.shows_caption(np.full((128, 128, 3), toy.BACKGROUNDS[scene.background], np.uint8), scene)
        assert not toy.shows_caption(np.full((128, 128, 3), toy.COLOURS[scene.things[0].colour], np.uint8), scene)
    by_chance = [toy.shows_caption(b.image, a) for a, b in zip(some, some[1:], strict=False)]
    assert np.mean(by_chance) < 0.15


# Hints and errors


def test_the_canny_hint_is_canny_of_the_picture():
    """hint("canny") is the condition's own function on the picture."""
    scene = scenes("test")[0]
    hint = scene.hint("canny")
    assert np.array_equal(hint, conditions.canny(scene.image))
    assert hint.any()


def test_errors_name_what_is_known():
    """An unknown split, a negative index and an unknown condition are refused in words."""
    with pytest.raises(ValueError, match='split is \'val\', but the toy world has "train" and "test"'):
        toy.scene(0, "val")
    with pytest.raises(ValueError, match="index is -1, but scenes are numbered from 0"):
        toy.scene(-1)
    with pytest.raises(ValueError, match=r"condition is 'smell', but must be one of: .*canny"):
        scenes("test")[0].hint("smell")
