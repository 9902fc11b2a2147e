"""`minicn condition`: from a file to the hint of one condition, whatever it takes, with a word on what was done.

A picture is sized by the official rule, then looked at; what a network finds may be looked for at another resolution
(`detect_resolution`) and is then resized to the picture, as the official apps do.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from minicn import conditions

SMALLEST = 8  # pixels a side: one of the latents that the hint steers

TAKES = {
    "canny": "a picture; --low, --high",
    "hough": "a picture: the straight lines of its Canny edges (--low, --high), or with --weights what M-LSD finds",
    "scribble": "a drawing, dark strokes on white; with --fake a picture, whose soft edges become strokes",
    "hed": "a picture: soft edges of HED with --weights, else of a filter; --safe leaves three grey levels",
    "openpose": "key points as OpenPose writes them (JSON, 18 or 25 points); or, with --weights, a picture",
    "openpifpaf": "key points as OpenPifPaf or COCO write them (JSON, 17 points)",
    "ade20k": "a label map: one channel, or a palette picture's indices; 0 (wall) to 149 (flag)",
    "coco_stuff": "a label map: one channel, or a palette picture's indices; 1 (person) to 182 (wood), 0 unlabelled",
    "normal": "a normal map, picture or .npy (--axes); with --from-depth a depth map (--background)",
    "lineart": "a picture or cartoon, whose dark lines are found by a filter",
    "depth": "a depth map, near is white: grey picture of 8 or 16 bits, or .npy (--far-is-white)",
}
OPTIONS = {  # which options count for which condition; --resolution and --ready count for all
    "canny": {"low", "high"},
    "hough": {"low", "high", "weights", "detect_resolution", "version"},
    "scribble": {"fake", "weights", "detect_resolution"},
    "hed": {"weights", "safe", "detect_resolution"},
    "openpose": {"size", "like", "weights", "detect_resolution", "version"},
    "openpifpaf": {"size", "like"},
    "ade20k": {"first_label", "unlabelled", "version"},
    "coco_stuff": {"first_label", "unlabelled", "version"},
    "normal": {"axes", "from_depth", "background", "far_is_white", "version"},
    "lineart": {"detect_resolution"},
    "depth": {"far_is_white"},
}
NEEDS = {  # options that count for nothing without another one, by condition
    "scribble": {"weights": "fake", "detect_resolution": "fake"},
    "openpose": {"detect_resolution": "weights"},
    "normal": {"background": "from_depth", "far_is_white": "from_depth"},
}


def make(name: str, path: Path, **options) -> tuple[np.ndarray, str]:
    """Make the hint (H, W, 3) uint8 of a condition from a file, and say in a few words what was done.

    options  those of `minicn condition`, by name; None or False stand for those that were not given
    Raises ValueError or FileNotFoundError, in one line, for a file that the condition does not take and for options that
    would count for nothing.
    """
    if name not in conditions.NAMES:
        raise ValueError(f"condition is {name!r}, but must be one of: {', '.join(conditions.NAMES)}")
    options = {key: value for key, value in options.items() if value is not None and value is not False}
    resolution, ready = options.pop("resolution", None), options.pop("ready", False)
    check_options(name, options, ready)
    if ready:
        return _ready(name, path, resolution)
    makers = {"openpose": _openpose, "openpifpaf": _openpifpaf, "ade20k": _labels, "coco_stuff": _labels}
    makers |= {"normal": _normal, "depth": _depth}
    return makers.get(name, _picture)(name, path, resolution, **options)


def check_options(name: str, options: dict, ready: bool) -> None:
    """Raise ValueError for an option that would count for nothing."""
    for key in options:
        option = "--" + key.replace("_", "-")
        if key not in OPTIONS[name]:
            allowed = ", ".join("--" + o.replace("_", "-") for o in sorted(OPTIONS[name]))
            raise ValueError(f"{option} counts for nothing with {name}, which takes {allowed}: leave it out")
        if ready and key != "version":
            raise ValueError(f"{option} counts for nothing with --ready: give one of the two")
        needed = NEEDS.get(name, {}).get(key)
        if needed and needed not in options:
            raise ValueError(f"{option} counts for nothing without --{needed.replace('_', '-')}: give both or none")


def _check_size(path: Path, height: int, width: int) -> None:
    if min(height, width) < SMALLEST:
        raise ValueError(f"{path} is {width}x{height} pixels: a hint needs {SMALLEST}x{SMALLEST} at least")


def _load(path: Path) -> Image.Image:
    image = conditions.load_image(path)
    _check_size(path, image.height, image.width)
    return image


def _ready(name: str, path: Path, resolution: int | None) -> tuple[np.ndarray, str]:
    image = _load(path)
    if resolution:
        image = conditions.resize_hint(image, *conditions.official_size(image.height, image.width, resolution))
    return np.asarray(image), f"{name}, taken as it is"


def _sized(image: Image.Image, resolution: int | None) -> Image.Image:
    return conditions.official_resize(image, resolution) if resolution else image


def _resized(hint: np.ndarray, height: int, width: int, kind: str) -> np.ndarray:
    return hint if hint.shape[:2] == (height, width) else conditions.resample(hint, height, width, kind)


def _back(version: str) -> str:
    """Say how maps with few colours are resized: v1.0 kept the colours, v1.1 mixes them at borders."""
    return "nearest" if version == "v1.0" else "linear"


def _picture(
    name: str,
    path: Path,
    resolution: int | None,
    weights: Path | None = None,
    detect_resolution: int | None = None,
    version: str = "v1.1",
    safe: bool = False,
    fake: bool = False,
    **thresholds: float,
) -> tuple[np.ndarray, str]:
    image = _sized(_load(path), resolution)
    height, width = image.height, image.width
    seen = _sized(image, detect_resolution)
    if name == "canny":
        hint = conditions.canny(seen, **thresholds)
        return hint, f"{np.mean(hint > 0):.1%} of them edges"
    if name == "hough" and weights:
        lines = _network("MLSD", weights)(np.asarray(seen))
        hint, did = conditions.draw_lines(lines, seen.height, seen.width), f"{len(lines)} lines that M-LSD found"
    elif name == "hough":
        hint = conditions.hough(seen, **thresholds)
        did = f"straight lines of the Canny edges, on {np.mean(hint > 0):.1%} of them"
    elif name == "scribble" and not fake:
        hint = conditions.scribble(image)
        return hint, f"{np.mean(hint > 0):.1%} of them strokes"
    elif name == "lineart":
        hint, did = conditions.lineart(seen), "dark lines, by a filter"
    else:
        hint = conditions.hed(seen, _network("HED", weights) if weights else conditions.soft_edges, safe)
        did = "soft edges of HED" if weights else "soft edges of a filter, not of HED (no --weights)"
        did += ", in three grey levels" if safe else ""
    hint = _resized(hint, height, width, _back(version) if name == "hough" else "linear")
    if fake:
        hint, did = conditions.fake_scribble(hint), f"strokes from {did}"
    return hint, did


def _network(kind: str, weights: Path):
    from minicn.conditions import networks  # needed by few

    return getattr(networks, kind).load(weights)


def _openpose(
    name: str,
    path: Path,
    resolution: int | None,
    weights: Path | None = None,
    detect_resolution: int | None = None,
    version: str = "v1.1",
    **size,
) -> tuple[np.ndarray, str]:
    if not weights:
        return _key_points(name, path, resolution, version=version, **size)
    if size:
        raise ValueError("--size and --like count for nothing with --weights: the picture's size is used")
    image = _sized(_load(path), resolution)
    seen = _sized(image, detect_resolution)
    people = _network("BodyPose", weights)(np.asarray(seen))
    hint = conditions.openpose(people, seen.height, seen.width, version)
    return _resized(hint, image.height, image.width, _back(version)), f"the poses of {_persons(people)}"


def _openpifpaf(name: str, path: Path, resolution: int | None, **size) -> tuple[np.ndarray, str]:
    return _key_points(name, path, resolution, **size)


def _key_points(
    name: str,
    path: Path,
    resolution: int | None,
    size: tuple[int, int] | None = None,
    like: Path | None = None,
    **version: str,
) -> tuple[np.ndarray, str]:
    if size and like:
        raise ValueError("--size and --like both say how large the picture is: give one")
    read, draw = getattr(conditions, f"read_{name}"), getattr(conditions, name)
    people, told = read(path)
    if like:
        height, width = _load(like).size[::-1]
    elif size:
        width, height = size
    elif told:
        height, width = told
    else:
        raise ValueError(f"{path} does not say how large its picture was: give --size WIDTHxHEIGHT or --like PICTURE")
    _check_size(path, height, width)
    inside = (people[..., 0] < width) & (people[..., 1] < height) & (people[..., :2] >= 0).all(2)
    if not (inside & (people[..., 2] > 0)).any():
        raise ValueError(f"{path}: no point lies within {width}x{height} pixels: give the size of its picture")
    if resolution:
        new = conditions.official_size(height, width, resolution)
        people = people * [new[1] / width, new[0] / height, 1]
        height, width = new
    return draw(people, height, width, **version), f"the poses of {_persons(people)}"


def _persons(people: np.ndarray) -> str:
    return f"{len(people)} person{'' if len(people) == 1 else 's'}"


def _labels(
    name: str,
    path: Path,
    resolution: int | None,
    first_label: int | None = None,
    unlabelled: int | None = None,
    version: str = "v1.1",
) -> tuple[np.ndarray, str]:
    labels = conditions.read_labels(path)
    _check_size(path, *labels.shape)
    given = {} if first_label is None else {"first": first_label}
    if unlabelled is not None:
        given["unlabelled"] = unlabelled
    try:
        hint = getattr(conditions, name)(labels, **given)
    except ValueError as error:
        raise ValueError(f"{path}: {error} (--first-label, --unlabelled)") from error
    if resolution:
        hint = _resized(hint, *conditions.official_size(*labels.shape, resolution), _back(version))
    return hint, f"{len(np.unique(labels))} labels"


def _normal(
    name: str,
    path: Path,
    resolution: int | None,
    axes: str | None = None,
    from_depth: bool = False,
    background: float = 0.4,
    far_is_white: bool = False,
    version: str = "v1.1",
) -> tuple[np.ndarray, str]:
    if from_depth:
        if axes:
            raise ValueError("--axes counts for nothing with --from-depth: give one of the two")
        depth = conditions.read_depth(path) * (-1 if far_is_white else 1)
        _check_size(path, *depth.shape)
        hint, did = conditions.normal_from_depth(depth, background, version), "normals from depth"
    else:
        normals = conditions.read_normals(path, axes or "opengl")
        _check_size(path, *normals.shape[:2])
        hint, did = conditions.normal(normals, version), f"normals of {axes or 'opengl'} axes"
    return _final(hint, resolution), f"{did} in {version}'s colours"


def _depth(name: str, path: Path, resolution: int | None, far_is_white: bool = False) -> tuple[np.ndarray, str]:
    depth = conditions.read_depth(path)
    _check_size(path, *depth.shape)
    low, high = depth.min(), depth.max()
    hint = conditions.depth(-depth if far_is_white else depth)
    return _final(hint, resolution), f"depth, its range {low:g} to {high:g} stretched{', turned round' * far_is_white}"


def _final(hint: np.ndarray, resolution: int | None) -> np.ndarray:
    if not resolution:
        return hint
    return _resized(hint, *conditions.official_size(*hint.shape[:2], resolution), "linear")
