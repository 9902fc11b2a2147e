"""How well pictures follow: what the hint said, looked for in the picture; the prompt's words against its colours.

    following score = (value - floor) / (ceiling - floor)

The value, in [0, 1], compares a generated picture with its scene by what the condition says, see `measure`; the floor is
what the same prompts and seeds reach without control, the ceiling what the autoencoder preserves of the true picture.

A hint says where things are, the prompt in which colours. So where things are found by their colours (poses and
segmentations), the caption's colours may be swapped; `prompt_share` looks at the colours themselves.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from minicn import conditions, toy

NOTHING = 255  # label of a pixel whose colour no thing of the scene has
REACH = 4.0  # pixels at which a limb counts as lost: about as wide as one
SHADING = 0.1  # difference up to which two shadings agree; a surface of the toy world has 0.48 to 1
LIMBS = conditions.OPENPOSE_LIMBS[:13]  # without those of the face, which the toy's people do not have


def measure(condition: str) -> Callable[[np.ndarray | Image.Image, toy.Scene], float]:
    """Return the function (image, scene) -> value in [0, 1] that says how well a picture follows a condition.

    canny                  F1 of the picture's Canny edges against the true picture's
    hough, hed             F1 of its lines or soft edges, by the condition's own function, against the hint's
    scribble               F1 of its Canny edges against the scene's outlines, with two pixels of tolerance: a hand is not
                           exact, and the drawings that it was trained on are up to 3.5 pixels off
    lineart                the same with one pixel, inner edges, too
    openpose, openpifpaf   how near the limbs found in it are to the true ones, see `pose_agreement`
    ade20k, coco_stuff     mean intersection over union of the regions of its colours with the labels
    normal, depth          share of pixels with the shading that the scene's surfaces have, see `shading_agreement`
    All other F1 with one pixel of tolerance. Raises ValueError for an unknown condition.
    """
    if condition not in MEASURES:
        raise ValueError(f"condition is {condition!r}, but must be one of: {', '.join(MEASURES)}")
    return MEASURES[condition]


def mean(measure: Callable, images: Sequence, wanted: Sequence) -> float:
    """Return the mean of a measure over pictures and what each is compared with: a scene, or a picture for `edge_f1`."""
    return float(np.mean([measure(image, each) for image, each in zip(images, wanted, strict=True)]))


def score(value: float, floor: float, ceiling: float) -> float:
    """Return the following score: 0 at the floor, 1 at the ceiling."""
    return (value - floor) / (ceiling - floor)


# Lines


def edge_f1(image: np.ndarray | Image.Image, truth: np.ndarray | Image.Image) -> float:
    """Return the F1 of the Canny edges of a picture against those of the truth, one pixel of tolerance, in [0, 1].

    image, truth  RGB pictures of one size, uint8
    """
    return f1(edges(image), edges(truth))


def edges(image: np.ndarray | Image.Image) -> np.ndarray:
    """Return where a picture has Canny edges, (H, W) bool."""
    return conditions.canny(image)[..., 0] > 0


def f1(found: np.ndarray, wanted: np.ndarray, pixels: int = 1) -> float:
    """Return the F1 of the pixels of two masks (H, W), with some pixels of tolerance; 1 if both are empty."""
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision = (found & widen(wanted, pixels)).sum() / found.sum()
    recall = (wanted & widen(found, pixels)).sum() / wanted.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def widen(mask: np.ndarray, pixels: int = 1) -> np.ndarray:
    """Return a mask (H, W) grown by some pixels in all eight directions."""
    for _ in range(pixels):
        p = np.pad(mask, 1)
        rows = p[:-2] | p[1:-1] | p[2:]
        mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask


def strong(hint: np.ndarray) -> np.ndarray:
    """Return where a hint (H, W, 3) is more than half white, (H, W) bool."""
    return hint[..., 0] > 127


# Regions


def found_labels(image: np.ndarray | Image.Image, scene: toy.Scene) -> Iterator[np.ndarray]:
    """Yield the label map (H, W) that the colours of a picture draw, for each way to assign them to the things.

    Each pixel has the label of the thing whose colour it has, 0 in the background's colour, else NOTHING.
    """
    names = [*toy.COLOURS, *toy.BACKGROUNDS]
    named = toy.name_colours(np.asarray(image))
    kinds = [1 + toy.THINGS.index(thing.kind) for thing in scene.things]
    for colours in itertools.permutations(thing.colour for thing in scene.things):
        label_of = np.full(len(names), NOTHING, np.uint8)
        label_of[names.index(scene.background)] = 0
        for kind, colour in zip(kinds, colours, strict=True):
            label_of[names.index(colour)] = kind
        yield label_of[named]


def mean_iou(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the mean over the labels in `wanted` of intersection / union of two label maps (H, W)."""
    pairs = [(found == label, wanted == label) for label in np.unique(wanted)]
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))


