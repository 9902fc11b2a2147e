"""The toy world: the same on every machine, train and test apart, and its ground truth true."""

import dataclasses
import hashlib
import re
import warnings
from functools import cache

import numpy as np
import pytest

from minicn import conditions, toy
from minicn.conditions import palettes
from minicn.toy import sketching

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
        for name in ("image", "depth", "normals", "labels", "owners", "keypoints"):
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
            "owners": ((128, 128), "int8"),
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


def test_owners_are_the_things_of_the_labels():
    """Every label is that of the thing that owns the pixel, -1 owns the background, and every thing is seen."""
    for scene in all_scenes():
        kinds = np.array([1 + toy.THINGS.index(thing.kind) for thing in scene.things] + [0])  # -1 is the last place
        assert np.array_equal(kinds[scene.owners], scene.labels)
        assert set(np.unique(scene.owners)) == {-1, *range(len(scene.things))}


def test_the_picture_is_colour_times_shading():
    """Inside a face of a box, where all normals are alike, a pixel is its colour times `shading` of the normal, rounded."""
    seen = 0
    for scene in all_scenes():
        colours = np.array([toy.COLOURS[thing.colour] for thing in scene.things] + [(0, 0, 0)])[scene.owners]
        inside = (scene.labels == 1 + toy.THINGS.index("box")) & ~grow(scene.outlines(inner=True), 2)
        want = toy.shading(scene.normals)[..., None] * colours
        assert np.abs(scene.image - want)[inside].max(initial=0) <= 0.5 + 1e-3
        seen += inside.sum()
    assert seen > 10000


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
            alone = toy.rendering.render(scene.things[:1], scene.background)[3] > 0  # labels of the front thing by itself
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


LINES = ("canny", "hough", "scribble", "hed", "lineart")
POSES = ("openpose", "openpifpaf")


@pytest.mark.parametrize("condition", conditions.NAMES)
def test_every_condition_has_a_hint(condition):
    """(128, 128, 3) uint8, not all black, black or flat where the scene is empty; lines are white, on black, at outlines.

    Some persons stand alone, so that every hint shows something.
    """
    found = [s for s in scenes("test")[:40] if "person" in [thing.kind for thing in s.things]][:5]
    assert len(found) == 5
    for scene in found:
        hint = scene.hint(condition)
        assert (hint.shape, hint.dtype) == ((128, 128, 3), np.uint8)
        assert hint.any()
        near = grow(scene.labels > 0, 14 if condition == "hed" else 6)  # joints and soft edges reach beyond
        assert len(np.unique(hint[~near], axis=0)) == 1
        if condition in (*LINES, *POSES, "depth"):
            assert not hint[~near].any()
        if condition in (*LINES, "depth"):
            assert (hint == hint[..., :1]).all()
        if condition in LINES:
            assert 0.005 < (hint > 127).mean() < 0.25
            assert grow(scene.outlines(), 3)[hint[..., 0] > 127].mean() > 0.6
        if condition in LINES and condition != "hed":
            assert set(np.unique(hint)) == {0, 255}


def test_hints_of_pictures_are_the_conditions_own_functions():
    """canny, hough and the soft edges are what conditions.py finds in the true picture; nothing warns."""
    scene = scenes("test")[3]
    assert np.array_equal(scene.hint("canny"), conditions.canny(scene.image))
    assert np.array_equal(scene.hint("hough"), conditions.hough(scene.image))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hint = scene.hint("hed")
    with pytest.warns(UserWarning, match="without weights"):
        assert np.array_equal(hint, conditions.hed(scene.image))


def flat_scene(columns):
    """A scene of four rows, 60 to 63, and these columns from 50 on: owner, kind, depth and normal of each."""
    some = scenes("test")[0]
    owners, labels = np.full((128, 128), -1, np.int8), np.zeros((128, 128), np.uint8)
    depth, normals = np.zeros((128, 128), np.float32), np.zeros((128, 128, 3), np.float32)
    normals[..., 2] = 1
    for x, (owner, kind, near, normal) in enumerate(columns, 50):
        owners[60:64, x], labels[60:64, x], depth[60:64, x] = owner, 1 + toy.THINGS.index(kind), near
        normals[60:64, x] = normal
    return dataclasses.replace(some, owners=owners, labels=labels, depth=depth, normals=normals)


FRONT, LEFT = (0, 0, 1), (-1, 0, 0)


