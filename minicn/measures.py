"""How well pictures follow: edges against edges, words against colours.

    following score = (F1 - floor) / (ceiling - floor)

F1 compares the Canny edges of a generated picture with those of the true one, with a pixel of tolerance; the floor is
what the same prompts and seeds reach without control, the ceiling what the autoencoder leaves of the true picture.
"""

import numpy as np
from PIL import Image

from minicn import conditions, toy


def edge_f1(image: np.ndarray | Image.Image, truth: np.ndarray | Image.Image) -> float:
    """Return the F1 of the Canny edges of a picture against those of the truth, one pixel of tolerance, in [0, 1].

    image, truth  RGB pictures of one size, uint8
    """
    found, wanted = (conditions.canny(picture)[..., 0] > 0 for picture in (image, truth))
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision = (found & widen(wanted)).sum() / found.sum()
    recall = (wanted & widen(found)).sum() / wanted.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def widen(mask: np.ndarray) -> np.ndarray:
    """Return a mask (H, W) grown by one pixel in all eight directions."""
    p = np.pad(mask, 1)
    rows = p[:-2] | p[1:-1] | p[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def mean_edge_f1(images: list, truths: list) -> float:
    """Return the mean `edge_f1` over pairs of pictures."""
    return float(np.mean([edge_f1(image, truth) for image, truth in zip(images, truths, strict=True)]))


def score(f1: float, floor: float, ceiling: float) -> float:
    """Return the following score: 0 at the floor, 1 at the ceiling."""
    return (f1 - floor) / (ceiling - floor)


def prompt_share(images: list, scenes: list[toy.Scene]) -> float:
    """Return the share of pictures whose commonest colour is the named background and that show every named colour."""
    return float(np.mean([toy.shows_caption(np.asarray(i), s) for i, s in zip(images, scenes, strict=True)]))
