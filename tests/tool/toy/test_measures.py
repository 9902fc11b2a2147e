"""The measures of following, each by what its condition says, and words against colours, on pictures drawn by hand."""

import dataclasses
from functools import cache

import numpy as np
import pytest
from PIL import Image

from minicn import StableDiffusion, conditions, toy
from minicn.toy import measures
from minicn.trainer import recording


def square(x=20, y=20, side=24, size=64):
    """A white square on black."""
    image = np.zeros((size, size, 3), np.uint8)
    image[y : y + side, x : x + side] = 255
    return image


FLAT = np.zeros((64, 64, 3), np.uint8)


def test_edge_f1_of_a_picture_with_itself_is_one():
    """Every edge is found and every edge found is one: F1 = 1, exactly, for drawn and for toy pictures."""
    assert measures.edge_f1(square(), square()) == 1.0
    image = toy.scene(0, "test").image
    assert measures.edge_f1(image, Image.fromarray(image)) == 1.0


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (0, 1), (-1, 0), (1, 1), (-1, 1)])
def test_edge_f1_tolerates_one_pixel(dx, dy):
    """A square moved by one pixel, also diagonally, still has F1 = 1; moved by two it has not."""
    assert measures.edge_f1(square(20 + dx, 20 + dy), square()) == 1.0
    assert measures.edge_f1(square(20 + 2 * dx, 20 + 2 * dy), square()) < 0.8


def test_edge_f1_counts_what_is_missing_and_what_is_too_much():
    """F1 = 2 P R / (P + R): of two equal squares, one found is P = 1, R = 1/2, so F1 = 2/3, either way round."""
    two = np.concatenate([square(), square()], axis=1)
    one = np.concatenate([square(), FLAT], axis=1)
    assert measures.edge_f1(one, two) == pytest.approx(2 / 3)
    assert measures.edge_f1(two, one) == pytest.approx(2 / 3)
    far = np.concatenate([FLAT, square()], axis=1)
    assert measures.edge_f1(one, far) == 0.0


def test_edge_f1_of_none_and_some_is_zero_and_of_none_and_none_one():
    """Where only one picture has edges nothing agrees; where neither has, everything does."""
    assert measures.edge_f1(FLAT, square()) == 0.0
    assert measures.edge_f1(square(), FLAT) == 0.0
    assert measures.edge_f1(FLAT, FLAT) == 1.0


def test_edge_f1_of_another_scene_is_low():
    """Pictures of other scenes share few edges by chance: mean F1 below 0.3, where a picture with itself has 1."""
    images = [toy.scene(i, "test").image for i in range(13)]
    by_chance = [measures.edge_f1(a, b) for a, b in zip(images, images[1:], strict=False)]
    assert max(by_chance) < 0.6
    assert np.mean(by_chance) < 0.3


def test_mean_is_the_mean_over_pairs():
    """Of F1 = 1 and F1 = 0 the mean is a half; lists of different lengths are refused."""
    assert measures.mean(measures.edge_f1, [square(), FLAT], [square(), square()]) == 0.5
    with pytest.raises(ValueError, match="argument"):
        measures.mean(measures.edge_f1, [square()], [square(), square()])


def test_widen_grows_by_one_pixel_in_eight_directions():
    """A point becomes 3x3, also at the border, and the mask given is not changed."""
    mask = np.zeros((5, 6), bool)
    mask[2, 1] = mask[4, 5] = True
    before = mask.copy()
    want = np.array(
        [
            [0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 0, 1, 1],
            [0, 0, 0, 0, 1, 1],
        ],
        bool,
    )
    assert np.array_equal(measures.widen(mask), want)
    assert np.array_equal(mask, before)


def test_score_is_zero_at_the_floor_and_one_at_the_ceiling():
    """(F1 - floor) / (ceiling - floor): linear, below zero under the floor."""
    assert measures.score(0.2, floor=0.2, ceiling=0.7) == 0.0
    assert measures.score(0.7, floor=0.2, ceiling=0.7) == 1.0
    assert measures.score(0.45, floor=0.2, ceiling=0.7) == pytest.approx(0.5)
    assert measures.score(0.1, floor=0.2, ceiling=0.7) == pytest.approx(-0.2)


