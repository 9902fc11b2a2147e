"""Surfaces: normal maps and depth maps."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from minicn.checkpoints import files
from minicn.conditions.filters import sobel
from minicn.conditions.images import check_file, check_version, grey_hint, open_image
from minicn.inputs import opacity, to_rgb

# Signs of x (right), y (up) and z (towards the viewer) in the channels red, green and blue of normal maps.
NORMAL_AXES = {"opengl": (1, 1, 1), "directx": (1, -1, 1), "diode": (1, -1, -1), "v1.1": (-1, 1, 1), "v1.0": (-1, 1, 1)}

MOST = 2**28  # numbers in a .npy file: as many as the channels of the largest picture
DARKEST = 50  # the brightest channel of a unit normal is at least 127.5 (1 - 3**-0.5) = 53.9


def normal(normals: np.ndarray, version: str = "v1.1") -> np.ndarray:
    """Colour a normal map, (H, W, 3) uint8 RGB.

    normals  (H, W, 3) float, of unit length: x to the right, y up, z towards the viewer
    version  "v1.1": blue is front, red is left, green is top. "v1.0": the same with red and blue swapped, since its app
             reversed the channels. Models for one do not understand maps of the other.
    Raises ValueError for normals whose length differs from 1 by more than a tenth.
    """
    check_version(version)
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

    depth       (H, W) float, larger is nearer; slopes are measured in its own unit (MiDaS's inverse depth): a 3x3 Sobel
                sum of 2 pi is 45 degrees, so values from 0 to 255 work well, and values from 0 to 1 look flat
    background  what is further than this fraction of the range faces the viewer, 0 to 1
    """
    depth = _check_depth(depth)
    if not 0 <= background <= 1:
        raise ValueError(f"background is {background}, but must lie in [0, 1]: a fraction of the depth's range")
    dx, dy = sobel(depth)
    far = _normalised(depth) < background
    dx[far], dy[far] = 0, 0
    normals = np.stack([-dx, dy, np.full_like(dx, 2 * np.pi)], axis=2)  # nearer to the right: facing left
    return normal(normals / np.linalg.norm(normals, axis=2, keepdims=True), version)


def read_normals(path: str | Path, axes: str = "opengl") -> np.ndarray:
    """Read a normal map (H, W, 3) float of unit length, x right, y up, z towards the viewer, from an image or .npy file.

    path  image, 0 to 255 for -1 to 1; or .npy of floats
    axes  "opengl": red is right, green is top. "directx": red is right, green is bottom. "v1.1", "v1.0": ControlNet's own.
          "diode": the dataset's, y down and z away from the viewer.
    What is unknown, vectors of length 0 and black or transparent pixels, faces the viewer. Up to 5% of the others may
    differ from unit length by more than a tenth, as at smoothed borders; all are normalised. Raises FileNotFoundError or
    ValueError, naming the file, for anything else.
    """
    if axes not in NORMAL_AXES:
        raise ValueError(f"axes is {axes!r}, but must be one of: {', '.join(NORMAL_AXES)}")
    if Path(path).suffix == ".npy":
        normals = _load_array(path)
        if normals.ndim != 3 or normals.shape[2] != 3:
            raise ValueError(f"{path} has shape {normals.shape}, but a normal map is (H, W, 3)")
    else:
        image = open_image(path)
        pixels = np.asarray(to_rgb(image))
        normals = pixels.astype(np.float64) / 127.5 - 1
        normals[_transparent(image) | (pixels.max(2) < DARKEST)] = 0
    normals = (normals[..., ::-1] if axes == "v1.0" else normals) * NORMAL_AXES[axes]
    length = np.linalg.norm(normals, axis=2, keepdims=True)
    known = length > 0.1
    wrong = np.mean(known & (np.abs(length - 1) > 0.1))
    if wrong > 0.05 or not known.any():
        raise ValueError(f"{path} is not a normal map: {wrong:.0%} of its vectors are not of unit length")
    return np.where(known, normals / np.maximum(length, 0.1), (0.0, 0.0, 1.0))


