"""Looking at a finished hint: what suggests that it is empty, inverted, BGR or of the other version."""

import numpy as np

from minicn.conditions import palettes
from minicn.conditions.images import to_pixels
from minicn.conditions.poses import OPENPOSE_COLOURS, OPENPOSE_LIMBS

LINES = ("canny", "hough", "scribble", "hed", "lineart")  # the conditions drawn white on black


def doubts(name: str | None, hint: np.ndarray, version: str = "v1.1") -> list[str]:
    """Say, in words, what looks wrong in a hint (H, W, 3) uint8 for its condition; an empty list if nothing does.

    name  of the condition; None if it is unknown
    """
    pixels = to_pixels(hint)
    found = None
    if pixels.max() == 0:
        found = "it is all black: it carries no information"
    elif (pixels == pixels[0, 0]).all():
        found = "it is a single colour: it carries no information"
    elif looks_inverted(pixels) if name is None else name in LINES and pixels.mean() > 127.5:
        found = "it is mostly white, so it looks inverted: hints have white lines on black"
    elif name in ("openpose", "openpifpaf"):
        found = _pose(name, pixels)
    elif name in ("ade20k", "coco_stuff"):
        found = _labels(pixels, palettes.ADE20K_COLOURS if name == "ade20k" else palettes.COCO_STUFF_COLOURS)
    elif name == "normal":
        found = _normal(pixels, version)
    elif name == "depth" and (pixels != pixels[..., :1]).any():
        found = "it is coloured: depth is grey, near is white"
    return [found] if found else []


def looks_inverted(hint: np.ndarray) -> bool:
    """Tell whether a hint (H, W, 3) uint8 of an unknown condition is mostly white with some black: lines, inverted."""
    grey = (hint.max(2) == hint.min(2)).all()
    return bool(grey and np.mean(hint > 200) > 0.6 and np.mean(hint < 55) > 0.001)


def _pose(name: str, pixels: np.ndarray) -> str | None:
    if np.mean(pixels.max(2) < 55) < 0.5:
        return "it is not mostly black: poses are drawn on black"
    if name == "openpose" and _limbs_between_joints(pixels[..., ::-1]) > _limbs_between_joints(pixels):
        return "its colours look like BGR: limbs match their joints once red and blue are swapped"
    return None


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


def _labels(pixels: np.ndarray, colours: np.ndarray) -> str | None:
    known, swapped = _known(pixels, colours), _known(pixels[..., ::-1], colours)
    if swapped > known:
        return "its colours look like BGR: more of them are in the palette once red and blue are swapped"
    return f"only {known:.0%} of its pixels have a colour of the palette" if known < 0.5 else None


def _known(pixels: np.ndarray, colours: np.ndarray) -> float:
    """Return the fraction of pixels that have one of the colours, or are black."""

    def number(rgb: np.ndarray) -> np.ndarray:
        return rgb.astype(np.int64) @ [65536, 256, 1]

    return float(np.isin(number(pixels), np.append(number(colours), 0)).mean())


def _normal(pixels: np.ndarray, version: str) -> str | None:
    red, _, blue = pixels.mean((0, 1))
    if (red > blue) != (version == "v1.1"):
        return None
    other = "v1.0's (or BGR)" if version == "v1.1" else "v1.1's"
    return f"its colours look like {other}: what faces the viewer is {'blue' if red > blue else 'red'} here"