def test_outlines_are_the_outermost_pixels_of_what_is_in_front():
    """Of a near box before a far one: the near one's whole rim, and of the far one's all but where the other hides it."""
    near, far = (0, "box", 0.9, FRONT), (1, "box", 0.4, FRONT)
    scene = flat_scene([near] * 4 + [far] * 4)
    want = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0, 0, 1], [1] * 8], bool)
    assert np.array_equal(scene.outlines()[60:64, 50:58], want)
    assert scene.outlines().sum() == want.sum()


@pytest.mark.parametrize(("kind", "edge"), [("box", 1), ("star", 1), ("ball", 0), ("person", 0)])
def test_inner_outlines_are_the_edges_between_faces(kind, edge):
    """Where the normals of a box or star turn there is a line, one pixel wide; a ball's turn everywhere, and has none."""
    scene = flat_scene([(0, kind, 0.5, FRONT)] * 4 + [(0, kind, 0.5, LEFT)] * 4)
    want = scene.outlines()
    assert not want[61:63, 53].any()
    want[61:63, 53] = edge
    assert np.array_equal(scene.outlines(inner=True), want)


def test_two_boxes_meet_in_the_outline_of_the_nearer_one():
    """Where a turned box is hidden by another the normals differ, too, but that is no edge between its faces."""
    scene = flat_scene([(0, "box", 0.4, LEFT)] * 4 + [(1, "box", 0.9, FRONT)] * 4)
    assert np.array_equal(scene.outlines(inner=True), scene.outlines())


def test_lines_of_the_scene_are_drawn():
    """lineart is the outlines and inner edges; a scribble the outlines, three pixels wide."""
    for scene in scenes("test")[:10]:
        assert np.array_equal(scene.hint("lineart")[..., 0] > 0, scene.outlines(inner=True))
        assert np.array_equal(scene.hint("scribble")[..., 0] > 0, grow(scene.outlines(), 1))


def test_coco_points_are_cocos():
    """OpenPifPaf's 17 points, in COCO's order, out of OpenPose's 18: all but the neck."""
    parts = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    want = ["nose", *(f"{side}_{part}" for part in parts for side in "lr")]
    assert [toy.KEYPOINTS[i] for i in toy.COCO_POINTS] == want


def test_poses_are_drawn_where_the_joints_are():
    """At the ankles of a person who stands alone: the colour of that OpenPose joint, the white dot of OpenPifPaf.

    And between left knee and left ankle, COCO's points 14 and 16, OpenPifPaf's first colour.
    """
    alone = [s for s in all_scenes() if [t.kind for t in s.things] == ["person"]]
    for scene in alone[:10]:
        for name in ("r_ankle", "l_ankle"):
            place = toy.KEYPOINTS.index(name)
            x, y, seen = scene.keypoints[0, place]
            assert seen == 1
            assert tuple(scene.hint("openpose")[int(y), int(x)]) == conditions.OPENPOSE_COLOURS[place]
            assert tuple(scene.hint("openpifpaf")[round(float(y)), round(float(x))]) == (255, 255, 255)
        left = [toy.KEYPOINTS.index(name) for name in ("l_knee", "l_ankle")]
        x, y = scene.keypoints[0, left, :2].mean(0).round().astype(int)
        assert tuple(scene.hint("openpifpaf")[y, x]) == conditions.OPENPIFPAF_COLOURS[0]


@pytest.mark.parametrize("condition", POSES)
def test_the_pose_of_nobody_is_black(condition):
    """A scene without people has a pose hint, too: a black one."""
    nobody = [s for s in scenes("test")[:40] if not len(s.keypoints)]
    assert len(nobody) > 10
    assert not any(s.hint(condition).any() for s in nobody)


@pytest.mark.parametrize(
    ("condition", "names", "colours", "person"),
    [
        ("ade20k", palettes.ADE20K_NAMES, palettes.ADE20K_COLOURS, (150, 5, 61)),
        ("coco_stuff", palettes.COCO_STUFF_NAMES, palettes.COCO_STUFF_COLOURS, (220, 20, 60)),
    ],
)
def test_labels_are_painted_in_colours_that_are_well_apart(condition, names, colours, person):
    """Every pixel has the colour of its label's class; any two of the seven are over 110 apart, of at most 442."""
    classes = {"ade20k": toy.ADE20K, "coco_stuff": toy.COCO_STUFF}[condition]
    table = colours[[names.index(name) for name in classes]]
    assert len(table) == 1 + len(toy.THINGS)
    assert tuple(table[1 + toy.THINGS.index("person")]) == person
    apart = np.linalg.norm(table[:, None].astype(float) - table, axis=2)
    assert apart[~np.eye(7, dtype=bool)].min() > 110
    for scene in scenes("test")[:20]:
        assert np.array_equal(scene.hint(condition), table[scene.labels])


