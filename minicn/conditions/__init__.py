"""From what a person has to a hint: one function per condition, and the reading and sizing of pictures and hints.

Source: the conventions of the released annotators of ControlNet v1.0 and v1.1 (colour order, polarity, thresholds,
limbs, drawing order, resizing). Where the two differ, v1.1 is the default and `version="v1.0"` the older one. Every hint is
(H, W, 3) uint8 RGB; lines are white on black. Left out: the networks themselves (`annotators` holds three of them), hands
and faces of poses.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minicn.conditions import drawing, palettes
from minicn.inputs import hint_tensor, to_rgb

NAMES = (
    *("canny", "hough", "scribble", "hed", "openpose", "openpifpaf"),
    *("ade20k", "coco_stuff", "normal", "lineart", "depth"),
)
VERSIONS = ("v1.1", "v1.0")

# OpenPose's 18 points: nose, neck, right shoulder, elbow, wrist, the same left, right hip, knee, ankle, the same left,
# right eye, left eye, right ear, left ear. Limbs are pairs of points, counted from 0, in the order of their colours.
OPENPOSE_LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
OPENPOSE_COLOURS = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85)),
    *((0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255)),
    *((255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
BODY_25 = (*range(8), *range(9, 19))  # where OpenPose's 18 points stand among its newer 25

# COCO's 17 points: nose, left eye, right eye, left ear, right ear, left shoulder, right shoulder, then elbows, wrists,
# hips, knees, ankles. OpenPifPaf's skeleton, and its painter's colours: matplotlib's tab20, in the order of the limbs.
OPENPIFPAF_LIMBS = (
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8)),
    *((7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
)
OPENPIFPAF_COLOURS = (
    *((31, 119, 180), (174, 199, 232), (255, 127, 14), (255, 187, 120), (44, 160, 44), (152, 223, 138)),
    *((214, 39, 40), (255, 152, 150), (148, 103, 189), (197, 176, 213), (140, 86, 75), (196, 156, 148)),
    *((227, 119, 194), (247, 182, 210), (127, 127, 127), (199, 199, 199), (188, 189, 34), (219, 219, 141)),
    *((23, 190, 207),),
)


# Reading and sizing


def load_image(path: str | Path) -> Image.Image:
    """Read any picture that Pillow reads as 8-bit RGB: turned by its EXIF tag, alpha composited over white.

    Raises FileNotFoundError or ValueError, naming the file, if there is no whole picture.
    """
    image = _open(path)
    try:
        return to_rgb(image)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _open(path: str | Path) -> Image.Image:
    """Read a whole picture of any mode, turned by its EXIF tag."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: name a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is an error here
            image = Image.open(path)
        with image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise ValueError(f"{image.width}x{image.height} pixels are more than Pillow's limit of {limit}: shrink it")
            image.load()
            return ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error


def load_hint(path: str | Path) -> Tensor:
    """Read a picture as a hint (1, 3, H, W) in [0, 1]."""
    return hint_tensor(load_image(path))


