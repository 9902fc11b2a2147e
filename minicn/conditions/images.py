"""Reading and sizing: from a file to pixels at the size that the official apps use, and the checks that all hints share."""

import contextlib
import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from minicn.checkpoints import files
from minicn.conditions.drawing import MOST_PIXELS
from minicn.conditions.filters import resample
from minicn.inputs import TRANSPARENT, hint_tensor, opacity, to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")  # to read: none is a program, as EPS is
PIXELS_A_BYTE = 8 * 1032  # of black and white, as deflate packs them: the most that a PNG, GIF, JPEG, BMP or PPM can hold
UNBOUNDED = ("TIFF", "WEBP", "AVIF")  # their coders pack an even picture of any size into next to nothing
PNG_NEEDS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # parts of a PNG that are no metadata
LARGEST = {"WEBP": 16383, "JPEG": 65500, "GIF": 65535, "AVIF": 65536}  # sides, pixels
VERSIONS = ("v1.1", "v1.0")  # of ControlNet's annotators


def check_file(path: str | Path, kind: str, most: int = 2**30) -> None:
    """Raise FileNotFoundError if there is no such file, ValueError if it is empty, or has more than `most` bytes.

    kind  what it should be, in words
    What a kernel shows as files, some of which never end, has no size.
    """
    if not Path(path).is_file():
        remedy = " (write / instead of \\)" if "\\" in str(path) and os.sep == "/" else ""
        raise FileNotFoundError(f"{path} does not exist or is not a file: name {kind}{remedy}")
    if not 0 < (size := os.stat(path).st_size) <= most:
        raise ValueError(f"{path} has {size:,} bytes, but must have 1 to {most:,}: name {kind}")


