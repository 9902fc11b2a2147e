"""From files to hints: each condition against its rules, worked out by hand, and against OpenCV; the command."""

import importlib.util
import json
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minicn import __main__, conditions, toy
from minicn.conditions import canny, drawing, hint_tensor, load_hint, load_image, making, palettes, resize_hint, to_rgb

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
    """(H, W, 3) uint8, each pixel (0, 0, 0) or (255, 255, 255): the form that the released weights expect."""
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

    So exactly column 3 is white, from border to border (and row 3, for the image transposed).
    """
    image = step(60)
    want = np.zeros(image.shape, bool)
    want[:, 3] = True
    found = edges(image.T.copy() if turned else image)
    assert np.array_equal(found, want.T if turned else want)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_diagonal_step_is_a_diagonal_line(sign):
    """A step at 45 degrees over three pixels (20, 60, 100) leaves exactly its central diagonal.

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
    """A step in one channel alone is found as in a grey picture, where converting to grey would weaken it."""
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


PHOTOGRAPHS = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


@pytest.fixture(scope="module")
def photographs():
    """scikit-image's sample photographs that come in its wheel: nothing is downloaded, and its code is not imported."""
    found = importlib.util.find_spec("skimage")
    if found is None:
        pytest.skip("scikit-image is not installed: its sample photographs are the pictures here")
    folder = Path(found.submodule_search_locations[0]) / "data"
    return {name: np.asarray(load_image(folder / name)) for name in PHOTOGRAPHS if (folder / name).is_file()}


@pytest.fixture(scope="module")
def cv2():
    return pytest.importorskip("cv2", reason="opencv-python-headless is not installed: it is the oracle here")


@pytest.mark.parametrize("low_high", THRESHOLDS)
def test_canny_is_opencvs_on_photographs(photographs, cv2, low_high):
    """Seven photographs, 512 pixels wide or so: every pixel is cv2.Canny's, so the intersection over union is 1."""
    assert len(photographs) >= 5
    for name, image in photographs.items():
        want, got = cv2.Canny(image, *low_high) > 0, edges(image, *low_high)
        assert (want & got).sum() >= 0.99 * (want | got).sum(), name
        assert np.array_equal(got, want), name


def test_canny_needs_little_memory():
    """On 1024x1024 pixels of noise, less than 100 MB on top of what Python and PyTorch need (250 MB)."""
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    tracemalloc.start()
    try:
        conditions.canny(noise)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


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
    """65535 / 257 = 255: the whole range maps to the whole range, rounded, not clipped at 255."""
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
    """A camera held sideways writes a tag: 6 means that the image must be rotated by 90 degrees clockwise."""
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
    """load_image names the file that it cannot read, even if the reason is its mode."""
    path = saved(tmp_path, Image.fromarray(np.zeros((2, 2), np.float32)), "float.tiff")
    with pytest.raises(ValueError, match=r"float\.tiff"):
        load_image(path)


def test_files_that_are_no_pictures_are_refused_by_name(tmp_path):
    """Missing, a folder, empty, text, truncated: each error names the file, and none is Pillow's own."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png does not exist or is not a file: name an image"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
        load_image(tmp_path)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        path = saved(tmp_path, noise, name)
        assert load_image(path).size == (64, 64)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "cut.jpg", "cut.webp", "text.png"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable image"):
            load_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"empty\.png has 0 bytes, but must have 1 to"):
        load_image(tmp_path / "empty.png")


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
    """(H, W), (H, W, 1) and mode L are grey, (H, W, 4) and RGBA are composited over white."""
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
    "float array": (np.zeros((4, 4, 3)), ValueError, r"array of dtype float64 and shape \(4, 4, 3\), but must be uint8"),
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
    "a path": ("hint.png", FileNotFoundError, "hint.png does not exist or is not a file: name an image"),
    "a number": (3, TypeError, "hint is int, but must be a picture, its path, an array or a tensor"),
    "nothing": (None, TypeError, "hint is NoneType, but must be a picture"),
}


@pytest.mark.parametrize("case", BAD_HINTS)
def test_hint_tensor_refuses_in_words(case):
    """The error states what came and what was expected."""
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


# Sizing by the official rule


@pytest.mark.parametrize(
    ("size", "resolution", "want"),
    [
        ((512, 512), 512, (512, 512)),
        ((400, 600), 512, (512, 768)),
        ((600, 400), 512, (768, 512)),
        ((480, 640), 256, (256, 320)),  # 341.3 / 64 = 5.33
        ((512, 544), 512, (512, 512)),  # 544 / 64 = 8.5: to the even 8
        ((512, 608), 512, (512, 640)),  # 608 / 64 = 9.5: to the even 10
        ((100, 100), 300, (320, 320)),
    ],
)
def test_the_official_size(size, resolution, want):
    """k = resolution / min(H, W); both sides become round(k side / 64) * 64, halves to the even multiple."""
    assert conditions.official_size(*size, resolution) == want


@pytest.mark.parametrize("resolution", [256, 300, 512])
def test_official_resize_is_opencvs(cv2, resolution):
    """Lanczos over 8 pixels if k > 1, else the mean over areas; within a grey level of cv2.resize."""
    image = np.random.default_rng(1).integers(0, 256, (309, 402, 3), dtype=np.uint8)
    height, width = conditions.official_size(309, 402, resolution)
    way = cv2.INTER_LANCZOS4 if resolution > 309 else cv2.INTER_AREA
    want = cv2.resize(image, (width, height), interpolation=way)
    got = np.asarray(conditions.official_resize(image, resolution))
    assert np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.parametrize("kind", ["nearest", "linear", "area"])
@pytest.mark.parametrize("size", [(40, 31), (90, 101), (50, 90), (61, 60)])
def test_resample_is_opencvs(cv2, kind, size):
    """Up, down, and one side each, in colour and grey: within a grey level of cv2.resize."""
    way = {"nearest": cv2.INTER_NEAREST, "linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}[kind]
    for shape in ((61, 80, 3), (61, 80)):
        image = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
        got = conditions.resample(image, *size, kind)
        assert (got.shape, got.dtype) == ((*size, *shape[2:]), np.uint8)
        assert np.abs(got.astype(int) - cv2.resize(image, size[::-1], interpolation=way)).max() <= 1


# Drawing


def test_lines_are_opencvs(cv2):
    """2,000 lines, half of them leaving the canvas: cv2.line's, pixel for pixel; coordinates are truncated, not rounded."""
    rng = np.random.default_rng(3)
    for i in range(2000):
        spread = 0 if i % 2 else 100
        ends = rng.integers(-spread, [80 + spread, 60 + spread] * 2)
        want = cv2.line(np.zeros((60, 80, 3), np.uint8), ends[:2].tolist(), ends[2:].tolist(), (255, 255, 255), 1)
        assert np.array_equal(conditions.draw_lines(ends[None] + (0 if spread else 0.7), 60, 80), want), ends


def test_dots_and_ellipses_are_opencvs(cv2):
    """Filled circles of radius 0 to 9, and ellipses on and off the canvas: cv2.circle, ellipse2Poly and fillConvexPoly."""
    for radius in range(10):
        want = cv2.circle(np.zeros((20, 30, 3), np.uint8), (15, 8), radius, (9, 8, 7), -1)
        got = np.zeros_like(want)
        drawing.dot(got, 15, 8, radius, (9, 8, 7))
        assert np.array_equal(got, want), radius
    rng = np.random.default_rng(4)
    for _ in range(500):
        x, y, a, degrees = (int(v) for v in rng.integers([-20, -20, 0, -180], [220, 220, 150, 181]))
        outline = drawing.ellipse_outline(x, y, a, 4, degrees)
        assert np.array_equal(outline, cv2.ellipse2Poly((x, y), (a, 4), degrees, 0, 360, 1))
        want = cv2.fillConvexPoly(np.zeros((200, 200, 3), np.uint8), outline.astype(np.int32), (255, 0, 3))
        got = np.zeros_like(want)
        got[drawing.filled(got, outline)] = (255, 0, 3)
        assert np.array_equal(got, want)


