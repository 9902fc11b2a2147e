"""Poses: the skeletons of OpenPose and OpenPifPaf, drawn from key points and from the JSON files that hold them."""

from pathlib import Path

import numpy as np

from minicn.checkpoints import files
from minicn.conditions import drawing
from minicn.conditions.images import check_version

KEY_POINTS = "a JSON file of key points"

# OpenPose's 18 points: nose, neck, right shoulder, elbow, wrist, the same on the left, right hip, knee, ankle, the same on
# the left, right eye, left eye, right ear, left ear. Limbs are pairs of points, numbered from 0, in the order of their
# colours: 13 of the body, then 4 of the face.
OPENPOSE_LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
OPENPOSE_COLOURS = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85)),
    *((0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255)),
    *((255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
BODY_25 = (*range(8), *range(9, 19))  # OpenPose's 18 points among its newer 25

MOST_PEOPLE = 500  # of a hint: more take minutes to draw

# COCO's 17 points: nose, left eye, right eye, left ear, right ear, left shoulder, right shoulder, then elbows, wrists,
# hips, knees, ankles. The skeleton and its colours are OpenPifPaf's: matplotlib's tab20, in the order of the limbs.
OPENPIFPAF_LIMBS = (
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8)),
    *((7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
)
OPENPIFPAF_COLOURS = (
    *((31, 119, 180), (174, 199, 232), (255, 127, 14), (255, 187, 120), (44, 160, 44), (152, 223, 138)),
    *((214, 39, 40), (255, 152, 150), (148, 103, 189), (197, 176, 213), (140, 86, 75), (196, 156, 148)),
    *((227, 119, 194), (247, 182, 210), (127, 127, 127), (199, 199, 199), (188, 189, 34), (219, 219, 141)),
    *((23, 190, 207),),
)


def openpose(people: np.ndarray, height: int, width: int, version: str = "v1.1", threshold: float = 0.1) -> np.ndarray:
    """Draw OpenPose skeletons as ControlNet learned them: coloured limbs and joints on black, (H, W, 3) uint8 RGB.

    people     (P, 18, 3) x, y in pixels and confidence (0: absent), in OpenPose's order of the 18 COCO points
    version    "v1.1": limbs at 60% brightness, then joints on top; "v1.0": joints, then limbs over them, 60% opaque
    threshold  points of this confidence or less are left out; 0.1 in the official code
    Joints are dots of radius 4, limbs ellipses 8 pixels wide; everyone's limb 1 is drawn before limb 2. No hands or faces.
    """
    check_version(version)
    people = _check_people(people, 18)
    seen = people[..., 2] > threshold
    canvas = drawing.new_canvas(height, width)

    def joints():
        for j, colour in enumerate(OPENPOSE_COLOURS):
            for x, y in people[seen[:, j], j, :2].astype(int):
                drawing.dot(canvas, x, y, 4, colour)

    if version == "v1.0":
        joints()
    for (a, b), colour in zip(OPENPOSE_LIMBS, OPENPOSE_COLOURS, strict=False):  # a joint more than limbs
        for start, end in people[seen[:, a] & seen[:, b]][:, (a, b), :2]:
            x, y = ((start + end) / 2).astype(int)
            dx, dy = start - end
            half, angle = int(np.hypot(dx, dy) / 2), int(np.degrees(np.arctan2(dy, dx)))
            inside = drawing.filled(canvas, drawing.ellipse_outline(x, y, half, 4, angle))
            under = canvas[inside] if version == "v1.0" else np.zeros(3)
            canvas[inside] = np.rint(0.4 * under + 0.6 * np.array(colour))
    if version == "v1.1":
        joints()
    return canvas


def openpifpaf(people: np.ndarray, height: int, width: int, threshold: float = 0.1) -> np.ndarray:
    """Draw OpenPifPaf skeletons on black, (H, W, 3) uint8 RGB.

    people     (P, 17, 3) x, y in pixels and confidence (0: absent), in COCO's order of the 17 points
    threshold  points of this confidence or less are left out
    Neither the weights of the paper's OpenPifPaf model nor its drawing code were released. These are OpenPifPaf's own 19
    limbs and colours, 4 pixels wide with round ends, and white dots of radius 2 for the joints.
    """
    people = _check_people(people, 17)
    seen = people[..., 2] > threshold
    canvas = drawing.new_canvas(height, width)
    for (a, b), colour in zip(OPENPIFPAF_LIMBS, OPENPIFPAF_COLOURS, strict=True):
        drawing.thick_lines(canvas, people[seen[:, a] & seen[:, b]][:, (a, b), :2].reshape(-1, 4), colour, 4)
    for x, y in np.rint(people[seen][:, :2]).astype(int):
        drawing.dot(canvas, x, y, 2, (255, 255, 255))
    return canvas


def _check_people(people: np.ndarray, points: int) -> np.ndarray:
    """Return people as float64, absent points as zeros, whatever their coordinates. Raises ValueError for anything else."""
    try:
        people = np.asarray(people, dtype=np.float64)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"people are no array of numbers of shape (P, {points}, 3): {error}") from error
    if people.ndim != 3 or people.shape[1:] != (points, 3):
        raise ValueError(f"people have shape {people.shape}, but must be (P, {points}, 3): x, y, confidence")
    if len(people) > MOST_PEOPLE:
        raise ValueError(f"there are {len(people)} people, but at most {MOST_PEOPLE} can be drawn: leave some out")
    people = np.where(people[..., 2:] <= 0, 0, people)
    wrong = np.argwhere(~np.isfinite(people) | (np.abs(people) > drawing.LIMIT))
    if len(wrong):
        person, point, what = wrong[0]
        raise ValueError(
            f"point {point} of person {person} has {('x', 'y', 'confidence')[what]} {people[tuple(wrong[0])]:g}: "
            f"give coordinates in pixels, at most {drawing.LIMIT} away, and confidence 0 for an absent point"
        )
    return people


def read_openpose(path: str | Path, size: tuple[int, int] | None = None) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Read the people (P, 18, 3) of an OpenPose JSON file, and the (height, width) of the image if it states them.

    size  height and width of the image, in place of those that the file states
    Coordinates that are fractions of the size are multiplied by it.
    COCO-18 or BODY_25, by the number of values; BODY_25's feet and mid-hip are left out.
    Raises FileNotFoundError or ValueError for another format or a file without people.
    """
    found = files.parse_json(files.read_text(path, KEY_POINTS), path, KEY_POINTS)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, dict) or not isinstance(found.get("people"), list):
        raise ValueError(f'{path} is not an OpenPose key-point file: it has no list "people"')
    people = []
    for i, person in enumerate(found["people"]):
        if not isinstance(person, dict) or "pose_keypoints_2d" not in person:
            raise ValueError(f'{path}: person {i} has no "pose_keypoints_2d": run OpenPose with its body model')
        values = person["pose_keypoints_2d"]
        if values:  # null or empty: only face or hands were seen
            points = _points(path, i, values, (18, 25), "COCO's 18 or BODY_25's 25 points")
            people.append(points if len(points) == 18 else [points[part] for part in BODY_25])
    return _people(path, people, size or _size(path, found, "canvas_height", "canvas_width"))


def read_openpifpaf(path: str | Path, size: tuple[int, int] | None = None) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Read the people (P, 17, 3) of an OpenPifPaf prediction or a COCO annotation file, and (height, width) if stated.

    size  height and width of the image, in place of those that the file states
    Coordinates that are fractions of the size are multiplied by it.
    OpenPifPaf writes a list of objects with "keypoints"; COCO an object with "annotations" (and "images").
    Raises FileNotFoundError or ValueError for another format, several images or a file without people.
    """
    found = files.parse_json(files.read_text(path, KEY_POINTS), path, KEY_POINTS)
    if isinstance(found, dict) and isinstance(found.get("annotations"), list):
        images = found.get("images")
        if isinstance(images, list) and len(images) == 1 and isinstance(images[0], dict):
            size = size or _size(path, images[0], "height", "width")
        found = found["annotations"]
        if len({str(entry.get("image_id")) for entry in found if isinstance(entry, dict)}) > 1:
            raise ValueError(f"{path} annotates several images: give a file with one")
    if not isinstance(found, list) or not all(isinstance(entry, dict) and "keypoints" in entry for entry in found):
        raise ValueError(f'{path} is not an OpenPifPaf or COCO key-point file: it has no list of objects with "keypoints"')
    people = [_points(path, i, entry["keypoints"], (17,), "COCO's 17 points") for i, entry in enumerate(found)]
    return _people(path, people, size)


def _points(path: str | Path, person: int, values: object, counts: tuple[int, ...], names: str) -> list[list]:
    """Return a flat list x, y, confidence, x, ... as one list a point; those of confidence 0 or null as zeros."""
    points = [values[i : i + 3] for i in range(0, len(values), 3)] if isinstance(values, list) else []
    points = [[0, 0, 0] if point[2:] in ([0], [None]) else point for point in points]
    numbers = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) for point in points for v in point
    )
    if not numbers or len(values) not in {3 * count for count in counts}:
        found = f"{len(values)} values" if numbers else "no list of numbers"
        raise ValueError(
            f"{path}: person {person} has {found}; expected {' or '.join(str(3 * count) for count in counts)}, "
            f"three for each of {names}"
        )
    return points


