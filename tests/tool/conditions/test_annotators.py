"""HED, M-LSD and OpenPose's body network by hand: names and sizes, what maps mean, which files and images are rejected.

The comparison with controlnet_aux is in parity/test_controlnet_aux.py.
"""

import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from minicn.checkpoints import files
from minicn.conditions.filters import blur
from minicn.conditions.networks import HED, MLSD, BodyPose, find_lines, find_people
from minicn.conditions.networks.annotator import resize
from minicn.conditions.networks.bodypose import LIMBS, find_peaks, join, match

NETWORKS = [HED, MLSD, BodyPose]


@pytest.fixture(scope="module")
def networks():
    """Each network once, with PyTorch's random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {kind: kind().eval() for kind in NETWORKS}


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


# Files


@pytest.mark.parametrize(
    ("kind", "tensors", "parameters", "shapes"),
    [
        (
            HED,
            37,
            14_716_168,
            {"norm": (1, 3, 1, 1), "block5.convs.2.weight": (512, 512, 3, 3), "block1.projection.bias": (1,)},
        ),
        (
            MLSD,
            362,
            1_533_680,
            {
                "backbone.features.0.0.weight": (32, 4, 3, 3),
                "backbone.features.13.conv.3.running_var": (96,),
                "block15.conv1.0.weight": (64, 96, 1, 1),
                "block23.conv3.weight": (16, 64, 1, 1),
            },
        ),
        (
            BodyPose,
            184,
            52_311_446,
            {
                "conv4_4_CPM.weight": (128, 256, 3, 3),
                "conv5_5_CPM_L1.bias": (38,),
                "Mconv1_stage6_L2.weight": (128, 185, 7, 7),
            },
        ),
    ],
)
def test_names_and_sizes_are_the_published_ones(networks, kind, tensors, parameters, shapes):
    """Some names and shapes in each file, and the numbers of tensors and parameters."""
    state = networks[kind].state_dict()
    assert len(state) == tensors
    assert sum(p.numel() for p in networks[kind].parameters()) == parameters
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_load_reads_the_published_container(networks, tmp_path, dtype):
    """A .pth of PyTorch: every tensor arrives, as float32, locked; M-LSD's may lack the counters of batch norm."""
    state = networks[MLSD].state_dict()
    kept = {key: value.to(dtype) for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / MLSD.published)
    before = torch.random.get_rng_state()
    loaded = MLSD.load(tmp_path / MLSD.published)
    assert torch.equal(before, torch.random.get_rng_state())  # no random number was drawn
    assert not loaded.training
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in loaded.parameters())
    found = loaded.state_dict()
    assert all(torch.equal(found[key], value.float()) for key, value in kept.items())