def test_what_leaves_the_canvas_is_left_out():
    """A dot in the corner keeps its quarter, and one outside leaves no trace (and no negative index)."""
    canvas = np.zeros((9, 9, 3), np.uint8)
    drawing.dot(canvas, 0, 0, 4, (1, 2, 3))
    assert canvas[:5, :5].any()
    assert not canvas[5:].any()
    assert not canvas[:, 5:].any()
    canvas = np.zeros((9, 9, 3), np.uint8)
    drawing.dot(canvas, -6, 4, 4, (1, 2, 3))
    drawing.thick_lines(canvas, [(-9, -9, -5, 20)], (1, 2, 3), 4)
    drawing.lines(canvas, [(-3, -1, 12, -1)], (1, 2, 3))
    assert not canvas.any()


# Straight lines


def test_hough_finds_the_sides_of_a_square_and_no_circle():
    """Four lines where the sides are, each pixel within two of an edge; a circle of the same size has no long one."""
    image = np.full((128, 128, 3), 240, np.uint8)
    image[30:90, 40:100] = 20
    hint = conditions.hough(image, shortest=40)[..., 0] > 0
    for line in (
        hint[28:32, 45:95].any(0),
        hint[88:92, 45:95].any(0),
        hint[35:85, 38:42].any(1),
        hint[35:85, 98:102].any(1),
    ):
        assert line.all()
    assert not hint[35:85, 45:95].any()
    y, x = np.mgrid[:128, :128]
    circle = np.where(np.hypot(x - 64, y - 64) < 30, 20, 240).astype(np.uint8)
    assert not conditions.hough(circle, shortest=40).any()


def test_lines_are_found_where_they_were_drawn():
    """A slanted segment with a gap of 3 pixels comes back as one with its ends within 2 pixels; with gap=1, as two."""
    edge = conditions.draw_lines(np.array([[10, 20, 90, 60]]), 80, 100)[..., 0] > 0
    edge[:, 50:53] = False
    [found] = conditions.find_lines(edge, shortest=20)
    if found[0] > found[2]:
        found = found[[2, 3, 0, 1]]
    assert np.abs(found - [10, 20, 90, 60]).max() <= 2
    assert len(conditions.find_lines(edge, shortest=20, gap=1)) == 2
    assert len(conditions.find_lines(edge, shortest=200)) == 0


def test_texture_forms_no_lines():
    """Noise has edges everywhere, but in all directions: few of them form lines of 20 pixels."""
    noise = np.random.default_rng(5).integers(0, 256, (128, 128), dtype=np.uint8)
    assert edges(noise).mean() > 0.2
    assert (conditions.hough(noise, shortest=20) > 0).mean() < 0.03


def test_no_line_is_a_black_hint():
    """As in the official code, which leaves the map black if nothing was found."""
    assert not conditions.draw_lines(np.zeros((0, 4)), 8, 8).any()
    assert not conditions.draw_lines([], 8, 8).any()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (np.zeros((3, 2)), r"shape \(3, 2\), but must be \(N, 4\)"),
        ([[0, 0, np.nan, 1]], "not finite or 100000 pixels away"),
        ([[0, 0, 1e9, 1]], "not finite or 100000 pixels away"),
    ],
)
def test_draw_lines_refuses(lines, words):
    with pytest.raises(ValueError, match=words):
        conditions.draw_lines(lines, 8, 8)


# Scribbles and soft edges


def test_a_scribble_is_white_where_the_drawing_is_dark():
    """White where min(R, G, B) < 127: 126 is a stroke, 127 is not, and pure red is."""
    drawn = np.full((1, 4, 3), 255, np.uint8)
    drawn[0, 0], drawn[0, 1], drawn[0, 2] = 126, 127, (255, 0, 0)
    assert np.array_equal(conditions.scribble(drawn)[..., 0], [[255, 0, 255, 0]])
    with pytest.raises(ValueError, match="has no strokes: draw with a dark pen"):
        conditions.scribble(np.full((4, 4, 3), 255, np.uint8))


def test_fake_scribbles_are_opencvs(photographs, cv2):
    """Against the same steps with cv2.GaussianBlur and cv2.dilate, IoU at least 0.99 (its 8-bit blur rounds differently)."""

    def official(soft):
        blurred = cv2.GaussianBlur(soft.astype(np.float32), (0, 0), 3.0)
        line = np.zeros_like(soft)
        straight, diagonal = np.zeros((3, 3), np.uint8), np.eye(3, dtype=np.uint8)
        straight[1] = 1
        for kernel in (straight, straight.T.copy(), diagonal, diagonal[::-1].copy()):
            line[(cv2.dilate(blurred, kernel) == blurred) & (blurred > 127)] = 255
        return cv2.GaussianBlur(line, (0, 0), 3.0) > 4

    for name in ("astronaut.png", "coffee.png"):
        soft = conditions.hed(photographs[name], network=conditions.soft_edges)
        want, got = official(soft[..., 0].copy()), conditions.fake_scribble(soft)[..., 0] > 0
        assert 0.05 < want.mean() < 0.6
        assert (want & got).sum() >= 0.99 * (want | got).sum()


def test_fake_scribbles_take_soft_edges_or_their_hint():
    """(H, W) float in [0, 1], (H, W) uint8 and the hint of three channels are equivalent; other values are rejected."""
    soft = np.zeros((40, 40), np.float32)
    soft[:, 17:23] = 0.9
    want = conditions.fake_scribble(soft)
    assert 0 < (want > 0).mean() < 0.5
    byte = (soft * 255).astype(np.uint8)
    assert np.array_equal(conditions.fake_scribble(byte), want)
    assert np.array_equal(conditions.fake_scribble(np.repeat(byte[..., None], 3, axis=2)), want)
    with pytest.raises(ValueError, match=r"soft edges lie in \[0, 2\], but must lie in \[0, 1\]"):
        conditions.fake_scribble(np.linspace(0, 2, 16).reshape(4, 4))
    with pytest.raises(ValueError, match=r"int64 of shape \(4, 4\), but must be float \(H, W\), or a uint8 hint"):
        conditions.fake_scribble(np.zeros((4, 4), np.int64))


def test_hed_paints_what_the_network_finds():
    """Soft edges times 255, truncated; the network sees an RGB array, even for a grey image."""
    seen = []

    def network(image):
        seen.append(image.shape)
        return np.array([[0, 0.5, 0.999, 1]], np.float32)

    assert np.array_equal(conditions.hed(np.zeros((1, 4), np.uint8), network)[..., 0], [[0, 127, 254, 255]])
    assert seen == [(1, 4, 3)]


def test_hed_safe_has_three_grey_levels():
    """int(3 x) / 2: below 1/3 black, below 2/3 127, then white (1.0 gives 3 / 2, which is clipped)."""
    soft = np.array([[0, 0.33, 0.34, 0.66, 0.67, 1]], np.float32)
    got = conditions.hed(np.zeros((1, 6, 3), np.uint8), lambda image: soft, safe=True)
    assert np.array_equal(got[..., 1], [[0, 0, 127, 127, 255, 255]])