def region_iou(image: np.ndarray | Image.Image, scene: toy.Scene) -> float:
    """Return the mean intersection over union of a picture's regions of colour with the scene's labels, in [0, 1]."""
    return max(mean_iou(found, scene.labels) for found in found_labels(image, scene))


# People


def limb_pixels(scene: toy.Scene) -> np.ndarray:
    """Return the pixels (N, 2), row and column, that the middle lines of people's limbs cross, where a person is seen."""
    lines = np.zeros((toy.SIZE, toy.SIZE), bool)
    for person in scene.keypoints:
        for a, b in LIMBS:
            start, end = person[a, 1::-1], person[b, 1::-1]
            steps = np.linspace(0, 1, 2 + int(2 * np.abs(end - start).max()))[:, None]  # at least two a pixel
            points = np.floor(start + (end - start) * steps).astype(int)
            row, column = points[((points >= 0) & (points < toy.SIZE)).all(1)].T
            lines[row, column] = True
    return np.argwhere(lines & (scene.labels == PERSON))


def pose_agreement(image: np.ndarray | Image.Image, scene: toy.Scene) -> float:
    """Return how near the limbs found in a picture are to those of the scene's people, in [0, 1].

    A person of the toy world has one colour, so its limbs are found as the pixels of that colour. Nearness falls
    linearly from 1 at distance 0 to 0 at REACH. The value is a product of two means: of the pixels along the true limbs
    to the nearest pixel found (is each limb there?), and of the pixels found to the nearest pixel of a true person (is
    nothing else there?). A ball in the person's place would reach about 0.4, a person with other arms 0.7.
    """
    limbs, body = limb_pixels(scene), np.argwhere(scene.labels == PERSON)
    pixels = [np.argwhere(found == PERSON) for found in found_labels(image, scene)]
    return max(nearness(limbs, each) * nearness(each, body) for each in pixels)


def nearness(points: np.ndarray, others: np.ndarray) -> float:
    """Return the mean over points (N, 2) of max(0, 1 - distance / REACH) to the nearest of the others (M, 2)."""
    if not len(points) or not len(others):
        return 0.0
    # |p - q|^2 = |p|^2 - 2 p.q + |q|^2
    squares = (points**2).sum(1)[:, None] - 2 * points @ others.T + (others**2).sum(1)
    return float(np.maximum(0, 1 - np.sqrt(np.maximum(squares.min(1), 0)) / REACH).mean())


# Surfaces


def drawn_shading(image: np.ndarray | Image.Image) -> np.ndarray:
    """Return how bright each thing's colour is in a picture, (H, W) float, 1 as in toy.COLOURS; nan where no thing is."""
    pixels = np.asarray(image).astype(np.float64)
    named = toy.name_colours(np.asarray(image))
    colours = np.array([*toy.COLOURS.values(), *((np.nan,) * 3 for _ in toy.BACKGROUNDS)])[named]
    return (pixels * colours).sum(2) / (colours**2).sum(2)


def true_shading(scene: toy.Scene) -> np.ndarray:
    """Return how bright the lamp makes the scene's surfaces, from their normals, (H, W) float; nan on the background."""
    return np.where(scene.labels > 0, toy.shading(scene.normals), np.nan)


def shading_agreement(image: np.ndarray | Image.Image, scene: toy.Scene) -> float:
    """Return the share of pixels whose shading is that of the scene's surfaces, to within SHADING, in [0, 1].

    The pixels where the scene or the picture shows a thing are counted; where only one does, they disagree. Normals
    show in a picture as shading alone. So does depth: its slopes are the normals, and its steps are where one thing
    ends.
    """
    drawn, true = drawn_shading(image), true_shading(scene)
    counted = ~(np.isnan(drawn) & np.isnan(true))
    return float((np.abs(drawn - true) <= SHADING)[counted].mean()) if counted.any() else 1.0


PERSON = 1 + toy.THINGS.index("person")
MEASURES = {
    "canny": lambda image, scene: edge_f1(image, scene.image),
    "hough": lambda image, scene: f1(strong(conditions.hough(image)), strong(scene.hint("hough"))),
    "scribble": lambda image, scene: f1(edges(image), scene.outlines(), pixels=2),
    "hed": lambda image, scene: f1(strong(toy.soft_edges(np.asarray(image))), strong(scene.hint("hed"))),
    "openpose": pose_agreement,
    "openpifpaf": pose_agreement,
    "ade20k": region_iou,
    "coco_stuff": region_iou,
    "normal": shading_agreement,
    "lineart": lambda image, scene: f1(edges(image), scene.outlines(inner=True)),
    "depth": shading_agreement,
}


def prompt_share(images: list, scenes: list[toy.Scene]) -> float:
    """Return the share of pictures whose commonest colour is the named background and that show every named colour."""
    return float(np.mean([toy.shows_caption(np.asarray(i), s) for i, s in zip(images, scenes, strict=True)]))
