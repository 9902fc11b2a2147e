"""Twenty drawings as people make them, for toy-scribble: none comes out of the code that drew its training hints.

A stroke is a row of corner points, in units of the thing's size. The hand that draws it hurries: it rounds corners, drifts
off the line and back, starts early or ends late, and leaves circles open.
"""

import math
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minicn import ControlNet, StableDiffusion, conditions
from minicn.toy import judging
from minicn.trainer import recording

SIZE = 128


def arc(x, y, rx, ry, begin=0.0, end=360.0):
    """Points of an ellipse's arc; degrees, clockwise from the right."""
    turns = [math.radians(begin + (end - begin) * i / 24) for i in range(25)]
    return [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns]


def star(points=5, inner=0.42):
    tips = [
        (1, -90 + 360 * i / points) if j == 0 else (inner, -90 + 360 * (i + 0.5) / points)
        for i in range(points)
        for j in (0, 1)
    ]
    corners = [(r * math.cos(math.radians(a)), r * math.sin(math.radians(a))) for r, a in tips]
    return [[*corners, corners[0]]]


def person(left=(-0.55, 0.1), right=(0.55, 0.1), feet=(-0.35, 0.35)):
    """A stick figure: head, spine, one stroke for both arms, one for both legs."""
    spine = [(0, -0.48), (0, 0.25)]
    arms = [left, (0, -0.3), right]
    legs = [(feet[0], 1), (0, 0.25), (feet[1], 1)]
    return [arc(0, -0.72, 0.23, 0.23), spine, arms, legs]


BALL = [arc(0, 0, 1, 1, 20, 372)]
UNCLOSED = [arc(0, 0, 1, 1, -60, 275)]
CONE = [[(-0.85, 0.75), (0, -1), (0.85, 0.75)], arc(0, 0.75, 0.85, 0.25, 0, 180)]
RING = [arc(0, 0, 1, 1), arc(0, 0, 0.55, 0.55)]
BOX = [
    [(-0.9, -0.3), (0.1, -0.1), (0.1, 0.95), (-0.9, 0.7), (-0.9, -0.3)],
    [(-0.9, -0.3), (-0.1, -0.75), (0.9, -0.5), (0.1, -0.1)],
    [(0.9, -0.5), (0.9, 0.5), (0.1, 0.95)],
]

# kind, colour, strokes, middle, size, pen in pixels, how unsteady the hand is in pixels
DRAWINGS = [
    ("ball", "red", BALL, (64, 64), 34, 2, 1.5),
    ("ball", "blue", BALL, (50, 70), 24, 4, 2),
    ("ball", "green", UNCLOSED, (70, 60), 30, 3, 1.5),
    ("ball", "purple", [*BALL, arc(0.04, 0.03, 0.96, 1.0, 100, 450)], (64, 66), 32, 1, 2),
    ("cone", "orange", CONE, (64, 66), 36, 2, 1.5),
    ("cone", "yellow", CONE, (56, 64), 28, 3, 2),
    ("ring", "blue", RING, (64, 64), 36, 2, 1.5),
    ("ring", "red", RING, (72, 58), 28, 2, 1),
    ("box", "green", BOX, (64, 64), 34, 2, 1.5),
    ("box", "orange", BOX, (60, 68), 28, 3, 1),
    ("star", "yellow", star(), (64, 66), 38, 2, 1.5),
    ("star", "red", star(), (60, 62), 32, 3, 1.5),
    ("person", "red", person(), (64, 64), 46, 2, 1.5),
    ("person", "blue", person(), (64, 66), 44, 4, 1),
    ("person", "green", person(left=(-0.5, -0.65), right=(0.5, -0.65)), (64, 66), 46, 3, 1.5),
    ("person", "purple", person(right=(0.55, -0.6)), (60, 66), 44, 3, 1),
    ("person", "orange", person(feet=(-0.2, 0.2)), (68, 64), 46, 2, 1),
    ("person", "yellow", person(left=(-0.6, -0.3), right=(0.6, -0.3), feet=(-0.5, 0.5)), (64, 64), 44, 4, 1.5),
    ("person", "red", person(left=(-0.35, 0.25), right=(0.35, 0.25), feet=(-0.25, 0.25)), (64, 66), 40, 3, 1),
    ("person", "blue", person(left=(-0.6, 0.0), right=(0.5, -0.6)), (66, 64), 46, 1, 1.5),
]


def by_hand(strokes, middle, size, pen, unsteady, seed):
    """Draw strokes as a hurried hand does, dark on white, (128, 128) RGB."""
    draw = random.Random(seed)
    picture = Image.new("RGB", (4 * SIZE, 4 * SIZE), "white")  # four times as large: smooth lines
    canvas = ImageDraw.Draw(picture)
    for stroke in strokes:
        corners = np.array(stroke, float) * size + middle
        along = np.concatenate([[0], np.linalg.norm(np.diff(corners, axis=0), axis=1).cumsum()])
        at = np.arange(draw.uniform(-3, 1), along[-1] + draw.uniform(-1, 3), 1.0)
        line = np.stack([np.interp(at.clip(0, along[-1]), along, column) for column in corners.T], 1)
        for axis in (0, 1):  # a hand that drifts off and comes back: a random walk with a spring
            drift, speed = 0.0, 0.0
            for i in range(len(line)):
                speed = 0.85 * speed - 0.02 * drift + 0.09 * unsteady * draw.gauss(0, 1)
                drift += speed
                line[i, axis] += drift
        ink = draw.choice(["black", (40, 40, 60), (70, 50, 40)])
        canvas.line([tuple(4 * point) for point in line], ink, 4 * pen, joint="curve")
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def drawn():
    """What toy-scribble makes of the drawings, each of them one thing on white."""
    sd = StableDiffusion.load("toy")
    net = ControlNet.load("toy-scribble", unet=sd.unet)
    hints = recording.stack([conditions.scribble(by_hand(*rest, seed=i)) for i, (_, _, *rest) in enumerate(DRAWINGS)])
    prompts = [f"a {colour} {kind} on a white background" for kind, colour, *_ in DRAWINGS]
    return sd.generate(prompts, hint=hints.float() / 255, controlnet=net, guidance_scale=3.0)


def test_drawings_by_hand_are_understood(drawn):
    """Exactly the thing that is drawn, in the colour that is asked for, and nothing else: 19 of the 20, 7 of the 8 people
    (the judge overlooks the third arm of one). Another processor's rounding may tip one or two.
    """
    judge = judging.Judge.load()
    right = [
        judge.see(image) == ({colour: kind}, "white") for image, (kind, colour, *_) in zip(drawn, DRAWINGS, strict=True)
    ]
    people = [ok for ok, (kind, *_) in zip(right, DRAWINGS, strict=True) if kind == "person"]
    assert sum(right) >= 17, right
    assert sum(people) >= 6, people