class Payload:
    """Leaves a file behind when unpickled by a reader that trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_load_executes_no_pickle(tmp_path):
    """A file that names a function is rejected without calling it."""
    path, mark = tmp_path / HED.published, tmp_path / "mark"
    torch.save({"norm": torch.zeros(1, 3, 1, 1), "evil": Payload(mark)}, path)
    with pytest.raises(ValueError, match=r"ControlNetHED\.pth is no"):
        HED.load(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))  # it would have
    assert mark.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("norm"), r"not a file of HED: norm is missing; use ControlNetHED.pth$"),
        (
            lambda state: state.update(extra=torch.zeros(1)),
            r"not a file of HED: extra is unexpected; use ControlNetHED.pth",
        ),
        (
            lambda state: state.update(norm=torch.zeros(3)),
            r"not a file of HED: norm is \(3,\) instead of \(1, 3, 1, 1\)",
        ),
        (
            lambda state: [state.pop(key) for key in list(state)[:5]],
            r"norm is missing, .* is missing, and 3 more differences; use",
        ),
    ],
)
def test_a_file_of_another_network_is_named(networks, tmp_path, change, words):
    """What is missing, unexpected or of another shape; two of them, then a number; in one line."""
    state = dict(networks[HED].state_dict())
    change(state)
    files.write(tmp_path / "file.safetensors", state)
    with pytest.raises(ValueError, match=words) as refused:
        HED.load(tmp_path / "file.safetensors")
    assert "file.safetensors is not" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_damaged_weights_are_named(tmp_path):
    """NaN in a file is reported at once, not seen in every hint."""
    state = HED().state_dict()
    state["block3.projection.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "hed.pth")
    with pytest.raises(ValueError, match="hed.pth: block3.projection.bias holds NaN"):
        HED.load(tmp_path / "hed.pth")


@pytest.mark.parametrize("kind", NETWORKS)
def test_no_file_is_named(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
        kind.load(tmp_path / "none.pth")


# Pictures


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ([[0]], TypeError, r"image is list, but must be an array \(H, W, 3\) of uint8"),
        (np.zeros((20, 20, 3)), ValueError, r"image is float64 of shape \(20, 20, 3\), but must be uint8"),
        (
            np.zeros((20, 20), np.uint8),
            ValueError,
            r"image is uint8 of shape \(20, 20\), but must be uint8 of shape \(H, W, 3\)",
        ),
        (np.zeros((20, 20, 4), np.uint8), ValueError, r"of shape \(20, 20, 4\), but"),
        (
            np.zeros((0, 20, 3), np.uint8),
            ValueError,
            r"image is 0x20 pixels, but .* needs at least (\d+)x\1: enlarge",
        ),
    ],
)
def test_what_is_no_picture_is_refused(networks, kind, image, error, words):
    with pytest.raises(error, match=words):
        networks[kind](image)


def test_a_picture_of_one_pixel_works_or_is_refused(networks):
    """HED halves four times, so it needs 16 pixels; the others enlarge."""
    with pytest.raises(ValueError, match="image is 1x1 pixels, but HED needs at least 16x16: enlarge it first"):
        networks[HED](noise(1, 1))
    assert networks[HED](noise(16, 31)).shape == (16, 31)
    assert networks[MLSD](noise(1, 1)).shape[1:] == (4,)
    assert networks[BodyPose](noise(1, 1)).shape[1:] == (18, 3)
    for size in ((1, 17), (170, 10)):
        with pytest.raises(ValueError, match=f"image is {size[1]}x{size[0]} pixels, an aspect ratio over 16: crop it first"):
            networks[BodyPose](noise(*size))


@pytest.mark.filterwarnings("error")
def test_a_read_only_picture_is_taken_as_it_is(networks):
    """As Pillow's arrays are: no warning, and the same edges as for a copy, even for a mirrored view."""
    image = noise(16, 20)
    image.flags.writeable = False
    edges = networks[HED](image)
    assert np.array_equal(edges, networks[HED](image.copy()))
    assert np.array_equal(networks[HED](image[:, ::-1]), networks[HED](image[:, ::-1].copy()))


def test_resize_takes_means_down_and_lanczos_up():
    """Down: the mean of what each new pixel covers, here 1.5 old ones. Up: a constant stays, 8 bits do not wrap around."""
    row = np.array([[10, 40, 100]], np.uint8)[..., None]
    assert resize(np.repeat(row, 2, 0), 2, 2)[..., 0].tolist() == [[20, 80]] * 2  # (10 + 40 / 2) / 1.5, (40 / 2 + 100) / 1.5
    step = np.repeat(np.array([[0] * 8 + [255] * 8], np.uint8), 16, 0)[..., None]
    up = resize(step, 128, 128)[..., 0]
    assert up.dtype == np.uint8
    assert (up[:, :60] < 40).all()
    assert (up[:, 68:] > 215).all()  # it overshoots, and is clipped at 0 and 255
    assert np.allclose(resize(np.full((3, 5, 3), 0.7), 17, 16), 0.7)
    assert resize(step, 16, 16) is step


# Soft edges


