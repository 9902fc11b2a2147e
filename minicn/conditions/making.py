"""`minicn condition`: from a file of the kind that a condition takes to its hint, with a few words on what was done.

An image is resized by the official rule, then annotated; lines and people may be detected at another resolution
(`detect_resolution`) and are then resized to the image, as in the official apps.
"""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from minicn import conditions
from minicn.conditions import palettes

SMALLEST = 8  # minimum side, pixels: one of the latents that the hint controls

TAKES = {
    "canny": "an image; --low, --high",
    "hough": "an image: the straight lines of its Canny edges (--low, --high), or of M-LSD with --weights",
    "scribble": "a drawing, dark strokes on white; with --fake an image, whose soft edges become strokes",
    "hed": "an image: soft edges of HED with --weights, else of a filter; --safe leaves three grey levels",
    "openpose": "key points as OpenPose writes them (JSON, 18 or 25 points); or, with --weights, an image",
    "openpifpaf": "key points as OpenPifPaf or COCO write them (JSON, 17 points)",
    "ade20k": "a label map: a single channel, or the indices of a palette image; 0 (wall) to 149 (flag)",
    "coco_stuff": "a label map: a single channel, or the indices of a palette image; 1 (person) to 182 (wood), 0 unlabelled",
    "normal": "a normal map, image or .npy (--axes); with --from-depth a depth map (--background)",
    "lineart": "an image or cartoon, whose dark lines are found by a filter",
    "depth": "a depth map, near is white: grey image of 8 or 16 bits, or .npy (--far-is-white)",
}
OPTIONS = {  # the options of each condition; all also take --resolution, --size and --ready
    "canny": {"low", "high"},
    "hough": {"low", "high", "weights", "detect_resolution", "version"},
    "scribble": {"fake", "weights", "detect_resolution"},
    "hed": {"weights", "safe", "detect_resolution"},
    "openpose": {"like", "weights", "detect_resolution", "version"},
    "openpifpaf": {"like"},
    "ade20k": {"first_label", "unlabelled", "version"},
    "coco_stuff": {"first_label", "unlabelled", "version"},
    "normal": {"axes", "from_depth", "background", "far_is_white", "version"},
    "lineart": {"detect_resolution"},
    "depth": {"far_is_white"},
}
NEEDS = {  # options that have no effect without another one, by condition
    "scribble": {"weights": "fake", "detect_resolution": "fake"},
    "openpose": {"detect_resolution": "weights"},
    "normal": {"background": "from_depth", "far_is_white": "from_depth"},
}
Size = int | tuple[int, int] | None  # the shorter side, as in the official apps; or width and height, to which it is cropped


def make(name: str, path: Path, **options) -> tuple[np.ndarray, str]:
    """Make the hint (H, W, 3) uint8 of a condition from a file, and say in a few words what was done.

    options  those of `minicn condition`, by name; None or False means not given
    Raises ValueError or FileNotFoundError, in one line, for a file that the condition does not take and for options that
    would have no effect.
    """
    if name not in conditions.NAMES:
        raise ValueError(f"condition is {name!r}, but must be one of: {', '.join(conditions.NAMES)}")
    options = {key: value for key, value in options.items() if value is not None and value is not False}
    resolution, ready, size = options.pop("resolution", None), options.pop("ready", False), options.pop("size", None)
    check_options(name, options, ready)
    if size and name in ("openpose", "openpifpaf") and "weights" not in options and not ready:
        options["size"] = size  # of the picture in which the points lie
    elif size and resolution:
        raise ValueError("--size and --resolution both state the size of the hint: give only one of them")
    elif size:
        resolution = size
    return _ready(name, path, resolution) if ready else MAKERS[name](path, resolution, **options)


def check_options(name: str, options: dict, ready: bool) -> None:
    """Raise ValueError for an option that would have no effect."""
    for key in options:
        option = "--" + key.replace("_", "-")
        if key not in OPTIONS[name]:
            allowed = ", ".join("--" + o.replace("_", "-") for o in sorted(OPTIONS[name]))
            raise ValueError(f"{option} has no effect with {name}, which takes {allowed}: leave it out")
        if ready and key != "version":
            raise ValueError(f"{option} has no effect with --ready: give only one of them")
        needed = NEEDS.get(name, {}).get(key)
        if needed and needed not in options:
            raise ValueError(f"{option} has no effect without --{needed.replace('_', '-')}: give both or neither")


