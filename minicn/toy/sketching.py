"""Drawings of toy scenes as people scribble them: wobbly, broken, unclosed or double lines, people as stick figures."""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from minicn.toy.rendering import BONES, SIZE, Thing, pose

NARROWEST, WIDEST = 1, 5  # pixels, of a pen
STICKS = 0.6  # how many of the people are stick figures


def sketch(things: Sequence[Thing], lines: np.ndarray, owners: np.ndarray, seed: int) -> np.ndarray:
    """Draw a scene as a hand would, black strokes on white, (128, 128, 3) uint8.

    lines   (128, 128) bool  the exact drawing
    owners  (128, 128) int8  place in `things` of the thing that is seen, -1 on the background

    Every line is a row of points. A hand moves them smoothly, leaves some out, and may go over the lines twice.
    """
    draw = random.Random(seed).random
    width = NARROWEST + int((WIDEST - NARROWEST + 1) * draw())
    wobble, gaps, times = 3.5 * draw(), max(0.0, 0.6 * draw() - 0.3), 1 + (draw() < 0.3)
    drawn = np.zeros((SIZE, SIZE), bool)
    for number, thing in enumerate(things):
        if thing.kind == "person" and draw() < STICKS:
            points = _stick_figure(thing)
            owner = owners[tuple(points.round().astype(int).clip(0, SIZE - 1).T[::-1])]
            points = points[(owner == number) | (owner < 0)]  # not what is behind another thing
        else:
            points = np.argwhere(lines & (owners == number))[:, ::-1].astype(np.float32)
        for _ in range(times):
            moved = points + wobble * np.stack([_waves(points, draw), _waves(points, draw)], 1)
            _dot(drawn, moved[_waves(points, draw) > 2 * gaps - 1], width)
    return np.repeat(np.where(drawn, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _waves(points: np.ndarray, draw: Callable[[], float]) -> np.ndarray:
    """Return a smooth number in [-1, 1] for each of the points (N, 2): three waves of 25 to 90 pixels, in any direction."""
    total = np.zeros(len(points), np.float32)
    for _ in range(3):
        angle, length, phase = 2 * math.pi * draw(), 25 + 65 * draw(), 2 * math.pi * draw()
        along = points[:, 0] * math.cos(angle) + points[:, 1] * math.sin(angle)
        total += np.sin(along * (2 * math.pi / length) + phase) / 3
    return total


def _stick_figure(thing: Thing) -> np.ndarray:
    """Return points (N, 2) of a person's bones and of a circle for the head."""
    joints, tall = pose(thing), 2 * thing.radius
    t = np.linspace(0, 1, 64, dtype=np.float32)[:, None]
    rows = [np.array(joints[a]) * (1 - t) + np.array(joints[b]) * t for a, b, _ in BONES]
    ring = np.concatenate([np.cos(2 * math.pi * t), np.sin(2 * math.pi * t)], 1)
    rows.append(np.array(joints["head"]) + 0.105 * tall * ring)
    return (np.concatenate(rows) + (thing.x, thing.y)).astype(np.float32)


def _dot(drawn: np.ndarray, points: np.ndarray, width: int) -> None:
    """Set the pixels under a round pen of some pixels at each point."""
    steps = np.arange(width) - (width - 1) / 2
    for dy in steps:
        for dx in steps:
            if dx * dx + dy * dy <= width * width / 4 + 0.25:
                x, y = np.rint(points + (dx, dy)).astype(int).T
                inside = (x >= 0) & (x < SIZE) & (y >= 0) & (y < SIZE)
                drawn[y[inside], x[inside]] = True
