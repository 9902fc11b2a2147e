"""Image filters in numpy, with the numbers of OpenCV or SciPy: resizing, Sobel derivatives, Gaussian blur."""

import numpy as np


def resample(array: np.ndarray, height: int, width: int, kind: str) -> np.ndarray:
    """Resize an array (H, W) or (H, W, C) of uint8 or float as cv2.resize does, keeping its dtype; uint8 within a level.

    kind  "nearest", "linear", "area" or "lanczos" (OpenCV's INTER_NEAREST, _LINEAR, _AREA, _LANCZOS4)
    """
    if array.shape[:2] == (height, width):
        return array
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
    """Resize one axis: each new pixel is a weighted sum of consecutive old ones, starting at its `first`."""
    old = values.shape[axis]
    scale, new = old / size, np.arange(size)
    if kind == "nearest":
        return np.take(values, np.minimum((new * scale).astype(int), old - 1), axis=axis)
    if kind == "area":
        first, taps = np.floor(new * scale + 1e-6).astype(int), int(np.ceil(scale)) + 1
        index = first[:, None] + np.arange(taps)
        weights = np.minimum(index + 1, ((new + 1) * scale)[:, None]) - np.maximum(index, (new * scale)[:, None])
        weights = np.clip(weights, 0, None)
    elif kind == "area upwards":  # OpenCV's, if one side grows: pixels as blocks, with narrow ramps between them
        first = np.floor(new * scale).astype(int)
        fraction = np.clip(new + 1 - (first + 1) / scale, 0, None) % 1
        weights = np.stack([1 - fraction, fraction], axis=1)
    else:
        centre = (new + 0.5) * scale - 0.5
        reach = 4 if kind == "lanczos" else 1
        first = np.floor(centre).astype(int) - reach + 1
        distance = centre[:, None] - first[:, None] - np.arange(2 * reach)
        weights = np.sinc(distance) * np.sinc(distance / 4) if kind == "lanczos" else 1 - np.abs(distance)
    weights = (weights / weights.sum(1, keepdims=True)).astype(values.dtype)
    shape = [1] * values.ndim
    shape[axis] = size
    # Numerics: beyond the border, the outermost pixel is repeated.
    parts = (
        np.take(values, np.clip(first + k, 0, old - 1), axis=axis) * weights[:, k].reshape(shape)
        for k in range(weights.shape[1])
    )
    total = next(parts)
    for part in parts:
        total += part
    return total


def sobel(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 3x3 Sobel derivatives dx, dy of (H, W), its border repeated: int16 for uint8, else the same dtype."""
    p = np.pad(values, 1, mode="edge")
    p = p.astype(np.int16) if p.dtype == np.uint8 else p
    across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
    dx = across[:-2] + 2 * across[1:-1] + across[2:]
    dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return dx, dy


def blur(values: np.ndarray, sigma: float, radius: int, border: str) -> np.ndarray:
    """Apply a Gaussian filter, cut off at `radius` pixels, to (H, W) of float, keeping its dtype.

    border  "reflect" mirrors at the outermost pixel, as OpenCV's GaussianBlur; "symmetric" mirrors beyond it, repeating
            that pixel, as SciPy's gaussian_filter
    """
    weights = np.exp(-0.5 / sigma**2 * np.arange(-radius, radius + 1) ** 2)
    weights = (weights / weights.sum()).astype(values.dtype)[radius:]
    for _ in range(2):  # down, then, transposed, across
        padded, size = np.pad(values, ((radius, radius), (0, 0)), mode=border), len(values)
        values = weights[0] * values
        # Numerics: both sides are added first, so that a symmetric map stays symmetric to the last bit: ties stay ties.
        for away in range(radius, 0, -1):
            values += weights[away] * (padded[radius - away :][:size] + padded[radius + away :][:size])
        values = values.T
    return values
