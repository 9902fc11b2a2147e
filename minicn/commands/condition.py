"""`minicn condition`: a hint from a picture, a drawing, key points, labels, normals or depth."""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from minicn import conditions
from minicn.commands import cli
from minicn.conditions import making


class Lines(cli.Formatter):
    """Keep the lines of the description as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text


def condition_options(command: argparse.ArgumentParser) -> None:
    takes = "\n".join(f"  {name:10}  {text}" for name, text in making.TAKES.items())
    command.description, command.formatter_class = f"Make the hint of a condition. Each takes:\n{takes}", Lines
    add, side = command.add_argument, cli.whole(64, 8192)
    add("name", choices=conditions.NAMES, metavar="NAME", help=f"the condition: {', '.join(conditions.NAMES)}")
    add("image", type=Path, metavar="INPUT", help="file to read: a picture, .json or .npy, see above")
    add("hint", type=Path, metavar="HINT", help="picture to write")
    add(
        "--resolution", type=side, help="shorter side, rounded to 64s as in the official apps, which use 512 (default: kept)"
    )
    add("--ready", action="store_true", help="the picture is a hint already: only look at it, and resize it")
    add("--version", choices=conditions.VERSIONS, help="ControlNet's conventions, where they differ (default: v1.1)")
    add("--low", type=cli.number(0, 10000), help="Canny: edges above it are kept if connected (default: 100)")
    add("--high", type=cli.number(0, 10000), help="Canny: edges above it are kept (default: 200)")
    add("--weights", type=Path, help="released file of HED (hed, scribble --fake), M-LSD (hough) or OpenPose (openpose)")
    add("--detect-resolution", type=side, help="shorter side at which lines or people are detected (default: the hint's)")
    add("--safe", action="store_true", help="hed: three grey levels, as in v1.1")
    add("--fake", action="store_true", help="scribble: from a picture")
    add(
        "--size",
        type=size,
        metavar="WxH",
        help="of the hint: pictures and maps are scaled and cropped to it; of key points, the picture in which they lie",
    )
    add("--like", type=Path, metavar="PICTURE", help="key points: a picture of that size")
    add("--first-label", type=cli.whole(0, 255), help="label of wall or person (default: 0 for ade20k, 1 for coco_stuff)")
    add(
        "--unlabelled",
        type=cli.whole(0, 65535),
        help="label that becomes black (default: none for ade20k, 0 for coco_stuff)",
    )
    add("--axes", choices=conditions.NORMAL_AXES, help="what a normal map's colours mean (default: opengl)")
    add("--from-depth", action="store_true", help="normal: from a depth map, as v1.0's app")
    add("--background", type=cli.number(0, 1), help="normal from depth: fraction of the range that is far (default: 0.4)")
    add("--far-is-white", action="store_true", help="the depth map is white, or large, where it is far")


def size(text: str) -> tuple[int, int]:
    """Convert "640x480" to 640 and 480, the width first."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        width = height = 0
    if not (8 <= width <= 16384 and 8 <= height <= 16384):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, each from 8 to 16384, as 768x512, got {text!r}")
    return width, height


def condition(args: argparse.Namespace) -> None:
    cli.check_picture(args.hint, args.image, args.like)
    options = {key: value for key, value in vars(args).items() if key not in ("command", "argv", "name", "image", "hint")}
    hint, did = making.make(args.name, args.image, **options)
    conditions.save_image(Image.fromarray(hint), args.hint)
    print(f"{args.hint}: {hint.shape[1]}x{hint.shape[0]} pixels, {did}")
    look(args.name, hint, str(args.hint), args.version or "v1.1")


def look(name: str | None, hint: np.ndarray, shown: str, version: str = "v1.1", remedy: str = "") -> None:
    """Note what looks wrong in a hint (H, W, 3) uint8 of a condition, None if that is unknown."""
    for doubt in conditions.doubts(name, hint, version):
        print(f"note: {shown} may be wrong: {doubt}{remedy}", file=sys.stderr)
