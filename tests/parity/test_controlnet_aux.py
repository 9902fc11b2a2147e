"""controlnet_aux as an oracle: the same random weights give the same maps, the same maps the same lines and people.

`.ci/run` installs it with --no-deps, as it asks for torchvision. Its modules that are used here do not.
"""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from minicn.conditions import filters, networks
from minicn.conditions.networks import HED, MLSD, BodyPose
from minicn.conditions.networks.annotator import resize
from minicn.conditions.networks.bodypose import LIMBS

ORACLES = ("cv2", "scipy", "einops", "huggingface_hub", "controlnet_aux")
ABSENT = [name for name in ORACLES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)} (see `extras` in .ci/run)")


@pytest.fixture(scope="module")
def oracle():
    """The modules of controlnet_aux, under packages that stand in for those that import torchvision or scikit-image."""
    with pytest.MonkeyPatch.context() as patch:
        root = importlib.util.find_spec("controlnet_aux").submodule_search_locations[0]
        for name, folder in (("controlnet_aux", root), ("controlnet_aux.open_pose", f"{root}/open_pose")):
            package = types.ModuleType(name)
            package.__path__ = [folder]
            patch.setitem(sys.modules, name, package)
        filters = types.ModuleType("scipy.ndimage.filters")  # an old name that SciPy is about to drop
        filters.gaussian_filter = importlib.import_module("scipy.ndimage").gaussian_filter
        patch.setitem(sys.modules, "scipy.ndimage.filters", filters)
        # `open_pose.util` before `open_pose.body`: they import each other.
        names = ("hed", "mlsd.models.mbv2_mlsd_large", "mlsd.utils", "open_pose.model", "open_pose.util", "open_pose.body")
        yield types.SimpleNamespace(
            **{name.split(".")[-1]: importlib.import_module(f"controlnet_aux.{name}") for name in names}
        )


def randomise(network):
    """Random weights that keep the sizes of what flows through, and statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
    return network.eval()


def picture(height, width, seed=0):
    """Soft random colours, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 3, height // 8 + 2, width // 8 + 2), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0].permute(1, 2, 0) * 255).byte().numpy()


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-3  # something flows
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def through_a_file(kind, state, folders):
    """Their weights, read by ours from a file of the published name."""
    path = folders.mktemp("weights") / kind.published
    torch.save(state, path)
    return kind.load(path)


@pytest.fixture(scope="module")
def hed(oracle, tmp_path_factory):
    """Ours and theirs, with the same weights: written by theirs, read by ours."""
    theirs = randomise(oracle.hed.ControlNetHED_Apache2())
    with torch.no_grad():
        theirs.norm.copy_(torch.tensor([100.0, 120.0, 140.0]).view(1, 3, 1, 1))
        theirs.block1.convs[0].weight.div_(100)  # so that edges are soft, not 0 and 1
    return through_a_file(HED, theirs.state_dict(), tmp_path_factory), theirs


@pytest.fixture(scope="module")
def mlsd(oracle, tmp_path_factory):
    theirs = randomise(oracle.mbv2_mlsd_large.MobileV2_MLSD_Large())
    return through_a_file(MLSD, theirs.state_dict(), tmp_path_factory), theirs


@pytest.fixture(scope="module")
def pose(oracle, tmp_path_factory):
    """As published: without the names of the blocks, which their loader adds."""
    theirs = randomise(oracle.model.bodypose_model())
    return through_a_file(
        BodyPose, {key.split(".", 1)[1]: tensor for key, tensor in theirs.state_dict().items()}, tmp_path_factory
    ), theirs


def test_resize_is_opencvs():
    """Areas and Lanczos, within OpenCV's rounding: 1 of 255 for 8 bits, 1e-5 for float32."""
    cv2 = importlib.import_module("cv2")
    for size, new in (
        ((37, 50), (19, 26)),
        ((64, 48), (32, 24)),
        ((37, 50), (80, 109)),
        ((23, 29), (184, 232)),
        ((1, 1), (7, 9)),
    ):
        method = cv2.INTER_AREA if sum(new) < sum(size) else cv2.INTER_LANCZOS4
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        theirs = cv2.resize(image, new[::-1], interpolation=method).astype(int)
        assert np.abs(resize(image, *new) - theirs).max() <= 1
        image = image.astype(np.float32) / 255
        theirs = cv2.resize(image, new[::-1], interpolation=method)
        assert np.abs(resize(image, *new) - theirs).max() <= 1e-5