def test_the_normal_hint_is_blue_in_front_red_at_the_left_green_at_the_top():
    """Of a ball; the background faces the viewer, (127, 127, 255)."""
    scene = next(s for s in all_scenes() if [t.kind for t in s.things] == ["ball"])
    hint, ball = scene.hint("normal").astype(int), scene.things[0]
    x, y, far = round(ball.x), round(ball.y), round(0.8 * ball.radius)
    assert tuple(hint[0, 0]) == (127, 127, 255)
    assert hint[y, x - far, 0] > 200 > 60 > hint[y, x + far, 0]
    assert hint[y - far, x, 1] > 200 > 60 > hint[y + far, x, 1]
    assert hint[y, x, 2] > 250


def test_the_depth_hint_is_white_where_it_is_near():
    """The background is black, the nearest pixel white, and in between brightness grows with nearness."""
    for scene in scenes("test")[:20]:
        hint = scene.hint("depth")[..., 0]
        assert not hint[scene.labels == 0].any()
        assert hint.flat[scene.depth.argmax()] == 255
        order = np.argsort(scene.depth.ravel(), kind="stable")
        assert (np.diff(hint.ravel()[order].astype(int)) >= 0).all()


def test_scenes_for_a_condition_all_show_it():
    """Without a condition, or for one that every scene shows, none is left out; for a pose all have people, in order."""
    every = [(s.index, s.split) for s in toy.scenes(12, "test")]
    assert every == [(i, "test") for i in range(12)]
    assert [s.index for s in toy.scenes(12, "test", "depth")] == list(range(12))
    assert [s.index for s in toy.scenes(3, "test", first=7)] == [7, 8, 9]
    assert [s.index for s in toy.scenes(9, "test", first=7, only={0, 5, 11})] == [7, 12]
    want = [s.index for s in scenes("test") if len(s.keypoints)]
    assert [s.index for s in toy.scenes(5, "test", "openpose")] == want[:5]
    assert [s.index for s in toy.scenes(3, "test", "openpose", only={2})] == [want[2]]


def test_errors_name_what_is_known():
    """An unknown split, a negative index and an unknown condition are refused in words."""
    with pytest.raises(ValueError, match='split is \'val\', but the toy world has "train" and "test"'):
        toy.scene(0, "val")
    with pytest.raises(ValueError, match="index is -1, but scenes are numbered from 0"):
        toy.scene(-1)
    with pytest.raises(TypeError, match="float"):
        toy.scene(1.0)
    assert toy.scene(np.uint8(200)).caption == toy.scene(200).caption
    with pytest.raises(ValueError, match=r"condition is 'smell', but must be one of: .*canny"):
        scenes("test")[0].hint("smell")


# Drawn by hand


def test_scribbles_of_test_scenes_are_exact_and_most_others_drawn_by_hand():
    for index in range(8):
        for split in ("train", "test"):
            scene = toy.scene(index, split)
            exact = np.pad(scene.outlines(), 1)
            exact = np.any([exact[y : y + toy.SIZE, x : x + toy.SIZE] for y in range(3) for x in range(3)], axis=0)
            by_hand = split == "train" and index % 4 != 0
            assert np.array_equal(scene.hint("scribble")[..., 0] > 0, exact) != by_hand


def test_a_hand_moves_lines_by_a_few_pixels_and_draws_sticks():
    """Every stroke lies near its thing; pens are one to five pixels wide; the same drawing at every call."""
    inked = []
    for index in range(24):
        scene = toy.scene(index)
        given = (scene.things, scene.outlines(), scene.owners, index)
        drawn = sketching.sketch(*given)
        assert np.array_equal(drawn, sketching.sketch(*given))
        assert drawn.shape == (toy.SIZE, toy.SIZE, 3)
        assert set(np.unique(drawn)) <= {0, 255}
        near = scene.owners >= 0
        for _ in range(12):  # pixels: a wobble either way, and half a pen
            grown = np.pad(near, 1)
            near = near | grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
        assert not (near < (drawn[..., 0] == 0)).any(), index
        inked.append((drawn[..., 0] == 0).sum() / scene.outlines().sum())
    assert min(inked) < 1.3  # thin
    assert max(inked) > 3  # thick, or twice
