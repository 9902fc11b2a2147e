"""The toy world: small scenes with picture, caption and the ground truth that the paper's conditions need.

A scene holds one to three things (ball, box, cone, ring, star, person) in named colours on a named background. The
camera is orthographic and looks slightly down, the light comes from the upper left; every surface is drawn from a
closed form, so depth, normals, labels and key points are exact. A scene is a pure function of (index, split).

Axes: x to the right and y down in pixels, z towards the viewer; `normals` have y up, as normal maps do.
"""

import io
import itertools
import math
import operator
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from tqdm import tqdm

from minicn import conditions
from minicn.conditions import palettes
from minicn.toy.rendering import BACKGROUNDS, COLOURS, SIZE, THINGS, Thing, render
from minicn.toy.sketching import sketch

RELATIONS = ("beside", "above", "in front of")
SHADES = (0.45, 0.6, 0.75, 0.9, 1.0)  # brightnesses at which `name_colours` knows a colour


@dataclass(frozen=True, repr=False)
class Scene:
    """A picture and everything that is known about it.

    image      (128, 128, 3)  uint8    RGB
    caption    str                     "a red ball beside a yellow person on a white background"
    depth      (128, 128)     float32  in [0, 1], larger is nearer (as in MiDaS), 0 on the background
    normals    (128, 128, 3)  float32  unit length; x right, y up, z towards the viewer; background (0, 0, 1)
    labels     (128, 128)     uint8    0 background, else 1 + place in THINGS
    owners     (128, 128)     int8     place in `things` of the thing that is seen, -1 on the background
    keypoints  (P, 18, 3)     float32  x, y in pixels, and 1 where the point is seen, else 0; one row per person
    """

    index: int
    split: str
    things: tuple[Thing, ...]
    background: str
    caption: str
    image: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    labels: np.ndarray
    owners: np.ndarray
    keypoints: np.ndarray

    @property
    def colours(self) -> tuple[str, ...]:
        """Name every colour that the caption names, the background's last."""
        return (*(thing.colour for thing in self.things), self.background)

    def hint(self, condition: str) -> np.ndarray:
        """Make the hint of a condition, (128, 128, 3) uint8, from what is known of the scene.

        The hint is black for the pose of a scene without people, or the straight lines of one that has none.
        Raises ValueError for an unknown condition.
        """
        if condition not in HINTS:
            raise ValueError(f"condition is {condition!r}, but must be one of: {', '.join(HINTS)}")
        return HINTS[condition](self)

    def classes(self, condition: str) -> np.ndarray:
        """Return the labels in the numbering of a data set, (128, 128) uint8, as `conditions.CONDITION` reads them.

        condition  "ade20k" or "coco_stuff"
        """
        names, of, first = CLASSES[condition]
        return np.array([first + of.index(name) for name in names], np.uint8)[self.labels]

    def __repr__(self) -> str:
        return f"<toy scene {self.index} of {self.split}: {self.caption}>"

    def _repr_png_(self) -> bytes:
        """Let notebooks show the picture."""
        buffer = io.BytesIO()
        Image.fromarray(self.image).save(buffer, "png")
        return buffer.getvalue()

    def outlines(self, inner: bool = False) -> np.ndarray:
        """Return where things end, (128, 128) bool: the outermost pixels of each thing that is in front there.

        inner  also the edges between the faces of boxes and stars
        """
        depth = np.pad(self.depth, 1, mode="edge")
        owners = np.pad(self.owners, 1, mode="edge")
        lines = np.zeros((SIZE, SIZE), bool)
        for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)):  # the neighbours above, below, left and right
            there = np.s_[y : y + SIZE, x : x + SIZE]
            lines |= (owners[there] != self.owners) & (depth[there] < self.depth)
        if inner:
            faces = np.isin(self.labels, [1 + THINGS.index(kind) for kind in ("box", "star")])
            for axis in (0, 1):  # a face is flat, so its normals are all alike
                this, following = (np.s_[:-1, :], np.s_[1:, :]) if axis == 0 else (np.s_[:, :-1], np.s_[:, 1:])
                turned = (self.normals[this] * self.normals[following]).sum(2) < 0.999
                lines[this] |= faces[this] & (self.owners[this] == self.owners[following]) & turned
        return lines