def _check_size(path: Path, height: int, width: int) -> None:
    if min(height, width) < SMALLEST:
        raise ValueError(f"{path} is {width}x{height} pixels, but a hint needs at least {SMALLEST}x{SMALLEST}: enlarge it")


def _load(path: Path, resolution: Size = None) -> Image.Image:
    image = conditions.load_image(path)
    _check_size(path, image.height, image.width)
    return _sized(image, resolution)


def _ready(name: str, path: Path, resolution: Size) -> tuple[np.ndarray, str]:
    image = _load(path)
    if isinstance(resolution, tuple):
        image = conditions.fit(image, resolution, hint=True)
    elif resolution:
        image = conditions.resize_hint(image, *conditions.official_size(image.height, image.width, resolution))
    return np.asarray(image), f"{name}, used as it is"


def _sized(image: Image.Image, resolution: Size) -> Image.Image:
    if isinstance(resolution, tuple):
        return conditions.fit(image, resolution)
    return conditions.official_resize(image, resolution) if resolution else image


def _resized(hint: np.ndarray, height: int, width: int, version: str = "v1.1") -> np.ndarray:
    """Resize a map: v1.0 kept the colours of maps with few of them, v1.1 mixes them at borders."""
    return conditions.resample(hint, height, width, "nearest" if version == "v1.0" else "linear")


def _final(hint: np.ndarray, resolution: Size, version: str = "v1.1") -> np.ndarray:
    if isinstance(resolution, tuple):
        return np.asarray(conditions.fit(Image.fromarray(hint), resolution, hint=True))
    return _resized(hint, *conditions.official_size(*hint.shape[:2], resolution), version) if resolution else hint


def _network(kind: str, weights: Path):
    from minicn.conditions import networks  # rarely needed

    return getattr(networks, kind).load(weights)


# From images


def _canny(path: Path, resolution: Size, **thresholds: float) -> tuple[np.ndarray, str]:
    hint = conditions.canny(_load(path, resolution), **thresholds)
    return hint, f"{np.mean(hint > 0):.1%} of them edges"


def _hough(
    path: Path,
    resolution: Size,
    weights: Path | None = None,
    detect_resolution: Size = None,
    version: str = "v1.1",
    **thresholds: float,
) -> tuple[np.ndarray, str]:
    image = _load(path, resolution)
    seen = _sized(image, detect_resolution)
    if weights:
        lines = _network("MLSD", weights)(np.asarray(seen))
        hint, did = conditions.draw_lines(lines, seen.height, seen.width), f"{len(lines)} lines found by M-LSD"
    else:
        hint = conditions.hough(seen, **thresholds)
        did = f"straight lines of the Canny edges, on {np.mean(hint > 0):.1%} of them"
    return _resized(hint, image.height, image.width, version), did


def _scribble(path: Path, resolution: Size, fake: bool = False, **of_hed) -> tuple[np.ndarray, str]:
    if fake:
        soft, did = _hed(path, resolution, **of_hed)
        return conditions.fake_scribble(soft), f"strokes from {did}"
    hint = conditions.scribble(_load(path, resolution))
    return hint, f"{np.mean(hint > 0):.1%} of them strokes"


def _hed(
    path: Path,
    resolution: Size,
    weights: Path | None = None,
    detect_resolution: Size = None,
    safe: bool = False,
) -> tuple[np.ndarray, str]:
    image = _load(path, resolution)
    network = _network("HED", weights) if weights else conditions.soft_edges
    hint = conditions.hed(_sized(image, detect_resolution), network, safe)
    did = "soft edges of HED" if weights else "soft edges of a filter, not of HED (no --weights)"
    return _resized(hint, image.height, image.width), did + (", in three grey levels" if safe else "")


def _lineart(path: Path, resolution: Size, detect_resolution: Size = None) -> tuple[np.ndarray, str]:
    image = _load(path, resolution)
    hint = conditions.lineart(_sized(image, detect_resolution))
    return _resized(hint, image.height, image.width), "dark lines, by a filter"


# From key points


def _openpose(
    path: Path,
    resolution: Size,
    weights: Path | None = None,
    detect_resolution: Size = None,
    version: str = "v1.1",
    **size,
) -> tuple[np.ndarray, str]:
    if not weights:
        return _key_points("openpose", path, resolution, version=version, **size)
    if size:
        raise ValueError("--like has no effect with --weights, which uses the size of the image: leave it out")
    image = _load(path, resolution)
    seen = _sized(image, detect_resolution)
    people = _network("BodyPose", weights)(np.asarray(seen))
    hint = conditions.openpose(people, seen.height, seen.width, version)
    return _resized(hint, image.height, image.width, version), _poses(people)