def test_hed_without_weights_says_so():
    """The filter warns, is bright at a step, dark elsewhere, and darker on texture than on an outline."""
    image = np.full((64, 64, 3), 40, np.uint8)
    image[:, 32:] = 200
    with pytest.warns(UserWarning, match="hed without weights: a soft-edge filter replaces the network"):
        hint = conditions.hed(image)
    assert hint[10:50, 31:33].min() > 200
    assert hint[10:50, :20].max() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(conditions.hed(image, network=conditions.soft_edges), hint)
    board = (np.indices((64, 64)).sum(0) % 2 * 160 + 40).astype(np.uint8)  # a step at every pixel
    assert conditions.soft_edges(board).max() < 0.1


def test_lineart_draws_dark_lines_white():
    """A dark line of 2 pixels on white is white on black; a light line on dark is not, except for its dark sides."""
    image = np.full((40, 40, 3), 250, np.uint8)
    image[:, 20:22] = 10
    hint = conditions.lineart(image)
    assert hint[5:35, 20:22].min() > 250
    assert hint[:, :17].max() == 0
    light = conditions.lineart(255 - image)
    assert light[5:35, 20:22].max() == 0


# Poses


def people_at_random(count, points, seed=6, low=0, high=200):
    rng = np.random.default_rng(seed)
    people = np.concatenate([rng.uniform(low, high, (count, points, 2)), np.ones((count, points, 1))], axis=2)
    people[..., 2] = rng.uniform(size=(count, points)) > 0.2
    return people


def official_pose(cv2, people, height, width, version):
    """Draw with OpenCV by the rules of FACTS: v1.0 dots first, limbs blended; v1.1 limbs, canvas x 0.6, dots on top."""
    canvas = np.zeros((height, width, 3), np.uint8)

    def dots():
        for j in range(18):
            for x, y, there in people[:, j]:
                if there:
                    cv2.circle(canvas, (int(x), int(y)), 4, COLOURS[j], thickness=-1)

    if version == "v1.0":
        dots()
    for colour, (a, b) in zip(COLOURS, LIMBS, strict=False):
        for person in people:
            (x1, y1, there), (x2, y2, too) = person[a - 1], person[b - 1]
            if not (there and too):
                continue
            angle = int(np.degrees(np.arctan2(y1 - y2, x1 - x2)))
            axes = (int(((y1 - y2) ** 2 + (x1 - x2) ** 2) ** 0.5 / 2), 4)
            polygon = cv2.ellipse2Poly((int((x1 + x2) / 2), int((y1 + y2) / 2)), axes, angle, 0, 360, 1)
            drawn = cv2.fillConvexPoly(canvas.copy(), polygon, colour)
            canvas = cv2.addWeighted(canvas, 0.4, drawn, 0.6, 0) if version == "v1.0" else drawn
    if version == "v1.1":
        canvas = (canvas * 0.6).astype(np.uint8)
        dots()
    return canvas


LIMBS = [(2, 3), (2, 6), (3, 4), (4, 5), (6, 7), (7, 8), (2, 9), (9, 10), (10, 11), (2, 12), (12, 13), (13, 14)]
LIMBS += [(2, 1), (1, 15), (15, 17), (1, 16), (16, 18)]
COLOURS = [(255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0)]
COLOURS += [(0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255)]
COLOURS += [(170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)]


@pytest.mark.parametrize("version", conditions.VERSIONS)
def test_poses_are_drawn_by_the_official_rules(cv2, version):
    """One and three people with missing points, within and beyond the canvas: every pixel is what OpenCV draws."""
    for count, seed, beyond in ((1, 6, 0), (3, 7, 0), (3, 8, 100), (3, 9, 100)):
        people = people_at_random(count, 18, seed, -beyond, 200 + beyond)
        want = official_pose(cv2, people, 200, 200, version)
        assert np.array_equal(conditions.openpose(people, 200, 200, version), want)


def test_one_limb_on_paper():
    """Nose at (20, 10), neck at (20, 40): a vertical ellipse in limb 13's blue at 60%, a red and an orange dot on top."""
    people = np.zeros((1, 18, 3))
    people[0, 0], people[0, 1] = (20, 10, 1), (20, 40, 1)
    hint = conditions.openpose(people, 50, 40)
    assert tuple(hint[10, 20]) == (255, 0, 0)
    assert tuple(hint[40, 20]) == (255, 85, 0)
    assert tuple(hint[25, 20]) == (0, 0, 153)
    assert np.flatnonzero(hint[25].any(1)).tolist() == list(range(16, 25))
    old = conditions.openpose(people, 50, 40, "v1.0")
    assert tuple(old[10, 20]) == (102, 0, 153)  # 0.4 (255, 0, 0) + 0.6 (0, 0, 255)
    assert np.array_equal(old[25], hint[25])


def test_points_of_low_confidence_are_left_out():
    """A confidence of 0.1 or less means no point, as in the official code: neither dot nor limb."""
    people = np.zeros((1, 18, 3))
    people[0, 0], people[0, 1] = (20, 10, 0.1), (20, 40, 0.11)
    hint = conditions.openpose(people, 50, 40)
    assert not hint[:30].any()
    assert tuple(hint[40, 20]) == (255, 85, 0)
    coco = np.zeros((1, 17, 3))
    coco[0, 15], coco[0, 13] = (20, 10, 0.1), (20, 40, 0.11)
    assert not conditions.openpifpaf(coco, 50, 40)[:30].any()


def test_openpifpaf_draws_its_skeleton():
    """Ankle to knee is limb 1, in tab20's first blue, 4 pixels wide, white dots at its ends; limbs share no colour."""
    people = np.zeros((1, 17, 3))
    people[0, 15], people[0, 13] = (20, 10, 1), (20, 40, 1)
    hint = conditions.openpifpaf(people, 50, 40)
    assert np.flatnonzero((hint[25] == (31, 119, 180)).all(1)).tolist() == list(range(18, 23))
    assert hint[10, 20].tolist() == hint[40, 20].tolist() == [255] * 3
    assert len(set(conditions.OPENPIFPAF_COLOURS)) == len(conditions.OPENPIFPAF_LIMBS) == 19
    full = people_at_random(1, 17)
    full[..., 2] = 1
    drawn = {tuple(c) for c in conditions.openpifpaf(full, 200, 200).reshape(-1, 3).tolist()}
    assert len(drawn & set(conditions.OPENPIFPAF_COLOURS)) == 19


@pytest.mark.parametrize(("draw", "points"), [(conditions.openpose, 18), (conditions.openpifpaf, 17)])
def test_poses_refuse_what_is_no_pose(draw, points):
    """A wrong number of points, points that are NaN or far away: named with person, point and value."""
    with pytest.raises(ValueError, match=rf"shape \(2, 25, 3\), but must be \(P, {points}, 3\): x, y, confidence"):
        draw(np.zeros((2, 25, 3)), 8, 8)
    people = np.ones((2, points, 3))
    people[1, 3, 1] = np.nan
    with pytest.raises(ValueError, match="point 3 of person 1 has y nan: give coordinates in pixels"):
        draw(people, 8, 8)
    people[1, 3, 1] = 1e7
    with pytest.raises(ValueError, match=r"point 3 of person 1 has y 1e\+07"):
        draw(people, 8, 8)
    with pytest.raises(ValueError, match="the size is 8x0 pixels"):
        draw(np.zeros((0, points, 3)), 0, 8)


def test_versions_are_named():
    with pytest.raises(ValueError, match=r"version is 'v2', but must be one of: v1.1, v1.0"):
        conditions.openpose(np.zeros((0, 18, 3)), 8, 8, "v2")