def scene(index: int, split: str = "train") -> Scene:
    """Draw scene number `index` of a split; the same on every machine.

    index  0 and up
    split  "train" or "test". No scene is in both: the first thing of a train scene stands on an even pixel column,
           of a test scene on an odd one.
    Raises ValueError for another split or a negative index, TypeError for one that is no integer.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split is {split!r}, but the toy world has "train" and "test"')
    index = operator.index(index)
    if index < 0:
        raise ValueError(f"index is {index}, but scenes are numbered from 0")
    things, background, relation = _composed(index, split)
    return Scene(index, split, things, background, _caption(things, background, relation), *render(things, background))


def scenes(
    count: int,
    split: str = "train",
    condition: str | None = None,
    first: int = 0,
    only: Collection[int] | None = None,
) -> Iterator[Scene]:
    """Draw `count` scenes of a split, one after the other, with a progress bar.

    condition  for a pose only scenes with people, whose hint shows something; else, and for None, every scene
    first      the number of the first scene
    only       of these scenes, counted from 0, those to draw; by default all
    """
    numbers: Iterable[int] = itertools.count(first)
    if condition in ("openpose", "openpifpaf"):
        numbers = (i for i in numbers if any(thing.kind == "person" for thing in _composed(i, split)[0]))
    numbers = (i for place, i in enumerate(itertools.islice(numbers, count)) if only is None or place in only)
    total = count if only is None else len(only)
    for number in tqdm(numbers, desc=f"drawing {split} scenes", unit="scene", total=total, leave=False):
        yield scene(number, split)


def name_colours(image: np.ndarray) -> np.ndarray:
    """Name the colour of every pixel: its place in (*COLOURS, *BACKGROUNDS), by the nearest known shade.

    image  (H, W, 3) uint8
    """
    shades, owners = _shades()
    # |p - s|^2 = |p|^2 - 2 p.s + |s|^2, and |p|^2 is the same for every shade.
    pixels = image.reshape(-1, 3).astype(np.float32)
    distance = (shades**2).sum(1) - 2 * pixels @ shades.T
    return owners[distance.argmin(1)].reshape(image.shape[:2])


def shows_caption(image: np.ndarray, scene: Scene, least: int = 40) -> bool:
    """Return whether the commonest colour is the named background and every named colour covers `least` pixels."""
    names = [*COLOURS, *BACKGROUNDS]
    counts = np.bincount(name_colours(image).ravel(), minlength=len(names))
    background_is_commonest = names[counts.argmax()] == scene.background
    return background_is_commonest and all(counts[names.index(colour)] >= least for colour in scene.colours)


def captions() -> list[str]:
    """List one example of every sentence form with every word in it: what a tokenizer must know."""
    a, b, c = ("a red ball", "a blue box", "a green star")
    forms = [([a], ""), *(([a, b], relation) for relation in RELATIONS), ([a, b, c], "")]
    forms += [([name], "") for name in thing_names()]
    return [sentence(names, background, relation) for names, relation in forms for background in BACKGROUNDS]


def thing_names() -> list[str]:
    """List every thing in every colour: "a red ball", "a red box", ..."""
    return [f"{_article(colour)} {kind}" for colour in COLOURS for kind in THINGS]


def sentence(names: list[str], background: str, relation: str = "") -> str:
    """Describe one to three things and their background; one of RELATIONS joins a pair."""
    said = f"{names[0]}, {names[1]} and {names[2]}" if len(names) == 3 else f" {relation} ".join(names)
    return f"{said} on a {background} background"


@lru_cache
def _shades() -> tuple[np.ndarray, np.ndarray]:
    """Every colour at every shade (N, 3), and which colour each row belongs to (N,)."""
    rows = [(np.array(rgb) * shade, i) for i, rgb in enumerate(COLOURS.values()) for shade in SHADES]
    rows += [(np.array(rgb), len(COLOURS) + i) for i, rgb in enumerate(BACKGROUNDS.values())]
    return np.array([rgb for rgb, _ in rows], np.float32), np.array([i for _, i in rows])


# Composition: what stands where


def _composed(index: int, split: str) -> tuple[tuple[Thing, ...], str, str]:
    """Return the composition of scene number `index` of a split."""
    # Numerics: random() of a seeded random.Random is the one stream that Python promises never to change.
    return _compose(random.Random(index * 2 + (split == "test")).random, odd=split == "test")


def _compose(draw, odd: bool) -> tuple[tuple[Thing, ...], str, str]:
    """Choose things, background and how the things stand to each other."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * draw()

    def pick(options):
        return options[int(draw() * len(options))]

    relation = pick(("alone", "alone", "alone", "beside", "beside", "above", "in front of", "row", "row", "triangle"))
    wobble = [(between(-5, 5), between(-5, 5)) for _ in range(3)]
    if relation == "alone":
        places = [(between(48, 80), between(50, 78), between(34, 46))]
    elif relation == "beside":
        places = [(35, between(52, 76), between(22, 28)), (93, between(52, 76), between(22, 28))]
    elif relation == "above":
        places = [(between(50, 78), 34, between(22, 26)), (between(50, 78), 94, between(22, 26))]
    elif relation == "in front of":
        side = pick((-1, 1))
        places = [(64 + side * between(14, 20), 78, between(22, 27)), (64 - side * between(12, 18), 54, between(26, 32))]
    elif relation == "row":
        places = [(x, between(54, 74), between(17, 20)) for x in (22, 64, 106)]
    else:
        places = [(34, 92, between(20, 24)), (94, 92, between(20, 24)), (64, 34, between(20, 24))]
    if relation != "row" and draw() < 0.5:  # left and right are alike
        places = [(SIZE - x, y, radius) for x, y, radius in places]
    order = sorted(COLOURS, key=lambda _: draw())
    things = []
    for i, (x, y, radius) in enumerate(places):
        kind = pick(THINGS)
        x, y = x + wobble[i][0] * (len(places) < 3), y + wobble[i][1]
        if kind == "person":  # people are tall and thin: let them grow where there is room above and below
            radius = min(radius * 1.35, SIZE - 4 - y, y - 4)
        if i == 0:
            x = 2 * math.floor(x / 2) + odd
        pose = tuple(between(-1, 1) for _ in range(6)) if kind == "person" else ()
        z = 60.0 if relation == "in front of" and i == 0 else 0.0
        things.append(Thing(kind, order[i], x, y, radius, z, between(0, 1), pose))
    return tuple(things), pick(list(BACKGROUNDS)), relation