# What each condition says


@cache
def people():
    """Held-out scenes with people, so that every condition has something to say."""
    return list(toy.scenes(12, "test", "openpose"))


@cache
def seen_by_the_autoencoder():
    """Those scenes' pictures, encoded and decoded: the ceiling."""
    sd = StableDiffusion.load("toy")
    latents = recording.encode(sd.vae, recording.stack([scene.image for scene in people()]))
    return [np.asarray(image) for image in sd.decode_latents(latents)]


@pytest.mark.parametrize("condition", conditions.NAMES)
def test_each_measure_tells_the_ceiling_from_another_scene(condition):
    """The autoencoder leaves over 0.8 of what the measure asks for, and at least 0.5 more than another scene's truth has.

    Pictures of Pillow and arrays give the same.
    """
    measure, images = measures.measure(condition), seen_by_the_autoencoder()
    ceiling = measures.mean(measure, images, people())
    others = measures.mean(measure, [*images[1:], images[0]], people())
    assert 0.8 < ceiling <= 1
    assert 0 <= others < ceiling - 0.5
    assert measure(Image.fromarray(images[0]), people()[0]) == measure(images[0], people()[0])


@pytest.mark.parametrize("condition", ["canny", "hough", "hed"])
def test_a_true_picture_has_all_its_lines(condition):
    """What is found in the picture by the function that made the hint is the hint: exactly 1."""
    assert [measures.measure(condition)(scene.image, scene) for scene in people()[:4]] == [1.0] * 4


@pytest.mark.parametrize("condition", conditions.NAMES)
def test_an_empty_picture_follows_nothing(condition):
    """The background alone has no line, limb or surface: 0; of the labels it has one, the background."""
    for scene in people()[:3]:
        value = measures.measure(condition)(np.full_like(scene.image, toy.BACKGROUNDS[scene.background]), scene)
        if condition in ("ade20k", "coco_stuff"):
            empty = (scene.labels == 0).mean()
            assert value == pytest.approx(empty / len(np.unique(scene.labels)))
        else:
            assert value == 0


def test_scribbles_ask_for_outlines_and_line_drawings_for_inner_edges():
    """A box painted in one flat colour has all the lines of its scribble, but of its line drawing not those inside."""
    scene = next(s for s in toy.scenes(99, "test") if [thing.kind for thing in s.things] == ["box"])
    palette = np.array([toy.BACKGROUNDS[scene.background], toy.COLOURS[scene.things[0].colour]], np.uint8)
    flat = palette[(scene.labels > 0).astype(int)]
    inner = (scene.outlines(inner=True) & ~scene.outlines()).sum()
    assert inner > 50
    assert measures.measure("scribble")(flat, scene) > 0.99
    found = measures.measure("lineart")(flat, scene)
    recall = 1 - inner / scene.outlines(inner=True).sum()
    assert found == pytest.approx(2 * recall / (1 + recall), abs=0.05)
    assert measures.measure("lineart")(scene.image, scene) > found + 0.05


def test_f1_tolerates_one_pixel():
    """Of two pixels found one is wanted or beside one that is (P = 1/2), of three wanted one is found (R = 1/3): 0.4."""
    found, wanted = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    found[1, 1] = found[1, 7] = True
    wanted[2, 2] = wanted[7, 1] = wanted[7, 7] = True
    assert measures.f1(found, wanted) == pytest.approx(0.4)
    assert measures.f1(np.zeros((9, 9), bool), wanted) == 0.0
    assert measures.f1(np.zeros((9, 9), bool), np.zeros((9, 9), bool)) == 1.0


def two_things(first, second):
    """A scene of a thing left (columns 32 to 63) and one right (64 to 95), rows 32 to 95, and its flat picture."""
    scene = next(s for i in range(99) if len((s := toy.scene(i, "test")).things) == 2)
    things = tuple(dataclasses.replace(t, kind=k) for t, k in zip(scene.things, (first, second), strict=True))
    labels = np.zeros((128, 128), np.uint8)
    labels[32:96, 32:64], labels[32:96, 64:96] = (1 + toy.THINGS.index(kind) for kind in (first, second))
    image = np.full((128, 128, 3), toy.BACKGROUNDS[scene.background], np.uint8)
    image[32:96, 32:64], image[32:96, 64:96] = (toy.COLOURS[thing.colour] for thing in things)
    return dataclasses.replace(scene, things=things, labels=labels), image