def written(tmp_path, content, name="points.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def flat(points):
    return np.asarray(points, float).ravel().tolist()


def test_openpose_files_of_18_and_25_points(tmp_path):
    """COCO-18 comes back as it is; BODY_25 loses point 8, the mid-hip, and 19 to 24, the feet."""
    points = np.arange(1, 76).reshape(25, 3) * 2.0
    path = written(tmp_path, {"version": 1.3, "people": [{"pose_keypoints_2d": flat(points)}]})
    people, size = conditions.read_openpose(path)
    assert size is None
    assert np.array_equal(people, points[None, [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]])
    two = {"people": [{"pose_keypoints_2d": flat(points[:18])}, {"pose_keypoints_2d": []}], "canvas_width": 9}
    assert np.array_equal(conditions.read_openpose(written(tmp_path, two))[0], points[None, :18])


def test_openpose_files_of_shares(tmp_path):
    """Coordinates in [0, 1] are multiplied by the canvas size that the file states; without one they are rejected."""
    points = np.full((18, 3), 0.5)
    content = {"people": [{"pose_keypoints_2d": flat(points)}], "canvas_width": 640, "canvas_height": 480}
    for form in (content, [content]):
        people, size = conditions.read_openpose(written(tmp_path, form))
        assert size == (480, 640)
        assert people[0, 0].tolist() == [320, 240, 0.5]
    del content["canvas_width"]
    with pytest.raises(ValueError, match=r"has coordinates in \[0, 1\]: multiply them by the image's width and height"):
        conditions.read_openpose(written(tmp_path, content))


def test_openpifpaf_files(tmp_path):
    """OpenPifPaf's list of predictions, and COCO's annotations of one picture with its size."""
    points = np.arange(1, 52).reshape(17, 3) * 2.0
    entry = {"keypoints": flat(points), "score": 0.9, "category_id": 1, "image_id": 7}
    people, size = conditions.read_openpifpaf(written(tmp_path, [entry, entry]))
    assert size is None
    assert np.array_equal(people, [points, points])
    coco = {"images": [{"width": 64, "height": 48}], "annotations": [entry]}
    people, size = conditions.read_openpifpaf(written(tmp_path, coco))
    assert size == (48, 64)
    assert np.array_equal(people, [points])
    coco["annotations"].append(entry | {"image_id": 8})
    with pytest.raises(ValueError, match="annotates several images: give a file with one"):
        conditions.read_openpifpaf(written(tmp_path, coco))


EIGHTEEN, SEVENTEEN = flat(np.ones((18, 3)) * 5), flat(np.ones((17, 3)) * 5)
BAD_POINTS = {
    "no JSON": ("{", "is not a JSON file of key points", "is not a JSON file of key points"),
    "a number": ("3", 'has no list "people"', 'has no list of objects with "keypoints"'),
    "another format": ({"shapes": []}, 'has no list "people"', 'has no list of objects with "keypoints"'),
    "the other one": (
        [{"keypoints": SEVENTEEN, "pose_keypoints_2d": 3}] * 2,
        'is not an OpenPose key-point file: it has no list "people"',
        None,
    ),
    "the other one, too": (
        {"people": [{"pose_keypoints_2d": EIGHTEEN}]},
        None,
        "is not an OpenPifPaf or COCO key-point file",
    ),
    "no people": ({"people": []}, "contains no people: the hint would be empty", None),
    "no people, too": ([], None, "contains no people: the hint would be empty"),
    "no pose": ({"people": [{"face_keypoints_2d": []}]}, 'person 0 has no "pose_keypoints_2d"', None),
    "17 points": (
        {"people": [{"pose_keypoints_2d": SEVENTEEN}]},
        "person 0 has 51 values; expected 54 or 75, three for each of COCO's",
        None,
    ),
    "18 points": (
        [{"keypoints": EIGHTEEN}],
        None,
        "person 0 has 54 values; expected 51, three for each of COCO's",
    ),
    "words": ({"people": [{"pose_keypoints_2d": ["x"] * 54}]}, "person 0 has no list of numbers", None),
    "not a number": (
        {"people": [{"pose_keypoints_2d": [float("nan"), *EIGHTEEN[1:]]}]},
        "point 0 of person 0 has x nan: give coordinates in pixels",
        None,
    ),
    "not a number, too": ([{"keypoints": [*SEVENTEEN[:-1], float("nan")]}], None, "point 16 of person 0 has confidence nan"),
}


@pytest.mark.parametrize("case", BAD_POINTS)
def test_key_point_files_are_refused_by_name(tmp_path, case):
    """Another format, no people, NaN: one error that names the file and what is wrong."""
    content, *expected = BAD_POINTS[case]
    path = written(tmp_path, content)
    for read, words in zip((conditions.read_openpose, conditions.read_openpifpaf), expected, strict=True):
        if words:
            with pytest.raises(ValueError, match="points.json") as error:
                read(path)
            assert words in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist or is not a file: name a JSON file"):
        conditions.read_openpose(tmp_path / "none.json")


# Labels


def test_all_colours_of_the_palettes():
    """150 and 182 names and colours, those of FACTS among them; road and skyscraper share one, other ADE classes do not."""
    assert len(palettes.ADE20K_NAMES) == len(palettes.ADE20K_COLOURS) == 150
    assert len(palettes.COCO_STUFF_NAMES) == len(palettes.COCO_STUFF_COLOURS) == 182
    ade = dict(zip(palettes.ADE20K_NAMES, palettes.ADE20K_COLOURS.tolist(), strict=True))
    assert [ade[n] for n in ("wall", "building", "sky", "floor", "tree")] == [
        [120, 120, 120],
        [180, 120, 120],
        [6, 230, 230],
        [80, 50, 50],
        [4, 200, 3],
    ]
    assert (palettes.ADE20K_NAMES[6], palettes.ADE20K_NAMES[48]) == ("road", "skyscraper")
    assert ade["road"] == ade["skyscraper"] == [140, 140, 140]
    assert len(set(map(tuple, ade.values()))) == 149
    assert [0, 0, 0] not in ade.values()
    assert palettes.ADE20K_COLOURS.sum() == 58427  # a checksum, for wrong digits


def test_coco_stuffs_colours_are_those_of_the_panoptic_task():
    """Classes that the panoptic task merges share its colour, the others have their own; person is (220, 20, 60)."""
    coco = dict(zip(palettes.COCO_STUFF_NAMES, palettes.COCO_STUFF_COLOURS.tolist(), strict=True))
    assert (palettes.COCO_STUFF_NAMES[0], palettes.COCO_STUFF_NAMES[91], palettes.COCO_STUFF_NAMES[181]) == (
        "person",
        "banner",
        "wood",
    )
    assert coco["person"] == [220, 20, 60]
    assert coco["branch"] == coco["bush"] == coco["leaves"] == coco["tree"] == [107, 142, 35]
    assert coco["street sign"] == [64, 0, 128]  # PASCAL VOC's colour 12: bit 2 is blue's 128, bit 3 red's 64
    assert len(set(map(tuple, coco.values()))) == 80 + 36 + 17 + 23
    assert [0, 0, 0] not in coco.values()
    assert palettes.COCO_STUFF_COLOURS.sum() == 70194


@pytest.mark.parametrize(
    ("paint", "colours", "first"),
    [(conditions.ade20k, palettes.ADE20K_COLOURS, 0), (conditions.coco_stuff, palettes.COCO_STUFF_COLOURS, 1)],
)
def test_labels_become_colours(paint, colours, first):
    """Every label of the range has its entry, in any integer type; the range can be moved, and a label made black."""
    labels = np.arange(first, first + len(colours)).reshape(2, -1)
    for dtype in (np.uint8, np.int64):
        hint = paint(labels.astype(dtype))
        assert (hint.dtype, hint.shape) == (np.uint8, (*labels.shape, 3))
        assert np.array_equal(hint.reshape(-1, 3), colours)
    moved = paint(np.array([[7, 255, 7 + len(colours) - 1]]), first=7, unlabelled=255)
    assert np.array_equal(moved[0], [colours[0], (0, 0, 0), colours[-1]])


def test_labels_out_of_range_are_named():
    """150 of ADE20K, 183 and -1 of COCO-Stuff; 0 is black in COCO-Stuff and wall in ADE20K."""
    assert not conditions.coco_stuff(np.zeros((1, 1), int)).any()
    assert np.array_equal(conditions.ade20k(np.zeros((1, 1), int))[0, 0], (120, 120, 120))
    for paint, value, limits in (
        (conditions.ade20k, 150, "ADE20K's range 0 to 149"),
        (conditions.ade20k, -1, "ADE20K's range 0 to 149"),
        (conditions.coco_stuff, 183, "COCO-Stuff's range 1 to 182"),
        (conditions.coco_stuff, -1, "COCO-Stuff's range 1 to 182"),
    ):
        with pytest.raises(ValueError, match=rf"label {value} is outside {limits} \(1 such pixels\)"):
            paint(np.array([[3, value]]))
    for bad in (np.zeros((2, 2, 3), int), np.zeros((2, 2))):
        with pytest.raises(ValueError, match=r"must be integers of shape \(H, W\)"):
            conditions.ade20k(bad)


def test_label_maps_are_read_as_numbers(tmp_path):
    """Grey pictures of 8 and 16 bits and the indices, not the colours, of palette images; others are rejected."""
    labels = np.array([[0, 7, 149]])
    image = Image.fromarray(labels.astype(np.uint8))
    assert np.array_equal(conditions.read_labels(saved(tmp_path, image)), labels)
    image.putpalette([200, 0, 0] * 256)
    assert image.mode == "P"
    assert np.array_equal(conditions.read_labels(saved(tmp_path, image)), labels)
    assert np.array_equal(conditions.read_labels(saved(tmp_path, Image.fromarray(labels.astype(np.uint16)))), labels)
    with pytest.raises(ValueError, match=r"\.png is not a label map: expected a single channel of integers, got R, G, B"):
        conditions.read_labels(saved(tmp_path, image.convert("RGB")))
    with pytest.raises(ValueError, match="is not a label map: expected a single channel of integers, got L, A"):
        conditions.read_labels(saved(tmp_path, image.convert("LA")))


# Normals and depth

FACING, LEFT, RIGHT, UP = (0.0, 0, 1), (-1.0, 0, 0), (1.0, 0, 0), (0.0, 1, 0)


def test_normals_of_v11_are_blue_in_front_red_left_green_on_top():
    """(n + 1) / 2 of (left, up, front) in R, G, B, truncated: 0 becomes 127."""
    hint = conditions.normal(np.array([[FACING, LEFT, RIGHT, UP]]))
    assert hint.tolist() == [[[127, 127, 255], [255, 127, 127], [0, 127, 127], [127, 255, 127]]]


def test_normals_of_v10_have_their_channels_reversed():
    """R is front, G is up, B is left."""
    hint = conditions.normal(np.array([[FACING, LEFT, RIGHT, UP]]), "v1.0")
    assert hint.tolist() == [[[255, 127, 127], [127, 127, 255], [127, 127, 0], [127, 255, 127]]]


def test_normals_must_be_of_unit_length():
    """A tenth off is the limit; NaN, integers and other shapes are rejected."""
    conditions.normal(np.array([[FACING]]) * 1.09)
    for factor in (1.11, 0.89, np.nan):
        with pytest.raises(ValueError, match=r"not of unit length in 50.0% of the pixels, e.g. .*: divide them by their"):
            conditions.normal(np.array([[FACING, FACING]]) * [[[1.0], [factor]]])
    for bad in (np.zeros((2, 2)), np.zeros((2, 2, 3), int)):
        with pytest.raises(ValueError, match=r"but must be float of shape \(H, W, 3\)"):
            conditions.normal(bad)


def test_normals_from_depth_are_v10s(cv2):
    """Against the app's formula with cv2.Sobel: equal except for a few pixels at the threshold of the background."""
    smooth = cv2.GaussianBlur(np.random.default_rng(9).uniform(0, 255, (60, 80)).astype(np.float32), (0, 0), 4) * 8
    x, y = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=3), cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=3)
    far = (smooth - smooth.min()) / np.ptp(smooth) < 0.4
    x[far], y[far] = 0, 0
    n = np.stack([x, y, np.full_like(x, np.pi * 2)], axis=2)
    n /= np.linalg.norm(n, axis=2, keepdims=True)
    want = (n * 127.5 + 127.5).clip(0, 255).astype(np.uint8)[..., ::-1].astype(int)
    got = conditions.normal_from_depth(smooth)
    inner = np.s_[1:-1, 1:-1]  # OpenCV mirrors the border, as the app did; here it is repeated
    assert 0.1 < far.mean() < 0.9
    assert (np.abs(got - want) <= 1)[inner].mean() > 0.999


