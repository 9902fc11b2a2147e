"""Folders of (hint, image, prompt) on disk: read, checked, and made.

Two formats. The official tutorial's (Fill50K): `prompt.json`, a JSON object a line with `source`, `target`, `prompt`.
Hugging Face's image folder: `metadata.jsonl`, a JSON object a line with `conditioning_image`, `file_name`, `text`.
"""

import hashlib
import json
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from minicn import conditions, toy
from minicn.checkpoints import files
from minicn.conditions.images import check_file

FORMATS = {  # file: names of hint, image and prompt in its lines
    "prompt.json": ("source", "target", "prompt"),
    "metadata.jsonl": ("conditioning_image", "file_name", "text"),
}


TABLE_BYTES = 2**28  # of a table, at most: some million pairs


@dataclass(frozen=True)
class Pair:
    """A hint, the image that it belongs to, and what it shows; `line` of the table, from 1."""

    hint: Path
    image: Path
    prompt: str
    line: int


def read_pairs(folder: str | Path) -> list[Pair]:
    """Read the table of a data folder; the pictures themselves are not opened.

    Raises FileNotFoundError or ValueError, naming file and line, for a folder of another format or a broken line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name one with prompt.json or metadata.jsonl")
    table = next((folder / name for name in FORMATS if (folder / name).is_file()), None)
    if table is None:
        raise FileNotFoundError(f"{folder} holds no prompt.json (Fill50K) and no metadata.jsonl (Hugging Face): make one")
    lines = files.read_text(table, "a table of pairs", TABLE_BYTES).split("\n")  # not at U+2028, as splitlines does
    pairs = [_pair(folder, table, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise ValueError(f"{table} is empty: it needs a line for each pair")
    return pairs


def _pair(folder: Path, table: Path, number: int, line: str) -> Pair:
    names, where = FORMATS[table.name], f"{table}, line {number},"
    row = files.parse_json(line, where, "a JSON object")
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object but {type(row).__name__}: correct or remove it")
    for name in names:
        value, wanted, never = row.get(name), "text", "[\0\ud800-\udfff]"  # what no encoding has
        if name != names[2]:
            wanted, never = "the name of a picture, with / instead of \\", "[\0-\x1f\x7f-\x9f\ud800-\udfff]"
        if not isinstance(value, str) or re.search(never, value):
            raise ValueError(f"{where[:-1]}: {name} is {value!r}, but must be {wanted}: correct or remove it")
    hint, image, prompt = (row[name] for name in names)
    return Pair(folder / hint, folder / image, prompt, number)


def digest(pairs: list[Pair]) -> str:
    """Return in words which pairs these are: by prompts, contents of the pictures, and order, wherever they lie.

    Raises FileNotFoundError, naming it, for a picture that is missing.
    """
    found = hashlib.blake2b(digest_size=8)
    for pair in tqdm(pairs, desc="identifying", unit="pair", leave=False):
        found.update(pair.prompt.encode() + b"\0")
        for path in (pair.hint, pair.image):
            check_file(path, "an image")
            with open(path, "rb") as file:
                found.update(hashlib.file_digest(file, "blake2b").digest())
    return f"{len(pairs)} pairs of digest {found.hexdigest()}"


def load_pair(pair: Pair, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return hint and image, each (size, size, 3) uint8, scaled so that the shorter side fits, the middle cut out alike.

    Raises FileNotFoundError or ValueError, naming the file, for a missing or unreadable picture or sizes that differ.
    """
    hint, image = conditions.load_image(pair.hint), conditions.load_image(pair.image)
    if hint.size != image.size:
        raise ValueError(
            f"{pair.hint} has {hint.width}x{hint.height} pixels, but {pair.image} {image.width}x{image.height}: "
            "make them equal"
        )
    scale = size / min(image.size)
    width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    try:
        hint = conditions.resize_hint(hint, height, width)
    except ValueError as error:
        raise ValueError(f"{pair.hint}: {error}") from error
    left, top = (width - size) // 2, (height - size) // 2
    box = (left, top, left + size, top + size)
    image = image.resize((width, height), Image.Resampling.LANCZOS) if (width, height) != image.size else image
    return np.asarray(hint.crop(box)), np.asarray(image.crop(box))


# Checking


