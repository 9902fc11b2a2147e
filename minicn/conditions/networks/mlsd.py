"""Straight lines: M-LSD."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicn.conditions.networks.annotator import Annotator, resize


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, ReLU6."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1):
        padding = kernel // 2 if stride == 1 else 0
        conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels), nn.ReLU6())
        # Numerics: with stride 2, only the right and the bottom are padded with zeros, as in TensorFlow.
        self.padding = (0, stride - 1, 0, stride - 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.padding))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise convolution, project; with a shortcut where the shapes agree."""

    def __init__(self, channels_in: int, channels: int, stride: int, expand: int):
        super().__init__()
        width = channels_in * expand
        layers = [ConvNorm(channels_in, width, 1)] if expand > 1 else []
        layers += [ConvNorm(width, width, 3, stride, groups=width), nn.Conv2d(width, channels, 1, bias=False)]
        self.conv = nn.Sequential(*layers, nn.BatchNorm2d(channels))
        self.shortcut = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class Backbone(nn.Module):
    """MobileNetV2 for four channels, down to 1/16 of the image; returns the features of five of its blocks."""

    BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))  # expand, channels, count, stride
    KEPT = (1, 3, 6, 10, 13)  # the last block of each width

    def __init__(self):
        super().__init__()
        blocks = [ConvNorm(4, 32, 3, 2)]
        channels_in = 32
        for expand, channels, count, stride in self.BLOCKS:
            for i in range(count):
                blocks.append(InvertedResidual(channels_in, channels, stride if i == 0 else 1, expand))
                channels_in = channels
        self.features = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = []
        for i, block in enumerate(self.features):
            x = block(x)
            if i in self.KEPT:
                kept.append(x)
        return kept  # 16, 24, 32, 64, 96 channels at 1/2, 1/4, 1/8, 1/16, 1/16


def _conv_norm_relu(channels_in: int, channels: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2 * dilation, dilation=dilation)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


class Join(nn.Module):
    """Concatenate finer and coarser features, each with 64 channels, at the finer size. M-LSD's block type A."""

    def __init__(self, fine: int, coarse: int, scale: int = 2):
        super().__init__()
        self.conv1 = _conv_norm_relu(coarse, 64, 1)
        self.conv2 = _conv_norm_relu(fine, 64, 1)
        self.scale = scale

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        coarse = self.conv1(coarse)
        if self.scale > 1:
            coarse = F.interpolate(coarse, scale_factor=self.scale, mode="bilinear", align_corners=True)
        return torch.cat([self.conv2(fine), coarse], 1)  # (B, 128, h, w)


class Mix(nn.Module):
    """Two convolutions, the first with a shortcut. M-LSD's block type B."""

    def __init__(self):
        super().__init__()
        self.conv1 = _conv_norm_relu(128, 128, 3)
        self.conv2 = _conv_norm_relu(128, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x) + x)


class Head(nn.Module):
    """Three convolutions to the 16 maps. M-LSD's block type C."""

    def __init__(self):
        super().__init__()
        self.conv1 = _conv_norm_relu(64, 64, 3, dilation=5)
        self.conv2 = _conv_norm_relu(64, 64, 3)
        self.conv3 = nn.Conv2d(64, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(x)))


class MLSD(Annotator):
    """M-LSD, a light line segment detector: MobileV2-MLSD-Large.

    Source: arXiv:2106.00186; the weights' PyTorch version in ControlNet's annotator/mlsd (Apache-2.0).
    Called with an image (H, W, 3) uint8 RGB, it returns lines (N, 4) float64: x1, y1, x2, y2 in pixels of that image,
    strongest first, N from 0 to 200; ends may lie outside it. For the network, sides are resized to the nearest multiple
    of 16.
    """

    published = "mlsd_large_512_fp32.pth"

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.block15, self.block16 = Join(64, 96, scale=1), Mix()
        self.block17, self.block18 = Join(32, 64), Mix()
        self.block19, self.block20 = Join(24, 64), Mix()
        self.block21, self.block22 = Join(16, 64), Mix()
        self.block23 = Head()

    def maps(self, x: Tensor) -> Tensor:
        """Return the nine maps (B, 9, H/2, W/2) that `find_lines` reads; x (B, 4, H, W) in [-1, 1], H, W multiples of 16."""
        half, quarter, eighth, sixteenth, deepest = self.backbone(x)
        h = self.block16(self.block15(sixteenth, deepest))
        h = self.block18(self.block17(eighth, h))
        h = self.block20(self.block19(quarter, h))
        h = self.block22(self.block21(half, h))
        return self.block23(h)[:, 7:]  # the first seven maps are used in training only

    @torch.no_grad()
    def forward(self, image: np.ndarray) -> np.ndarray:
        self.check(image)
        height, width = image.shape[:2]
        seen_height, seen_width = (max(16, round(side / 16) * 16) for side in (height, width))
        seen = resize(image, seen_height, seen_width)
        ones = np.ones((seen_height, seen_width, 1), np.uint8)  # 1, not 255: so the weights were trained
        x = self.batch(np.concatenate([seen, ones], axis=2)) / 127.5 - 1
        lines = find_lines(self.maps(x)[0])
        return lines * np.array([width / seen_width, height / seen_height] * 2)


def find_lines(maps: Tensor, strongest: int = 200, score: float = 0.1, length: float = 0.1) -> np.ndarray:
    """Decode M-LSD's maps into lines: one at each peak of the map of line centres.

    maps       (5 or more, h, w): logits of line centres, then the offsets of x1, y1, x2, y2 from them, in map pixels
    strongest  number of peaks considered
    score      minimum probability of a line
    length     minimum length of a line, map pixels
    Returns (N, 4) float64: x1, y1, x2, y2 in pixels of an image twice as large as the maps, strongest first.
    """
    maps = maps.float().cpu()
    heat = maps[0].sigmoid()
    is_peak = heat == F.max_pool2d(heat[None], 3, stride=1, padding=1)[0]
    scores, indices = (heat * is_peak).flatten().topk(min(strongest, heat.numel()))
    width = heat.shape[1]
    centres = torch.stack([indices % width, indices // width] * 2, 1).double()  # (M, 4): x, y, x, y of M peaks
    offsets = maps[1:5].flatten(1)[:, indices].T  # (M, 4)
    longer = (offsets[:, :2] - offsets[:, 2:]).norm(dim=1) > length
    return (2 * (centres + offsets))[(scores > score) & longer].numpy()