def test_normals_from_depth_turn_away_from_what_is_further():
    """Nearer to the right faces left (v1.1: red), nearer at the bottom faces up (green); the background faces the viewer."""
    y, x = np.mgrid[:20, :20] * 10.0
    right, bottom = (conditions.normal_from_depth(d, version="v1.1") for d in (x, y))
    assert right[10, 15, 0] > 240
    assert bottom[15, 10, 1] > 240
    assert right[10, 3].tolist() == [127, 127, 255]
    assert conditions.normal_from_depth(x, background=0, version="v1.1")[10, 3, 0] > 240
    with pytest.raises(ValueError, match=r"background is 2, but must lie in \[0, 1\]"):
        conditions.normal_from_depth(x, background=2)


@pytest.mark.parametrize("axes", conditions.NORMAL_AXES)
def test_normal_maps_are_read_in_their_axes(tmp_path, axes):
    """A vector up, right and to the viewer, written in each convention, comes back the same within the 8 bits."""
    signs = {"opengl": "++ +", "directx": "+- +", "diode": "+- -", "v1.1": "-+ +", "v1.0": "-+ +"}[axes].replace(" ", "")
    vector = np.array([0.48, 0.6, 0.64])
    stored = vector * [1 if s == "+" else -1 for s in signs]
    stored = stored[::-1] if axes == "v1.0" else stored
    pixels = np.rint((np.tile(stored, (4, 4, 1)) + 1) * 127.5).astype(np.uint8)
    got = conditions.read_normals(saved(tmp_path, Image.fromarray(pixels)), axes)
    assert np.abs(got - vector).max() < 0.01
    np.save(tmp_path / "map.npy", np.tile(stored, (4, 4, 1)).astype(np.float32))
    assert np.abs(conditions.read_normals(tmp_path / "map.npy", axes) - vector).max() < 1e-6