def problems(pair: Pair) -> Iterator[str]:
    """Yield what is wrong with a pair, in words, with the line of the table."""
    where = f"line {pair.line}"
    if not pair.prompt.strip():
        yield f"{where}: the prompt is empty (fine for some, but most should say what is seen)"
    pictures, found = [], []
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        for path in (pair.hint, pair.image):
            try:
                pictures.append(conditions.load_image(path, hint=path is pair.hint))
            except (OSError, ValueError) as error:
                found.append(error)
    yield from (f"{where}: {text}" for text in [*found, *(note.message for note in notes)])
    if len(pictures) < 2:
        return
    hint, image = pictures
    if hint.size != image.size:
        yield f"{where}: {pair.hint} has {hint.width}x{hint.height} pixels, but {pair.image} {image.width}x{image.height}"
    for doubt in conditions.doubts(None, np.asarray(hint)):
        yield f"{where}: {pair.hint} may be wrong: {doubt}"


def contact_sheet(pairs: list[Pair], count: int = 24, side: int = 96, lines: int = 4) -> Image.Image:
    """Draw up to `count` pairs, evenly chosen: hint, image, the prompt in up to `lines`; what is missing is red."""
    chosen = [pairs[round(i)] for i in np.linspace(0, len(pairs) - 1, min(count, len(pairs)))]
    across = min(8, len(chosen))
    rows = -(-len(chosen) // across)
    height = 2 * side + 12 * lines + 8
    sheet = Image.new("RGB", (across * (side + 4), rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, pair in enumerate(chosen):
        x, y = i % across * (side + 4), i // across * height
        for j, path in enumerate((pair.hint, pair.image)):
            try:
                picture = conditions.load_image(path).resize((side, side), Image.Resampling.BOX)
            except (OSError, ValueError):
                picture = Image.new("RGB", (side, side), "red")
            sheet.paste(picture, (x, y + j * side))
        caption = (
            textwrap.wrap(pair.prompt[:200], 16, max_lines=lines, placeholder="...")
            if pair.prompt.strip()
            else ["(no prompt)"]
        )
        draw.text((x + 2, y + 2 * side + 3), "\n".join(caption), fill="black", spacing=1)
    return sheet


# Making


def write_pairs(folder: str | Path, pairs: Iterator[tuple[np.ndarray, np.ndarray, str]], total: int | None = None) -> int:
    """Write (hint, image, prompt) in the tutorial's format, all or nothing, and return how many.

    Raises ValueError if the folder holds anything already, OSError if it cannot be written.
    """
    lines = []
    with files.new_folder(folder) as new:
        for name in ("source", "target"):
            (new / name).mkdir()
        for i, (hint, image, prompt) in enumerate(tqdm(pairs, desc="drawing", unit="pair", total=total)):
            for name, picture in (("source", hint), ("target", image)):
                Image.fromarray(picture).save(new / name / f"{i}.png")
            lines.append(json.dumps({"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": prompt}))
        (new / "prompt.json").write_text("\n".join(lines) + "\n", "utf-8")
    return len(lines)


def circles(count: int, seed: int = 0, size: int = toy.SIZE) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Yield pairs like Fill50K's: the outline of a circle, the circle filled, "red circle with white background".

    Pair i is a function of (seed, i) alone. The generator of Fill50K was never published; this one is ours.
    """
    y, x = np.mgrid[:size, :size] + 0.5
    for i in range(count):
        random = np.random.default_rng([seed, i])
        colour, ground = random.choice(list(toy.COLOURS)), random.choice(list(toy.BACKGROUNDS))
        radius = random.uniform(0.1, 0.35) * size
        middle = random.uniform(radius + 2, size - radius - 2, 2)
        inside = radius - np.hypot(x - middle[0], y - middle[1])  # pixels from the edge, above 0 within
        filled, line = (np.clip(v, 0, 1)[..., None] for v in (inside + 0.5, 1.5 - abs(inside)))
        image = filled * np.array(toy.COLOURS[colour]) + (1 - filled) * np.array(toy.BACKGROUNDS[ground])
        hint = np.repeat(255 * line, 3, axis=2)
        yield hint.round().astype(np.uint8), image.round().astype(np.uint8), f"{colour} circle with {ground} background"


def toy_pairs(count: int, condition: str) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Yield the training scenes of the toy world with their hints."""
    for scene in toy.scenes(count, "train"):
        yield scene.hint(condition), scene.image, scene.caption