def _load_array(path: str | Path) -> np.ndarray:
    """Read finite numbers from a .npy file, as float64; no pickle is opened."""
    check_file(path, "an image or a .npy file", 8 * MOST + 2**16)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # nothing is allocated, and no more claimed than is there
    except Exception as error:  # whatever a damaged header makes Python's parser raise
        raise ValueError(f"{path} is not a readable .npy file: {files.printable(error) or type(error).__name__}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.size == 0:
        raise ValueError(f"{path} does not contain an array of numbers: save one with numpy.save")
    if array.size > MOST:
        raise ValueError(f"{path} has shape {array.shape}, more than {MOST:,} numbers: downscale it")
    if not np.isfinite(array).all():
        raise ValueError(f"{path} contains values that are not finite: fill the holes first")
    return array.astype(np.float64)


def depth(depth: np.ndarray) -> np.ndarray:
    """Return a depth map as the released ControlNets learned MiDaS's: near is white, (H, W, 3) uint8.

    depth  (H, W) float, larger is nearer; its range becomes 0 to 255, truncated to integers; a constant map is black
    """
    return grey_hint((_normalised(_check_depth(depth)) * 255).astype(np.uint8))


def _check_depth(depth: np.ndarray, name: str = "depth") -> np.ndarray:
    depth = np.asarray(depth)
    if depth.ndim != 2 or depth.size == 0 or depth.dtype.kind not in "fiu":
        raise ValueError(f"{name} is {depth.dtype} of shape {depth.shape}, but must be numbers of shape (H, W)")
    depth = depth.astype(np.float64)
    if not np.isfinite(depth).all():
        raise ValueError(f"{name} contains values that are not finite: fill the holes first")
    return depth


def _normalised(depth: np.ndarray) -> np.ndarray:
    """Scale depth to [0, 1]."""
    return (depth - depth.min()) / max(np.ptp(depth), np.finfo(np.float64).tiny)


def read_depth(path: str | Path, far_is_white: bool = False) -> np.ndarray:
    """Read a depth map (H, W) float, larger is nearer, from a grey image or .npy file; 8 and 16 bits as 0 to 255.

    far_is_white  the map is white, or large, where it is far, as distances are: it is negated
    What is unknown becomes as far as the farthest pixel, with a warning: transparent pixels, and those that are 0 in a map
    of distances of 16 bits or more, if no other is as near as a 200th of the largest: a sensor's "no reading".
    Raises FileNotFoundError or ValueError, naming the file, for anything else, such as a coloured image.
    """
    if Path(path).suffix == ".npy":
        depth, fine = _load_array(path), True
        if depth.ndim == 3 and 1 in (depth.shape[0], depth.shape[2]):
            depth = depth[0] if depth.shape[0] == 1 else depth[..., 0]
        if depth.ndim != 2:
            raise ValueError(f"{path} has shape {depth.shape}, but a depth map is (H, W)")
        unknown = np.zeros(depth.shape, bool)
    else:
        image = open_image(path)
        unknown, fine = _transparent(image), image.mode[0] in "IF"
        depth = _check_depth(np.array(image), str(path)) if fine else _grey(path, image)
        depth = depth / 257 if image.mode[0] == "I" else depth
    if far_is_white and fine and depth.min() == 0 and depth.any() and depth[depth != 0].min() > depth.max() / 200:
        unknown |= depth == 0
    depth = -depth if far_is_white else depth
    if not unknown.any():
        return depth
    if unknown.all():
        raise ValueError(f"{path} is not a depth map: it is transparent everywhere")
    warnings.warn(
        f"{path}: {unknown.mean():.1%} of its pixels are unknown (0 or transparent) and become far; if 0 is near, make it 1",
        stacklevel=2,
    )
    return np.where(unknown, depth[~unknown].min(), depth)


def _transparent(image: Image.Image) -> np.ndarray:
    """Return which pixels are transparent, as booleans."""
    alpha = opacity(image)
    return np.zeros(image.size[::-1], bool) if alpha is None else alpha < 128


def _grey(path: str | Path, image: Image.Image) -> np.ndarray:
    pixels = np.asarray(to_rgb(image))
    if (pixels != pixels[..., :1]).any():
        raise ValueError(f"{path} is not a depth map: it is coloured, but depth is grey")
    return pixels[..., 0].astype(np.float64)