def test_hed_is_the_sigmoid_of_the_mean_of_five_sides():
    """With no weights but the biases 1, 2, 3, 4, 5 of the projections, every pixel is sigmoid(3)."""
    network = HED()
    for p in network.parameters():
        nn.init.zeros_(p)
    for i in range(1, 6):
        network.get_submodule(f"block{i}").projection.bias.data.fill_(i)
    edges = network(noise(20, 33))
    assert (edges.shape, edges.dtype) == ((20, 33), np.float32)
    assert np.allclose(edges, 1 / (1 + np.exp(-3)))


def test_hed_subtracts_the_learned_colour_in_the_order_red_green_blue():
    """An image of exactly this colour is zero to the network; one with the channels reversed is not."""
    network = HED().eval()
    network.norm.data[:] = torch.tensor([10.0, 20.0, 30.0]).view(1, 3, 1, 1)
    zero = network.side_outputs(torch.tensor([10.0, 20.0, 30.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16))
    seen = []
    network.block1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    network(np.full((16, 16, 3), (10, 20, 30), np.uint8))
    network(np.full((16, 16, 3), (30, 20, 10), np.uint8))
    assert len(zero) == 5
    assert seen[0].abs().max() == 0
    assert seen[1][0, :, 0, 0].tolist() == [20, 0, -20]


# Straight lines


def line_maps(*lines):
    """Maps (9, 16, 20) with a centre at (x, y) of a logit, and the offsets to both ends, for each line."""
    maps = torch.zeros(9, 16, 20)
    maps[0] = -9
    for (x, y), logit, ends in lines:
        maps[0, y, x] = logit
        maps[1:5, y, x] = torch.tensor(ends)
    return maps


def test_a_line_is_its_centre_plus_two_ways():
    """In pixels of the image, which is twice as large; strongest first."""
    weak = ((4, 10), 1.0, [-2.0, 0.0, 2.0, 0.5])
    strong = ((15, 3), 2.0, [-5.0, -1.0, 4.0, 2.0])
    lines = find_lines(line_maps(weak, strong))
    assert lines.dtype == np.float64
    assert lines.tolist() == [[20, 4, 38, 10], [4, 20, 12, 21]]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (((5, 5), -2.1, [0.0, 0.0, 9.0, 0.0]), 1),  # sigmoid(-2.1) = 0.109
        (((5, 5), -2.3, [0.0, 0.0, 9.0, 0.0]), 0),  # sigmoid(-2.3) = 0.091
        (((5, 5), 3.0, [0.0, 0.0, 0.0, 0.11]), 1),
        (((5, 5), 3.0, [4.0, 4.0, 4.0, 4.09]), 0),
        (((4, 4), 3.0, [0.0, 0.0, 9.0, 0.0]), 0),  # beside a stronger centre
        (((3, 5), 3.0, [0.0, 0.0, 9.0, 0.0]), 1),  # two pixels from it
    ],
)
def test_weak_short_and_neighbouring_lines_are_left_out(line, found):
    """Probability and length must be above 0.1; of adjacent centres the strongest is kept, here one at (5, 3)."""
    strongest = ((5, 3), 4.0, [-1.0, 0.0, 1.0, 0.0])
    assert len(find_lines(line_maps(strongest, line))) == 1 + found


def test_of_many_lines_the_strongest_200_are_kept():
    """30 x 30 centres, two pixels apart, each a little stronger than the one before."""
    maps = torch.full((5, 60, 60), -9.0)
    maps[0, ::2, ::2] = torch.linspace(0, 3, 900).view(30, 30)
    maps[1:3], maps[3:5] = -1, 1
    lines = find_lines(maps)
    assert len(lines) == 200
    assert lines[0].tolist() == [2 * 58 - 2, 2 * 58 - 2, 2 * 58 + 2, 2 * 58 + 2]
    assert (lines[:, 1] + 2 >= 2 * 46).all()  # 200 of 900 are the last 7 of 30 rows: y = 46 and more