def _article(colour: str) -> str:
    return ("an " if colour[0] in "aeiou" else "a ") + colour


def _caption(things: tuple[Thing, ...], background: str, relation: str) -> str:
    names = [f"{_article(thing.colour)} {thing.kind}" for thing in things]
    if relation == "above" and things[0].y > things[1].y:
        names.reverse()
    return sentence(names, background, relation)


# Hints: what is known of a scene, drawn by the functions that draw a picture's


# The classes used for the background and for each of THINGS: of those that fit, the ones with colours far apart.
ADE20K = ("wall", "ball", "box", "tent", "plate", "light", "person")
COCO_STUFF = ("wall-other", "sports ball", "suitcase", "umbrella", "donut", "flower", "person")
CLASSES = {"ade20k": (ADE20K, palettes.ADE20K_NAMES, 0), "coco_stuff": (COCO_STUFF, palettes.COCO_STUFF_NAMES, 1)}
# COCO's 17 points, as places in KEYPOINTS: it has no neck, and each left point stands before the right one.
COCO_POINTS = (0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10)


def soft_edges(image: np.ndarray) -> np.ndarray:
    """Return the soft edges of a toy picture, (128, 128, 3) uint8, by the filter that needs no weights.

    No warning says that this is not the HED network's: on the toy the filter is what a ControlNet learns from.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return conditions.hed(image)


def drawing(scene: Scene) -> np.ndarray:
    """The scene as a drawing, black strokes on white, (128, 128, 3) uint8.

    Three in four scenes of "train" are drawn as by hand; the others, and those of "test", which are measured, as exact
    outlines of three pixels.
    """
    if scene.split == "train" and scene.index % 4:
        return sketch(scene.things, scene.outlines(inner=scene.index % 2 == 1), scene.owners, scene.index)
    thick = np.pad(scene.outlines(), 1)
    thick = np.any([thick[y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)], axis=0)
    return np.repeat(np.where(thick, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _line_drawing(scene: Scene) -> np.ndarray:
    """The scene's outlines and inner edges, white on black, (128, 128, 3) uint8."""
    return np.repeat((scene.outlines(inner=True) * np.uint8(255))[..., None], 3, axis=2)


HINTS: dict[str, Callable[[Scene], np.ndarray]] = {
    "canny": lambda scene: conditions.canny(scene.image),
    "hough": lambda scene: conditions.hough(scene.image),
    "scribble": lambda scene: conditions.scribble(drawing(scene)),
    "hed": lambda scene: soft_edges(scene.image),
    "openpose": lambda scene: conditions.openpose(scene.keypoints, SIZE, SIZE),
    "openpifpaf": lambda scene: conditions.openpifpaf(scene.keypoints[:, COCO_POINTS], SIZE, SIZE),
    "ade20k": lambda scene: conditions.ade20k(scene.classes("ade20k")),
    "coco_stuff": lambda scene: conditions.coco_stuff(scene.classes("coco_stuff")),
    "normal": lambda scene: conditions.normal(scene.normals),
    "lineart": _line_drawing,
    "depth": lambda scene: conditions.depth(scene.depth),
}
