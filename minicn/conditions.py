"""From a picture to a hint: one function per condition, and the reading and sizing of hints.

Source: the conventions of the released annotators of ControlNet v1.0 and v1.1. So far: Canny edges.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

NAMES = ("canny",)


def load_image(path: str | Path) -> Image.Image:
    """Read any picture that Pillow reads as 8-bit RGB: turned by its EXIF tag, alpha composited over white.

    Raises FileNotFoundError or ValueError, naming the file, if there is no whole picture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: name a picture")
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Make a picture of any mode 8-bit RGB: 16 bits are scaled down, alpha is composited over white."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        values = np.asarray(image, dtype=np.int64)
        image = Image.fromarray((values.clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("a picture of floating-point values has no agreed range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_hint(path: str | Path) -> Tensor:
    """Read a picture as a hint (1, 3, H, W) in [0, 1]."""
    return hint_tensor(load_image(path))


def hint_tensor(hint: Image.Image | np.ndarray | Tensor) -> Tensor:
    """Turn a picture into a hint (B, 3, H, W) float32 in [0, 1].

    hint  PIL picture of any mode; array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8; or float tensor
          (3, H, W) or (B, 3, H, W) in [0, 1]
    Raises TypeError or ValueError for anything else.
    """
    if isinstance(hint, np.ndarray):
        if hint.dtype != np.uint8 or hint.ndim not in (2, 3) or (hint.ndim == 3 and hint.shape[2] not in (1, 3, 4)):
            raise ValueError(
                f"hint is an array of {hint.dtype} and shape {hint.shape}, but must be uint8 of shape "
                "(H, W), (H, W, 3) or (H, W, 4)"
            )
        hint = Image.fromarray(hint[..., 0] if hint.ndim == 3 and hint.shape[2] == 1 else hint)
    if isinstance(hint, Image.Image):
        pixels = np.array(to_rgb(hint))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    if not isinstance(hint, Tensor):
        raise TypeError(f"hint is {type(hint).__name__}, but must be a picture, an array or a tensor")
    if hint.ndim == 3:
        hint = hint[None]
    if hint.ndim != 4 or hint.shape[1] != 3 or not hint.is_floating_point():
        raise ValueError(f"hint is {hint.dtype} of shape {tuple(hint.shape)}, but must be float of shape (B, 3, H, W)")
    if hint.numel() == 0:
        raise ValueError(f"hint has shape {tuple(hint.shape)}: it holds no pixel")
    low, high = hint.min().item(), hint.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"hint has values from {low:.3g} to {high:.3g}, but they must lie in [0, 1]: divide by 255")
    return hint.float()


def resize_hint(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize a hint picture to the size of the picture to draw: smoothly down, without new colours up."""
    smaller = height * width < image.width * image.height
    return image.resize((width, height), Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)


def canny(image: Image.Image | np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Return Canny edges, (H, W, 3) uint8, white on black, equal to OpenCV's Canny(image, low, high).

    image      RGB picture, or (H, W, 3) or (H, W) uint8
    low, high  thresholds on |dx| + |dy| of the 3x3 Sobel filter, 0 and up: edges above `high` are kept, and those
               above `low` that touch a kept one. 100 and 200 are ControlNet's.
    Source: Canny 1986, as in OpenCV: the colour channel with the strongest gradient counts at each pixel.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"image is {image.dtype} of shape {image.shape}, but must be uint8 of shape (H, W, 3)")
    if image.size == 0 or not (low >= 0 and high >= 0):  # also NaN
        raise ValueError(f"canny of {image.shape} pixels with thresholds {low} and {high}: needs pixels, thresholds from 0")
    low, high = int(np.floor(min(low, high))), int(np.floor(max(low, high)))
    dx, dy = _sobel(image if image.ndim == 3 else image[..., None])
    magnitude = np.abs(dx) + np.abs(dy)
    if magnitude.shape[2] > 1:
        strongest = magnitude.argmax(2)[..., None]
        dx, dy, magnitude = (np.take_along_axis(a, strongest, 2) for a in (dx, dy, magnitude))
    dx, dy, magnitude = dx[..., 0], dy[..., 0], magnitude[..., 0]
    ridge = _is_ridge(dx, dy, magnitude) & (magnitude > low)
    edges = _grow(ridge & (magnitude > high), ridge)
    return np.repeat((edges * np.uint8(255))[..., None], 3, axis=2)


def _sobel(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """3x3 Sobel derivatives (H, W, C) int32, the border repeated outwards."""
    p = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge").astype(np.int32)
    across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
    dx = across[:-2] + 2 * across[1:-1] + across[2:]
    dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return dx, dy


def _is_ridge(dx: np.ndarray, dy: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Tell where the magnitude is the largest along the gradient, whose direction is rounded to 45 degrees."""
    m = np.pad(magnitude, 1)  # zero outside

    def neighbour(y: int, x: int) -> np.ndarray:
        return m[1 + y : m.shape[0] - 1 + y, 1 + x : m.shape[1] - 1 + x]

    # Numerics: OpenCV compares in fixed point, tan(22.5 degrees) * 2^15 rounded.
    ax, ay = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    tan22 = ax * 13573
    tan67 = tan22 + (ax << 16)
    c = magnitude
    level = (c > neighbour(0, -1)) & (c >= neighbour(0, 1))
    upright = (c > neighbour(-1, 0)) & (c >= neighbour(1, 0))
    falling = (c > neighbour(-1, -1)) & (c > neighbour(1, 1))
    rising = (c > neighbour(-1, 1)) & (c > neighbour(1, -1))
    diagonal = np.where((dx ^ dy) < 0, rising, falling)
    return np.where(ay < tan22, level, np.where(ay > tan67, upright, diagonal))


def _grow(seeds: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return the parts of `allowed` that are connected, over 8 neighbours, to a seed."""
    height, width = seeds.shape
    free = np.pad(allowed, 1).ravel()
    kept = np.zeros_like(free)
    stride = width + 2
    steps = np.array([-stride - 1, -stride, -stride + 1, -1, 1, stride - 1, stride, stride + 1])
    front = np.flatnonzero(np.pad(seeds, 1).ravel())
    kept[front] = True
    while front.size:  # only the pixels reached last are looked at
        reached = (front[:, None] + steps).ravel()
        reached = reached[free[reached] & ~kept[reached]]
        kept[reached] = True
        front = np.unique(reached)
    return kept.reshape(height + 2, stride)[1:-1, 1:-1]
