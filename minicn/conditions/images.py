"""Reading and sizing: from a file to pixels at the size that the official apps use, and the checks that all hints share."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minicn.conditions.filters import resample
from minicn.inputs import hint_tensor, to_rgb

VERSIONS = ("v1.1", "v1.0")  # of ControlNet's annotators


def check_file(path: str | Path, kind: str) -> None:
    """Raise FileNotFoundError if there is no such file; `kind` says what it should be."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: name {kind}")


def load_image(path: str | Path) -> Image.Image:
    """Read any image that Pillow can read as 8-bit RGB: rotated by its EXIF tag, alpha composited over white.

    Raises FileNotFoundError or ValueError, naming the file, if it is missing, damaged or not an image.
    """
    image = open_image(path)
    try:
        return to_rgb(image)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def open_image(path: str | Path) -> Image.Image:
    """Read an image of any mode completely, rotated by its EXIF tag."""
    check_file(path, "an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error below
            image = Image.open(path)
        with image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise ValueError(f"{image.width}x{image.height} pixels exceed Pillow's limit of {limit}: downscale it")
            image.load()
            return ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error


def load_hint(path: str | Path) -> Tensor:
    """Read an image as a hint (1, 3, H, W) in [0, 1]."""
    return hint_tensor(load_image(path))


def resize_hint(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize a hint to the size of the picture to generate: by averaging if it shrinks, without new colours if it grows."""
    smaller = height * width < image.width * image.height
    return image.resize((width, height), Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)


def official_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Return the height and width to which the official apps resize an image: the shorter side close to `resolution`.

    Both sides are rounded to multiples of 64 (halves to the even multiple) and are at least 64.
    """
    scale = resolution / min(height, width)
    new = tuple(max(64, round(side * scale / 64) * 64) for side in (height, width))
    if new[0] * new[1] > 2**27:
        raise ValueError(f"{width}x{height} pixels would become {new[1]}x{new[0]}: choose a lower resolution, or crop it")
    return new


def official_resize(image: Image.Image | np.ndarray, resolution: int) -> Image.Image:
    """Resize an RGB image as the official apps do before annotating it.

    OpenCV's Lanczos filter over 8 pixels if the shorter side grows, else the mean over the area of each new pixel.
    """
    pixels = to_pixels(image)
    height, width = official_size(*pixels.shape[:2], resolution)
    return Image.fromarray(resample(pixels, height, width, "lanczos" if resolution > min(pixels.shape[:2]) else "area"))


def to_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return an image as (H, W, 3) or (H, W, 1) uint8. Raises ValueError for any other array."""
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"image is {image.dtype} of shape {image.shape}, but must be uint8 of shape (H, W, 3)")
    if image.size == 0:
        raise ValueError(f"image has shape {image.shape}: it contains no pixels")
    return image if image.ndim == 3 else image[..., None]


def grey_hint(values: np.ndarray) -> np.ndarray:
    """Return values (H, W), bool or uint8, as a hint (H, W, 3) with equal channels; booleans are white where true."""
    if values.dtype == bool:
        values = values * np.uint8(255)
    return np.repeat(values[..., None], 3, axis=2)


def check_version(version: str) -> None:
    if version not in VERSIONS:
        raise ValueError(f"version is {version!r}, but must be one of: {', '.join(VERSIONS)}")
