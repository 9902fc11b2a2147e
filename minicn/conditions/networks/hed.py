"""Soft edges: HED."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicn.conditions.networks.annotator import Annotator


class EdgeBlock(nn.Module):
    """Convolutions at one resolution, and a projection to an edge map."""

    def __init__(self, channels_in: int, channels: int, convolutions: int):
        super().__init__()
        widths = [channels_in] + [channels] * convolutions
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:], strict=False))
        self.projection = nn.Conv2d(channels, 1, 1)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            h = F.relu(conv(h))
        return h, self.projection(h)


class HED(Annotator):
    """Holistically-nested edge detection, in the version that ControlNet's authors trained (Apache-2.0).

    Source: arXiv:1504.06375; ControlNet's annotator/hed. Unlike the paper's, it reads RGB and has a learned mean colour.
    Called with an image (H, W, 3) uint8 RGB of at least 16x16 pixels, it returns soft edges (H, W) float32 in [0, 1].
    """

    published = "ControlNetHED.pth"
    smallest = 16  # halved four times

    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.block1 = EdgeBlock(3, 64, 2)
        self.block2 = EdgeBlock(64, 128, 2)
        self.block3 = EdgeBlock(128, 256, 3)
        self.block4 = EdgeBlock(256, 512, 3)
        self.block5 = EdgeBlock(512, 512, 3)

    def side_outputs(self, x: Tensor) -> list[Tensor]:
        """Return five edge maps before the sigmoid, (B, 1, H / 2^i, W / 2^i), i from 0; x (B, 3, H, W) in [0, 255]."""
        h, edges = self.block1(x - self.norm)
        sides = [edges]
        for block in (self.block2, self.block3, self.block4, self.block5):
            h, edges = block(F.max_pool2d(h, 2))
            sides.append(edges)
        return sides

    @torch.no_grad()
    def forward(self, image: np.ndarray) -> np.ndarray:
        self.check(image)
        sides = self.side_outputs(self.batch(image))
        sides = [F.interpolate(side, image.shape[:2], mode="bilinear", align_corners=False) for side in sides]
        return torch.cat(sides).mean(0)[0].sigmoid().cpu().numpy()
