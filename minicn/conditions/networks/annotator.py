"""What the annotator networks share: files that load or are refused by name, pictures that are checked and resized."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minicn.checkpoints import files, loading
from minicn.conditions.filters import resample


class Annotator(nn.Module):
    """What the three share: files that load or are refused in words, and pictures that are checked.

    Called with a picture (H, W, 3), RGB, uint8, by subclasses' `forward`.
    """

    published = ""  # the name of the file that was released
    smallest = 1  # pixels of the shorter side

    @classmethod
    def load(cls, path: str | Path) -> "Annotator":
        """Read the published file, or one of the same names and shapes; no pickle is executed.

        Raises FileNotFoundError, or ValueError in one line for a file that is not this network's.
        """
        with loading.Unfilled():
            network = cls()
        state, expected = files.read(path), network.state_dict()
        for key in expected:
            if key.endswith("num_batches_tracked"):  # counts steps of training; not in every file, and not used
                state.setdefault(key, torch.tensor(0))
        missing = [key for key in expected if key not in state]
        unknown = [key for key in state if key not in expected]
        other = [key for key in expected if key in state and state[key].shape != expected[key].shape]
        if missing or unknown or other:
            found = [f"{key} is missing" for key in missing] + [f"{key} is unknown" for key in unknown]
            found += [f"{key} is {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}" for key in other]
            more = f", and {len(found) - 2} more differ" if len(found) > 2 else ""
            raise ValueError(f"{path} is not {cls.__name__}'s: {', '.join(found[:2])}{more}; name {cls.published}")
        network.load_state_dict({key: state[key].to(expected[key].dtype) for key in expected}, assign=True)
        network.unchecked = (str(path), {key: key for key in expected})
        loading.check_finite(network)
        return network.requires_grad_(False).eval()

    def check(self, image: np.ndarray) -> None:
        """Raise TypeError or ValueError for what is no picture of a size that the network can see."""
        if not isinstance(image, np.ndarray):
            raise TypeError(f"image is {type(image).__name__}, but must be an array (H, W, 3) of uint8")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image is {image.dtype} of shape {image.shape}, but must be uint8 of shape (H, W, 3)")
        if min(image.shape[:2]) < self.smallest:
            raise ValueError(
                f"image is {image.shape[0]}x{image.shape[1]} pixels, but {type(self).__name__} needs {self.smallest} "
                "or more each way: enlarge it first"
            )

    def batch(self, image: np.ndarray) -> Tensor:
        """Return the picture (H, W, C) as (1, C, H, W) float32 where the weights are."""
        device = next(self.parameters()).device
        # A copy: pictures may be read-only, and turned (::-1).
        return torch.tensor(np.ascontiguousarray(image), device=device).permute(2, 0, 1)[None].float()


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a picture (H, W, C) as ControlNet's annotators do: means of areas if it shrinks, else Lanczos; dtype kept."""
    if picture.shape[:2] == (height, width):
        return picture
    return conditions.resample(picture, height, width, "area" if height + width < sum(picture.shape[:2]) else "lanczos")
