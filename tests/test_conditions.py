"""Pictures to hints: Canny against its definition and against OpenCV, reading and sizing of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from minicn import conditions, toy
from minicn.conditions import canny, hint_tensor, load_hint, load_image, resize_hint, to_rgb

THRESHOLDS = [(100, 200), (50, 100), (1, 255), (30, 400), (150, 150)]


def step(height, at=4, size=(10, 12), base=20):
    """A grey picture that rises by `height` between column at - 1 and column at."""
    image = np.full(size, base, np.uint8)
    image[:, at:] += np.uint8(height)
    return image


def edges(image, *args):
    """The edge map as booleans (H, W)."""
    return canny(image, *args)[..., 0] > 0


# Canny, on paper


def test_canny_is_white_on_black_in_three_channels():
    """(H, W, 3) uint8, each pixel (0, 0, 0) or (255, 255, 255): the form in which the released weights want it."""
    found = canny(toy.scene(0, "test").image)
    assert (found.shape, found.dtype) == ((128, 128, 3), np.uint8)
    assert set(np.unique(found)) == {0, 255}
    assert (found == found[..., :1]).all()
    assert 0.005 < (found[..., 0] > 0).mean() < 0.3


def test_a_flat_picture_has_no_edges():
    """Without a gradient nothing is found, however low the thresholds: a magnitude of 0 is not above 0."""
    assert not canny(np.full((9, 7, 3), 77, np.uint8), 0, 0).any()


@pytest.mark.parametrize("turned", [False, True])
def test_a_step_edge_is_one_line(turned):
    """A step of 60 gives |dx| = 4 * 60 = 240 in the two columns beside it; of equals the first stays.

    So exactly column 3 is white, from border to border (and row 3, for the picture turned).
    """
    image = step(60)
    want = np.zeros(image.shape, bool)
    want[:, 3] = True
    found = edges(image.T.copy() if turned else image)
    assert np.array_equal(found, want.T if turned else want)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_diagonal_step_is_a_diagonal_line(sign):
    """A step at 45 degrees over three pixels (20, 60, 100) leaves exactly its middle diagonal.

    |dx| + |dy| is 480 on it, 320 on the diagonals beside it, 80 on the next, else 0. Along the gradient the neighbours
    are two diagonals away: 480 is larger than 80, but the 320 on either side are equal, and only the larger stays.
    """
    y, x = np.mgrid[:12, :12]
    d = sign * (x - 6) + (y - 6)
    image = np.where(d < 0, 20, np.where(d == 0, 60, 100)).astype(np.uint8)
    inner = np.s_[2:-2, 2:-2]
    assert np.array_equal(edges(image)[inner], (d == 0)[inner])


@pytest.mark.parametrize(("height", "found"), [(50, False), (51, True)])
def test_the_high_threshold_is_exclusive(height, found):
    """A step of 50 has magnitude 200, which is not above 200; one of 51 has 204, which is."""
    assert edges(step(height)).any() == found
    assert edges(step(height), 100, 199.5).any()  # thresholds are rounded down: 200 is above 199


def test_weak_lines_are_kept_only_where_a_strong_one_touches_them():
    """Hysteresis: a line that fades from strong to weak is kept whole; the weak part alone is not.

    The step's height falls by 2 a row from 60: |dx| + |dy| in the column right of it is 4 (60 - 2 row) + 12, above 200
    in the upper half and above 100 everywhere. (That column is the larger one: |dy| is 12 there and 4 left of it.)
    """
    rows = np.arange(12)
    fading, weak = step(0, size=(12, 12)), step(0, size=(12, 12))
    fading[:, 4:] += (60 - 2 * rows).astype(np.uint8)[:, None]
    weak[:, 4:] += (40 - 2 * rows).astype(np.uint8)[:, None]
    want = np.zeros((12, 12), bool)
    want[:, 4] = True
    assert np.array_equal(edges(fading), want)
    assert not edges(weak).any()
    both = np.concatenate([fading, weak[:, ::-1]], axis=1)  # side by side, apart: each as when alone
    assert np.array_equal(edges(both)[:, :10], want[:, :10])
    assert not edges(both)[:, 14:].any()


def test_thresholds_may_come_in_either_order():
    """canny(low, high) is canny(high, low), as in OpenCV."""
    image = toy.scene(3, "test").image
    assert np.array_equal(canny(image, 60, 180), canny(image, 180, 60))
    assert not np.array_equal(canny(image, 60, 180), canny(image, 180, 180))


def test_lower_thresholds_only_add_edges():
    """Every edge at (100, 200) is one at (50, 100)."""
    image = toy.scene(4, "test").image
    few, many = edges(image), edges(image, 50, 100)
    assert (many | ~few).all()
    assert many.sum() > few.sum()


def test_grey_is_read_like_rgb_of_equal_channels():
    """(H, W), (H, W, 1), (H, W, 3) and PIL pictures of one grey picture have the same edges."""
    grey = toy.scene(5, "test").image[..., 0]
    want = canny(grey)
    assert want.any()
    rgb = np.repeat(grey[..., None], 3, axis=2)
    for same in (grey[..., None], rgb, Image.fromarray(grey), Image.fromarray(rgb)):
        assert np.array_equal(canny(same), want)


@pytest.mark.parametrize("channel", range(3))
def test_the_channel_of_the_strongest_gradient_counts(channel):
    """A step in one channel alone is found as in a grey picture, where a grey conversion would weaken it."""
    image = np.full((10, 12, 3), 20, np.uint8)
    image[..., channel] = step(60)
    assert np.array_equal(canny(image), canny(step(60)))
    assert canny(image).any()


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3), np.float32), np.zeros((4,), np.uint8), np.zeros((1, 4, 4, 3), np.uint8)]
)
def test_canny_refuses_other_arrays(bad):
    """Only uint8 of two or three dimensions."""
    with pytest.raises(ValueError, match=r"image is \w+ of shape .* must be uint8 of shape \(H, W, 3\)"):
        canny(bad)


# Canny, against OpenCV


@pytest.mark.parametrize("low_high", THRESHOLDS)
def test_canny_is_opencvs(low_high):
    """On noise of odd sizes, blurred noise and toy scenes, every pixel is cv2.Canny's, in grey and in colour."""
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed: it is the oracle here")
    rng = np.random.default_rng(7)
    shapes = [(33, 41, 3), (64, 64, 3), (1, 9, 3), (9, 1, 3), (3, 3, 3), (50, 70), (2, 2)]
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    images += [cv2.GaussianBlur(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), (0, 0), s) for s in (0.8, 1.5, 3)]
    images += [toy.scene(i, "test").image for i in range(6)]
    for image in images:
        want = cv2.Canny(image, *low_high)
        assert np.array_equal(canny(image, *low_high)[..., 0], want), image.shape