def test_normal_maps_with_holes_and_smoothed_borders(tmp_path):
    """Vectors of length 0 face the viewer, a few short ones are normalised; many of them are rejected, and so is a photo."""
    normals = np.tile(np.array(UP), (10, 10, 1))
    normals[0, 0], normals[1, :4] = 0, (0, 0.5, 0)
    np.save(tmp_path / "map.npy", normals)
    got = conditions.read_normals(tmp_path / "map.npy")
    assert got[0, 0].tolist() == [0, 0, 1]
    assert got[1, 0].tolist() == [0, 1, 0]
    normals[1, :6] = (0, 0.5, 0)
    np.save(tmp_path / "map.npy", normals)
    with pytest.raises(ValueError, match=r"map\.npy is not a normal map: 6% of its vectors are not of unit length"):
        conditions.read_normals(tmp_path / "map.npy")
    for array, words in (
        (np.zeros((4, 4)), r"has shape \(4, 4\), but a normal map is \(H, W, 3\)"),
        (np.full((4, 4, 3), np.nan), "contains values that are not finite"),
        (np.array(["a"]), "does not contain an array of numbers"),
    ):
        np.save(tmp_path / "map.npy", array)
        with pytest.raises(ValueError, match=words):
            conditions.read_normals(tmp_path / "map.npy")
    (tmp_path / "map.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"is not a readable \.npy file"):
        conditions.read_normals(tmp_path / "map.npy")
    with pytest.raises(ValueError, match="axes is 'blender', but must be one of: opengl, directx, diode"):
        conditions.read_normals(tmp_path / "map.npy", "blender")


def test_depth_is_stretched_near_is_white():
    """(d - min) / (max - min) * 255, truncated: 0.5 becomes 127; a constant map is black; NaN is rejected."""
    assert conditions.depth(np.array([[3.0, 4.0, 5.0]]))[..., 0].tolist() == [[0, 127, 255]]
    assert not conditions.depth(np.full((2, 2), 7.0)).any()
    assert conditions.depth(np.array([[0, 200]], np.uint8))[..., 2].tolist() == [[0, 255]]
    with pytest.raises(ValueError, match="depth contains values that are not finite"):
        conditions.depth(np.array([[np.inf, 1]]))
    with pytest.raises(ValueError, match=r"float64 of shape \(2, 2, 3\), but must be numbers of shape \(H, W\)"):
        conditions.depth(np.zeros((2, 2, 3)))


def test_depth_maps_are_read_in_full_depth(tmp_path):
    """16 bits become 0 to 255 with fractions, 8 bits and floats are unchanged; colours are rejected."""
    fine = Image.fromarray(np.array([[0, 1, 257, 65535]], np.uint16))
    assert np.allclose(conditions.read_depth(saved(tmp_path, fine)), [[0, 1 / 257, 1, 255]])
    grey = Image.fromarray(np.array([[0, 9]], np.uint8))
    for image in (grey, grey.convert("RGB"), grey.convert("LA")):
        assert conditions.read_depth(saved(tmp_path, image)).tolist() == [[0, 9]]
    float_file = saved(tmp_path, Image.fromarray(np.array([[0.25, 900]], np.float32)), "depth.tiff")
    assert conditions.read_depth(float_file).tolist() == [[0.25, 900]]
    np.save(tmp_path / "depth.npy", np.array([[[0.25, 900]]]))
    assert conditions.read_depth(tmp_path / "depth.npy").tolist() == [[0.25, 900]]
    with pytest.raises(ValueError, match=r"picture\.png is not a depth map: it is coloured"):
        conditions.read_depth(saved(tmp_path, Image.new("RGB", (2, 2), "red")))


# Looking at hints


def pose_hint(version="v1.1"):
    return conditions.openpose(toy.scene(3, "test").keypoints * [2, 2, 1], 256, 256, version)


def test_doubts_about_good_hints():
    """What the functions make from a scene raises no doubt, in either version."""
    scene = toy.scene(3, "test")
    labels = np.where(scene.labels == 0, 2, 12)
    hints = {
        "canny": canny(scene.image),
        "hough": conditions.hough(scene.image),
        "hed": conditions.hed(scene.image, conditions.soft_edges),
        "lineart": conditions.lineart(scene.image),
        "openpose": pose_hint(),
        "ade20k": conditions.ade20k(labels),
        "coco_stuff": conditions.coco_stuff(labels),
        "normal": conditions.normal(scene.normals),
        "depth": conditions.depth(scene.depth),
    }
    for name, hint in hints.items():
        assert conditions.doubts(name, hint) == [], name
    assert conditions.doubts("openpose", pose_hint("v1.0")) == []
    alone = np.zeros((1, 18, 3))
    alone[0, 0] = (20, 20, 1)  # a point without a limb says nothing about the channel order
    assert conditions.doubts("openpose", conditions.openpose(alone, 64, 64)) == []
    assert conditions.doubts("normal", conditions.normal(scene.normals, "v1.0"), "v1.0") == []


def test_doubts_about_wrong_hints():
    """Black, one colour, inverted lines, BGR poses and labels, the other version's normals, coloured depth."""
    scene = toy.scene(3, "test")
    labels = np.where(scene.labels == 0, 2, 12)
    black = np.zeros((16, 16, 3), np.uint8)
    cases = [
        *((name, black, "all black") for name in conditions.NAMES),
        ("depth", black + 9, "a single colour"),
        *((name, 255 - canny(scene.image), "looks inverted") for name in ("canny", "hough", "scribble", "hed", "lineart")),
        ("openpose", pose_hint()[..., ::-1], "look like BGR"),
        ("openpose", pose_hint("v1.0")[..., ::-1], "look like BGR"),
        ("openpose", 255 - pose_hint(), "not mostly black"),
        ("openpifpaf", 255 - pose_hint(), "not mostly black"),
        ("ade20k", conditions.ade20k(labels)[..., ::-1], "look like BGR"),
        ("coco_stuff", conditions.coco_stuff(labels)[..., ::-1], "look like BGR"),
        ("ade20k", scene.image // 2 + 1, "of its pixels have a colour of the palette"),
        ("normal", conditions.normal(scene.normals, "v1.0"), "v1.0's (or BGR)"),
        ("depth", scene.image, "it is coloured"),
    ]
    for name, hint, words in cases:
        [found] = conditions.doubts(name, hint)
        assert words in found, (name, found)
    [found] = conditions.doubts("normal", conditions.normal(scene.normals), "v1.0")
    assert "v1.1's" in found


def test_a_jpeg_of_a_bgr_pose_is_found_too(tmp_path):
    """Slightly wrong colours, as in a JPEG, do not hide the order of the channels."""
    for hint, count in ((pose_hint(), 0), (pose_hint()[..., ::-1], 1)):
        path = saved(tmp_path, Image.fromarray(hint.copy()), "pose.jpg", quality=80)
        assert len(conditions.doubts("openpose", np.asarray(load_image(path)))) == count


# The command


def test_names_lists_the_conditions():
    """Eleven names; each is a function of this module, and the command says what each takes."""
    assert len(conditions.NAMES) == len(set(conditions.NAMES)) == 11
    assert all(callable(getattr(conditions, name)) for name in conditions.NAMES)
    assert set(making.TAKES) == set(making.OPTIONS) == set(conditions.NAMES)


def run(*arguments):
    return __main__.main(["condition", *map(str, arguments)])


@pytest.fixture
def inputs(tmp_path):
    """One file of each kind, 64x96 pixels, from a scene."""
    scene = toy.scene(3, "test")
    part = np.s_[16:80, 8:104]
    Image.fromarray(scene.image[part]).save(tmp_path / "picture.png")
    drawn = np.where(canny(scene.image[part]) > 0, np.uint8(0), np.uint8(255))
    Image.fromarray(drawn).save(tmp_path / "drawing.png")
    Image.fromarray(scene.labels[part]).save(tmp_path / "labels.png")
    Image.fromarray((scene.normals[part] * 127.5 + 127.5).astype(np.uint8)).save(tmp_path / "normals.png")
    Image.fromarray((scene.depth[part] * 65535).astype(np.uint16)).save(tmp_path / "depth.png")
    points = scene.keypoints[0] - [8, 16, 0]
    written(tmp_path, {"people": [{"pose_keypoints_2d": flat(points)}]}, "openpose.json")
    coco = {"images": [{"width": 96, "height": 64}], "annotations": [{"keypoints": flat(points[:17])}]}
    written(tmp_path, coco, "openpifpaf.json")
    return tmp_path


INPUTS = {
    "canny": ["picture.png", "--low", "50"],
    "hough": ["picture.png"],
    "scribble": ["drawing.png"],
    "hed": ["picture.png", "--safe"],
    "openpose": ["openpose.json", "--size", "96x64", "--version", "v1.0"],
    "openpifpaf": ["openpifpaf.json"],
    "ade20k": ["labels.png"],
    "coco_stuff": ["labels.png", "--first-label", "0", "--unlabelled", "255"],
    "normal": ["normals.png"],
    "lineart": ["picture.png"],
    "depth": ["depth.png"],
}


def expected(name, inputs):
    """What the functions give for INPUTS."""
    picture = load_image(inputs / "picture.png")
    labels = np.asarray(Image.open(inputs / "labels.png"))
    people = {n: getattr(conditions, f"read_{n}")(inputs / f"{n}.json")[0] for n in ("openpose", "openpifpaf")}
    return {
        "canny": lambda: canny(picture, 50, 200),
        "hough": lambda: conditions.hough(picture),
        "scribble": lambda: conditions.scribble(load_image(inputs / "drawing.png")),
        "hed": lambda: conditions.hed(picture, conditions.soft_edges, safe=True),
        "openpose": lambda: conditions.openpose(people["openpose"], 64, 96, "v1.0"),
        "openpifpaf": lambda: conditions.openpifpaf(people["openpifpaf"], 64, 96),
        "ade20k": lambda: conditions.ade20k(labels),
        "coco_stuff": lambda: conditions.coco_stuff(labels, 0, 255),
        "normal": lambda: conditions.normal(conditions.read_normals(inputs / "normals.png")),
        "lineart": lambda: conditions.lineart(picture),
        "depth": lambda: conditions.depth(conditions.read_depth(inputs / "depth.png")),
    }[name]()


@pytest.mark.parametrize("name", INPUTS)
def test_the_command_makes_every_hint(inputs, capsys, name):
    """Each condition from its kind of file: what the function gives, at the size of the file, with one line that says so."""
    file, *options = INPUTS[name]
    assert run(name, inputs / file, inputs / "hint.png", *options) == 0
    hint = np.asarray(Image.open(inputs / "hint.png"))
    assert hint.shape == (64, 96, 3)
    assert hint.any()
    assert np.array_equal(hint, expected(name, inputs))
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "hint.png: 96x64 pixels, " in out
    assert err == ""


@pytest.mark.parametrize("name", INPUTS)
def test_the_command_resizes_by_the_official_rule(inputs, name):
    """64x96 at resolution 128 is 128x192: images are resized before detection, poses by their points, maps afterwards."""
    file, *options = INPUTS[name]
    run(name, inputs / file, inputs / "hint.png", *options, "--resolution", "128")
    hint = np.asarray(Image.open(inputs / "hint.png"))
    assert hint.shape == (128, 192, 3)
    if name == "canny":
        large = conditions.official_resize(load_image(inputs / "picture.png"), 128)
        assert np.array_equal(hint, canny(large, 50, 200))
    if name == "openpose":
        people, _ = conditions.read_openpose(inputs / "openpose.json")
        assert np.array_equal(hint, conditions.openpose(people * [2, 2, 1], 128, 192, "v1.0"))
    if name in ("ade20k", "coco_stuff", "normal", "depth"):
        want = conditions.resample(expected(name, inputs), 128, 192, "linear")
        assert np.array_equal(hint, want)


def test_label_colours_mix_in_v11_alone(inputs):
    """v1.0 resized segmentations by nearest neighbour: no new colours. v1.1 is linear, which mixes them at borders."""
    known = {tuple(c) for c in palettes.ADE20K_COLOURS.tolist()}
    for version, mixed in (("v1.0", False), ("v1.1", True)):
        run("ade20k", inputs / "labels.png", inputs / "hint.png", "--resolution", "128", "--version", version)
        colours = {tuple(c) for c in np.asarray(Image.open(inputs / "hint.png")).reshape(-1, 3).tolist()}
        assert bool(colours - known) == mixed


def test_other_ways_to_a_hint(inputs):
    """--fake, --detect-resolution, --like, --from-depth, --far-is-white, --version: each is what the function gives."""
    picture, out = load_image(inputs / "picture.png"), inputs / "hint.png"

    def made(*arguments):
        run(arguments[0], inputs / arguments[1], out, *arguments[2:])
        return np.asarray(Image.open(out))

    soft = conditions.hed(picture, conditions.soft_edges)
    assert np.array_equal(made("scribble", "picture.png", "--fake"), conditions.fake_scribble(soft))
    large = conditions.official_resize(picture, 128)
    want = conditions.resample(conditions.hed(large, conditions.soft_edges), 64, 96, "linear")
    assert np.array_equal(made("hed", "picture.png", "--detect-resolution", "128"), want)
    want = conditions.resample(conditions.hough(large), 64, 96, "nearest")
    assert np.array_equal(made("hough", "picture.png", "--detect-resolution", "128", "--version", "v1.0"), want)
    like = made("openpose", "openpose.json", "--like", inputs / "picture.png", "--version", "v1.0")
    assert np.array_equal(like, expected("openpose", inputs))
    depth = conditions.read_depth(inputs / "depth.png")
    want = conditions.normal_from_depth(depth, 0.0, "v1.1")
    assert np.array_equal(made("normal", "depth.png", "--from-depth", "--background", "0"), want)
    Image.fromarray((1 + depth * 257).round().astype(np.uint16)).save(inputs / "distance.png")
    assert np.array_equal(
        made("depth", "distance.png", "--far-is-white"), conditions.depth(-(1 + depth * 257).round() / 257)
    )
    normals = conditions.read_normals(inputs / "normals.png", "directx")
    want = conditions.normal(normals, "v1.0")
    assert np.array_equal(made("normal", "normals.png", "--axes", "directx", "--version", "v1.0"), want)


def test_networks_are_used_where_weights_are_named(inputs, monkeypatch):
    """--weights loads HED, MLSD or BodyPose from that file, and the network sees the image at --detect-resolution."""
    from minicn.conditions import networks  # torch modules, needed here alone

    seen = []
    results = {
        "HED": lambda image: np.full(image.shape[:2], 0.5, np.float32),
        "MLSD": lambda image: np.array([[1, 1, 20, 20.0]]),
        "BodyPose": lambda image: np.tile([[[20.0, 20, 1]]], (1, 18, 1)),
    }
    for kind, result in results.items():

        def load(path, kind=kind, result=result):
            return lambda image: seen.append((kind, Path(path).name, image.shape, image.dtype)) or result(image)

        monkeypatch.setattr(getattr(networks, kind), "load", load)
    for name, kind in (("hed", "HED"), ("hough", "MLSD"), ("openpose", "BodyPose")):
        run(name, inputs / "picture.png", inputs / "hint.png", "--weights", "w.pth", "--detect-resolution", "128")
        assert seen.pop() == (kind, "w.pth", (128, 192, 3), np.uint8)
        hint = np.asarray(Image.open(inputs / "hint.png"))
        assert hint.shape == (64, 96, 3)
        assert hint.any()
        if name == "hed":
            assert (hint == 127).all()
    run("scribble", inputs / "picture.png", inputs / "hint.png", "--fake", "--weights", "w.pth")
    assert seen.pop() == ("HED", "w.pth", (64, 96, 3), np.uint8)


def test_the_command_notes_what_looks_wrong(inputs, capsys):
    """An inverted drawing, a black map, and with --ready another tool's BGR pose: made anyway, with one note."""
    Image.fromarray(255 - np.asarray(Image.open(inputs / "drawing.png"))).save(inputs / "inverted.png")
    Image.new("L", (64, 64)).save(inputs / "flat.png")
    Image.fromarray(pose_hint()[..., ::-1].copy()).save(inputs / "bgr.png")
    for arguments, words in (
        (["scribble", inputs / "inverted.png", inputs / "hint.png"], "it looks inverted"),
        (["depth", inputs / "flat.png", inputs / "hint.png"], "it is all black"),
        (["openpose", inputs / "bgr.png", inputs / "hint.png", "--ready"], "look like BGR"),
        (["openpose", inputs / "bgr.png", inputs / "hint.png", "--ready", "--resolution", "64"], ""),
    ):
        assert run(*arguments) == 0
        [*_, note] = capsys.readouterr().err.splitlines() or [""]
        assert words in note
        assert note == "" or note.startswith(f"note: {inputs / 'hint.png'} may be wrong: ")
    assert np.asarray(Image.open(inputs / "hint.png")).shape == (64, 64, 3)


REFUSED = {
    "unknown": ("smell picture.png", ", ".join(repr(name) for name in conditions.NAMES)),
    "missing": ("canny none.png", "none.png does not exist or is not a file: name an image"),
    "no picture": ("canny openpose.json", "openpose.json is not a readable image"),
    "cut": ("canny cut.png", "cut.png is not a readable image"),
    "1x1": ("canny tiny.png", "tiny.png is 1x1 pixels, but a hint needs at least 8x8: enlarge it"),
    "1x1 labels": ("ade20k tiny.png", "tiny.png is 1x1 pixels"),
    "1x1 depth": ("depth tiny.png", "tiny.png is 1x1 pixels"),
    "1x1 normals": ("normal blue.png", "blue.png is 1x1 pixels"),
    "1x1 ready": ("hed tiny.png --ready", "tiny.png is 1x1 pixels"),
    "huge": ("canny huge.png", "huge.png is not a readable image: 100x100 pixels in "),
    "too long": ("canny long.png --resolution 8192", "8x9000 pixels would become 8192x9216000: choose a lower resolution"),
    "no stroke": ("scribble white.png", "the drawing has no strokes"),
    "colour labels": (
        "ade20k picture.png",
        "picture.png is not a label map: expected a single channel",
    ),
    "labels out of range": ("ade20k high.png", "high.png: label 200 is outside ADE20K's range 0 to 149"),
    "no normals": ("normal grey.png", "grey.png is not a normal map"),
    "coloured depth": ("depth picture.png", "picture.png is not a depth map: it is coloured"),
    "no people": ("openpose empty.json --size 64x64", "empty.json contains no people"),
    "NaN": ("openpose nan.json --size 64x64", "nan.json: point 0 of person 0 has x nan"),
    "a picture": ("openpose picture.png --size 64x64", "picture.png is not a JSON file of key points"),
    "another format": ("openpifpaf openpose.json", "openpose.json is not an OpenPifPaf or COCO key-point file"),
    "no size": ("openpose openpose.json", "does not state the size of its image: give --size WIDTHxHEIGHT or --like"),
    "two sizes": (
        "openpose openpose.json --size 64x64 --like picture.png",
        "both state the size of the image: give",
    ),
    "bad size": ("openpose openpose.json --size 64", "WIDTHxHEIGHT"),
    "elsewhere": ("openpose openpose.json --size 8x8", "no point lies within 8x8 pixels"),
    "no use": ("hed picture.png --low 3", "--low has no effect with hed, which takes --detect-resolution, --safe"),
    "no use, alone": ("scribble drawing.png --weights w", "--weights has no effect without --fake: give both or neither"),
    "no use, ready": ("canny picture.png --ready --low 3", "--low has no effect with --ready: give only one of them"),
    "axes of depth": ("normal depth.png --from-depth --axes opengl", "--axes has no effect with --from-depth"),
    "size of a picture": (
        "openpose picture.png --weights w --like picture.png",
        "--like has no effect with --weights, which uses the size of the image",
    ),
    "two sizes of a hint": ("canny picture.png --size 64x64 --resolution 64", "--size and --resolution both state the size"),
    "no weights": ("hed picture.png --weights none.pth", "none.pth"),
    "resolution": ("canny picture.png --resolution 7", "64 to 8192"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(inputs, refused, monkeypatch, case):
    """Bad input: exit status 2, one line that names the file and says what to do, and no hint is written."""
    Image.new("L", (1, 1)).save(inputs / "tiny.png")
    Image.new("RGB", (1, 1), (128, 128, 255)).save(inputs / "blue.png")
    Image.new("L", (8, 9000)).save(inputs / "long.png")
    Image.new("L", (9, 9), 255).save(inputs / "white.png")
    Image.new("L", (9, 9), 200).save(inputs / "high.png")
    Image.new("L", (9, 9), 250).save(inputs / "grey.png")
    Image.new("L", (100, 100)).save(inputs / "huge.png")
    if case == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)
    picture = (inputs / "picture.png").read_bytes()
    (inputs / "cut.png").write_bytes(picture[: len(picture) // 2])
    written(inputs, {"people": []}, "empty.json")
    written(inputs, {"people": [{"pose_keypoints_2d": [float("nan"), *EIGHTEEN[1:]]}]}, "nan.json")
    command, words = REFUSED[case]
    name, file, *options = command.split()
    options = [inputs / o if o.endswith(".png") else o for o in options]
    line = refused(run, name, inputs / file, inputs / "hint.png", *options)
    assert line.startswith("error: ")
    assert words in line
    assert not (inputs / "hint.png").exists()


@pytest.mark.parametrize("name", [name for name in INPUTS if "pose" not in name and "pif" not in name])
def test_the_size_of_a_hint_can_be_given(inputs, name):
    """Scaled and cropped; a picture before it is annotated, a map afterwards."""
    file, *options = INPUTS[name]
    run(name, inputs / file, inputs / "hint.png", *options, "--size", "40x48")
    hint = Image.open(inputs / "hint.png")
    assert hint.size == (40, 48)
    if name == "canny":
        assert np.array_equal(hint, canny(conditions.fit(load_image(inputs / file), (40, 48)), 50, 200))
    run(name, inputs / "hint.png", inputs / "ready.png", "--ready", "--size", "64x24")
    assert np.array_equal(Image.open(inputs / "ready.png"), conditions.fit(hint, (64, 24), hint=True))


def test_key_points_are_fitted_as_points(inputs):
    """96x64 pixels become 40x40: scaled by 5/8, and 10 pixels cropped on either side; lines keep their width."""
    people = conditions.read_openpifpaf(inputs / "openpifpaf.json")[0] * [0.625, 0.625, 1] - [10, 0, 0]
    hint, _ = making.make("openpifpaf", inputs / "openpifpaf.json", resolution=(40, 40))
    assert np.array_equal(hint, conditions.openpifpaf(people, 40, 40))


def test_fitting_crops_in_the_middle():
    stripes = Image.fromarray(np.repeat(np.uint8([[[9] * 3, [70] * 3, [200] * 3]]).repeat(2, 1), 2, 0))  # 6x2
    for hint in (False, True):
        assert np.unique(conditions.fit(stripes, (2, 2), hint)) == [70]
    assert np.unique(conditions.fit(stripes, (60, 60), hint=True)) == [70]  # no new colours
    assert conditions.fit(stripes, (2, 6)).size == (2, 6)
    with pytest.raises(ValueError, match="6x2 pixels would become 99999x99999"):
        conditions.fit(stripes, (99999, 99999))


def test_make_lists_the_eleven():
    """From Python, too, an error about an unknown condition lists all names."""
    with pytest.raises(ValueError, match=f"condition is 'smell', but must be one of: {', '.join(conditions.NAMES)}"):
        making.make("smell", Path("x.png"))


def test_help_says_what_each_condition_takes(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name, takes in making.TAKES.items():
        assert f"  {name:10}  {takes}\n" in text
