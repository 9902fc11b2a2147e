"""Key points as tools and people write them: units, absent points, sizes, numbers of any kind."""

import json
import time

import numpy as np
import pytest

from minicn import __main__, conditions
from minicn.conditions import drawing
from minicn.conditions.networks.bodypose import find_peaks
from minicn.conditions.poses import MOST_PEOPLE

NAN = float("nan")
STANDING = np.stack([np.linspace(0.3, 0.6, 18), np.linspace(0.1, 0.9, 18), np.ones(18)], 1)  # fractions of the size


def written(tmp_path, people, **more):
    (tmp_path / "p.json").write_text(json.dumps({"people": [{"pose_keypoints_2d": p} for p in people], **more}))
    return tmp_path / "p.json"


def coco(tmp_path, people, **size):
    (tmp_path / "c.json").write_text(json.dumps({"images": [size], "annotations": [{"keypoints": p} for p in people]}))
    return tmp_path / "c.json"


def flat(points):
    return np.asarray(points, float).ravel().tolist()


def run(*arguments):
    return __main__.main(["condition", *map(str, arguments)])


# Units


@pytest.mark.parametrize("outside", [(1.04, 0.5), (-0.2, 1.3), (7.0, 3.0)])
def test_fractions_that_lie_a_little_outside_are_fractions(tmp_path, outside):
    """Feet below the picture, a hand beside it, one point anywhere: the others say what the unit is."""
    points = STANDING.copy()
    points[10, :2] = outside
    want = points * [640, 480, 1]
    people, _ = conditions.read_openpose(written(tmp_path, [flat(points)], canvas_width=640, canvas_height=480))
    assert np.allclose(people[0], want)
    people, _ = conditions.read_openpifpaf(coco(tmp_path, [flat(points[:17])], width=640, height=480))
    assert np.allclose(people[0], want[:17])


def test_pixels_stay_pixels(tmp_path):
    """Few points of which most are (0, 0) at full confidence, as some tools mark absence; and a small figure in a corner."""
    few = np.zeros((18, 3)) + [0, 0, 1]
    few[:2, :2] = (300, 200), (310, 220)
    for points in (few, STANDING * [20, 20, 1]):
        people, _ = conditions.read_openpose(written(tmp_path, [flat(points)], canvas_width=640, canvas_height=480))
        assert np.array_equal(people[0], points)


def test_a_given_size_turns_fractions_into_pixels(tmp_path):
    """Where the file states none, or another."""
    for stated in ({}, {"canvas_width": 1, "canvas_height": 1}):
        path = written(tmp_path, [flat(STANDING)], **stated)
        people, size = conditions.read_openpose(path, (48, 64))
        assert size == (48, 64)
        assert np.allclose(people[0], STANDING * [64, 48, 1])
        run("openpose", path, tmp_path / "hint.png", "--size", "64x48")
        assert conditions.load_image(tmp_path / "hint.png").size == (64, 48)


# Absent points


@pytest.mark.parametrize(
    "absent", [[NAN, NAN, 0], [None, None, 0], [1e300, -1e300, 0], ["x", {}, 0], [None] * 3, [9, 9, -1], [10**400, 0, 0.0]]
)
def test_what_an_absent_point_holds_is_not_looked_at(tmp_path, absent):
    values = flat(STANDING * [64, 48, 1])
    values[12:15] = absent
    want = STANDING * [64, 48, 1]
    want[4] = 0
    people, _ = conditions.read_openpose(written(tmp_path, [values], canvas_width=64, canvas_height=48))
    assert np.array_equal(people[0], want)
    people, _ = conditions.read_openpifpaf(coco(tmp_path, [values[:51]], width=64, height=48))
    assert np.array_equal(people[0], want[:17])


def test_absent_points_of_arrays_are_not_looked_at_either():
    points = STANDING[None] * [64, 48, 1]
    with_nan = points.copy()
    with_nan[0, 3] = (NAN, 1e300, 0)
    points[0, 3] = 0
    assert np.array_equal(conditions.openpose(with_nan, 48, 64), conditions.openpose(points, 48, 64))
    assert np.array_equal(conditions.openpifpaf(with_nan[:, :17], 48, 64), conditions.openpifpaf(points[:, :17], 48, 64))


# Numbers