# Soft edges


def test_hed_gives_the_same_side_outputs(hed):
    """All five, relative error at most 1e-5; 50 x 69 is halved with remainders."""
    ours, theirs = hed
    x = torch.from_numpy(picture(50, 69)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        sides, expected = ours.side_outputs(x), theirs(x)
    assert len(sides) == len(expected) == 5
    assert max(map(relative, sides, expected)) <= 1e-5


def test_hed_draws_the_same_edges(oracle, hed):
    """The whole detector, which ends in 8 bits, rounded down: within 1 of 255."""
    ours, theirs = hed
    image = picture(64, 128)
    expected = oracle.hed.HEDdetector(theirs)(image, detect_resolution=64, image_resolution=64, output_type="np")[..., 0]
    assert expected.std() > 10
    assert 0 < expected.min() <= expected.max() < 255
    assert np.abs((ours(image) * 255).astype(int) - expected).max() <= 1


# Straight lines


def test_mlsd_gives_the_same_maps(mlsd):
    """Relative error at most 1e-5."""
    ours, theirs = mlsd
    x = torch.rand((1, 4, 96, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        assert relative(ours.maps(x), theirs(x)) <= 1e-5


class Gives(nn.Module):
    """A network that gives what it was told, and remembers what it was given."""

    def __init__(self, given):
        super().__init__()
        self.unused, self.given = nn.Parameter(torch.zeros(1)), given

    def forward(self, x):
        self.seen = x
        return self.given


def line_maps(seed, bias):
    """Maps (1, 9, 48, 64) with peaks; a quarter of the lines has no length."""
    generator = torch.Generator().manual_seed(seed)
    maps = 3 * torch.randn((1, 9, 48, 64), generator=generator)
    maps[:, 0] += bias
    maps[:, 1:] *= (torch.rand((48, 64), generator=generator) > 0.25).float()
    maps[:, 0, :8] = maps[:, 0, :8].round()  # plateaus
    return maps


@pytest.mark.parametrize(("bias", "least"), [(0, 100), (-9, 5), (8, 100)])
def test_the_same_maps_give_the_same_lines(oracle, bias, least):
    """Exactly, with more peaks than 200, with fewer, and with many equal ones (float32's sigmoid reaches 1)."""
    for seed in range(5):
        maps = line_maps(seed, bias)
        theirs = oracle.utils.pred_lines(np.zeros((96, 128, 3), np.uint8), Gives(maps), [96, 128], 0.1, 0.1)
        ours = networks.find_lines(maps[0])
        assert least <= len(theirs) <= 200
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("size", "seen"), [((96, 128), (96, 128)), ((100, 135), (96, 128))])
def test_mlsd_finds_the_same_lines(oracle, mlsd, size, seen):
    """From the picture to its lines, also where it is resized for the network: the same ones."""
    ours, theirs = mlsd
    image = picture(*size)
    expected = oracle.utils.pred_lines(image, theirs, list(seen), 0.1, 0.1)
    found = ours(image)
    assert len(found) == len(expected) > 20
    order = [np.lexsort(np.round(lines[:, ::-1], 1).T) for lines in (found, expected)]
    assert np.abs(found[order[0]] - expected[order[1]]).max() < 0.01


# People


def test_bodypose_gives_the_same_maps(pose):
    """Fields and parts, relative error at most 1e-5."""
    ours, theirs = pose
    x = torch.rand((1, 3, 64, 80), generator=torch.Generator().manual_seed(1)) - 0.5
    with torch.no_grad():
        assert max(map(relative, ours.maps(x), theirs(x))) <= 1e-5


def test_blur_is_scipys():
    """Within the last bits of float64; also where the map is smaller than the filter."""
    gaussian_filter = importlib.import_module("scipy.ndimage").gaussian_filter
    for size in ((40, 30), (1, 1), (5, 60)):
        image = np.random.default_rng(0).random(size)
        assert np.abs(filters.blur(image, 3, 12, "symmetric") - gaussian_filter(image, sigma=3)).max() <= 1e-15


def pose_maps(seed, height, width, people, noise, spacing=1):
    """Fields and parts of random people (38, h, w), (19, h, w): some parts missing, limbs crossing, with noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    parts, fields = np.zeros((19, height, width), np.float32), np.zeros((38, height, width), np.float32)
    for _ in range(people):
        at = random.uniform((0.1 * width, 0.1 * height), (0.9 * width, 0.9 * height), (18, 2))
        there = random.random(18) > 0.15
        for part in np.nonzero(there)[0]:
            bump = random.uniform(0.15, 1) * np.exp(
                -((x - at[part, 0]) ** 2 + (y - at[part, 1]) ** 2) / (2 * (6 / spacing) ** 2)
            )
            parts[part] = np.maximum(parts[part], bump)
        for (a, b), channels in LIMBS:
            if there[a] and there[b]:
                along = at[b] - at[a]
                length = np.hypot(*along)
                across = ((x - at[a, 0]) * along[1] - (y - at[a, 1]) * along[0]) / length
                part_way = ((x - at[a, 0]) * along[0] + (y - at[a, 1]) * along[1]) / length
                limb = (np.abs(across) < 5 / spacing) & (part_way > -4 / spacing) & (part_way < length + 4 / spacing)
                for channel, part_of in zip(channels, along / length, strict=True):
                    fields[channel][limb] = part_of
    fields += noise * random.standard_normal(fields.shape).astype(np.float32)
    return fields, parts


def as_people(candidate, subset):
    """controlnet_aux's answer as (P, 18, 3)."""
    people = np.zeros((len(subset), 18, 3))
    for n, row in enumerate(subset):
        for part in range(18):
            if row[part] >= 0:
                people[n, part] = candidate[int(row[part]), :3]
    return people


def their_people(oracle, monkeypatch, image, fields, parts, enlarged):
    """What controlnet_aux makes of maps; `enlarged`: these have the picture's size already."""
    body = oracle.body.Body.__new__(oracle.body.Body)
    body.model = Gives((torch.from_numpy(fields)[None], torch.from_numpy(parts)[None]))
    if enlarged:
        monkeypatch.setattr(oracle.body.util, "smart_resize_k", lambda image, fx, fy: image)
    return as_people(*body(image)), body.model


@pytest.mark.parametrize(("people", "noise"), [(1, 0.0), (2, 0.0), (4, 0.1), (6, 0.3), (12, 0.0)])
def test_the_same_maps_give_the_same_people(oracle, monkeypatch, people, noise):
    """Exactly: points, confidences and order. Many people overlap, so that limbs are joined, replaced and disputed."""
    found = 0
    for seed in range(4):
        fields, parts = pose_maps(seed, 184, 240, people, noise)
        image = np.zeros((184, 240, 3), np.uint8)
        theirs, _ = their_people(oracle, monkeypatch, image, fields, parts, enlarged=True)
        ours = networks.find_people(fields, parts)
        assert np.array_equal(ours, theirs)
        found += len(theirs)
    assert found >= 3


@pytest.mark.parametrize("size", [(368, 400), (300, 211), (100, 150), (184, 184)])
def test_bodypose_finds_the_same_people(oracle, monkeypatch, size):
    """From the picture to what the network sees, and from its maps to people, with resizing on both ways.

    The same points; confidences within 1e-5, and what the network sees within OpenCV's rounding of 1/256.
    """
    height, width = size
    image = picture(height, width)
    seen_width = int(width * (184 / height))
    fields, parts = pose_maps(1, 23, -(-seen_width // 8), people=2, noise=0.0, spacing=8)
    theirs, model = their_people(oracle, monkeypatch, image[..., ::-1], fields, parts, enlarged=False)
    seen = []

    def maps(self, x):
        seen.append(x)
        return torch.from_numpy(fields)[None], torch.from_numpy(parts)[None]

    monkeypatch.setattr(BodyPose, "maps", maps)
    monkeypatch.setattr(BodyPose, "__init__", lambda self: nn.Module.__init__(self))
    body = BodyPose()
    body.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    ours = body(image)
    assert seen[0].shape == model.seen.shape
    assert (seen[0] - model.seen).abs().max() <= 1 / 256
    assert len(theirs) > 0
    assert np.array_equal(ours[..., :2], theirs[..., :2])
    assert np.abs(ours[..., 2] - theirs[..., 2]).max() <= 1e-5
