"""The measures of following: edges against edges, words against colours, on pictures drawn by hand."""

import numpy as np
import pytest
from PIL import Image

from minicn import measures, toy


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


def test_mean_edge_f1_is_the_mean_over_pairs():
    """Of F1 = 1 and F1 = 0 the mean is a half; lists of different lengths are refused."""
    assert measures.mean_edge_f1([square(), FLAT], [square(), square()]) == 0.5
    with pytest.raises(ValueError, match="argument"):
        measures.mean_edge_f1([square()], [square(), square()])


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