def test_mean_iou_by_hand():
    """Labels 0, 1, 2 with intersections 1, 1, 1 and unions 2, 2, 4; what is found beyond them is no label of its own."""
    wanted = np.array([[0, 0], [1, 2], [2, 2]])
    found = np.array([[0, 9], [1, 1], [2, 9]])
    assert measures.mean_iou(found, wanted) == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


def test_region_iou_by_hand():
    """The true regions have 1; colours may change places; a thing that moves by half its width has IoU 1/3."""
    scene, image = two_things("ball", "box")
    assert measures.region_iou(image, scene) == 1.0
    changed = image.copy()
    changed[32:96, 32:96] = image[32:96, 32:96][:, ::-1]
    assert measures.region_iou(changed, scene) == 1.0
    shifted = image.copy()
    shifted[32:96, 32:48], shifted[32:96, 96:112] = image[0, 0], image[32, 64]
    shifted[32:96, 48:80], shifted[32:96, 80:112] = image[32, 32], image[32, 64]
    sky = 128 * 128 - 64 * 64
    assert measures.region_iou(shifted, scene) == pytest.approx((1 / 3 + 1 / 3 + (sky - 1024) / (sky + 1024)) / 3)
    other = next(rgb for name, rgb in toy.COLOURS.items() if name not in scene.colours)
    foreign = np.where((image == image[32, 32]).all(2, keepdims=True), np.array(other, np.uint8), image)
    assert measures.region_iou(foreign, scene) == pytest.approx(2 / 3)  # a colour that nothing of the scene has


def test_two_things_of_one_kind_are_one_region():
    """Two boxes have one label: in whichever of the two colours, a pixel of it is right."""
    scene, image = two_things("box", "box")
    image[32:96, 32:48] = image[32, 64]
    assert measures.region_iou(image, scene) == 1.0


def test_nearness_by_hand():
    """Distances 0, 1, 2, 4 and 50 count 1, 3/4, 1/2, 0 and 0, to the nearest of several points; of or to none it is 0."""
    points = np.array([[10.0, 10], [11, 10], [10, 12], [10, 6], [60, 10]])
    others = np.array([[10.0, 10], [100, 100]])
    assert measures.nearness(points, others) == pytest.approx((1 + 0.75 + 0.5) / 5)
    assert measures.nearness(points, others[:0]) == measures.nearness(points[:0], others) == 0.0


def test_limbs_go_from_joint_to_joint():
    """The limbs are OpenPose's first 13, those of the body; their pixels lie on people and reach every seen joint."""
    assert {(toy.KEYPOINTS[a], toy.KEYPOINTS[b]) for a, b in measures.LIMBS} == {
        *(("neck", "nose"), ("neck", "r_shoulder"), ("neck", "l_shoulder"), ("neck", "r_hip"), ("neck", "l_hip")),
        *(("r_shoulder", "r_elbow"), ("r_elbow", "r_wrist"), ("l_shoulder", "l_elbow"), ("l_elbow", "l_wrist")),
        *(("r_hip", "r_knee"), ("r_knee", "r_ankle"), ("l_hip", "l_knee"), ("l_knee", "l_ankle")),
    }
    for scene in people():
        pixels = measures.limb_pixels(scene)
        assert (scene.labels[tuple(pixels.T)] == measures.PERSON).all()
        joints = {(int(y), int(x)) for person in scene.keypoints for x, y, seen in person[:14] if seen}
        assert joints <= set(map(tuple, pixels.tolist()))


def draw_again(scene, **changes):
    """The scene's picture with its people changed."""
    things = [dataclasses.replace(t, **{k: v(t) for k, v in changes.items()}) if t.pose else t for t in scene.things]
    return toy.rendering.render(tuple(things), scene.background)[0]


