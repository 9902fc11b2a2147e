"""Names and colours of the classes of segmentation hints: 150 of ADE20K, 182 of COCO-Stuff, read from palettes.csv."""

from pathlib import Path

import numpy as np


def _read(palette: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names and the colours (N, 3) uint8 of a palette, in the order of its labels."""
    lines = Path(__file__).with_suffix(".csv").read_text("utf-8").splitlines()
    rows = [line.split(",") for line in lines if line.startswith(f"{palette},")]
    return tuple(row[5] for row in rows), np.array([row[2:5] for row in rows], dtype=np.uint8)


ADE20K_NAMES, ADE20K_COLOURS = _read("ade20k")
COCO_STUFF_NAMES, COCO_STUFF_COLOURS = _read("coco_stuff")  # entry 0 is person, whose id is 1
