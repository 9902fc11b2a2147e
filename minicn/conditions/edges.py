"""Edges and straight lines: Canny's, equal to OpenCV's, and a Hough transform in place of M-LSD."""

import numpy as np
from PIL import Image

from minicn.conditions import drawing
from minicn.conditions.filters import sobel
from minicn.conditions.images import grey_hint, to_pixels


def canny(image: Image.Image | np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Return Canny edges, (H, W, 3) uint8, white on black, equal to OpenCV's Canny(image, low, high).

    image      RGB image, or (H, W, 3) or (H, W) uint8
    low, high  thresholds on |dx| + |dy| of the 3x3 Sobel filter, 0 and up: edges above `high` are kept, and so are those
               above `low` that are connected to a kept one. 100 and 200 are ControlNet's.
    Source: Canny 1986, as in OpenCV: at each pixel, the colour channel with the strongest gradient decides.
    """
    pixels = to_pixels(image)
    if not (low >= 0 and high >= 0):  # also NaN
        raise ValueError(f"canny thresholds are {low} and {high}, but must be 0 or greater")
    low, high = int(np.floor(min(low, high))), int(np.floor(max(low, high)))
    dx, dy, magnitude = (np.pad(a, 1) for a in _strongest_gradient(pixels))  # every pixel gets eight neighbours
    stride = magnitude.shape[1]
    magnitude = magnitude.ravel()
    ridge = _ridge(dx.ravel(), dy.ravel(), magnitude, np.flatnonzero(magnitude > low), stride)
    edges = _grow(ridge[magnitude[ridge] > high], ridge, magnitude.size, stride)
    return grey_hint(edges.reshape(-1, stride)[1:-1, 1:-1])


def _strongest_gradient(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return dx, dy and |dx| + |dy| (H, W) int16 of the 3x3 Sobel filter, from the channel where the sum is largest."""
    best = None
    for channel in np.moveaxis(pixels, 2, 0):
        dx, dy = sobel(channel)
        magnitude = np.abs(dx)
        magnitude += np.abs(dy)
        if best is None:
            best = dx, dy, magnitude
            continue
        stronger = magnitude > best[2]
        for kept, new in zip(best, (dx, dy, magnitude), strict=True):
            np.copyto(kept, new, where=stronger)
    return best


def _ridge(dx: np.ndarray, dy: np.ndarray, magnitude: np.ndarray, indices: np.ndarray, stride: int) -> np.ndarray:
    """Return those of the indices where the magnitude is a maximum along the gradient, rounded to 45 degrees.

    dx, dy, magnitude  padded and flattened; a row has `stride` pixels
    """
    # Numerics: OpenCV compares in fixed point, tan(22.5 degrees) * 2^15 rounded; 2 * 1020 * 2^16 fits in 32 bits.
    dx, dy, m = dx[indices], dy[indices], magnitude[indices]
    ax, ay = np.abs(dx).astype(np.int32), np.abs(dy).astype(np.int32) << 15
    tan22 = ax * 13573
    level, upright = ay < tan22, ay > tan22 + (ax << 16)
    diagonal = ~(level | upright)
    step = np.where((dx ^ dy) < 0, stride - 1, stride + 1)
    step[level], step[upright] = 1, stride
    # Of two equal neighbours the first stays; on a diagonal, neither does.
    largest = (m > magnitude[indices - step]) & (m >= magnitude[indices + step] + diagonal)
    return indices[largest]


def _grow(seeds: np.ndarray, allowed: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Return a flat mask of those allowed indices that are connected, through 8 neighbours, to a seed."""
    kept, free = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    free[allowed] = True
    kept[seeds], free[seeds] = True, False
    steps = np.array([-stride - 1, -stride, -stride + 1, -1, 1, stride - 1, stride, stride + 1])
    owner = np.empty(size, dtype=np.int32)
    front = seeds
    while front.size:  # only the pixels reached last are expanded
        reached = (front[:, None] + steps).ravel()
        reached = reached[free[reached]]
        order = np.arange(reached.size, dtype=np.int32)
        owner[reached] = order  # a pixel that was reached twice is kept once
        front = reached[owner[reached] == order]
        kept[front], free[front] = True, False
    return kept


def hough(
    image: Image.Image | np.ndarray,
    low: float = 100,
    high: float = 200,
    shortest: float | None = None,
    gap: float = 4,
    most: int = 300,
) -> np.ndarray:
    """Return the straight lines among an image's Canny edges, white on black, (H, W, 3) uint8.

    It needs no weights, unlike M-LSD, which the paper used: `draw_lines` draws what that network finds.
    low, high  Canny's thresholds
    shortest   minimum length of a line, pixels (default: a sixteenth of the shorter side, at least 8)
    gap        largest gap within a line, pixels
    most       maximum number of lines
    """
    edges = canny(image, low, high)[..., 0] > 0
    if shortest is None:
        shortest = max(8, min(edges.shape) / 16)
    dx, dy, _ = _strongest_gradient(to_pixels(image))
    across = np.arctan2(dy, dx, dtype=np.float32)
    return draw_lines(find_lines(edges, shortest, gap, most, across), *edges.shape)


def find_lines(
    edges: np.ndarray, shortest: float, gap: float = 4, most: int = 300, across: np.ndarray | None = None
) -> np.ndarray:
    """Find line segments (N, 4), x1 y1 x2 y2, in edges (H, W) bool, those of the line with the most pixels first.

    across  (H, W) radians from x towards y: the direction across the edge, if known. A pixel then votes only for lines
            within 12 degrees of its own, which keeps texture from forming lines.
    Source: the Hough transform (Duda and Hart 1972), peak by peak: the pixels of the segments found withdraw their votes,
    as in the progressive probabilistic transform (Matas et al. 2000), but deterministically. Angles are quantised to
    degrees, distances to pixels; a segment's pixels lie within 1.5 pixels of its line.
    """
    y, x = np.nonzero(edges)
    angles = np.deg2rad(np.arange(180))
    cosine, sine = np.cos(angles), np.sin(angles)
    offset = sum(edges.shape)
    columns = 2 * offset + 1
    if across is None:
        own = np.tile(np.arange(180), (len(x), 1))
    else:
        own = (np.rint(np.rad2deg(across[y, x])).astype(int)[:, None] + np.arange(-12, 13)) % 180

    def cells(pixels: np.ndarray) -> np.ndarray:  # which cell of each of its angles a pixel votes for
        angle = own[pixels]
        distance = x[pixels, None] * cosine[angle] + y[pixels, None] * sine[angle]
        return (angle * columns + np.rint(distance).astype(np.int64) + offset).ravel()

    # The pixels that vote for angle a: voters[starts[a] : starts[a + 1]].
    voters = np.argsort(own.ravel(), kind="stable") // own.shape[1]
    starts = np.concatenate([[0], np.cumsum(np.bincount(own.ravel(), minlength=180))])
    votes = np.zeros(180 * columns, dtype=np.int32)
    for pixels in np.array_split(np.arange(len(x)), len(x) // 20_000 + 1):  # in parts: a pixel votes for many cells
        votes += np.bincount(cells(pixels), minlength=votes.size).astype(np.int32)
    found, left = [], np.ones(len(x), dtype=bool)
    while len(found) < most:
        peak = int(votes.argmax())
        if votes[peak] < shortest / 2:
            break
        angle, distance = divmod(peak, columns)
        c, s = cosine[angle], sine[angle]
        near = voters[starts[angle] : starts[angle + 1]]
        near = near[left[near]]
        near = near[np.abs(x[near] * c + y[near] * s - (distance - offset)) <= 1.5]
        along = y[near] * c - x[near] * s
        order = np.argsort(along, kind="stable")
        near, along = near[order], along[order]
        runs = np.split(np.arange(len(near)), np.flatnonzero(np.diff(along) > gap + 1) + 1)
        lengths = [along[run[-1]] - along[run[0]] if len(run) else 0 for run in runs]
        # A diagonal has 0.7 pixels per unit of length; less than 0.5 is texture that happens to be aligned.
        runs = [r for r, length in zip(runs, lengths, strict=True) if length >= shortest and len(r) >= length / 2]
        votes[max(0, peak - 1) : peak + 2] = 0  # the votes of its neighbours were within reach
        for run in runs:
            first, last = near[run[[0, -1]]]
            found.append((x[first], y[first], x[last], y[last]))
        if runs:
            used = near[np.concatenate(runs)]
            left[used] = False
            np.subtract.at(votes, cells(used), 1)
    return np.array(found[:most], dtype=np.float64).reshape(-1, 4)


def draw_lines(lines: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draw lines as the official code draws M-LSD's: white on black, one pixel wide, coordinates truncated to integers.

    lines  (N, 4) x1, y1, x2, y2 in pixels; N = 0 gives a black hint, as it does there
    """
    lines = np.asarray(lines, dtype=np.float64)
    if lines.size == 0:
        lines = lines.reshape(0, 4)
    if lines.ndim != 2 or lines.shape[1] != 4:
        raise ValueError(f"lines have shape {lines.shape}, but must be (N, 4): x1, y1, x2, y2")
    if not (np.abs(lines) < drawing.LIMIT).all():
        raise ValueError(f"lines have ends that are not finite or {drawing.LIMIT} pixels away: give coordinates in pixels")
    canvas = drawing.new_canvas(height, width)
    drawing.lines(canvas, lines.astype(np.int64), (255, 255, 255))
    return canvas