def _size(path: str | Path, found: dict, height: str, width: str) -> tuple[int, int] | None:
    """Return the height and width that a file states, if it does. Raises ValueError if they are no size of an image."""
    size = found.get(height), found.get(width)
    if None in size:
        return None
    if not all(isinstance(side, int | float) and 0 < side <= drawing.LIMIT and side == int(side) for side in size):
        raise ValueError(f"{path} states a size of {size[1]}x{size[0]} pixels: correct it, or give another (--size)")
    return int(size[0]), int(size[1])


def _people(path: str | Path, people: list, size: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Check the people of a file, and convert fractions of the size to pixels."""
    if not people:
        raise ValueError(f"{path} contains no people: the hint would be empty")
    try:
        people = _check_people(people, len(people[0]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    seen = people[(people[..., 2] > 0) & people[..., :2].any(axis=2)][:, :2]  # some tools write (0, 0) for an absent point
    # No person is 2 pixels tall: fractions, of which a tenth may lie further outside than the image is large.
    if len(seen) and np.quantile(np.abs(seen - 0.5), 0.9) <= 1.5:
        if size is None:
            raise ValueError(
                f"{path} has coordinates in [0, 1]: multiply them by the image's width and height, or give its size (--size)"
            )
        people = people * [size[1], size[0], 1]
    return people, size
