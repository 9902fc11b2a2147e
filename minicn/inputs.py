"""The arguments of `StableDiffusion.generate`: pictures turned into tensors, settings checked."""

import math
import numbers
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minicn.controlnet import ControlNet

TRANSPARENT = "the hint is transparent in places, which become white: if it was drawn on black, put black behind it"
RANGES = {
    "num_steps": (1, 1000),
    "guidance_scale": (0, math.inf),
    "control_start": (0, 1),
    "control_end": (0, 1),
    "denoise": (0, 1),
    "eta": (0, 1),
    "seed": (0, 2**63 - 1),
    "num_images": (1, math.inf),
}


@dataclass(frozen=True)
class Defaults:
    """What a model is drawn with where nothing else is said: Stable Diffusion 1.5's, and the paper's; others keep theirs."""

    guidance_scale: float = 9.0
    default_prompt: str = "a professional, detailed, high-quality image"
    words: str = ""  # all that the model knows, separated by spaces, if these are few; "": any


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Make a picture of any mode 8-bit RGB: 16 bits are scaled down, alpha is composited over the background.

    White is what the official apps put behind pictures and hints alike; behind a mask it is black, which keeps the image.
    """
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        values = np.asarray(image, dtype=np.int64)
        image = Image.fromarray((values.clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("a picture of floating-point values has no agreed range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def opacity(image: Image.Image) -> np.ndarray | None:
    """Return a picture's alpha as uint8, 0 where it is transparent; None if it is opaque everywhere."""
    alpha = np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else None
    return None if alpha is None or alpha.min() == 255 else alpha


def hint_tensor(hint: str | Path | Image.Image | np.ndarray | Tensor) -> Tensor:
    """Turn a picture into a hint, (B, 3, H, W) float32 in [0, 1].

    hint  PIL picture of any mode; the path of one; array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8; or float tensor
          (3, H, W) or (B, 3, H, W) in [0, 1]
    Raises TypeError or ValueError for anything else. What is transparent becomes white, with a warning.
    """
    if isinstance(hint, (str, Path)):
        from minicn.conditions.images import open_image

        hint = open_image(hint)
    if isinstance(hint, np.ndarray):
        if hint.dtype != np.uint8 or hint.ndim not in (2, 3) or (hint.ndim == 3 and hint.shape[2] not in (1, 3, 4)):
            raise ValueError(
                f"hint is an array of dtype {hint.dtype} and shape {hint.shape}, but must be uint8 of shape "
                "(H, W), (H, W, 3) or (H, W, 4)"
            )
        hint = Image.fromarray(hint[..., 0] if hint.ndim == 3 and hint.shape[2] == 1 else hint)
    if isinstance(hint, Image.Image):
        if opacity(hint) is not None:
            warnings.warn(TRANSPARENT, stacklevel=2)
        pixels = np.array(to_rgb(hint))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    if not isinstance(hint, Tensor):
        raise TypeError(f"hint is {type(hint).__name__}, but must be a picture, its path, an array or a tensor")
    if hint.ndim == 3:
        hint = hint[None]
    if hint.ndim != 4 or hint.shape[1] != 3 or not hint.is_floating_point():
        raise ValueError(f"hint is {hint.dtype} of shape {tuple(hint.shape)}, but must be float of shape (B, 3, H, W)")
    if hint.numel() == 0:
        raise ValueError(f"hint has shape {tuple(hint.shape)}: it has no pixels")
    low, high = hint.min().item(), hint.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"hint has values from {low:.3g} to {high:.3g}, but they must lie in [0, 1]: divide by 255")
    return hint.float()


