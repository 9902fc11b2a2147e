"""Scribbles, soft edges and line art: strokes without a network, or with HED."""

import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image

from minicn.conditions.filters import blur, sobel
from minicn.conditions.images import grey_hint, to_pixels


def scribble(drawing: Image.Image | np.ndarray) -> np.ndarray:
    """Turn a drawing of dark strokes on white into white strokes on black: white where min(R, G, B) < 127.

    Raises ValueError for a drawing without strokes.
    """
    strokes = to_pixels(drawing).min(2) < 127
    if not strokes.any():
        raise ValueError("the drawing has no strokes: draw with a dark pen (a channel below 127) on white")
    return grey_hint(strokes)


def fake_scribble(soft: np.ndarray) -> np.ndarray:
    """Return a scribble made from soft edges, (H, W, 3) uint8, white on black.

    soft  (H, W) float in [0, 1], or a soft-edge hint (H, W) or (H, W, 3) uint8
    Source: ControlNet's nms(map, 127, 3) and what follows it: blur by 3 pixels, keep what is above 127 and a maximum along
    one of four directions, blur by 3 pixels, keep what is above 4.
    """
    soft = _soft_uint8(soft)
    blurred = blur(soft.astype(np.float32), 3, 12, "reflect")
    p = np.pad(blurred, 1, constant_values=-np.inf)
    height, width = blurred.shape

    def neighbour(y: int, x: int) -> np.ndarray:
        return p[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    ridge = np.zeros(blurred.shape, dtype=bool)
    for y, x in ((0, 1), (1, 0), (1, 1), (1, -1)):
        ridge |= (blurred >= neighbour(y, x)) & (blurred >= neighbour(-y, -x))
    lines = np.where(ridge & (blurred > 127), np.float32(255), np.float32(0))
    return grey_hint(np.rint(blur(lines, 3, 9, "reflect")) > 4)


def hed(image: Image.Image | np.ndarray, network: Callable | None = None, safe: bool = False) -> np.ndarray:
    """Return soft edges, grey on black, (H, W, 3) uint8.

    network  `networks.HED`: from an image (H, W, 3) uint8 to soft edges (H, W) in [0, 1]. By default `soft_edges` replaces
             it, with a warning, since the released ControlNets learned the network's edges; pass `soft_edges` to choose it
             without the warning.
    safe     quantise to three values, 0, 127 and 255, so that no image can hide in the hint (v1.1)
    """
    if network is None:
        warnings.warn("hed without weights: a soft-edge filter replaces the network", stacklevel=1)
        network = soft_edges
    pixels = to_pixels(image)
    soft = np.asarray(network(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()), dtype=np.float32)
    if safe:
        soft = (soft * 3).astype(np.int32) / 2
    return grey_hint(_soft_uint8(np.clip(soft, 0, 1)))


def _soft_uint8(soft: np.ndarray) -> np.ndarray:
    """Return soft edges as (H, W) uint8; floats are truncated to grey levels, as in the official code."""
    soft = np.asarray(soft)
    if soft.dtype == np.uint8 and soft.ndim == 3:
        soft = soft[..., 0]
    if soft.ndim != 2 or soft.size == 0 or not (soft.dtype == np.uint8 or np.issubdtype(soft.dtype, np.floating)):
        raise ValueError(f"soft edges are {soft.dtype} of shape {soft.shape}, but must be float (H, W), or a uint8 hint")
    if soft.dtype == np.uint8:
        return soft
    if not (soft.min() >= 0 and soft.max() <= 1):
        raise ValueError(f"soft edges lie in [{soft.min():.3g}, {soft.max():.3g}], but must lie in [0, 1]: rescale them")
    return (soft * 255).astype(np.uint8)


def soft_edges(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return soft edges (H, W) float32 in [0, 1) without a network: what is an edge at all of three scales.

    The gradient of the strongest channel after blurs by 1, 2 and 4 pixels, times that number; its geometric mean g
    suppresses texture, which only the finest scale sees. The edge is g^2 / (g^2 + 1/16^2): half where g is a sixteenth.
    """
    total = 0.0
    for sigma in (1, 2, 4):
        strongest = 0.0
        for channel in np.moveaxis(to_pixels(image).astype(np.float32), 2, 0):
            dx, dy = sobel(blur(channel, sigma, 3 * sigma, "reflect"))
            strongest = np.maximum(strongest, np.hypot(dx, dy))
        total = total + np.log(sigma * strongest / (8 * 255) + 1e-6)
    gradient = np.exp(total / 3)
    return gradient**2 / (gradient**2 + 1 / 16**2)


def lineart(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return the lines of a cartoon or other image, soft, white on black, (H, W, 3) uint8.

    A line is where a channel is darker than its surroundings (a Gaussian of 3 pixels), by 4% of the range (black) to 20%
    (white). No network: the paper's line detector was not released; v1.1's (Anime2Sketch) draws dark lines on white, and
    its ControlNet takes the inverted map, which has this polarity.
    """
    darker = 0.0
    for channel in np.moveaxis(to_pixels(image).astype(np.float32), 2, 0):
        darker = np.maximum(darker, blur(channel, 3, 9, "reflect") - channel)
    strength = np.clip((darker / 255 - 0.04) / 0.16, 0, 1)
    return grey_hint((strength * 255).astype(np.uint8))
