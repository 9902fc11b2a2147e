"""What white, black and nothing mean, one by one: hints, masks, depth maps, normal maps."""

import warnings

import numpy as np
import pytest
from PIL import Image

from minicn import __main__, conditions
from minicn.inputs import TRANSPARENT, hint_tensor, opacity


def saved(tmp_path, pixels, name="map.png"):
    Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path / name


def quietly(function, *arguments, **options):
    """Run a function that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*arguments, **options)


def test_a_transparent_hint_is_white_as_in_the_official_apps_and_says_so():
    """A pose drawn on nothing: white behind it would be a hint that no ControlNet has seen."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:4, 2:4] = (255, 0, 0, 255)
    for hint in (pixels, Image.fromarray(pixels)):
        with pytest.warns(
            UserWarning, match="transparent in places, which become white: if it was drawn on black, put black"
        ):
            assert hint_tensor(hint)[0, :, 0, 0].tolist() == [1, 1, 1]
    pixels[..., 3] = 255
    assert quietly(hint_tensor, pixels)[0, :, 0, 0].tolist() == [0, 0, 0]


def test_a_palette_with_an_unused_transparent_colour_is_opaque(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for transparent, want in ((2, None), (1, [[255, 0]])):
        image.save(tmp_path / "p.png", transparency=transparent)
        found = opacity(Image.open(tmp_path / "p.png"))
        assert (found is None) if want is None else found.tolist() == want
    assert "white" in TRANSPARENT


# Depth


def distances(hole=0):
    """Return 1 to 5 m in mm, (16, 16) uint16, with a hole of 16 pixels."""
    mm = np.linspace(1000, 5000, 256).reshape(16, 16).astype(np.uint16)
    mm[6:10, 6:10] = hole
    return mm


@pytest.mark.parametrize("kind", ["16 bits", "32 bits", "floats", "metres, .npy"])
def test_a_distance_of_zero_is_no_reading(tmp_path, kind):
    """The holes are as far as the farthest pixel, and the range is that of what was measured."""
    mm = distances()
    if kind == "metres, .npy":
        np.save(path := tmp_path / "map.npy", mm / 1000)
    else:
        dtype = {"16 bits": np.uint16, "32 bits": np.int32, "floats": np.float32}[kind]
        path = saved(tmp_path, mm.astype(dtype), "map.tiff")
    with pytest.warns(UserWarning, match=r"6\.2% of its pixels are unknown .* become far; if 0 is near, make it 1"):
        hint = conditions.depth(conditions.read_depth(path, far_is_white=True))[..., 0]
    assert not hint[6:10, 6:10].any()
    assert (hint[0, 0], hint[-1, -1]) == (255, 0)


def test_a_zero_that_is_only_the_nearest_of_many_is_measured(tmp_path):
    """A map stretched to its full range has a pixel of 0, and others just above it; one of 8 bits has steps anyway."""
    stretched = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    coarse = np.uint8([[0, 90], [180, 255]])
    for pixels in (stretched, coarse, np.zeros((2, 2), np.uint16)):
        got = quietly(conditions.read_depth, saved(tmp_path, pixels), far_is_white=True)
        assert got[0, 0] == 0 == got.max()


def test_near_and_white_zero_is_far(tmp_path):
    got = quietly(conditions.read_depth, saved(tmp_path, distances()))
    assert got[7, 7] == 0 == got.min()


@pytest.mark.parametrize("far_is_white", [False, True])
def test_transparent_depth_is_far(tmp_path, far_is_white):
    """Whatever its value: white, and black."""
    pixels = np.zeros((4, 4, 2), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.linspace(50, 100, 16).reshape(4, 4), 255
    pixels[0, 0], pixels[3, 3] = (0, 0), (255, 0)
    Image.fromarray(pixels, "LA").save(tmp_path / "map.png")
    with pytest.warns(UserWarning, match=r"12\.5% of its pixels are unknown"):
        hint = conditions.depth(conditions.read_depth(tmp_path / "map.png", far_is_white))[..., 0]
    assert (hint[0, 0], hint[3, 3], hint.max()) == (0, 0, 255)
    pixels[..., 1] = 0
    Image.fromarray(pixels, "LA").save(tmp_path / "map.png")
    with pytest.raises(ValueError, match=r"map\.png is not a depth map: it is transparent everywhere"):
        conditions.read_depth(tmp_path / "map.png")


def test_the_command_notes_what_is_unknown(tmp_path, capsys):
    arguments = ["condition", "depth", saved(tmp_path, distances()), tmp_path / "hint.png", "--far-is-white"]
    assert __main__.main([*map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert "depth, its range of 3.89105 to 19.4553 stretched, inverted" in out
    assert "note: " in err
    assert "6.2% of its pixels are unknown" in err


# Normals


@pytest.mark.parametrize("unknown", [(0, 0, 0, 255), (9, 4, 0, 255), (255, 255, 255, 0), (200, 10, 90, 0)])
def test_black_and_transparent_normals_are_unknown(tmp_path, unknown):
    """More of them than the twentieth that may be wrong: they face the viewer, and what is beside them stays."""
    pixels = np.tile(np.uint8([255, 128, 128, 255]), (16, 16, 1))
    pixels[:, 8:] = unknown
    path = saved(tmp_path, pixels)
    got = quietly(conditions.read_normals, path)
    assert np.allclose(got[:, :8], (1, 0, 0), atol=0.01)
    assert (got[:, 8:] == (0, 0, 1)).all()
    pixels[:] = unknown
    with pytest.raises(ValueError, match="is not a normal map"):
        conditions.read_normals(saved(tmp_path, pixels))


@pytest.mark.parametrize("axes", conditions.NORMAL_AXES)
def test_no_normal_is_so_dark_that_it_is_taken_for_unknown(tmp_path, axes):
    """The darkest, all three components equal and below 0, has 53.9 in each channel, stored as 54 or truncated to 53."""
    darkest = np.tile(np.uint8([53, 53, 53]), (8, 8, 1))
    got = conditions.read_normals(saved(tmp_path, darkest), axes)
    assert np.allclose(np.abs(got), 3**-0.5, atol=0.01)