def test_mlsd_gives_lines_in_pixels_of_the_picture(networks, monkeypatch):
    """120 x 90 pixels are seen as 128 x 96, as four channels in [-1, 1]; lines come back to 120 x 90."""
    seen = []

    def maps(x):
        seen.append(x)
        found = torch.full((1, 9, 64, 48), -9.0)
        found[0, :5, 32, 12] = torch.tensor([5.0, -6.0, -8.0, 6.0, 8.0])
        return found

    monkeypatch.setattr(networks[MLSD], "maps", maps)
    image = np.full((120, 90, 3), (255, 0, 51), np.uint8)
    [line] = networks[MLSD](image)
    assert np.allclose(line, [12 * 90 / 96, 48 * 120 / 128, 36 * 90 / 96, 80 * 120 / 128])
    assert seen[0].shape == (1, 4, 128, 96)
    assert np.allclose(seen[0][0, :, 0, 0], [1, -1, -0.6, 1 / 127.5 - 1])


# People


STANDING = np.array(
    [(60, 20), (60, 40), (45, 40), (40, 60), (38, 80), (75, 40), (80, 60), (82, 80), (50, 85)]
    + [(48, 110), (47, 135), (70, 85), (72, 110), (73, 135), (56, 16), (64, 16), (52, 18), (68, 18)]
)


def pose_maps(people, height=150, width=240, size=1.0):
    """Fields and parts of people (18, 2); a part at NaN is absent. `size` is the height of the bumps."""
    y, x = np.mgrid[:height, :width]
    fields, parts = np.zeros((38, height, width)), np.zeros((19, height, width))
    for points in people:
        for part, (px, py) in enumerate(points):
            if not np.isnan(px):
                parts[part] = np.maximum(parts[part], size * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 50))
        for (a, b), channels in LIMBS:
            along = points[b] - points[a]
            length = np.hypot(*along)
            if length > 0:  # and no NaN
                aside = np.abs((x - points[a, 0]) * along[1] - (y - points[a, 1]) * along[0]) / length
                ahead = ((x - points[a, 0]) * along[0] + (y - points[a, 1]) * along[1]) / length
                fields[np.ix_(channels)] = np.where(
                    (aside < 3) & (ahead > -2) & (ahead < length + 2),
                    (along / length)[:, None, None],
                    fields[list(channels)],
                )
    return fields, parts


def test_two_people_are_put_together():
    """Everyone gets their own 18 points, at the pixel, with the confidence of the maps."""
    other = STANDING + (100, 5)
    people = find_people(*pose_maps([STANDING, other]))
    assert people.shape == (2, 18, 3)
    assert np.array_equal(people[..., :2], [STANDING, other])
    assert np.allclose(people[..., 2], 1)


def test_people_who_cross_keep_their_own_arms():
    """The right wrists are swapped: each lies nearer to the other's elbow, but the field leads to the right one."""
    first, second = STANDING.copy(), STANDING + (45, 0)
    first[4], second[4] = (78, 88), (47, 86)
    people = find_people(*pose_maps([first, second]))
    assert np.array_equal(people[..., :2], [first, second])


def test_absent_parts_are_zero():
    """Without the head and a leg, the rest is found."""
    points = STANDING.astype(float)
    gone = [0, 8, 9, 10, 14, 15, 16, 17]
    points[gone] = np.nan
    [person] = find_people(*pose_maps([points]))
    assert (person[gone] == 0).all()
    left = [part for part in range(18) if part not in gone]
    assert np.array_equal(person[left, :2], STANDING[left])


@pytest.mark.parametrize(("count", "found"), [(3, 0), (4, 1)])
def test_people_of_less_than_four_parts_are_left_out(count, found):
    """Neck, right shoulder, elbow, and with the wrist it is a person."""
    points = np.full((18, 2), np.nan)
    points[1 : 1 + count] = STANDING[1 : 1 + count]
    assert len(find_people(*pose_maps([points]))) == found


