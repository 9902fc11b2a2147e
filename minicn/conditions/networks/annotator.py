"""What the annotator networks share: loading a published file, checking and resizing the images they see."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minicn.checkpoints import files, loading
from minicn.conditions.filters import resample


class Annotator(nn.Module):
    """The base class: subclasses' `forward` takes an image (H, W, 3), RGB, uint8."""

    published = ""  # name of the released file
    smallest = 1  # minimum of the shorter side, pixels

    @classmethod
    def load(cls, path: str | Path) -> "Annotator":
        """Read the published file, or one with the same names and shapes; no pickle is executed.

        Raises FileNotFoundError, or ValueError in one line for a file of another network.
        """
        with loading.Unfilled():
            network = cls()
        file, expected = files.open_weights(path), network.state_dict()
        numbers = {key: like for key, like in expected.items() if like.is_floating_point()}
        missing = [key for key in numbers if key not in file]
        unknown = [key for key in file.shapes if key not in expected]
        other = [key for key in numbers if key in file and file.shapes[key] != tuple(expected[key].shape)]
        if missing or unknown or other:
            found = [f"{key} is missing" for key in missing] + [f"{key} is unexpected" for key in unknown]
            found += [f"{key} is {file.shapes[key]} instead of {tuple(expected[key].shape)}" for key in other]
            more = f", and {len(found) - 2} more differences" if len(found) > 2 else ""
            raise ValueError(f"{path} is not a file of {cls.__name__}: {', '.join(found[:2])}{more}; use {cls.published}")
        state = {key: file.weight(key, like.shape).to(like.dtype) for key, like in numbers.items()}
        # The rest counts training steps, for batch norms: unused, and not in every file.
        network.load_state_dict({key: state.get(key, torch.tensor(0)) for key in expected}, assign=True)
        network.unchecked = (str(path), {key: key for key in expected})
        loading.check_finite(network)
        return network.requires_grad_(False).eval()

    def check(self, image: np.ndarray) -> None:
        """Raise TypeError or ValueError for anything but an image that is large enough for the network."""
        if not isinstance(image, np.ndarray):
            raise TypeError(f"image is {type(image).__name__}, but must be an array (H, W, 3) of uint8")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image is {image.dtype} of shape {image.shape}, but must be uint8 of shape (H, W, 3)")
        if min(image.shape[:2]) < self.smallest:
            raise ValueError(
                f"image is {image.shape[0]}x{image.shape[1]} pixels, but {type(self).__name__} needs at "
                f"least {self.smallest}x{self.smallest}: enlarge it first"
            )

    def batch(self, image: np.ndarray) -> Tensor:
        """Return an image (H, W, C) as (1, C, H, W) float32 on the device of the weights."""
        device = next(self.parameters()).device
        # A copy: images may be read-only, or reversed views (::-1).
        return torch.tensor(np.ascontiguousarray(image), device=device).permute(2, 0, 1)[None].float()


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image (H, W, C) as ControlNet's annotators do: area averages if it shrinks, else Lanczos; keeps dtype."""
    return resample(image, height, width, "area" if height + width < sum(image.shape[:2]) else "lanczos")