@pytest.mark.parametrize(
    ("what", "changes", "low", "high"),
    [
        ("the same", {}, 0.95, 1),
        ("other arms", {"pose": lambda t: (-t.pose[0], *t.pose[1:3], -t.pose[3], *t.pose[4:])}, 0.6, 0.8),
        ("5 pixels aside", {"x": lambda t: t.x + 5}, 0.5, 0.7),
        ("a ball in its place", {"kind": lambda _: "ball"}, 0.3, 0.5),
        ("30 pixels aside", {"x": lambda t: t.x + 30 - 60 * (t.x > 64)}, 0, 0.15),
    ],
)
def test_pose_agreement_falls_with_the_distance_of_limbs(what, changes, low, high):
    """As `pose_agreement` says: a person with other arms reaches about 0.7, a ball in the person's place about 0.4."""
    values = [measures.pose_agreement(draw_again(scene, **changes), scene) for scene in people()]
    assert low < np.mean(values) < high, what


def test_pose_agreement_by_hand():
    """A body that fills its label is all near. Its lower half gone, 27 of 51 pixels of limbs are; some are near those left.

    What is found elsewhere counts against it by its share.
    """
    scene, image = two_things("person", "box")
    person = np.full((1, 18, 3), (48, 40, 1), np.float32)  # a body on a line, from the neck down to one ankle
    for name, y in (("r_hip", 60), ("r_knee", 70), ("r_ankle", 90)):
        person[0, toy.KEYPOINTS.index(name), 1] = y
    scene = dataclasses.replace(scene, keypoints=person)
    assert measures.limb_pixels(scene).tolist() == [[y, 48] for y in range(40, 91)]
    behind = scene.labels * (np.arange(128) < 70)[:, None]  # something hides the legs: they are not asked for
    assert measures.limb_pixels(dataclasses.replace(scene, labels=behind)).tolist() == [[y, 48] for y in range(40, 70)]
    assert measures.pose_agreement(image, scene) == 1.0
    image[64:96, 32:64] = toy.BACKGROUNDS[scene.background]  # rows 64 to 66 are 1 to 3 pixels from what is left
    assert measures.pose_agreement(image, scene) == pytest.approx((24 + 0.75 + 0.5 + 0.25) / 51)
    image[32:96, 0:8] = toy.COLOURS[scene.things[0].colour]  # half as many pixels again, where no person is
    found = 32 * 32 / (32 * 32 + 64 * 8)
    assert measures.pose_agreement(image, scene) == pytest.approx(found * (24 + 0.75 + 0.5 + 0.25) / 51)


def test_drawn_shading_is_how_much_of_its_colour_a_pixel_has():
    """Every colour at half and at full brightness; nan on a background."""
    for rgb in toy.COLOURS.values():
        flat = np.round(np.array([[rgb, rgb]]) * [[[0.6], [1.0]]]).astype(np.uint8)
        assert measures.drawn_shading(flat)[0] == pytest.approx([0.6, 1.0], abs=0.01)
    for rgb in toy.BACKGROUNDS.values():
        assert np.isnan(measures.drawn_shading(np.full((1, 1, 3), rgb, np.uint8))).all()


def test_shading_agreement_by_hand():
    """Of two squares one right, one too dark by 0.2: 1/2. Beside it another square where nothing should be: 1/3."""
    scene, image = two_things("ball", "box")
    normals = np.zeros((128, 128, 3), np.float32)
    normals[..., 2] = 1
    scene = dataclasses.replace(scene, normals=normals)
    shade = float(toy.shading(np.array([0, 0, 1], np.float32)))
    assert 0.9 < shade < 1
    right = image.copy()
    right[32:96, 32:96] = np.round(image[32:96, 32:96] * shade)
    assert measures.shading_agreement(right, scene) == 1.0
    changed = right.copy()
    changed[32:96, 32:96] = right[32:96, 32:96][:, ::-1]  # colours may change places
    assert measures.shading_agreement(changed, scene) == 1.0
    right[32:96, 64:96] = np.round(image[32:96, 64:96] * (shade - 0.2))
    assert measures.shading_agreement(right, scene) == 0.5
    right[32:96, 96:128] = right[32, 32]
    assert measures.shading_agreement(right, scene) == pytest.approx(1 / 3)