def resize_hint(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize a hint picture to the size of the picture to draw: smoothly down, without new colours up."""
    smaller = height * width < image.width * image.height
    return image.resize((width, height), Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)


def official_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Return the height and width that the official apps give a picture: the shorter side near `resolution`.

    Both sides are rounded to multiples of 64 (halves to the even multiple), and are 64 at least.
    """
    scale = resolution / min(height, width)
    new = tuple(max(64, round(side * scale / 64) * 64) for side in (height, width))
    if new[0] * new[1] > 2**27:
        raise ValueError(f"{width}x{height} pixels would become {new[1]}x{new[0]}: choose a smaller resolution, or cut it")
    return new


def official_resize(image: Image.Image | np.ndarray, resolution: int) -> Image.Image:
    """Resize an RGB picture as the official apps do before they look for a condition.

    OpenCV's Lanczos filter over 8 pixels if the shorter side grows, else the mean over the area of each new pixel.
    """
    pixels = _pixels(image)
    height, width = official_size(*pixels.shape[:2], resolution)
    return Image.fromarray(resample(pixels, height, width, "lanczos" if resolution > min(pixels.shape[:2]) else "area"))


def resample(array: np.ndarray, height: int, width: int, kind: str) -> np.ndarray:
    """Resize an array (H, W) or (H, W, C) of uint8 or float as cv2.resize does; uint8 stays so, within a grey level.

    kind  "nearest", "linear", "area" or "lanczos" (OpenCV's INTER_NEAREST, _LINEAR, _AREA, _LANCZOS4)
    """
    if kind == "area" and (height > array.shape[0] or width > array.shape[1]):
        kind = "area upwards"
    values = array if kind == "nearest" or array.dtype == np.float64 else array.astype(np.float32)
    for axis, size in ((0, height), (1, width)):
        if size != values.shape[axis]:
            values = _resample_axis(values, axis, size, kind)
    if array.dtype == np.uint8 and values.dtype != np.uint8:
        values = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return values


def _resample_axis(values: np.ndarray, axis: int, size: int, kind: str) -> np.ndarray:
    """Resize one axis: each new pixel is a weighted sum of the `taps` old ones from its `first` on."""
    old = values.shape[axis]
    scale, new = old / size, np.arange(size)
    if kind == "nearest":
        return np.take(values, np.minimum((new * scale).astype(int), old - 1), axis=axis)
    if kind == "area":
        first, taps = np.floor(new * scale + 1e-6).astype(int), int(np.ceil(scale)) + 1
        place = first[:, None] + np.arange(taps)
        weights = np.minimum(place + 1, ((new + 1) * scale)[:, None]) - np.maximum(place, (new * scale)[:, None])
        weights = np.clip(weights, 0, None)
    elif kind == "area upwards":  # what OpenCV does if one side grows: pixels as blocks, with narrow ramps between
        first = np.floor(new * scale).astype(int)
        share = np.clip(new + 1 - (first + 1) / scale, 0, None)
        weights = np.stack([1 - (share - np.floor(share)), share - np.floor(share)], axis=1)
    else:
        middle = (new + 0.5) * scale - 0.5
        reach = 4 if kind == "lanczos" else 1
        first = np.floor(middle).astype(int) - reach + 1
        distance = middle[:, None] - first[:, None] - np.arange(2 * reach)
        weights = np.sinc(distance) * np.sinc(distance / 4) if kind == "lanczos" else 1 - np.abs(distance)
    weights = (weights / weights.sum(1, keepdims=True)).astype(values.dtype)
    shape = [1] * values.ndim
    shape[axis] = size
    # Numerics: a picture repeats its border outwards.
    parts = (
        np.take(values, np.clip(first + k, 0, old - 1), axis=axis) * weights[:, k].reshape(shape)
        for k in range(weights.shape[1])
    )
    total = next(parts)
    for part in parts:
        total += part
    return total


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return a picture as (H, W, 3) or (H, W, 1) uint8. Raises ValueError for another array."""
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"image is {image.dtype} of shape {image.shape}, but must be uint8 of shape (H, W, 3)")
    if image.size == 0:
        raise ValueError(f"image has shape {image.shape}: it holds no pixel")
    return image if image.ndim == 3 else image[..., None]


def _grey(values: np.ndarray) -> np.ndarray:
    """Return values (H, W), booleans or uint8, as a hint (H, W, 3) of equal channels; booleans are white where true."""
    if values.dtype == bool:
        values = values * np.uint8(255)
    return np.repeat(values[..., None], 3, axis=2)


def _check_version(version: str) -> None:
    if version not in VERSIONS:
        raise ValueError(f"version is {version!r}, but must be one of: {', '.join(VERSIONS)}")


def _check_canvas(height: int, width: int) -> None:
    if not (1 <= height <= drawing.LIMIT and 1 <= width <= drawing.LIMIT):
        raise ValueError(f"the size is {width}x{height} pixels, but must be 1x1 to {drawing.LIMIT}x{drawing.LIMIT}")


# Canny


def canny(image: Image.Image | np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Return Canny edges, (H, W, 3) uint8, white on black, equal to OpenCV's Canny(image, low, high).

    image      RGB picture, or (H, W, 3) or (H, W) uint8
    low, high  thresholds on |dx| + |dy| of the 3x3 Sobel filter, 0 and up: edges above `high` are kept, and those
               above `low` that touch a kept one. 100 and 200 are ControlNet's.
    Source: Canny 1986, as in OpenCV: the colour channel with the strongest gradient counts at each pixel.
    """
    pixels = _pixels(image)
    if not (low >= 0 and high >= 0):  # also NaN
        raise ValueError(f"canny with thresholds {low} and {high}: needs thresholds from 0")
    low, high = int(np.floor(min(low, high))), int(np.floor(max(low, high)))
    dx, dy, magnitude = (_frame(a) for a in _strongest_gradient(pixels))
    stride = magnitude.shape[1]
    magnitude = magnitude.ravel()
    ridge = _ridge(dx.ravel(), dy.ravel(), magnitude, np.flatnonzero(magnitude > low), stride)
    edges = _grow(ridge[magnitude[ridge] > high], ridge, magnitude.size, stride)
    return _grey(edges.reshape(-1, stride)[1:-1, 1:-1])


def _frame(array: np.ndarray) -> np.ndarray:
    """Put zeros around an array (H, W), so that every pixel has eight neighbours."""
    return np.pad(array, 1)


def _strongest_gradient(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return dx, dy and |dx| + |dy| (H, W) int16 of the 3x3 Sobel filter, from the channel where the sum is largest."""
    best = None
    for channel in np.moveaxis(pixels, 2, 0):
        dx, dy = _sobel(channel)
        magnitude = np.abs(dx)
        magnitude += np.abs(dy)
        if best is None:
            best = dx, dy, magnitude
            continue
        stronger = magnitude > best[2]
        for kept, new in zip(best, (dx, dy, magnitude), strict=True):
            np.copyto(kept, new, where=stronger)
    return best


def _sobel(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """3x3 Sobel derivatives of (H, W), the border repeated outwards: int16 for uint8, else of the same type."""
    p = np.pad(values, 1, mode="edge")
    p = p.astype(np.int16) if p.dtype == np.uint8 else p
    across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
    dx = across[:-2] + 2 * across[1:-1] + across[2:]
    dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return dx, dy


def _ridge(dx: np.ndarray, dy: np.ndarray, magnitude: np.ndarray, places: np.ndarray, stride: int) -> np.ndarray:
    """Return those of the places where the magnitude is the largest along the gradient, rounded to 45 degrees.

    dx, dy, magnitude  framed and flat; `stride` places are one row
    """
    # Numerics: OpenCV compares in fixed point, tan(22.5 degrees) * 2^15 rounded; 2 * 1020 * 2^16 fits into 32 bits.
    dx, dy, m = dx[places], dy[places], magnitude[places]
    ax, ay = np.abs(dx).astype(np.int32), np.abs(dy).astype(np.int32) << 15
    tan22 = ax * 13573
    level, upright = ay < tan22, ay > tan22 + (ax << 16)
    diagonal = ~(level | upright)
    step = np.where((dx ^ dy) < 0, stride - 1, stride + 1)
    step[level], step[upright] = 1, stride
    # Of two equal neighbours the first stays, but on a diagonal none.
    largest = (m > magnitude[places - step]) & (m >= magnitude[places + step] + diagonal)
    return places[largest]


def _grow(seeds: np.ndarray, allowed: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Return, flat and framed, which of the allowed places are connected, over 8 neighbours, to a seed."""
    kept, free = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    free[allowed] = True
    kept[seeds], free[seeds] = True, False
    steps = np.array([-stride - 1, -stride, -stride + 1, -1, 1, stride - 1, stride, stride + 1])
    owner = np.empty(size, dtype=np.int32)
    front = seeds
    while front.size:  # only the places reached last are looked at
        reached = (front[:, None] + steps).ravel()
        reached = reached[free[reached]]
        order = np.arange(reached.size, dtype=np.int32)
        owner[reached] = order  # of a place that was reached twice, one stays
        front = reached[owner[reached] == order]
        kept[front], free[front] = True, False
    return kept


# Straight lines


def hough(
    image: Image.Image | np.ndarray,
    low: float = 100,
    high: float = 200,
    shortest: float | None = None,
    gap: float = 4,
    most: int = 300,
) -> np.ndarray:
    """Return the straight lines of a picture's Canny edges, white on black, (H, W, 3) uint8.

    The weightless stand-in for M-LSD, which the paper used: `draw_lines` draws what that network finds.
    low, high  Canny's thresholds
    shortest   length of the shortest line, pixels (default: a sixteenth of the shorter side, 8 at least)
    gap        longest hole in a line, pixels
    most       lines, at most
    """
    edges = canny(image, low, high)[..., 0] > 0
    if shortest is None:
        shortest = max(8, min(edges.shape) / 16)
    dx, dy, _ = _strongest_gradient(_pixels(image))
    across = np.arctan2(dy, dx, dtype=np.float32)
    return draw_lines(find_lines(edges, shortest, gap, most, across), *edges.shape)


def find_lines(
    edges: np.ndarray, shortest: float, gap: float = 4, most: int = 300, across: np.ndarray | None = None
) -> np.ndarray:
    """Find line segments (N, 4), x1 y1 x2 y2, in edges (H, W) bool, the line of the most pixels first.

    across  (H, W) radians from x towards y: the direction across the edge, if known. A pixel then counts only for lines
            within 12 degrees of its own, which keeps texture from forming lines.
    Source: the Hough transform (Duda and Hart 1972), one peak after the other: the pixels of the segments found take back
    their votes, as in the progressive probabilistic transform (Matas et al. 2000), but without chance. Angles are counted
    in degrees, distances in pixels; a segment's pixels lie within 1.5 pixels of its line.
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
        turn = own[pixels]
        distance = x[pixels, None] * cosine[turn] + y[pixels, None] * sine[turn]
        return (turn * columns + np.rint(distance).astype(np.int64) + offset).ravel()

    # The pixels that count for angle a: voters[starts[a] : starts[a + 1]].
    voters = np.argsort(own.ravel(), kind="stable") // own.shape[1]
    starts = np.concatenate([[0], np.cumsum(np.bincount(own.ravel(), minlength=180))])
    votes = np.zeros(180 * columns, dtype=np.int32)
    for pixels in np.array_split(np.arange(len(x)), len(x) // 20_000 + 1):  # Numerics: many cells a pixel, so in parts
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
        # A diagonal has 0.7 pixels a pixel of length; what has less than 0.5 is texture that happens to lie in a row.
        runs = [r for r, length in zip(runs, lengths, strict=True) if length >= shortest and len(r) >= length / 2]
        votes[max(0, peak - 1) : peak + 2] = 0  # what its neighbours hold was within reach
        for run in runs:
            first, last = near[run[[0, -1]]]
            found.append((x[first], y[first], x[last], y[last]))
        if runs:
            used = near[np.concatenate(runs)]
            left[used] = False
            np.subtract.at(votes, cells(used), 1)
    return np.array(found[:most], dtype=np.float64).reshape(-1, 4)


def draw_lines(lines: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draw lines as the official code draws M-LSD's: white on black, one pixel wide, coordinates cut to whole pixels.

    lines  (N, 4) x1, y1, x2, y2 in pixels; N = 0 gives a black hint, as there
    """
    lines = np.asarray(lines, dtype=np.float64)
    if lines.size == 0:
        lines = lines.reshape(0, 4)
    if lines.ndim != 2 or lines.shape[1] != 4:
        raise ValueError(f"lines have shape {lines.shape}, but must be (N, 4): x1, y1, x2, y2")
    if not (np.abs(lines) < drawing.LIMIT).all():
        raise ValueError(f"lines have ends that are no numbers or {drawing.LIMIT} pixels away: use pixels of the picture")
    _check_canvas(height, width)
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    drawing.lines(canvas, lines.astype(np.int64), (255, 255, 255))
    return canvas


# Scribbles and soft edges


def scribble(drawing: Image.Image | np.ndarray) -> np.ndarray:
    """Return a drawing of dark strokes on white as white strokes on black: white where min(R, G, B) < 127.

    Raises ValueError for a drawing without a stroke.
    """
    strokes = _pixels(drawing).min(2) < 127
    if not strokes.any():
        raise ValueError("the drawing has no stroke: draw with a dark pen (a channel below 127) on white")
    return _grey(strokes)


def fake_scribble(soft: np.ndarray) -> np.ndarray:
    """Return a scribble made from soft edges, (H, W, 3) uint8, white on black.

    soft  (H, W) float in [0, 1], or a soft-edge hint (H, W) or (H, W, 3) uint8
    Source: ControlNet's nms(map, 127, 3) and what follows it: blur by 3 pixels, keep what is largest along one of four
    directions and above 127, blur by 3 pixels, keep what is above 4.
    """
    soft = _soft_uint8(soft)
    blurred = _blur(soft.astype(np.float32), 3, radius=12)
    p = np.pad(blurred, 1, constant_values=-np.inf)
    height, width = blurred.shape

    def neighbour(y: int, x: int) -> np.ndarray:
        return p[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    ridge = np.zeros(blurred.shape, dtype=bool)
    for y, x in ((0, 1), (1, 0), (1, 1), (1, -1)):
        ridge |= (blurred >= neighbour(y, x)) & (blurred >= neighbour(-y, -x))
    lines = np.where(ridge & (blurred > 127), np.float32(255), np.float32(0))
    return _grey(np.rint(_blur(lines, 3, radius=9)) > 4)


def hed(image: Image.Image | np.ndarray, network: Callable | None = None, safe: bool = False) -> np.ndarray:
    """Return soft edges, grey on black, (H, W, 3) uint8.

    network  `networks.HED`: from a picture (H, W, 3) uint8 to soft edges (H, W) in [0, 1]. Without one `soft_edges`
             stands in, and a warning says so, since the released ControlNets learned the network's edges; to choose it,
             and hear no warning, name it here.
    safe     quantise to three values, 0, 127 and 255, so that the hint carries no hidden picture (v1.1)
    """
    if network is None:
        warnings.warn("hed without weights: a soft-edge filter stands in for the network", stacklevel=1)
        network = soft_edges
    pixels = _pixels(image)
    soft = np.asarray(network(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()), dtype=np.float32)
    if safe:
        soft = (soft * 3).astype(np.int32) / 2
    return _grey(_soft_uint8(np.clip(soft, 0, 1)))


def _soft_uint8(soft: np.ndarray) -> np.ndarray:
    """Return soft edges as (H, W) uint8; floats are cut to whole grey levels, as in the official code."""
    soft = np.asarray(soft)
    if soft.dtype == np.uint8 and soft.ndim == 3:
        soft = soft[..., 0]
    if soft.ndim != 2 or soft.size == 0 or not (soft.dtype == np.uint8 or np.issubdtype(soft.dtype, np.floating)):
        raise ValueError(f"soft edges are {soft.dtype} of shape {soft.shape}, but must be float (H, W), or a uint8 hint")
    if soft.dtype == np.uint8:
        return soft
    if not (soft.min() >= 0 and soft.max() <= 1):
        raise ValueError(f"soft edges lie in [{soft.min():.3g}, {soft.max():.3g}], but must lie in [0, 1]: divide them")
    return (soft * 255).astype(np.uint8)


def soft_edges(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return soft edges (H, W) float32 in [0, 1) without a network: what is an edge at three scales at once.

    The gradient of the strongest channel after blurs by 1, 2 and 4 pixels, times that number; its geometric mean g leaves
    out texture, which only the finest scale sees. g^2 / (g^2 + 1/16^2) makes it soft: half where g is a sixteenth.
    """
    total = 0.0
    for sigma in (1, 2, 4):
        strongest = 0.0
        for channel in np.moveaxis(_pixels(image).astype(np.float32), 2, 0):
            dx, dy = _sobel(_blur(channel, sigma, radius=3 * sigma))
            strongest = np.maximum(strongest, np.hypot(dx, dy))
        total = total + np.log(sigma * strongest / (8 * 255) + 1e-6)
    gradient = np.exp(total / 3)
    return gradient**2 / (gradient**2 + 1 / 16**2)


def _blur(values: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """Gaussian blur of (H, W) float32, mirrored at the border without repeating it, as OpenCV does."""
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    for _ in range(2):  # down, then, turned, across
        padded = np.pad(values, [(radius, radius), (0, 0)], mode="reflect")
        values = sum(w * padded[k : k + len(values)] for k, w in enumerate(weights)).T
    return values


def lineart(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return the lines of a cartoon or picture, white on black, soft, (H, W, 3) uint8.

    A line is where a channel is darker than its surroundings (a Gaussian of 3 pixels): from 4% of the range on, and by a
    fifth it is white. No network: the paper's line detector was not released, v1.1's (Anime2Sketch) draws
    dark lines on white, and its ControlNet takes the inverted map, which is this polarity.
    """
    darker = 0.0
    for channel in np.moveaxis(_pixels(image).astype(np.float32), 2, 0):
        darker = np.maximum(darker, _blur(channel, 3, radius=9) - channel)
    strength = np.clip((darker / 255 - 0.04) / 0.16, 0, 1)
    return _grey((strength * 255).astype(np.uint8))


# Poses


def openpose(people: np.ndarray, height: int, width: int, version: str = "v1.1", threshold: float = 0.1) -> np.ndarray:
    """Draw OpenPose skeletons as ControlNet learned them: coloured limbs and joints on black, (H, W, 3) uint8 RGB.

    people     (P, 18, 3) x, y in pixels and confidence (0: absent), in OpenPose's order of the 18 COCO points
    version    "v1.1": limbs of 60% brightness, then joints on top; "v1.0": joints, then limbs laid over them, 60% opaque
    threshold  points of this confidence and below are left out, 0.1 in the official code
    Joints are dots of radius 4, limbs ellipses 8 pixels wide, all people's limb 1 before limb 2. No hands, no faces.
    """
    _check_version(version)
    _check_canvas(height, width)
    people = _check_people(people, 18)
    seen = people[..., 2] > threshold
    canvas = np.zeros((height, width, 3), dtype=np.uint8)

    def joints():
        for j, colour in enumerate(OPENPOSE_COLOURS):
            for x, y in people[seen[:, j], j, :2].astype(int):
                drawing.dot(canvas, x, y, 4, colour)

    if version == "v1.0":
        joints()
    for (a, b), colour in zip(OPENPOSE_LIMBS, OPENPOSE_COLOURS, strict=False):  # one more colour for a joint
        for start, end in people[seen[:, a] & seen[:, b]][:, (a, b), :2]:
            x, y = ((start + end) / 2).astype(int)
            dx, dy = start - end
            half, angle = int(np.hypot(dx, dy) / 2), int(np.degrees(np.arctan2(dy, dx)))
            box, inside = drawing.filled(canvas, drawing.ellipse_outline(x, y, half, 4, angle))
            under = canvas[box][inside] if version == "v1.0" else np.zeros(3)
            canvas[box][inside] = np.rint(0.4 * under + 0.6 * np.array(colour))
    if version == "v1.1":
        joints()
    return canvas


def openpifpaf(people: np.ndarray, height: int, width: int, threshold: float = 0.1) -> np.ndarray:
    """Draw OpenPifPaf skeletons on black, (H, W, 3) uint8 RGB.

    people     (P, 17, 3) x, y in pixels and confidence (0: absent), in COCO's order of the 17 points
    threshold  points of this confidence and below are left out
    Of the paper's OpenPifPaf model neither weights nor drawing code were released. Here: OpenPifPaf's own 19 limbs and
    colours, 4 pixels wide with round ends, white dots of radius 2 for the joints.
    """
    _check_canvas(height, width)
    people = _check_people(people, 17)
    seen = people[..., 2] > threshold
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    for (a, b), colour in zip(OPENPIFPAF_LIMBS, OPENPIFPAF_COLOURS, strict=True):
        drawing.thick_lines(canvas, people[seen[:, a] & seen[:, b]][:, (a, b), :2].reshape(-1, 4), colour, 4)
    for x, y in np.rint(people[seen][:, :2]).astype(int):
        drawing.dot(canvas, x, y, 2, (255, 255, 255))
    return canvas


def _check_people(people: np.ndarray, points: int) -> np.ndarray:
    people = np.asarray(people, dtype=np.float64)
    if people.ndim != 3 or people.shape[1:] != (points, 3):
        raise ValueError(f"people have shape {people.shape}, but must be (P, {points}, 3): x, y, confidence")
    wrong = np.argwhere(~np.isfinite(people) | (np.abs(people) > drawing.LIMIT))
    if len(wrong):
        person, point, what = wrong[0]
        raise ValueError(
            f"point {point} of person {person} has {('x', 'y', 'confidence')[what]} {people[tuple(wrong[0])]:g}: "
            f"give pixels, at most {drawing.LIMIT} from the picture, and confidence 0 for what is absent"
        )
    return people


def read_openpose(path: str | Path) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Read the people (P, 18, 3) of an OpenPose JSON file, and height and width of the picture if it tells them.

    COCO-18 or BODY_25, told apart by their number of values; BODY_25's feet and middle of the hips are left out.
    Raises FileNotFoundError or ValueError for another format, or if it holds no person.
    """
    found = _read_json(path)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, dict) or not isinstance(found.get("people"), list):
        raise ValueError(f'{path} is no key-point file of OpenPose: it holds no list "people"')
    people = []
    for i, person in enumerate(found["people"]):
        if not isinstance(person, dict) or "pose_keypoints_2d" not in person:
            raise ValueError(f'{path}: person {i} has no "pose_keypoints_2d": write it with OpenPose\'s body model')
        values = person["pose_keypoints_2d"]
        if values:  # null or empty: seen by face or hands alone
            points = _points(path, i, values, {54: 18, 75: 25}, "COCO's 18 or BODY_25's 25 points")
            people.append(points if len(points) == 18 else points[list(BODY_25)])
    return _people(path, people, _size(found, "canvas_height", "canvas_width"))


def read_openpifpaf(path: str | Path) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Read the people (P, 17, 3) of an OpenPifPaf prediction or a COCO annotation file, and (height, width) if there.

    OpenPifPaf writes a list of objects with "keypoints"; COCO an object with "annotations" (and "images").
    Raises FileNotFoundError or ValueError for another format, for several pictures, or if it holds no person.
    """
    found, size = _read_json(path), None
    if isinstance(found, dict) and isinstance(found.get("annotations"), list):
        images = found.get("images")
        if isinstance(images, list) and len(images) == 1 and isinstance(images[0], dict):
            size = _size(images[0], "height", "width")
        found = found["annotations"]
        if len({str(entry.get("image_id")) for entry in found if isinstance(entry, dict)}) > 1:
            raise ValueError(f"{path} annotates several pictures: give a file of one")
    if not isinstance(found, list) or not all(isinstance(entry, dict) and "keypoints" in entry for entry in found):
        raise ValueError(f'{path} is no key-point file of OpenPifPaf or COCO: it holds no list of objects with "keypoints"')
    people = [_points(path, i, entry["keypoints"], {51: 17}, "COCO's 17 points") for i, entry in enumerate(found)]
    return _people(path, people, size)


def _read_json(path: str | Path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: name a JSON file of key points")
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file of key points: {error}") from error


def _points(path: str | Path, person: int, values: object, counts: dict[int, int], names: str) -> np.ndarray:
    """Return a flat list x, y, confidence, x, ... as (points, 3), whose number of values must be one of `counts`."""
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or len(values) not in counts:
        came = f"{len(values)} values" if numbers else "no list of numbers"
        raise ValueError(
            f"{path}: person {person} has {came}, but {' or '.join(map(str, counts))} are needed, three for each of {names}"
        )
    return np.array(values, dtype=np.float64).reshape(counts[len(values)], 3)


def _size(found: dict, height: str, width: str) -> tuple[int, int] | None:
    """Return the height and width that a file tells, if it does."""
    size = found.get(height), found.get(width)
    return size if all(isinstance(v, int) and 0 < v <= drawing.LIMIT for v in size) else None


def _people(path: str | Path, people: list, size: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Check the people of a file, and turn shares of the picture into pixels."""
    if not people:
        raise ValueError(f"{path} holds no person: the hint would be empty")
    try:
        people = _check_people(np.stack(people), len(people[0]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    there = people[people[..., 2] > 0][:, :2]
    if len(there) and there.min() >= 0 and there.max() <= 1:
        if size is None:
            raise ValueError(f"{path} has coordinates from 0 to 1: multiply them by the picture's width and height")
        people = people * [size[1], size[0], 1]
    return people, size


# Labels


def ade20k(labels: np.ndarray, first: int = 0, unlabelled: int | None = None) -> np.ndarray:
    """Paint a label map in ADE20K's 150 colours, (H, W, 3) uint8 RGB.

    labels      (H, W) integers: `first` is wall, `first` + 149 flag (names: `palettes.ADE20K_NAMES`)
    first       0, as predictions have it; the dataset's own files begin at 1
    unlabelled  label that becomes black, e.g. 0 in the dataset's own files; the released models never saw black
    Raises ValueError, naming the value, for a label outside the range.
    """
    return _paint(labels, palettes.ADE20K_COLOURS, first, unlabelled, "ADE20K")


def coco_stuff(labels: np.ndarray, first: int = 1, unlabelled: int | None = 0) -> np.ndarray:
    """Paint a label map in colours of COCO-Stuff's 182 classes, (H, W, 3) uint8 RGB.

    labels      (H, W) integers: `first` is person, `first` + 181 wood (names: `palettes.COCO_STUFF_NAMES`)
    first       1, as the dataset's ids; its PNG files ("stuffthingmaps") begin at 0
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
            f"label {wrong[0]} is outside {name}'s {first} to {first + len(colours) - 1} ({wrong.size} such pixels): "
            "use its labels, or say which label is the first, and which is for unlabelled pixels"
        )
    return np.where(empty[..., None], np.uint8(0), colours[np.where(empty, 0, index)])


def read_labels(path: str | Path) -> np.ndarray:
    """Read a label map (H, W) int64 from a picture of one channel, or from the indices of a palette picture.

    Raises FileNotFoundError or ValueError, naming the file, for no picture or one of several channels.
    """

    image = _open(path)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N"):
        raise ValueError(
            f"{path} is no label map: it has the channels {', '.join(image.getbands())}, but needs one, of whole numbers"
        )
    return np.array(image).astype(np.int64)


# Normals and depth

# Signs of x (right), y (up) and z (to the viewer) in the red, green and blue, or first to third number, of normal maps.
NORMAL_AXES = {"opengl": (1, 1, 1), "directx": (1, -1, 1), "diode": (1, -1, -1), "v1.1": (-1, 1, 1), "v1.0": (-1, 1, 1)}


def normal(normals: np.ndarray, version: str = "v1.1") -> np.ndarray:
    """Colour a normal map, (H, W, 3) uint8 RGB.

    normals  (H, W, 3) float, of unit length: x to the right, y up, z towards the viewer
    version  "v1.1": blue is front, red is left, green is top. "v1.0": the same with red and blue exchanged, since its app
             reversed the channels. The models of one do not understand maps of the other.
    Raises ValueError for normals that are not of unit length (within a tenth).
    """
    _check_version(version)
    normals = np.asarray(normals)
    if normals.ndim != 3 or normals.shape[2] != 3 or normals.size == 0 or not np.issubdtype(normals.dtype, np.floating):
        raise ValueError(f"normals are {normals.dtype} of shape {normals.shape}, but must be float of shape (H, W, 3)")
    wrong = ~(np.abs(np.linalg.norm(normals, axis=2) - 1) <= 0.1)  # also NaN
    if wrong.any():
        raise ValueError(
            f"normals are not of unit length in {wrong.mean():.1%} of the pixels, e.g. {normals[wrong][0].tolist()}: "
            "divide them by their length"
        )
    coloured = np.clip((normals * NORMAL_AXES[version] + 1) * 127.5, 0, 255).astype(np.uint8)
    return coloured[..., ::-1].copy() if version == "v1.0" else coloured


def normal_from_depth(depth: np.ndarray, background: float = 0.4, version: str = "v1.0") -> np.ndarray:
    """Colour the normals that v1.0's app computes from depth, (H, W, 3) uint8 RGB.

    depth       (H, W) float, larger is nearer; slopes count in its own unit (MiDaS's inverse depth): 3x3 Sobel sums of
                2 pi are 45 degrees, so values from 0 to 255 do well, and values from 0 to 1 look flat
    background  what is nearer than this share of the range counts; the rest faces the viewer, 0 to 1
    """
    depth = _check_depth(depth)
    if not 0 <= background <= 1:
        raise ValueError(f"background is {background}, but must lie in [0, 1]: a share of the depth's range")
    dx, dy = _sobel(depth)
    far = _share(depth) < background
    dx[far], dy[far] = 0, 0
    normals = np.stack([-dx, dy, np.full_like(dx, 2 * np.pi)], axis=2)  # nearer to the right: turned to the left
    return normal(normals / np.linalg.norm(normals, axis=2, keepdims=True), version)


def read_normals(path: str | Path, axes: str = "opengl") -> np.ndarray:
    """Read a normal map (H, W, 3) float of unit length, x right, y up, z to the viewer, from a picture or a .npy file.

    path  picture, 0 to 255 for -1 to 1; or .npy of floats
    axes  "opengl": red is right, green is top. "directx": red is right, green is bottom. "v1.1", "v1.0": ControlNet's own.
          "diode": the data set's, y down and z away from the viewer.
    Vectors of length 0, which stand for unknown, face the viewer. A twentieth of the others may differ from unit length by
    more than a tenth, as smoothed borders do, and are stretched. Raises FileNotFoundError or ValueError, naming the file,
    for more of them or anything else.
    """
    if axes not in NORMAL_AXES:
        raise ValueError(f"axes is {axes!r}, but must be one of: {', '.join(NORMAL_AXES)}")
    if Path(path).suffix == ".npy":
        normals = _load_array(path)
        if normals.ndim != 3 or normals.shape[2] != 3:
            raise ValueError(f"{path} has shape {normals.shape}, but a normal map is (H, W, 3)")
    else:
        normals = np.asarray(load_image(path)).astype(np.float64) / 127.5 - 1
    normals = (normals[..., ::-1] if axes == "v1.0" else normals) * NORMAL_AXES[axes]
    length = np.linalg.norm(normals, axis=2, keepdims=True)
    known = length > 0.1
    wrong = np.mean(known & (np.abs(length - 1) > 0.1))
    if wrong > 0.05 or not known.any():
        raise ValueError(f"{path} is no normal map: the vectors of {wrong:.0%} of its pixels are not of unit length")
    return np.where(known, normals / np.maximum(length, 0.1), (0.0, 0.0, 1.0))


def _load_array(path: str | Path) -> np.ndarray:
    """Read finite numbers from a .npy file, as float64; no pickle is opened."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: name a picture or a .npy file")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file that can be read: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.size == 0:
        raise ValueError(f"{path} holds no array of numbers: save one with numpy.save")
    if not np.isfinite(array).all():
        raise ValueError(f"{path} holds values that are no finite numbers: fill the holes first")
    return array.astype(np.float64)


def depth(depth: np.ndarray) -> np.ndarray:
    """Return a depth map as the released ControlNets learned MiDaS's: near is white, (H, W, 3) uint8.

    depth  (H, W) float, larger is nearer; its range becomes 0 to 255, cut to whole grey levels; all equal is black
    """
    return _grey((_share(_check_depth(depth)) * 255).astype(np.uint8))


def _check_depth(depth: np.ndarray) -> np.ndarray:
    depth = np.asarray(depth)
    if depth.ndim != 2 or depth.size == 0 or depth.dtype.kind not in "fiu":
        raise ValueError(f"depth is {depth.dtype} of shape {depth.shape}, but must be numbers of shape (H, W)")
    depth = depth.astype(np.float64)
    if not np.isfinite(depth).all():
        raise ValueError("depth holds values that are no finite numbers: fill the holes first")
    return depth


def _share(depth: np.ndarray) -> np.ndarray:
    """Scale depth to [0, 1]."""
    return (depth - depth.min()) / max(np.ptp(depth), np.finfo(np.float64).tiny)


def read_depth(path: str | Path) -> np.ndarray:
    """Read a depth map (H, W) float from a grey picture or a .npy file: 8 and 16 bits as 0 to 255, floats as they are.

    Raises FileNotFoundError or ValueError, naming the file, for anything else, as a coloured picture.
    """
    if Path(path).suffix == ".npy":
        array = _load_array(path)
        if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
            array = array[0] if array.shape[0] == 1 else array[..., 0]
        if array.ndim != 2:
            raise ValueError(f"{path} has shape {array.shape}, but a depth map is (H, W)")
        return array

    image = _open(path)
    if image.mode.startswith("I"):
        return np.array(image, dtype=np.float64) / 257
    if image.mode == "F":
        return _check_depth(np.array(image))
    pixels = np.asarray(to_rgb(image))
    if (pixels != pixels[..., :1]).any():
        raise ValueError(f"{path} is no depth map: it is coloured, and depth is grey")
    return pixels[..., 0].astype(np.float64)


# Looking at a hint


def doubts(name: str, hint: np.ndarray, version: str = "v1.1") -> list[str]:
    """Say, in words, what looks wrong in a hint (H, W, 3) uint8 for its condition; an empty list if nothing does."""
    pixels = _pixels(hint)
    found = []
    if pixels.max() == 0:
        found.append("it is all black: it says nothing")
    elif (pixels == pixels[0, 0]).all():
        found.append("it is all of one colour: it says nothing")
    elif name in ("canny", "hough", "scribble", "hed", "lineart") and pixels.mean() > 127.5:
        found.append("it is mostly white, so it looks inverted: lines are white on black in hints")
    elif name in ("openpose", "openpifpaf") and np.mean(pixels.max(2) < 55) < 0.5:
        found.append("it is not mostly black: poses are drawn on black")
    elif name == "openpose" and _limbs_between_joints(pixels[..., ::-1]) > _limbs_between_joints(pixels):
        found.append("its colours look like BGR: limbs lie between the right joints once red and blue are exchanged")
    elif name in ("ade20k", "coco_stuff"):
        colours = palettes.ADE20K_COLOURS if name == "ade20k" else palettes.COCO_STUFF_COLOURS
        known, exchanged = _known(pixels, colours), _known(pixels[..., ::-1], colours)
        if exchanged > known:
            found.append("its colours look like BGR: more of them are the palette's once red and blue are exchanged")
        elif known < 0.5:
            found.append(f"only {known:.0%} of its pixels have a colour of the palette")
    elif name == "normal":
        red, _, blue = pixels.mean((0, 1))
        if (red > blue) == (version == "v1.1"):
            other = "v1.0's (or BGR)" if version == "v1.1" else "v1.1's"
            found.append(f"its colours look like {other}: what faces the viewer is {'blue' if red > blue else 'red'} here")
    elif name == "depth" and (pixels != pixels[..., :1]).any():
        found.append("it is coloured: depth is grey, near is white")
    return found


def _known(pixels: np.ndarray, colours: np.ndarray) -> float:
    """Return the share of pixels that have one of the colours, or are black."""

    def number(rgb: np.ndarray) -> np.ndarray:
        return rgb.astype(np.int64) @ [65536, 256, 1]

    return float(np.isin(number(pixels), np.append(number(colours), 0)).mean())


def _limbs_between_joints(pixels: np.ndarray) -> int:
    """Count the limbs whose colour touches, within 3 pixels, the colours of both of their joints."""
    y, x = np.nonzero(pixels.max(2) > 100)
    seen = pixels[y, x].astype(int)
    joint = np.full((pixels.shape[0] + 6, pixels.shape[1] + 6), -1)
    for j, colour in enumerate(OPENPOSE_COLOURS):
        dot = np.abs(seen - colour).max(1) < 30
        joint[y[dot] + 3, x[dot] + 3] = j
    around = np.stack(np.divmod(np.arange(49), 7))[:, :, None]
    count = 0
    for ends, colour in zip(OPENPOSE_LIMBS, OPENPOSE_COLOURS, strict=False):
        limb = np.abs(seen - 0.6 * np.array(colour)).max(1) < 20
        near = np.unique(joint[y[limb] + around[0], x[limb] + around[1]])
        count += np.isin(ends, near).all()
    return int(count)