def load_image(path: str | Path, background: str = "white", hint: bool = False) -> Image.Image:
    """Read an image of one of FORMATS as 8-bit RGB: rotated by its EXIF tag, alpha composited over the background.

    hint  warn, naming the file, if it is transparent in places
    Raises FileNotFoundError or ValueError, naming the file, if it is missing, damaged or not an image.
    """
    image = open_image(path)
    if hint and opacity(image) is not None:
        warnings.warn(f"{path}: {TRANSPARENT}", stacklevel=2)
    try:
        return to_rgb(image, background)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def open_image(path: str | Path) -> Image.Image:
    """Read an image of any mode completely, rotated by its EXIF tag. Raises FileNotFoundError or ValueError, naming it."""
    check_file(path, "an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are an error below
            return _decoded(path)
    except Exception as error:  # its decoders raise whatever a damaged file leads them to
        reason = files.printable(error, 200) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is damaged, or none of {', '.join(FORMATS)}"
        elif isinstance(error, MemoryError):
            reason = "its pixels need more memory than there is: downscale it"
        raise ValueError(f"{path} is not a readable image: {reason}") from error


def _decoded(path: str | Path) -> Image.Image:
    with open(path, "rb") as file:  # Compat: given the name, Pillow 13 maps the file, and mixes up a turned TIFF's pixels
        size = os.fstat(file.fileno()).st_size
        try:
            return _decode(file, size)
        except Exception as error:
            bare = None if isinstance(error, MemoryError) else _without_metadata(file)
            if bare is None:
                raise
            return _decode(bare, size)


def _decode(file: IO[bytes], size: int) -> Image.Image:
    """Decode a file of so many bytes, if it has not too many pixels for them."""
    image = Image.open(file, formats=FORMATS)
    packed = image.info.get("compression") != "raw"  # a TIFF may say so, of which Pillow would make up what is not there
    held = math.inf if packed and image.format in UNBOUNDED else max(2**22, (PIXELS_A_BYTE if packed else 8) * size)
    limit = min(Image.MAX_IMAGE_PIXELS or math.inf, held)
    if image.width * image.height > limit:
        came = f"{image.width}x{image.height} pixels in {size} bytes"
        raise ValueError(f"{came} exceed the limit of {limit}: downscale it")
    read_metadata = image.load_end

    def load_end():  # Pillow's hook, after the pixels: broken metadata do not stop them
        with contextlib.suppress(Exception):
            read_metadata()

    image.load_end = load_end
    with _unprinted() if image.format == "TIFF" else contextlib.nullcontext():
        image.load()
    with contextlib.suppress(Exception):  # it turns the pixels first, then changes the metadata
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _without_metadata(file: IO[bytes]) -> io.BytesIO | None:
    """Return what a PNG's pixels need, and the EXIF tags if they are whole; None for another format.

    Pillow gives up a PNG for metadata that are cut, of another checksum, or large when unpacked.
    """
    file.seek(0)
    bare = io.BytesIO(file.read(8))
    if bare.getvalue() != b"\x89PNG\r\n\x1a\n":
        return None
    bare.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        body = file.read(length + 4)  # and the checksum
        if kind in PNG_NEEDS or (kind == b"eXIf" and body[-4:] == struct.pack(">I", zlib.crc32(kind + body[:-4]))):
            bare.write(head + body)
    bare.seek(0)
    return bare


@contextlib.contextmanager
def _unprinted() -> Iterator[None]:
    """Inside `with`, standard error goes nowhere: libtiff writes there by itself, also what it finds in the file."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def save_image(image: Image.Image, path: str | Path, **options) -> None:
    """Write a picture in the format of its extension, whole or not at all.

    options  those of Pillow's `Image.save`
    Raises ValueError for a format that cannot hold it, OSError if it cannot be written; what was there is intact.
    """
    form = format_of(path)
    side = LARGEST.get(form, math.inf)
    if max(image.size) > side:
        raise ValueError(
            f"{path}: a picture of {image.width}x{image.height} pixels does not fit into {form}, whose sides are at most "
            f"{side}: name it .png"
        )
    with files.replacing(path) as new:
        try:
            image.save(new, form, **options)
            whole = open_image(new).size == image.size
        except Exception as error:  # as many kinds as there are encoders
            raise OSError(files.printable(error, 200) or type(error).__name__) from error
        if not whole:
            raise OSError("it read back with another size")


def format_of(path: str | Path) -> str:
    """Return Pillow's name of the format of a picture to write. Raises ValueError unless it is one that is also read."""
    form = Image.registered_extensions().get(Path(path).suffix.lower())
    if form not in FORMATS or form not in Image.SAVE:
        raise ValueError(f"output {path} has no extension of a writable picture format: name it .png or .jpg")
    return form


def load_hint(path: str | Path) -> Tensor:
    """Read an image as a hint (1, 3, H, W) in [0, 1]."""
    return hint_tensor(load_image(path, hint=True))


def resize_hint(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize a hint to the size of the picture to generate: by averaging if it shrinks, without new colours if it grows."""
    check_enlarged(image.size, (width, height))
    return image.resize((width, height), _filter(image, height, width))


def _filter(hint: Image.Image, height: int, width: int) -> Image.Resampling:
    return Image.Resampling.BOX if height * width < hint.width * hint.height else Image.Resampling.NEAREST


def fit(image: Image.Image, size: tuple[int, int], hint: bool = False) -> Image.Image:
    """Scale an image until it covers a width and height, and crop what is over, half of it on either side.

    hint  resize it as `resize_hint` does
    """
    check_enlarged(image.size, size)
    return ImageOps.fit(image, size, _filter(image, size[1], size[0]) if hint else Image.Resampling.LANCZOS)


def side_by_side(pictures: list[tuple[str, Image.Image]], gap: int = 4, head: int = 30) -> Image.Image:
    """Draw pictures in a row, each with its title of up to two lines above it."""
    sheet = Image.new(
        "RGB",
        (sum(picture.width + gap for _, picture in pictures) - gap, head + max(picture.height for _, picture in pictures)),
        "white",
    )
    draw, x = ImageDraw.Draw(sheet), 0
    for title, picture in pictures:
        draw.text((x + 3, 1), title, fill="black", spacing=1)
        sheet.paste(picture, (x, head))
        x += picture.width + gap
    return sheet


def official_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Return the height and width to which the official apps resize an image: the shorter side close to `resolution`.

    Both sides are rounded to multiples of 64 (halves to the even multiple) and are at least 64.
    """
    scale = resolution / min(height, width)
    new = tuple(max(64, round(side * scale / 64) * 64) for side in (height, width))
    check_enlarged((width, height), new[::-1])
    return new


def check_enlarged(size: tuple[int, int], new: tuple[int, int]) -> None:
    """Raise ValueError if an image of a width and height would get more pixels than memory should hold."""
    if new[0] * new[1] > MOST_PIXELS:
        raise ValueError(f"{size[0]}x{size[1]} pixels would become {new[0]}x{new[1]}: choose a lower resolution, or crop it")


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