@pytest.mark.parametrize(("strength", "found"), [(0.1, 0), (0.3, 1)])
def test_people_of_low_scores_are_left_out(strength, found):
    """18 parts of 0.2 and 17 limbs of 0.1 give 5.3, which is 0.29 for each part; with limbs of 0.3 it is 0.48."""
    fields, parts = pose_maps([STANDING], size=0.2)
    assert len(find_people(fields * strength, parts)) == found


def test_a_peak_is_a_maximum_of_the_smoothed_map():
    """Above 0.1 after smoothing, which leaves of a single pixel 1 / (2 pi 9) = 0.018; the value is the unsmoothed one's."""
    y, x = np.mgrid[:40, :60]
    heat = 0.8 * np.exp(-((x - 20) ** 2 + (y - 11) ** 2) / 50)
    heat[35, 50] = 1
    [peak] = find_peaks(heat)
    assert peak.tolist() == [20, 11, 0.8]


def test_two_equal_neighbours_are_two_peaks():
    """As in ControlNet's code: smoothing keeps a symmetric map symmetric to the last bit."""
    y, x = np.mgrid[:40, :92]
    heat = 0.6 * np.exp(-((x - 45.5) ** 2 + (y - 25) ** 2) / 50)
    assert find_peaks(heat)[:, :2].tolist() == [[45, 25], [46, 25]]
    half = np.random.default_rng(0).random((30, 20))
    smooth = blur(np.concatenate([half, half[:, ::-1]], axis=1), 3, 12, "symmetric")
    assert np.array_equal(smooth, smooth[:, ::-1])


def field_along_x(height=100, width=200, strength=1.0):
    return np.stack([np.full((height, width), strength), np.zeros((height, width))])


def test_the_score_of_a_limb_is_the_field_along_it():
    """1 along the field, cos 60 degrees at 60 degrees, none against it or across."""
    a = np.array([[20.0, 50, 1]])
    ends = np.array([[60.0, 50, 1], [40, 50 + 20 * 3**0.5, 1], [10, 50, 1], [20, 90, 1]])
    for end, score in zip(ends, (1, 0.5, None, None), strict=True):
        pairs = match(a, end[None], field_along_x())
        assert [(i, j) for i, j, _ in pairs] == ([(0, 0)] if score else [])
        assert [s for _, _, s in pairs] == pytest.approx([score] if score else [])


def test_each_peak_is_paired_once_the_best_first():
    """The straight limb is taken before those that are 8, 42 and 45 degrees off; no peak is in two limbs."""
    a = np.array([[20.0, 30, 1], [20, 70, 1]])
    b = np.array([[60.0, 70, 1], [60, 36, 1]])
    pairs = match(a, b, field_along_x())
    assert [(i, j) for i, j, _ in pairs] == [(1, 0), (0, 1)]
    assert pairs[0][2] == pytest.approx(1)
    assert [(i, j) for i, j, _ in match(a, b[:1], field_along_x())] == [(1, 0)]
    assert [(i, j) for i, j, _ in match(a[:1], b, field_along_x())] == [(0, 1)]


@pytest.mark.parametrize(("gap", "found"), [(1, 1), (2, 0)])
def test_nine_of_ten_points_must_lie_on_the_limb(gap, found):
    """Ten points from 20 to 110 are ten pixels apart; where the field is 0.05 or less, they are not counted."""
    field = field_along_x()
    field[:, :, 55 : 55 + 10 * gap] = 0.05
    assert len(match(np.array([[20.0, 50, 1]]), np.array([[110.0, 50, 1]]), field)) == found


@pytest.mark.parametrize(("length", "score"), [(50, 1.0), (100, 0.5), (125, 0.4)])
def test_limbs_longer_than_half_the_picture_cost(length, score):
    """The picture is 100 pixels high: 50 / length - 1 is added beyond 50."""
    pairs = match(np.array([[10.0, 50, 1]]), np.array([[10.0 + length, 50, 1]]), field_along_x())
    assert pairs[0][2] == pytest.approx(score)


