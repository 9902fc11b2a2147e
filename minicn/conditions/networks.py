"""Three networks that look at a picture: soft edges (HED), straight lines (M-LSD), people's key points (OpenPose).

They carry the names of the files that ControlNet was released with, so these load: ControlNetHED.pth,
mlsd_large_512_fp32.pth and body_pose_model.pth. Here is what is seen; `conditions` makes hints of it.
All were used on pictures of about 512 pixels: resize first (the shorter side to 512).
Left out: training, hands and faces, OpenPose at several scales (ControlNet uses one).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicn import conditions
from minicn.checkpoints import files, loading


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


# Resizing


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a picture (H, W, C) as ControlNet's annotators do: means of areas if it shrinks, else Lanczos; dtype kept."""
    if picture.shape[:2] == (height, width):
        return picture
    return conditions.resample(picture, height, width, "area" if height + width < sum(picture.shape[:2]) else "lanczos")


def resizing(size: int, new: int, kind: str) -> np.ndarray:
    """Return the matrix (new, size) that resizes one direction."""
    return conditions.resample(np.eye(size), new, size, kind)


# Soft edges


class EdgeBlock(nn.Module):
    """Convolutions of one resolution, and a projection to one map of edges."""

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

    Source: arXiv:1504.06375; ControlNet's annotator/hed. Unlike the paper's it reads RGB and has a learned mean colour.
    Called with a picture (H, W, 3) uint8 RGB, 16 pixels or more each way, it gives soft edges (H, W) float32 in [0, 1].
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
        """Return five maps of edges before the sigmoid, (B, 1, H / 2^i, W / 2^i), i from 0; x (B, 3, H, W) in [0, 255]."""
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


# Straight lines


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, and a ReLU that ends at 6."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1):
        padding = kernel // 2 if stride == 1 else 0
        conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels), nn.ReLU6())
        # Numerics: with stride 2, zeros are added at the right and below alone, as TensorFlow does.
        self.extra = (0, stride - 1, 0, stride - 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.extra))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, filter each channel by itself, narrow; added to its input where the shapes agree."""

    def __init__(self, channels_in: int, channels: int, stride: int, widen: int):
        super().__init__()
        width = channels_in * widen
        layers = [ConvNorm(channels_in, width, 1)] if widen > 1 else []
        layers += [ConvNorm(width, width, 3, stride, groups=width), nn.Conv2d(width, channels, 1, bias=False)]
        self.conv = nn.Sequential(*layers, nn.BatchNorm2d(channels))
        self.shortcut = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class Backbone(nn.Module):
    """MobileNetV2 for four channels, up to 1/16 of the picture; gives the features of five of its blocks."""

    KEPT = (1, 3, 6, 10, 13)  # the last block of each width

    def __init__(self):
        super().__init__()
        blocks = [ConvNorm(4, 32, 3, 2)]
        channels_in = 32
        for widen, channels, count, stride in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)):
            for i in range(count):
                blocks.append(InvertedResidual(channels_in, channels, stride if i == 0 else 1, widen))
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
    """Bring finer and coarser features to 64 channels each and to one size, side by side. M-LSD's block type A."""

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
    """The 16 maps. M-LSD's block type C."""

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
    Called with a picture (H, W, 3) uint8 RGB, it gives lines (N, 4) float64: x1, y1, x2, y2 in pixels of that picture,
    strongest first, N from 0 to 200; ends may lie outside. Sides that are no multiples of 16 are resized to the nearest
    for the network.
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
        return self.block23(h)[:, 7:]  # the first seven maps help in training only

    @torch.no_grad()
    def forward(self, image: np.ndarray) -> np.ndarray:
        self.check(image)
        height, width = image.shape[:2]
        seen_height, seen_width = (max(16, round(side / 16) * 16) for side in (height, width))
        seen = resize(image, seen_height, seen_width)
        ones = np.ones((seen_height, seen_width, 1), np.uint8)  # 1 of 255, not 255: so the weights were trained
        x = self.batch(np.concatenate([seen, ones], axis=2)) / 127.5 - 1
        lines = find_lines(self.maps(x)[0])
        return lines * np.array([width / seen_width, height / seen_height] * 2)