def _key_points(
    name: str,
    path: Path,
    resolution: Size,
    size: tuple[int, int] | None = None,
    like: Path | None = None,
    **version: str,
) -> tuple[np.ndarray, str]:
    if size and like:
        raise ValueError("--size and --like both state the size of the image: give only one of them")
    read, draw = getattr(conditions, f"read_{name}"), getattr(conditions, name)
    size = _load(like).size if like else size
    people, stated = read(path, size and size[::-1])
    if not stated:
        raise ValueError(f"{path} does not state the size of its image: give --size WIDTHxHEIGHT or --like IMAGE")
    height, width = stated
    _check_size(path, height, width)
    inside = (people[..., 0] < width) & (people[..., 1] < height) & (people[..., :2] >= 0).all(2)
    if not (inside & (people[..., 2] > 0)).any():
        raise ValueError(f"{path}: no point lies within {width}x{height} pixels: give the size of its image")
    if isinstance(resolution, tuple):
        scale = max(resolution[0] / width, resolution[1] / height)
        over = [scale * width - resolution[0], scale * height - resolution[1]]
        people = people * [scale, scale, 1] - [over[0] / 2, over[1] / 2, 0]
        width, height = resolution
    elif resolution:
        new = conditions.official_size(height, width, resolution)
        people = people * [new[1] / width, new[0] / height, 1]
        height, width = new
    try:
        return draw(people, height, width, **version), _poses(people)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _poses(people: np.ndarray) -> str:
    return f"the poses of {len(people)} {'person' if len(people) == 1 else 'people'}"


# From maps


def _labels(
    name: str,
    path: Path,
    resolution: Size,
    first_label: int | None = None,
    unlabelled: int | None = None,
    version: str = "v1.1",
) -> tuple[np.ndarray, str]:
    labels = conditions.read_labels(path)
    _check_size(path, *labels.shape)
    given = {"first": first_label, "unlabelled": unlabelled}
    try:
        hint = getattr(conditions, name)(labels, **{key: value for key, value in given.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{path}: {error} (--first-label, --unlabelled)") from error
    classes = zip(*(getattr(palettes, f"{name.upper()}_{what}") for what in ("NAMES", "COLOURS")), strict=True)
    shown = np.unique(hint.reshape(-1, 3), axis=0).tolist()
    names = [words for words, colour in classes if colour.tolist() in shown]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return _final(hint, resolution, version), f"{len(np.unique(labels))} labels: {', '.join(names[:8])}{more}"


def _normal(
    path: Path,
    resolution: Size,
    axes: str | None = None,
    from_depth: bool = False,
    background: float = 0.4,
    far_is_white: bool = False,
    version: str = "v1.1",
) -> tuple[np.ndarray, str]:
    if from_depth:
        if axes:
            raise ValueError("--axes has no effect with --from-depth: give only one of them")
        depth = conditions.read_depth(path, far_is_white)
        _check_size(path, *depth.shape)
        hint, did = conditions.normal_from_depth(depth, background, version), "normals from depth"
    else:
        normals = conditions.read_normals(path, axes or "opengl")
        _check_size(path, *normals.shape[:2])
        hint, did = conditions.normal(normals, version), f"normals of {axes or 'opengl'} axes"
    return _final(hint, resolution), f"{did} in {version}'s colours"


def _depth(path: Path, resolution: Size, far_is_white: bool = False) -> tuple[np.ndarray, str]:
    depth = conditions.read_depth(path, far_is_white)
    _check_size(path, *depth.shape)
    low, high = sorted((-1 if far_is_white else 1) * side + 0.0 for side in (depth.min(), depth.max()))  # 0.0: no "-0"
    hint = conditions.depth(depth)
    did = f"depth, its range of {low:g} to {high:g} stretched{', inverted' if far_is_white else ''}"
    return _final(hint, resolution), did


MAKERS = {
    **{"canny": _canny, "hough": _hough, "scribble": _scribble, "hed": _hed, "lineart": _lineart},
    **{"openpose": _openpose, "openpifpaf": partial(_key_points, "openpifpaf")},
    **{"ade20k": partial(_labels, "ade20k"), "coco_stuff": partial(_labels, "coco_stuff")},
    **{"normal": _normal, "depth": _depth},
}