@pytest.mark.filterwarnings("error")
def test_two_peaks_at_one_place_make_no_limb():
    """A limb of zero length has no direction: no division by zero."""
    point = np.array([[20.0, 50, 1]])
    assert match(point, point, field_along_x()) == []


def test_a_limb_begins_extends_joins_or_disputes():
    """Peaks of part p have the confidence p / 10, limbs the score 1; ControlNet's count of a disputed part is kept, too."""
    peaks = [np.array([[0, 0, part / 10]] * 2) for part in range(18)]
    people = []

    def after(start, end):
        join(people, start, end, 1.0, peaks)
        return [(person.parts, round(person.score, 6), person.count) for person in people]

    first = {1: 0, 2: 0}
    assert after((1, 0), (2, 0)) == [(first, 1.3, 2)]
    assert after((1, 0), (2, 0)) == [(first, 1.3, 2)]  # known
    assert after((2, 0), (3, 0)) == [({**first, 3: 0}, 2.6, 3)]
    assert after((5, 1), (6, 1))[1] == ({5: 1, 6: 1}, 2.1, 2)
    joined = {**first, 3: 0, 5: 1, 6: 1}
    assert after((1, 0), (5, 1)) == [(joined, 2.6 + 2.1 + 1, 5)]
    assert after((2, 1), (3, 1))[1] == ({2: 1, 3: 1}, 1.5, 2)
    # Both have a part 2: the first takes the disputed one in place of its own, the second keeps it, too.
    assert after((2, 0), (3, 1)) == [({**joined, 3: 1}, 7.0, 6), ({2: 1, 3: 1}, 1.5, 2)]
    assert after((2, 0), (3, 1))[0] == ({**joined, 3: 1}, 8.3, 7)


def test_bodypose_gives_people_in_pixels_of_the_picture(networks, monkeypatch):
    """A picture 400 high is seen 184 high, BGR, in [-0.5, 0.5), padded by 128 to multiples of 8; points come back."""
    seen = []
    truth = STANDING * 2.5 + (20, 10)

    def maps(x):
        seen.append(x)
        # On the network's cells: cell centres lie at 8 i + 3.5 of the 184 rows, which are 2.174 rows of the picture.
        fields, parts = pose_maps([((truth + 0.5) * 184 / 400 - 0.5 - 3.5) / 8], *(n // 8 for n in x.shape[2:]))
        y, x = np.mgrid[: parts.shape[1], : parts.shape[2]]
        for part, (px, py) in enumerate(((truth + 0.5) * 184 / 400 - 4) / 8):
            parts[part] = np.exp(-((x - px) ** 2 + (y - py) ** 2) / 2)
        return torch.from_numpy(fields)[None], torch.from_numpy(parts)[None]

    monkeypatch.setattr(networks[BodyPose], "maps", maps)
    [person] = networks[BodyPose](np.full((400, 303, 3), (0, 64, 192), np.uint8))
    assert seen[0].shape == (1, 3, 184, 144)
    assert seen[0][0, :, 0, 138].tolist() == [0.25, -0.25, -0.5]
    assert (seen[0][..., 139:] == 0).all()  # 303 * 0.46 = 139.38, truncated
    assert np.abs(person[:, :2] - truth).max() <= 2
    assert (person[:, 2] > 0.8).all()


def test_few_maps_of_the_pictures_size_are_held_at_once():
    """Of the 18 + 38 that are enlarged at most two: those of a limb."""
    held, most = [], []

    def enlarge(small):
        held[:] = [reference for reference in held if reference() is not None]
        large = small.copy()
        held.append(weakref.ref(large))
        most.append(len(held))
        return large

    people = find_people(*pose_maps([STANDING]), enlarge=enlarge)
    assert len(people) == 1
    assert len(most) == 18 + 38
    assert max(most) == 2