def pair_hints(controlnet, hint, scale) -> tuple[list[ControlNet], list[Tensor], list[float]]:
    """Return ControlNets, hint tensors and scales, in lists of equal length. Raises ValueError, saying what is missing."""
    nets = [] if controlnet is None else list(controlnet) if isinstance(controlnet, (list, tuple)) else [controlnet]
    for net in nets:
        if not isinstance(net, ControlNet):
            raise TypeError(f"controlnet is {net!r}, but must be a ControlNet: load one with ControlNet.load")
    hints = [] if hint is None else list(hint) if isinstance(hint, (list, tuple)) else [hint]
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * max(len(nets), 1)
    if bool(nets) != bool(hints):
        raise ValueError(f"hint and ControlNet go together, but the {'ControlNet' if hints else 'hint'} is missing")
    if len(nets) != len(hints) or len(scales) != max(len(nets), 1):
        raise ValueError(
            f"got {len(nets)} ControlNets, {len(hints)} hints and {len(scales)} conditioning scales: give one of each"
        )
    for value in scales:
        check_range("conditioning_scale", value, 0, math.inf)
    hints = [hint_tensor(h) for h in hints]
    for i, h in enumerate(hints):
        if torch.equal(h.amin((2, 3)), h.amax((2, 3))):
            warnings.warn(f"hint {i} is a single colour: it shows no shapes", stacklevel=2)
    return nets, hints, scales[: len(nets)]


def size_of(height, width, hints: list[Tensor], image: Image.Image | None, default: int) -> tuple[int, int]:
    """Return height and width of the picture. Raises ValueError unless they are multiples of 8."""
    like = (*hints[0].shape[-2:],) if hints else (image.height, image.width) if image is not None else (default, default)
    height, width = like[0] if height is None else height, like[1] if width is None else width
    if (
        not all(isinstance(side, numbers.Integral) for side in (height, width))
        or height < 8
        or width < 8
        or height % 8
        or width % 8
    ):
        raise ValueError(
            f"the picture would be {width}x{height} pixels, but both sides must be multiples of 8: resize the hint "
            "(--fit, conditions.fit)"
        )
    if not 2 / 3 <= height * width / default**2 <= 3 / 2:
        warnings.warn(
            f"this model was trained at {default}x{default} pixels, and {width}x{height} may come out as nonsense: "
            "fit the hint, or choose another size (--fit, conditions.fit)",
            stacklevel=2,
        )
    return int(height), int(width)


def check_words(texts: list[str], known: str) -> None:
    """Warn of words that a model of few words does not know, and list those that it does."""
    strange = [word for word in dict.fromkeys(re.findall(r"\w+", " ".join(texts).lower())) if word not in known.split()]
    if known and strange:
        named = ", ".join(strange[:8]) + ", ..." * (len(strange) > 8)
        warnings.warn(f"this model does not know: {named}; its words are: {known}", stacklevel=2)


def check_settings(prompt, settings: dict) -> None:
    """Raise ValueError or TypeError, naming the value and what was expected, for invalid settings of `generate`."""
    for name, limits in RANGES.items():
        check_range(name, settings[name], *limits)
    for name in ("num_steps", "seed", "num_images"):
        if not isinstance(settings[name], numbers.Integral):
            raise TypeError(f"{name} is {settings[name]!r}, but must be an integer")
    if settings["denoise"] == 0:
        raise ValueError("denoise is 0, which would change nothing: give a value above 0, up to 1")
    if settings["control_start"] > settings["control_end"]:
        raise ValueError(
            f"control_start {settings['control_start']} lies after control_end {settings['control_end']}: swap them"
        )
    if not isinstance(prompt, str) and (settings["num_images"] != 1 or not prompt):
        raise ValueError(
            f"{len(prompt)} prompts with num_images {settings['num_images']}: a list gives one picture per prompt"
        )
    if settings["guess_mode"] not in (False, True, "diffusers"):
        raise ValueError(f'guess_mode is {settings["guess_mode"]!r}, but must be False, True or "diffusers"')
    for name in ("image", "mask"):
        picture = settings[name]
        if picture is not None and not isinstance(picture, Image.Image):
            raise TypeError(f"{name} is {type(picture).__name__}, but must be a PIL picture: open it with Image.open")
    if settings["mask"] is not None and settings["image"] is None:
        raise ValueError("a mask needs the image that it masks: give both")


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, but must be a number")
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{name} is {value}, but must lie in [{low}, {high}]")
