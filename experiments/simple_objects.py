"""How exactly are simple things controlled? The paper's "simple objects" (X19), thing by thing.

The held-out scenes are drawn from three kinds of hints. For each thing: how well do the edges around it follow (F1), and
how far off, in pixels, is its outline where it is farthest off? That is the largest distance from a pixel of the true
outline to the picture's nearest edge, or from one of the picture's edges around the thing to the nearest true edge.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence

import harness
import numpy as np
from harness import Experiment, Figures, HeldOut
from PIL import Image

from minicn import ControlNet, StableDiffusion, toy
from minicn.toy import measures

AROUND = 6  # pixels from a thing up to which an edge is counted as its own
EXACT = 2.0  # pixels: a thing with no part of its outline farther off is drawn exactly
CONDITIONS = ("canny", "scribble", "depth")


def measure(experiment: Experiment) -> None:
    sd = StableDiffusion.load("toy")
    for condition in CONDITIONS:
        held_out = HeldOut(experiment, sd, condition, also=by_thing)
        held_out.row(f"{condition}: controlled", ControlNet.load(f"toy-{condition}", unet=sd.unet))


def by_thing(images: Sequence[Image.Image], scenes: Sequence[toy.Scene]) -> Figures:
    """Return the median of each kind's largest deviations, in pixels, the share of exact things, and the F1 of each kind."""
    off, f1s = defaultdict(list), defaultdict(list)
    for image, scene in zip(images, scenes, strict=True):
        found, true = measures.edges(image), measures.edges(scene.image)
        for number, thing in enumerate(scene.things):
            near = around(scene, number)
            off[thing.kind].append(deviation(found, true, scene.outlines() & (scene.owners == number), near))
            f1s[thing.kind].append(measures.f1(found & near, true & near))
    figures = {f"pixels off, {kind}": np.median(off[kind]) for kind in toy.THINGS if kind in off}
    every = np.concatenate([*off.values()])
    figures |= {"pixels off, all": np.median(every), f"at most {EXACT:g} pixels off": np.mean(every <= EXACT)}
    return figures | {f"F1, {kind}": np.mean(f1s[kind]) for kind in toy.THINGS if kind in f1s}


def around(scene: toy.Scene, number: int) -> np.ndarray:
    """Return the pixels (H, W) that are near one thing of a scene, and no farther from it than from the others."""
    mine, others = scene.owners == number, (scene.owners >= 0) & (scene.owners != number)
    for _ in range(AROUND):
        mine, others = measures.widen(mine) & ~others, measures.widen(others) & ~mine
    return mine


def deviation(found: np.ndarray, true: np.ndarray, outline: np.ndarray, near: np.ndarray) -> float:
    """Return how far off a thing's outline is where it is farthest off, in pixels; the picture's side if it has no edge.

    found, true  (H, W) bool  edges of the picture, and of the true one
    outline      (H, W) bool  the thing's true outline
    near         (H, W) bool  pixels around it
    """
    if not found.any() or not outline.any():
        return float(len(found)) if outline.any() else 0.0
    return float(max(distances(outline, found).max(), distances(found & near, true | outline).max(initial=0)))


def distances(mask: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the distance from each pixel of a mask (H, W) to the nearest one of another, (N,), in pixels."""
    points, others = np.argwhere(mask), np.argwhere(others)
    squares = (points**2).sum(1)[:, None] - 2 * points @ others.T + (others**2).sum(1)
    return np.sqrt(squares.min(1))


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main(__file__, __doc__, measure, argv, scenes=100)


if __name__ == "__main__":
    sys.exit(main())