def find_lines(maps: Tensor, strongest: int = 200, score: float = 0.1, length: float = 0.1) -> np.ndarray:
    """Read lines off M-LSD's maps: one at each peak of the map of line centres.

    maps       (5 or more, h, w): logits of line centres, then how far x1, y1, x2, y2 are from there, in the maps' pixels
    strongest  so many peaks are looked at
    score      lines with a probability above this stay
    length     lines longer than this many of the maps' pixels stay
    Returns (N, 4) float64: x1, y1, x2, y2 in pixels of a picture twice as large as the maps, strongest first.
    """
    maps = maps.float().cpu()
    heat = maps[0].sigmoid()
    is_peak = heat == F.max_pool2d(heat[None], 3, stride=1, padding=1)[0]
    scores, indices = (heat * is_peak).flatten().topk(min(strongest, heat.numel()))
    width = heat.shape[1]
    centres = torch.stack([indices % width, indices // width] * 2, 1).double()  # (M, 4): x, y, x, y of M peaks
    away = maps[1:5].flatten(1)[:, indices].T  # (M, 4)
    longer = (away[:, :2] - away[:, 2:]).norm(dim=1) > length
    return (2 * (centres + away))[(scores > score) & longer].numpy()


# People's key points

PARTS = (
    18  # nose, neck, right shoulder, elbow, wrist, left ones, right hip, knee, ankle, left ones, eyes, ears (right, left)
)
# Pairs of parts, in the order in which people are put together, and the two channels (x, y) of the field from one to the
# other. The last two, from shoulder to ear, are not drawn: they join what is there, as a pair by itself is no person.
LIMBS = (
    ((1, 2), (12, 13)),
    ((1, 5), (20, 21)),
    ((2, 3), (14, 15)),
    ((3, 4), (16, 17)),
    ((5, 6), (22, 23)),
    ((6, 7), (24, 25)),
    ((1, 8), (0, 1)),
    ((8, 9), (2, 3)),
    ((9, 10), (4, 5)),
    ((1, 11), (6, 7)),
    ((11, 12), (8, 9)),
    ((12, 13), (10, 11)),
    ((1, 0), (28, 29)),
    ((0, 14), (30, 31)),
    ((14, 16), (34, 35)),
    ((0, 15), (32, 33)),
    ((15, 17), (36, 37)),
    ((2, 16), (18, 19)),
    ((5, 17), (26, 27)),
)

# OpenPose's feature layers: name and channels; a row is halved before the next.
STEM = (
    (("conv1_1", 64), ("conv1_2", 64)),
    (("conv2_1", 128), ("conv2_2", 128)),
    (("conv3_1", 256), ("conv3_2", 256), ("conv3_3", 256), ("conv3_4", 256)),
    (("conv4_1", 512), ("conv4_2", 512), ("conv4_3_CPM", 256), ("conv4_4_CPM", 128)),
)


class BodyPose(Annotator):
    """OpenPose's body network with its grouping by part affinity fields.

    Source: arXiv:1611.08050; the constants are those of ControlNet's annotator/openpose.
    Called with a picture (H, W, 3) uint8 RGB, it gives people (P, 18, 3) float64: x, y in pixels of that picture and
    confidence, all three 0 for a part that was not seen; the order of parts is COCO-18's. Pictures more than 16 times
    as long as wide are refused.
    """

    published = "body_pose_model.pth"

    def __init__(self):
        super().__init__()
        channels_in = 3
        for row in STEM:
            for name, channels in row:
                self.add_module(name, nn.Conv2d(channels_in, channels, 3, padding=1))
                channels_in = channels
        for stage in range(1, 7):
            for branch, channels_out in ((1, 38), (2, 19)):
                first, kernel, middle = (128, 3, 512) if stage == 1 else (128 + 38 + 19, 7, 128)
                widths = [first] + [128] * (3 if stage == 1 else 5) + [middle, channels_out]
                names = self._branch_names(stage, branch)
                for i, name in enumerate(names):
                    k = kernel if i < len(names) - 2 else 1
                    self.add_module(name, nn.Conv2d(widths[i], widths[i + 1], k, padding=k // 2))

    @staticmethod
    def _branch_names(stage: int, branch: int) -> list[str]:
        if stage == 1:
            return [f"conv5_{i}_CPM_L{branch}" for i in range(1, 6)]
        return [f"Mconv{i}_stage{stage}_L{branch}" for i in range(1, 8)]

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return part affinity fields (B, 38, H/8, W/8) and maps of parts (B, 19, H/8, W/8), background last.

        x  (B, 3, H, W) in [-0.5, 0.5), BGR, H and W multiples of 8
        """
        for i, row in enumerate(STEM):
            x = F.max_pool2d(x, 2) if i else x
            for name, _ in row:
                x = F.relu(self.get_submodule(name)(x))
        known = x
        for stage in range(1, 7):
            fields, parts = self._branch(stage, 1, known), self._branch(stage, 2, known)
            known = torch.cat([fields, parts, x], 1)
        # Paper vs code: no other output has a ReLU, nor has this one in the paper; ControlNet's code has it.
        return fields, F.relu(parts)

    def _branch(self, stage: int, branch: int, h: Tensor) -> Tensor:
        *inner, last = self._branch_names(stage, branch)
        for name in inner:
            h = F.relu(self.get_submodule(name)(h))
        return self.get_submodule(last)(h)

    @torch.no_grad()
    def forward(self, image: np.ndarray) -> np.ndarray:
        self.check(image)
        height, width = image.shape[:2]
        if max(height, width) > 16 * min(height, width):
            raise ValueError(f"image is {height}x{width} pixels, more than 16 times as long as wide: crop it first")
        scale = 0.5 * 368 / height
        # Numerics: rounded down, also where the product misses a whole number by the last bit, as in ControlNet's code.
        seen = resize(image, int(height * scale), int(width * scale))
        seen_height, seen_width = seen.shape[:2]
        padded = np.pad(seen, ((0, -seen_height % 8), (0, -seen_width % 8), (0, 0)), constant_values=128)
        fields, parts = self.maps(self.batch(padded[..., ::-1]) / 256 - 0.5)
        # Eight times enlarged, the padding cut off, resized to the picture: all of it is one matrix for each direction.
        last = "area" if height + width < seen_height + seen_width else "lanczos"
        rows, columns = _enlarging(seen_height, height, last), _enlarging(seen_width, width, last)
        return find_people(fields[0].cpu().numpy(), parts[0].cpu().numpy(), lambda small: rows @ small @ columns.T)


def _enlarging(seen: int, size: int, kind: str) -> np.ndarray:
    """Matrix (size, seen / 8 rounded up) from the network's maps to the picture; `kind` of resizing from seen to size."""
    cells = -(-seen // 8)
    eightfold = resizing(cells, 8 * cells, "lanczos")[:seen]
    return eightfold if size == seen else resizing(seen, size, kind) @ eightfold


@dataclass(eq=False)
class Person:
    """Parts that were joined so far."""

    parts: dict[int, int]  # part: which of its peaks
    score: float  # of all peaks and all limbs that were added
    count: int  # how often a part was added: also when it took another's place


def find_people(
    fields: np.ndarray,
    parts: np.ndarray,
    enlarge: Callable[[np.ndarray], np.ndarray] = np.asarray,
    fewest: int = 4,
    mean_score: float = 0.4,
) -> np.ndarray:
    """Put people together from maps of parts and the part affinity fields between them.

    fields      (38, h, w): unit vectors along limbs, x and y by turns; channels as in LIMBS
    parts       (18 or more, h, w): about 1 where a part is
    enlarge     makes of a map (h, w) one of the picture's size, (H, W), of which two are held at a time
    fewest      people with fewer parts are left out
    mean_score  and those whose score for each part is less
    Returns (P, 18, 3): x, y in pixels and confidence, all 0 for a part that was not seen.
    """
    peaks = [find_peaks(enlarge(parts[part])) for part in range(PARTS)]
    people: list[Person] = []
    for (a, b), channels in LIMBS:
        if len(peaks[a]) and len(peaks[b]):
            field = np.stack([enlarge(fields[channel]) for channel in channels])
            for i, j, score in match(peaks[a], peaks[b], field):
                join(people, (a, i), (b, j), score, peaks)
    kept = [person for person in people if person.count >= fewest and person.score / person.count >= mean_score]
    points = np.zeros((len(kept), PARTS, 3))
    for n, person in enumerate(kept):
        for part, i in person.parts.items():
            points[n, part] = peaks[part][i]
    return points


def find_peaks(heat: np.ndarray, threshold: float = 0.1) -> np.ndarray:
    """Return the local maxima above the threshold of a smoothed map (h, w): (N, 3) x, y, and the map before smoothing."""
    heat = heat.astype(np.float64)
    smooth = np.pad(blur(heat), 1)  # zero outside
    centre = smooth[1:-1, 1:-1]
    top = centre > threshold
    for neighbour in (smooth[:-2, 1:-1], smooth[2:, 1:-1], smooth[1:-1, :-2], smooth[1:-1, 2:]):
        top &= centre >= neighbour
    y, x = np.nonzero(top)
    return np.stack([x, y, heat[y, x]], axis=1)


def blur(image: np.ndarray, sigma: float = 3.0) -> np.ndarray:
    """Gaussian filter of (h, w), cut at four sigma, the picture mirrored outside: SciPy's gaussian_filter."""
    radius = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 / sigma**2 * np.arange(-radius, radius + 1) ** 2)
    weights = (weights / weights.sum())[radius:]
    for _ in range(2):  # down, then across
        padded = np.pad(image, ((radius, radius), (0, 0)), mode="symmetric")
        size = len(image)
        image = weights[0] * image
        # Numerics: both sides are added first, so that a symmetric map stays symmetric to the last bit: ties stay ties.
        for away in range(radius, 0, -1):
            before, after = padded[radius - away :][:size], padded[radius + away :][:size]
            image += weights[away] * (before + after)
        image = image.T
    return image


def match(a: np.ndarray, b: np.ndarray, field: np.ndarray, low: float = 0.05) -> list[tuple[int, int, float]]:
    """Pair peaks a (N, 3) with peaks b (M, 3), best first, by how well the field (2, h, w) points from one to the other.

    Looked at are ten points between the two: at nine or more the field must point that way by more than `low`, and its mean,
    less a penalty for limbs longer than half the picture's height, must be positive. Returns (i, j, score).
    """
    between = b[None, :, :2] - a[:, None, :2]  # (N, M, 2)
    length = np.maximum(np.linalg.norm(between, axis=2), 0.001)
    points = np.rint(np.linspace(a[:, None, :2], b[None, :, :2], 10)).astype(int)  # (10, N, M, 2)
    seen = field[:, points[..., 1], points[..., 0]]  # (2, 10, N, M)
    along = (seen[0] * between[..., 0] + seen[1] * between[..., 1]) / length
    scores = along.mean(0) + np.minimum(0.5 * field.shape[1] / length - 1, 0)
    possible = ((along > low).sum(0) >= 9) & (scores > 0)
    i, j = np.nonzero(possible)
    best = np.argsort(-scores[i, j], kind="stable")
    pairs, free_a, free_b = [], set(i.tolist()), set(j.tolist())
    for m, n in zip(i[best].tolist(), j[best].tolist(), strict=True):
        if m in free_a and n in free_b:
            pairs.append((m, n, float(scores[m, n])))
            free_a.remove(m)
            free_b.remove(n)
    return pairs


def join(people: list[Person], start: tuple, end: tuple, score: float, peaks: list[np.ndarray]) -> None:
    """Add a limb to the people, in place: to the one who has one of its ends, else as someone new.

    start, end  (part, which of its peaks)
    score       of the limb
    Two who have an end each become one if they have no part in common.
    """
    (a, i), (b, j) = start, end
    holders = [person for person in people if person.parts.get(a) == i or person.parts.get(b) == j]
    added = score + peaks[b][j, 2]
    if not holders:
        people.append(Person({a: i, b: j}, added + peaks[a][i, 2], 2))
        return
    first, *others = holders
    if others and not first.parts.keys() & others[0].parts.keys():
        first.parts |= others[0].parts
        first.score += others[0].score + score
        first.count += others[0].count
        people.remove(others[0])
    elif others or first.parts.get(b) != j:
        first.parts[b] = j
        first.score += added
        first.count += 1
