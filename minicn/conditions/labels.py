"""Label maps in the colours of ADE20K and COCO-Stuff."""

from pathlib import Path

import numpy as np

from minicn.conditions import palettes
from minicn.conditions.images import open_image


def ade20k(labels: np.ndarray, first: int = 0, unlabelled: int | None = None) -> np.ndarray:
    """Colour a label map with ADE20K's 150 colours, (H, W, 3) uint8 RGB.

    labels      (H, W) integers: `first` is wall, `first` + 149 flag (names: `palettes.ADE20K_NAMES`)
    first       0, as in predictions; the dataset's own files start at 1
    unlabelled  label that becomes black, e.g. 0 in the dataset's own files; the released models never saw black
    Raises ValueError, naming the value, for a label outside the range.
    """
    return _paint(labels, palettes.ADE20K_COLOURS, first, unlabelled, "ADE20K")


def coco_stuff(labels: np.ndarray, first: int = 1, unlabelled: int | None = 0) -> np.ndarray:
    """Colour a label map with colours for COCO-Stuff's 182 classes, (H, W, 3) uint8 RGB.

    labels      (H, W) integers: `first` is person, `first` + 181 wood (names: `palettes.COCO_STUFF_NAMES`)
    first       1, as in the dataset's ids; its PNG files ("stuffthingmaps") start at 0
    unlabelled  label that becomes black: 0 among the ids, 255 in those PNG files
    Raises ValueError, naming the value, for a label outside the range.
    """
    return _paint(labels, palettes.COCO_STUFF_COLOURS, first, unlabelled, "COCO-Stuff")


def _paint(labels: np.ndarray, colours: np.ndarray, first: int, unlabelled: int | None, name: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}, but must be integers of shape (H, W)")
    index = labels.astype(np.int64) - first
    empty = np.zeros(labels.shape, dtype=bool) if unlabelled is None else labels == unlabelled
    wrong = labels[~empty & ((index < 0) | (index >= len(colours)))]
    if wrong.size:
        raise ValueError(
            f"label {wrong[0]} is outside {name}'s range {first} to {first + len(colours) - 1} ({wrong.size} such pixels): "
            "check which label is the first, and which one marks unlabelled pixels"
        )
    return np.where(empty[..., None], np.uint8(0), colours[np.where(empty, 0, index)])


def read_labels(path: str | Path) -> np.ndarray:
    """Read a label map (H, W) int64 from a single-channel image, or from the indices of a palette image.

    Raises FileNotFoundError or ValueError, naming the file, if it is not an image or has several channels.
    """
    image = open_image(path)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N"):
        raise ValueError(
            f"{path} is not a label map: expected a single channel of integers, got {', '.join(image.getbands())}"
        )
    return np.array(image).astype(np.int64)