def test_measure_names_the_conditions_it_knows():
    """Each of the eleven has one; another is refused in words."""
    assert tuple(measures.MEASURES) == conditions.NAMES == tuple(toy.HINTS)
    with pytest.raises(ValueError, match=r"condition is 'smell', but must be one of: canny, .*depth"):
        measures.measure("smell")


def test_validation_scores_by_its_measure():
    """Floor, ceiling and score are the measure's means over (picture, what is wanted); without one, edges and truths."""
    sd, scenes = StableDiffusion.load("toy"), people()[:2]
    pictures = [s.image for s in scenes], [s.hint("depth") for s in scenes], [s.caption for s in scenes]
    measure = measures.measure("depth")
    validation = recording.Validation(sd, *pictures, 3.0, num_steps=1, measure=measure, wanted=scenes)
    plain = validation.draw(None)
    assert validation.floor == measures.mean(measure, plain, scenes)
    assert validation.ceiling == measures.mean(measure, seen_by_the_autoencoder()[:2], scenes)
    assert validation.score(plain) == 0
    assert validation.score(list(pictures[0])) == measures.score(
        measures.mean(measure, pictures[0], scenes), validation.floor, validation.ceiling
    )
    plainly = recording.Validation(sd, *pictures, 3.0, num_steps=1)
    assert plainly.floor == measures.mean(measures.edge_f1, plain, pictures[0])
    assert plainly.score(list(pictures[0])) > 1


# Words


def flat_picture(scene, side):
    """The scene's background with one flat square of `side` pixels in the colour of each thing."""
    image = np.full((128, 128, 3), toy.BACKGROUNDS[scene.background], np.uint8)
    for i, thing in enumerate(scene.things):
        image[10 : 10 + side, 40 * i : 40 * i + side] = toy.COLOURS[thing.colour]
    return image


def test_prompt_share_counts_pictures_with_every_named_colour():
    """7x7 pixels of each named colour are enough (40 are asked for), 6x6 are not; the background must be commonest."""
    scenes = [toy.scene(i, "test") for i in range(8)]
    assert {len(scene.things) for scene in scenes} >= {1, 2, 3}
    assert measures.prompt_share([flat_picture(s, 7) for s in scenes], scenes) == 1.0
    assert measures.prompt_share([flat_picture(s, 6) for s in scenes], scenes) == 0.0
    half = [flat_picture(s, 7 if i % 2 else 6) for i, s in enumerate(scenes)]
    assert measures.prompt_share([Image.fromarray(image) for image in half], scenes) == 0.5


def test_prompt_share_needs_the_named_background():
    """On another background a picture does not count, though every thing and some of the named background are there."""
    scene = toy.scene(0, "test")
    image = flat_picture(scene, 30)
    other = next(name for name in toy.BACKGROUNDS if name != scene.background)
    wrong = np.where((image == toy.BACKGROUNDS[scene.background]).all(2, keepdims=True), toy.BACKGROUNDS[other], image)
    wrong[100:120, 100:120] = toy.BACKGROUNDS[scene.background]
    assert measures.prompt_share([image, wrong.astype(np.uint8)], [scene, scene]) == 0.5


def test_prompt_share_misses_one_colour():
    """Of three things one left out is enough to fail."""
    scene = next(s for i in range(99) if len((s := toy.scene(i, "test")).things) == 3)
    image = flat_picture(scene, 20)
    assert measures.prompt_share([image], [scene]) == 1.0
    for i in range(3):
        less = image.copy()
        less[10:30, 40 * i : 40 * i + 20] = toy.BACKGROUNDS[scene.background]
        assert measures.prompt_share([less], [scene]) == 0.0


def test_a_scribble_is_followed_within_two_pixels():
    """A line two pixels off counts, three do not; and so for a picture moved against its scribble."""
    wanted = np.zeros((20, 20), bool)
    wanted[5, 5:15] = True
    assert [measures.f1(np.roll(wanted, off, axis=0), wanted, pixels=2) for off in (2, 3)] == [1.0, 0.0]
    scene = toy.scene(6, "test")
    moved, outlines = np.roll(scene.image, 2, axis=(0, 1)), scene.outlines()
    values = [measures.f1(measures.edges(moved), outlines, pixels) for pixels in (1, 2)]
    assert measures.measure("scribble")(moved, scene) == values[1] > values[0] + 0.2
