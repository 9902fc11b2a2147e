"""Lines, dots and filled ellipses on a canvas (H, W, 3) uint8, pixel for pixel as OpenCV draws them.

The poses and lines that the released ControlNets learned were drawn by OpenCV, with integer coordinates and without
antialiasing. Everything is drawn in place; what lies outside the canvas is clipped.
"""

import numpy as np

LIMIT = 100_000  # pixels: coordinates further away than this are a mistake, and would take time and memory
MOST_PIXELS = 2**27  # of a canvas, or of what a picture is enlarged to


def new_canvas(height: int, width: int) -> np.ndarray:
    """Return a black canvas (H, W, 3) uint8. Raises ValueError for a size out of range."""
    if not (1 <= height <= LIMIT and 1 <= width <= LIMIT and height * width <= MOST_PIXELS):
        raise ValueError(
            f"the size is {width}x{height} pixels, but must be 1x1 to {LIMIT}x{LIMIT}, at most {MOST_PIXELS} pixels in all: "
            "choose a lower resolution"
        )
    return np.zeros((height, width, 3), dtype=np.uint8)


def line_pixels(lines: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of all pixels of one-pixel lines on a canvas, both ends included, by Bresenham's algorithm.

    lines  (N, 4) integers x1, y1, x2, y2. As in OpenCV, each is first clipped to the canvas, then runs from its left end,
           and halves are rounded towards the start.
    """
    lines = _clip(np.array(lines, dtype=np.int64).reshape(-1, 4), height, width)
    lines = np.where(lines[:, 2:3] < lines[:, :1], lines[:, [2, 3, 0, 1]], lines)
    run = lines[:, 2:] - lines[:, :2]  # (M, 2): M lines are left
    steps = np.abs(run).max(1)
    which = np.repeat(np.arange(len(lines)), steps + 1)
    k = np.arange(len(which)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    length = np.maximum(steps, 1)[which, None]
    run = run[which]
    moved = np.sign(run) * ((2 * k[:, None] * np.abs(run) + length - 1) // (2 * length))
    x, y = (lines[which, :2] + moved).T
    return x, y


def _clip(lines: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip lines (N, 4) to the canvas, first top and bottom, then left and right; drop those outside.

    Numerics: each end moves along the line between the current ends, and its coordinates are truncated to integers.
    """
    for across, along, last in ((1, 0, height - 1), (0, 1, width - 1)):  # y, then x
        a, b = lines[:, [across, across + 2]].T
        beside = ((a < 0) & (b < 0)) | ((a > last) & (b > last))
        lines = lines[~beside]
        for end, other in ((0, 2), (2, 0)):
            outside = (lines[:, end + across] < 0) | (lines[:, end + across] > last)
            part = lines[outside]
            border = np.where(part[:, end + across] < 0, 0, last)
            run = part[:, [other + 0, other + 1]] - part[:, [end + 0, end + 1]]
            shift = (border - part[:, end + across]) * run[:, along] / run[:, across]
            part[:, end + along] += shift.astype(np.int64)
            part[:, end + across] = border
            lines[outside] = part
    return lines


def lines(canvas: np.ndarray, ends: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Draw lines (N, 4) of integers x1, y1, x2, y2, one pixel wide: cv2.line(canvas, (x1, y1), (x2, y2), colour)."""
    x, y = line_pixels(ends, *canvas.shape[:2])
    canvas[y, x] = colour


def thick_lines(canvas: np.ndarray, ends: np.ndarray, colour: tuple[int, int, int], width: float) -> None:
    """Draw lines (N, 4) of floats x1, y1, x2, y2 with round ends: all pixels within `width` / 2 of the line."""
    reach = width / 2 + 1
    for x1, y1, x2, y2 in np.asarray(ends, dtype=np.float64).reshape(-1, 4):
        first = int(np.floor(max(min(y1, y2) - reach, 0)))
        rows = np.arange(first, int(np.ceil(min(max(y1, y2) + reach, len(canvas) - 1))) + 1)
        # The part of the line that is within reach of a row, as fractions of its length, then as columns.
        fractions = (
            np.clip((rows[:, None] + (-reach, reach) - y1) / (y2 - y1), 0, 1) if y1 != y2 else [0, 1] + 0 * rows[:, None]
        )
        columns = x1 + fractions * (x2 - x1)
        y, x = _spans(canvas, rows, np.floor(columns.min(1) - reach), np.ceil(columns.max(1) + reach))
        length = max((x2 - x1) ** 2 + (y2 - y1) ** 2, 1e-9)
        along = np.clip(((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / length, 0, 1)
        near = np.hypot(x - x1 - along * (x2 - x1), y - y1 - along * (y2 - y1)) <= width / 2
        canvas[y[near], x[near]] = colour


def dot(canvas: np.ndarray, x: int, y: int, radius: int, colour: tuple[int, int, int]) -> None:
    """Fill a circle around a pixel: cv2.circle(canvas, (x, y), radius, colour, -1)."""
    half = _half_widths(radius)
    box = _box(canvas, x - radius, y - radius, x + radius, y + radius)
    rows, columns = np.ogrid[box]
    canvas[box][np.abs(columns - x) <= half[np.abs(rows - y)]] = colour


def _half_widths(radius: int) -> np.ndarray:
    """Return how far a filled circle extends to each side in the rows 0, 1, ..., `radius` from its centre."""
    half = np.zeros(radius + 1, dtype=np.int64)
    x, y, excess = radius, 0, 0  # x^2 + y^2 - radius^2 stays near 0 on the way from (radius, 0) to the diagonal
    while x >= y:
        half[y], half[x] = max(half[y], x), max(half[x], y)
        excess += 2 * y + 1
        y += 1
        if excess > 0:
            excess -= 2 * x - 1
            x -= 1
    return half


def ellipse_outline(x: int, y: int, a: int, b: int, degrees: int) -> np.ndarray:
    """Return the vertices (N, 2) of an ellipse, one per degree: cv2.ellipse2Poly((x, y), (a, b), degrees, 0, 360, 1).

    a, b     semi-axes
    degrees  angle of the first axis, from x towards y
    """
    sine = np.float32(np.round(np.sin(np.deg2rad(np.arange(360))), 7))  # Numerics: OpenCV's table has seven digits
    angle = np.arange(361) % 360
    across, along = a * np.float64(sine[(450 - angle) % 360]), b * np.float64(sine[angle])
    cosine, sine = np.float64(sine[(450 - degrees) % 360]), np.float64(sine[degrees % 360])
    corners = np.rint(np.stack([x + across * cosine - along * sine, y + across * sine + along * cosine], 1)).astype(int)
    changed = np.any(np.diff(corners, axis=0) != 0, axis=1)
    return corners[np.concatenate([[True], changed])]


def filled(canvas: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return y and x of the pixels that a convex polygon covers: cv2.fillConvexPoly.

    corners  (N, 2) integers x, y. In each row, the pixels of the outline and all those between its two sides are covered.
    """
    height, width = canvas.shape[:2]
    (x0, y0), (x1, y1) = corners.min(0), corners.max(0)
    sides = np.concatenate([corners, np.roll(corners, -1, axis=0)], axis=1).astype(np.int64)
    x, y = line_pixels(sides, height, width)
    sides = sides[sides[:, 1] != sides[:, 3]]
    sides = np.where(sides[:, 3:] < sides[:, 1:2], sides[:, [2, 3, 0, 1]], sides)  # downwards
    rows = sides[:, 3] - sides[:, 1]
    # Numerics: from row to row, a side moves by an integer number of 65536ths of a pixel, and halves are rounded up.
    twice = (sides[:, 2] - sides[:, 0]) * 2**17 + rows
    slope = np.sign(twice) * (np.abs(twice) // (2 * rows).clip(1))
    which = np.repeat(np.arange(len(sides)), rows)
    k = np.arange(len(which)) - np.repeat(np.cumsum(rows) - rows, rows)
    x = np.concatenate([x, (sides[which, 0] * 2**16 + k * slope[which] + 2**15) >> 16])
    y = np.concatenate([y, sides[which, 1] + k])
    left, right = np.full(y1 - y0 + 1, x1 + 1), np.full(y1 - y0 + 1, x0 - 1)
    np.minimum.at(left, y - y0, x)
    np.maximum.at(right, y - y0, x)
    return _spans(canvas, np.arange(y0, y1 + 1), left, right)


def _spans(canvas: np.ndarray, rows: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return y and x of the pixels from `left` to `right`, both included, in each of some rows, as far as on the canvas."""
    on = (rows >= 0) & (rows < canvas.shape[0])
    rows, left = rows[on], np.maximum(left[on], 0).astype(np.int64)
    count = np.maximum(np.minimum(right[on], canvas.shape[1] - 1).astype(np.int64) - left + 1, 0)
    return np.repeat(rows, count), np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - left, count)


def _box(canvas: np.ndarray, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
    """Return the rows and columns of the part of a box, borders included, that lies on the canvas."""
    height, width = canvas.shape[:2]
    limits = ((top, bottom, height), (left, right, width))
    low, high = zip(*((max(0, int(np.floor(a))), min(n, int(np.ceil(b)) + 1)) for a, b, n in limits), strict=True)
    return tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))