HUGE = {
    "an integer of 400 digits": (10**400, "too large"),
    "a float beyond the canvas": (1e300, "has x 1e+300: give coordinates in pixels"),
    "infinity": (float("inf"), "has x inf"),
    "a word": ("12", "has no list of numbers"),
    "a truth": (True, "has no list of numbers"),
}


@pytest.mark.parametrize("case", HUGE)
def test_odd_numbers_are_refused_by_the_name_of_the_file(tmp_path, refused, case):
    number, words = HUGE[case]
    values = [number, *flat(STANDING)[1:]]
    for name, path in (("openpose", written(tmp_path, [values])), ("openpifpaf", coco(tmp_path, [values[:51]]))):
        line = refused(run, name, path, tmp_path / "hint.png", "--size", "64x64")
        assert path.name in line
        assert words in line
    assert not (tmp_path / "hint.png").exists()


SIZES = {
    "of 30 GB": (
        (100_000, 100_000),
        "the size is 100000x100000 pixels, but must be 1x1 to 100000x100000, at most 134217728",
    ),
    "too wide": ((100_001, 9), "states a size of 100001x9 pixels: correct it, or give another (--size)"),
    "beyond 64 bits": ((9, 2**80), "states a size of 9x1208925819614629174706176 pixels"),
    "of 400 digits": ((10**400, 9), "states a size of 1000"),
    "negative": ((-5, 9), "states a size of -5x9"),
    "broken": ((9.5, 9), "states a size of 9.5x9"),
    "not a number": ((NAN, 9), "states a size of nanx9"),
    "a word": (("a\x1b[2J", 9), "states a size of a\\x1b[2Jx9"),
}


@pytest.mark.parametrize("case", SIZES)
def test_odd_sizes_are_refused_before_anything_is_drawn(tmp_path, refused, monkeypatch, case):
    (width, height), words = SIZES[case]
    monkeypatch.setattr(np, "zeros", lambda *_, **__: pytest.fail("allocated"))
    line = refused(run, "openpose", written(tmp_path, [flat(STANDING)], canvas_width=width, canvas_height=height), "h.png")
    assert "p.json" in line
    assert words in line
    assert len(line) < 800


def test_sizes_are_whole_numbers_of_any_kind(tmp_path):
    for size in ((64, 48), (64.0, 48.0)):
        found = conditions.read_openpose(written(tmp_path, [flat(STANDING)], canvas_width=size[0], canvas_height=size[1]))[1]
        assert found == (48, 64)
        assert {type(side) for side in found} == {int}


def test_more_people_than_can_be_drawn_are_refused(tmp_path, refused):
    path = written(tmp_path, [flat(STANDING)] * (MOST_PEOPLE + 1), canvas_width=64, canvas_height=64)
    assert f"p.json: there are {MOST_PEOPLE + 1} people, but at most" in refused(run, "openpose", path, tmp_path / "h.png")


# Cost


def test_drawing_costs_what_is_drawn():
    """A limb across 4096x4096 pixels: not as much as all of them, which took 16 bytes each."""
    import tracemalloc

    canvas = drawing.new_canvas(4096, 4096)
    tracemalloc.start()
    try:
        start = time.process_time()
        canvas[drawing.filled(canvas, drawing.ellipse_outline(2048, 2048, 2900, 4, 45))] = 255
        drawing.thick_lines(canvas, [(0.0, 4095.0, 4095.0, 0.0), (0.0, 9.0, 4095.0, 9.0)], (255, 0, 0), 4)
        assert tracemalloc.get_traced_memory()[1] < 10e6
        assert time.process_time() - start < 0.5
    finally:
        tracemalloc.stop()
    assert canvas[0, 4095].tolist() == canvas[4095, 0].tolist() == canvas[9, 2000].tolist() == [255, 0, 0]


def test_of_a_plateau_of_peaks_some_are_kept():
    """The highest, in the order of the map: matching each with each would take 10^10 steps for 300x300 of them."""
    heat = np.full((60, 200), 0.5)
    heat[:, 100:] = 1
    peaks = find_peaks(heat)
    assert len(peaks) == MOST_PEOPLE
    assert peaks[:, 2].min() == 1
    assert (np.diff(peaks[:, 1] * 200 + peaks[:, 0]) > 0).all()
