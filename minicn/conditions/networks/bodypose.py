"""People's key points: OpenPose's body network."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicn.conditions.filters import blur, resample
from minicn.conditions.networks.annotator import Annotator, resize
from minicn.conditions.poses import MOST_PEOPLE, OPENPOSE_LIMBS

PARTS = 18  # in the order of `poses.OPENPOSE_LIMBS`
# Pairs of parts, in the order in which people are assembled, each with the two channels (x, y) of the field from one part to
# the other. The last two, from shoulder to ear, are not drawn: they only connect parts.
FIELDS = (12, 20, 14, 16, 22, 24, 0, 2, 4, 6, 8, 10, 28, 30, 34, 32, 36, 18, 26)
LIMBS = tuple((pair, (x, x + 1)) for pair, x in zip((*OPENPOSE_LIMBS, (2, 16), (5, 17)), FIELDS, strict=True))

# OpenPose's feature layers: name and channels; each row but the last ends with a 2x2 max pooling.
STEM = (
    (("conv1_1", 64), ("conv1_2", 64)),
    (("conv2_1", 128), ("conv2_2", 128)),
    (("conv3_1", 256), ("conv3_2", 256), ("conv3_3", 256), ("conv3_4", 256)),
    (("conv4_1", 512), ("conv4_2", 512), ("conv4_3_CPM", 256), ("conv4_4_CPM", 128)),
)


class BodyPose(Annotator):
    """OpenPose's body network with its grouping by part affinity fields.

    Source: arXiv:1611.08050; the constants are those of ControlNet's annotator/openpose.
    Called with an image (H, W, 3) uint8 RGB, it returns people (P, 18, 3) float64: x, y in pixels of that image and
    confidence, all three 0 for a part that was not found; the order of parts is COCO-18's. Images with an aspect ratio
    over 16 are rejected.
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
        """Return part affinity fields (B, 38, H/8, W/8) and part confidence maps (B, 19, H/8, W/8), background last.

        x  (B, 3, H, W) in [-0.5, 0.5), BGR, H and W multiples of 8
        """
        for i, row in enumerate(STEM):
            x = F.max_pool2d(x, 2) if i else x
            for name, _ in row:
                x = F.relu(self.get_submodule(name)(x))
        features = x
        for stage in range(1, 7):
            fields, parts = self._branch(stage, 1, features), self._branch(stage, 2, features)
            features = torch.cat([fields, parts, x], 1)
        # Paper vs code: ControlNet's code has this ReLU; in the paper no output has one.
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
            raise ValueError(f"image is {width}x{height} pixels, an aspect ratio over 16: crop it first")
        scale = 0.5 * 368 / height
        # Numerics: truncated, also where the product misses an integer by the last bit, as in ControlNet's code.
        seen = resize(image, int(height * scale), int(width * scale))
        seen_height, seen_width = seen.shape[:2]
        padded = np.pad(seen, ((0, -seen_height % 8), (0, -seen_width % 8), (0, 0)), constant_values=128)
        fields, parts = self.maps(self.batch(padded[..., ::-1]) / 256 - 0.5)
        # Upscaled by 8, the padding cropped, resized to the image: all of that is one matrix per axis.
        last = "area" if height + width < seen_height + seen_width else "lanczos"
        rows, columns = _upscaling(seen_height, height, last), _upscaling(seen_width, width, last)
        return find_people(fields[0].cpu().numpy(), parts[0].cpu().numpy(), lambda small: rows @ small @ columns.T)


def _upscaling(seen: int, size: int, kind: str) -> np.ndarray:
    """Return the matrix (size, seen / 8 rounded up) from the network's maps to the image; `kind` resizes seen to size."""
    cells = -(-seen // 8)
    eightfold = resample(np.eye(cells), 8 * cells, cells, "lanczos")[:seen]
    return resample(np.eye(seen), size, seen, kind) @ eightfold


@dataclass(eq=False)
class Person:
    """The parts found so far."""

    parts: dict[int, int]  # part: index of its peak
    score: float  # sum over the peaks and limbs added
    count: int  # of parts added, including those that replaced another


def find_people(
    fields: np.ndarray,
    parts: np.ndarray,
    enlarge: Callable[[np.ndarray], np.ndarray] = np.asarray,
    fewest: int = 4,
    mean_score: float = 0.4,
) -> np.ndarray:
    """Assemble people from part confidence maps and the part affinity fields between them.

    fields      (38, h, w): unit vectors along limbs, x and y alternating; channels as in LIMBS
    parts       (18 or more, h, w): about 1 where a part is
    enlarge     resizes a map (h, w) to the size of the image, (H, W); at most two of these are held at a time
    fewest      minimum number of parts of a person
    mean_score  minimum score of a person per part
    Returns (P, 18, 3): x, y in pixels and confidence, all 0 for a part that was not found.
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


def find_peaks(heat: np.ndarray, threshold: float = 0.1, most: int = MOST_PEOPLE) -> np.ndarray:
    """Return the local maxima above the threshold of a smoothed map (h, w): (N, 3) x, y and its value before smoothing.

    most  of them are kept, the highest: on a plateau every pixel is one, and matching takes N times N
    """
    heat = heat.astype(np.float64)
    smooth = np.pad(blur(heat, 3, 12, "symmetric"), 1)  # zero outside
    centre = smooth[1:-1, 1:-1]
    top = centre > threshold
    for neighbour in (smooth[:-2, 1:-1], smooth[2:, 1:-1], smooth[1:-1, :-2], smooth[1:-1, 2:]):
        top &= centre >= neighbour
    y, x = np.nonzero(top)
    if len(y) > most:
        kept = np.sort(np.argsort(-heat[y, x], kind="stable")[:most])
        y, x = y[kept], x[kept]
    return np.stack([x, y, heat[y, x]], axis=1)


def match(a: np.ndarray, b: np.ndarray, field: np.ndarray, low: float = 0.05) -> list[tuple[int, int, float]]:
    """Match peaks a (N, 3) with peaks b (M, 3), best first, by how well the field (2, h, w) points from one to the other.

    The field is sampled at ten points between the two: at nine or more of them its component in that direction must exceed
    `low`, and the mean, less a penalty for limbs longer than half the image's height, must be positive.
    Returns (i, j, score).
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
    """Add a limb to the people, in place: to the person who has one of its ends, else as a new person.

    start, end  (part, index of its peak)
    score       of the limb
    Two people who have one end each are merged if they have no part in common.
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