# Reading pictures


def saved(tmp_path, image, name="picture.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_grey_pictures_become_rgb(tmp_path):
    """Mode L: the value, three times; mode 1: black and white."""
    grey = Image.fromarray(np.array([[0, 7, 255]], np.uint8))
    assert np.array_equal(load_image(saved(tmp_path, grey)), [[[0] * 3, [7] * 3, [255] * 3]])
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert np.array_equal(load_image(saved(tmp_path, bits)), [[[0] * 3, [255] * 3]])


def test_alpha_is_composited_over_white(tmp_path):
    """a c + (1 - a) 255: with a = 0 white, with 255 the colour itself, with 128 (red) 255 and 255 * 127 / 255 = 127."""
    pixels = np.array([[(10, 20, 30, 0), (10, 20, 30, 255), (255, 0, 0, 128), (0, 0, 0, 51)]], np.uint8)
    want = [[(255, 255, 255), (10, 20, 30), (255, 127, 127), (204, 204, 204)]]
    assert np.array_equal(load_image(saved(tmp_path, Image.fromarray(pixels))), want)
    grey = Image.fromarray(np.array([[(0, 0), (0, 51), (9, 255)]], np.uint8), "LA")
    assert np.array_equal(load_image(saved(tmp_path, grey)), [[(255,) * 3, (204,) * 3, (9,) * 3]])


def test_sixteen_bits_are_divided_by_257(tmp_path):
    """65535 / 257 = 255: the whole range maps to the whole range, rounded, and not cut off at 255."""
    values = np.array([[0, 128, 129, 257, 25_700, 65_535]], np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    want = np.array([0, 0, 1, 1, 100, 255])[None, :, None].repeat(3, 2)
    assert np.array_equal(load_image(saved(tmp_path, image)), want)
    assert np.array_equal(to_rgb(Image.fromarray(values.astype(np.int32))), want)


def test_palettes_and_their_transparent_colour(tmp_path):
    """Mode P: colours are looked up, and the transparent one is white."""
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert image.mode == "P"
    assert np.array_equal(load_image(saved(tmp_path, image)), [[(255, 0, 0), (0, 255, 0), (0, 0, 255)]])
    path = saved(tmp_path, image, transparency=1)
    assert np.array_equal(load_image(path), [[(255, 0, 0), (255, 255, 255), (0, 0, 255)]])


@pytest.mark.parametrize(
    ("tag", "want"),
    [
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
    ],
)
def test_pictures_are_turned_by_their_exif_tag(tmp_path, tag, want):
    """A camera held sideways writes a tag: 6 means that the picture is to be turned a quarter clockwise."""
    image = Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = tag
    got = load_image(saved(tmp_path, image, exif=exif))
    assert np.array_equal(np.asarray(got)[..., 0], want)


def test_floating_point_pictures_are_refused(tmp_path):
    """Mode F has no agreed range: the error says what to do."""
    image = Image.fromarray(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="floating-point values has no agreed range: save it with 8 or 16 bits"):
        to_rgb(image)


def test_floating_point_files_are_refused_by_name(tmp_path):
    """load_image names the file that it cannot read, also where the reason is its mode."""
    path = saved(tmp_path, Image.fromarray(np.zeros((2, 2), np.float32)), "float.tiff")
    with pytest.raises(ValueError, match=r"float\.tiff"):
        load_image(path)


def test_files_that_are_no_pictures_are_refused_by_name(tmp_path):
    """Missing, a folder, empty, text, cut off: each error names the file, and none is a traceback of Pillow's."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png does not exist or is no file: name a picture"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="does not exist or is no file"):
        load_image(tmp_path)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        path = saved(tmp_path, noise, name)
        assert load_image(path).size == (64, 64)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "cut.jpg", "cut.webp", "empty.png", "text.png"):
        with pytest.raises(ValueError, match=rf"{name} is no picture that can be read"):
            load_image(tmp_path / name)


# Hints


def test_hint_tensor_of_pictures_is_divided_by_255():
    """RGB 8-bit becomes (1, 3, H, W) float32 in [0, 1], row by row, in the order R, G, B."""
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    want = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float() / 255
    for hint in (pixels, Image.fromarray(pixels)):
        got = hint_tensor(hint)
        assert (got.shape, got.dtype) == ((1, 3, 2, 4), torch.float32)
        assert torch.equal(got, want)
    assert hint_tensor(np.array([[[0, 255, 51]]], np.uint8)).flatten().tolist() == pytest.approx([0, 1, 0.2])


def test_hint_tensor_takes_grey_and_alpha():
    """(H, W), (H, W, 1) and mode L are grey, (H, W, 4) and RGBA lie over white."""
    grey = np.array([[0, 51]], np.uint8)
    for hint in (grey, grey[..., None], Image.fromarray(grey)):
        assert torch.equal(hint_tensor(hint), torch.tensor([[0.0, 51 / 255]]).expand(1, 3, 1, 2))
    rgba = np.array([[(0, 0, 0, 0), (0, 0, 0, 255)]], np.uint8)
    for hint in (rgba, Image.fromarray(rgba)):
        assert torch.equal(hint_tensor(hint), torch.tensor([[1.0, 0.0]]).expand(1, 3, 1, 2))


def test_hint_tensor_takes_float_tensors_as_they_are():
    """A float tensor in [0, 1], alone or in a batch, keeps its values; float64 and half become float32."""
    one = torch.rand(3, 2, 4)
    assert torch.equal(hint_tensor(one), one[None])
    assert torch.equal(hint_tensor(torch.stack([one, one])), torch.stack([one, one]))
    for dtype in (torch.float64, torch.float16):
        assert hint_tensor(one.to(dtype)).dtype == torch.float32


def test_load_hint_reads_a_file(tmp_path):
    """A saved edge map comes back as it was, as (1, 3, H, W) of zeros and ones."""
    found = canny(toy.scene(0, "test").image)
    path = saved(tmp_path, Image.fromarray(found))
    assert torch.equal(load_hint(path), torch.from_numpy(found).permute(2, 0, 1)[None] / 255)


BAD_HINTS = {
    "float array": (np.zeros((4, 4, 3)), ValueError, r"array of float64 and shape \(4, 4, 3\), but must be uint8"),
    "2 channels": (
        np.zeros((4, 4, 2), np.uint8),
        ValueError,
        r"shape \(4, 4, 2\), but must be uint8 of shape \(H, W\)",
    ),
    "4 dimensions": (np.zeros((1, 4, 4, 3), np.uint8), ValueError, r"shape \(1, 4, 4, 3\), but must be"),
    "channels last": (
        torch.zeros(4, 4, 3),
        ValueError,
        r"float32 of shape \(1, 4, 4, 3\), but must be float .* 3, H, W",
    ),
    "integers": (torch.zeros(3, 4, 4, dtype=torch.uint8), ValueError, r"torch.uint8 of shape .* must be float"),
    "one channel": (torch.zeros(1, 1, 4, 4), ValueError, r"shape \(1, 1, 4, 4\), but must be float of shape \(B, 3, H"),
    "0 to 255": (torch.full((3, 4, 4), 255.0), ValueError, r"values from 255 to 255, .* \[0, 1\]: divide by 255"),
    "negative": (torch.full((3, 4, 4), -0.5), ValueError, r"values from -0.5 to -0.5, but they must lie in \[0, 1\]"),
    "not a number": (torch.full((3, 4, 4), float("nan")), ValueError, r"values from nan to nan"),
    "a path": ("hint.png", TypeError, "hint is str, but must be a picture, an array or a tensor"),
    "nothing": (None, TypeError, "hint is NoneType, but must be a picture"),
}


@pytest.mark.parametrize("case", BAD_HINTS)
def test_hint_tensor_refuses_in_words(case):
    """What came and what is taken stand in the error."""
    hint, error, words = BAD_HINTS[case]
    with pytest.raises(error, match=words):
        hint_tensor(hint)


def test_resize_hint_up_makes_no_new_colours():
    """Enlarged by nearest neighbour: each pixel becomes a block."""
    image = Image.fromarray(np.array([[0, 255], [7, 0]], np.uint8))
    got = resize_hint(image, height=4, width=6)
    assert np.array_equal(got, np.kron([[0, 255], [7, 0]], np.ones((2, 3))))


def test_resize_hint_down_takes_the_mean():
    """Shrunk by the mean of each block: thin lines fade, but none is lost."""
    pixels = np.zeros((4, 6), np.uint8)
    pixels[:, 2] = 200
    pixels[:2, 5] = 100
    got = resize_hint(Image.fromarray(pixels), height=2, width=3)
    assert np.array_equal(got, [[0, 100, 50], [0, 100, 0]])


def test_resize_hint_gives_height_and_width_in_this_order():
    """Height first, as in tensors; the same size changes nothing."""
    image = Image.fromarray(toy.scene(1, "test").image)
    assert resize_hint(image, height=64, width=192).size == (192, 64)
    assert np.array_equal(resize_hint(image, 128, 128), image)


def test_names_lists_the_conditions():
    """Every name in NAMES is a function of this module."""
    assert "canny" in conditions.NAMES
    assert all(callable(getattr(conditions, name)) for name in conditions.NAMES)
