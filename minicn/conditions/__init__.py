"""From a picture, drawing, key points, labels, normals or depth to a hint: one function per condition.

Source: the conventions of the annotators released with ControlNet v1.0 and v1.1 (colour order, polarity, thresholds, limbs,
drawing order, resizing). Where the two differ, v1.1 is the default and `version="v1.0"` the older one. Every hint is
(H, W, 3) uint8 RGB; lines are white on black. The networks that annotate are in `conditions.networks`. Left out: hands and
faces of poses.
"""

from minicn.conditions.checking import doubts, looks_inverted
from minicn.conditions.edges import canny, draw_lines, find_lines, hough
from minicn.conditions.filters import resample
from minicn.conditions.images import (
    VERSIONS,
    fit,
    load_hint,
    load_image,
    official_resize,
    official_size,
    resize_hint,
    save_image,
    side_by_side,
)
from minicn.conditions.labels import ade20k, coco_stuff, read_labels
from minicn.conditions.poses import (
    BODY_25,
    OPENPIFPAF_COLOURS,
    OPENPIFPAF_LIMBS,
    OPENPOSE_COLOURS,
    OPENPOSE_LIMBS,
    openpifpaf,
    openpose,
    read_openpifpaf,
    read_openpose,
)
from minicn.conditions.scribbles import fake_scribble, hed, lineart, scribble, soft_edges
from minicn.conditions.surfaces import NORMAL_AXES, depth, normal, normal_from_depth, read_depth, read_normals
from minicn.inputs import hint_tensor, to_rgb

NAMES = (
    *("canny", "hough", "scribble", "hed", "openpose", "openpifpaf"),
    *("ade20k", "coco_stuff", "normal", "lineart", "depth"),
)

__all__ = [
    "BODY_25",
    "NAMES",
    "NORMAL_AXES",
    "OPENPIFPAF_COLOURS",
    "OPENPIFPAF_LIMBS",
    "OPENPOSE_COLOURS",
    "OPENPOSE_LIMBS",
    "VERSIONS",
    "ade20k",
    "canny",
    "coco_stuff",
    "depth",
    "doubts",
    "draw_lines",
    "fake_scribble",
    "find_lines",
    "fit",
    "hed",
    "hint_tensor",
    "hough",
    "lineart",
    "load_hint",
    "load_image",
    "looks_inverted",
    "normal",
    "normal_from_depth",
    "official_resize",
    "official_size",
    "openpifpaf",
    "openpose",
    "read_depth",
    "read_labels",
    "read_normals",
    "read_openpifpaf",
    "read_openpose",
    "resample",
    "resize_hint",
    "save_image",
    "scribble",
    "side_by_side",
    "soft_edges",
    "to_rgb",
]
