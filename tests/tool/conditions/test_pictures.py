"""Pictures as people and strangers have them: opened by one function, written whole or not at all."""

import dataclasses
import io
import logging
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from minicn import __main__
from minicn.conditions.images import FORMATS, load_image, open_image, save_image
from minicn.trainer import data

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
ENDINGS = {form: "." + form.lower() for form in FORMATS}


def run(*arguments):
    return __main__.main([*map(str, arguments)])


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_written_and_read(tmp_path, form):
    path = tmp_path / f"a{ENDINGS[form]}"
    save_image(NOISE, path)
    assert Image.open(path).format == form
    assert load_image(path).size == NOISE.size


@pytest.mark.parametrize("form", ["EPS", "PDF", "ICO", "TGA", "JPEG2000", "DDS", "PCX"])
def test_no_other_format_is_opened_whatever_its_name(tmp_path, form, monkeypatch):
    """An EPS is a program, for which Pillow would start Ghostscript; the others are just more code that a file may reach."""
    NOISE.save(tmp_path / "a.png", form)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match=r"a\.png is not a readable image: it is damaged, or none of PNG, JPEG, WEBP"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError(),
        SyntaxError("x"),
        struct.error("x"),
        AttributeError("x"),
        MemoryError(),
        ZeroDivisionError("a\nb"),
    ],
)
def test_whatever_a_decoder_raises_is_one_line_with_the_name(tmp_path, monkeypatch, error):
    def load(self):
        raise error

    save_image(NOISE, tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ValueError, match=r"a\.png is not a readable image: .") as said:
        load_image(tmp_path / "a.png")
    assert "\n" not in str(said.value)
    assert str(said.value).endswith("more memory than there is: downscale it") == isinstance(error, MemoryError)


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_pictures_of_every_format_are_read_or_refused_in_one_line(tmp_path, form):
    """Bits flipped, the end cut off: another picture of at most the old one's size, or a ValueError with the name."""
    save_image(NOISE, path := tmp_path / f"a{ENDINGS[form]}")
    whole, random, words = path.read_bytes(), np.random.default_rng(1), set()
    for i in range(40):
        content = bytearray(whole[: random.integers(1, len(whole)) if i % 4 == 0 else None])
        for place in random.integers(0, min(len(content), 400), 3):
            content[place] ^= 1 << random.integers(8)
        path.write_bytes(content)
        try:
            load_image(path)
        except ValueError as error:
            words.add(str(error))
    assert all(word.startswith(str(path)) and "\n" not in word for word in words)


def ifd(orientation: int, *entries: tuple) -> bytes:
    """Return a TIFF header and an orientation with more entries (tag, type, count, value of 4 bytes)."""
    entries = sorted([(0x112, 3, 1, struct.pack("<HH", orientation, 0)), *entries])
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


def tiff(orientation: int, *entries: tuple) -> bytes:
    """Return NOISE, grey, as an uncompressed TIFF with these entries."""
    numbers = {0x100: NOISE.width, 0x101: NOISE.height, 0x102: 8, 0x103: 1, 0x106: 1, 0x117: NOISE.width * NOISE.height}
    numbers[0x111] = 8 + 2 + 12 * (len(numbers) + 2 + len(entries)) + 4  # where the pixels begin
    entries += tuple((tag, 4, 1, struct.pack("<I", number)) for tag, number in numbers.items())
    return ifd(orientation, *entries) + NOISE.convert("L").tobytes()


BROKEN = {
    "a fraction of bytes outside": (0x11A, 10, 1, struct.pack("<I", 9999)),
    "text where a fraction belongs": (0x11A, 2, 4, b"abc\0"),
    "a type that does not exist": (0x11A, 99, 1, bytes(4)),
    "a folder of entries that is none": (0x8769, 4, 1, struct.pack("<I", 3)),
    "a number where XMP belongs": (700, 4, 1, bytes(4)),
    "four billion numbers": (0x11A, 3, 2**32 - 1, bytes(4)),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".tiff"])
def test_broken_metadata_do_not_stop_whole_pixels(tmp_path, ending, broken):
    """The orientation, which can be read, still counts."""
    path = tmp_path / f"a{ending}"
    if ending == ".tiff":
        path.write_bytes(tiff(6, BROKEN[broken]))
    else:
        NOISE.save(path, exif=b"Exif\0\0" + ifd(6, BROKEN[broken]))
    assert load_image(path).size == NOISE.size[::-1]


def chunk(kind: bytes, content: bytes, wrong: int = 0) -> bytes:
    """Return a part of a PNG, if asked to with a wrong checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


TURNED = chunk(b"eXIf", ifd(6))
PARTS = {
    "a text of 3 MB in 3 kB": (chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 << 20))) + TURNED, True),
    "a colour profile of 90 MB in 90 kB": (chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(90 << 20))) + TURNED, True),
    "a text with a wrong checksum": (TURNED + chunk(b"tEXt", b"a\0b", 1), True),
    "EXIF with a wrong checksum": (chunk(b"eXIf", ifd(6), 1), False),
    "numbers that are cut": (chunk(b"gAMA", b"") + chunk(b"cHRM", b"a") + chunk(b"pHYs", b"") + TURNED, True),
    "an animation that is cut": (chunk(b"acTL", b"\0") + chunk(b"fcTL", b"\0") + TURNED, True),
    "a part of no name": (chunk(b"\x1b[3a", b"") + TURNED, True),
}


@pytest.mark.parametrize("part", PARTS)
def test_broken_parts_of_a_png_do_not_stop_whole_pixels(tmp_path, part):
    content, turned = PARTS[part]
    NOISE.save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:33] + content + whole[33:])  # behind the header
    expected = NOISE.transpose(Image.Transpose.ROTATE_270) if turned else NOISE
    assert np.array_equal(load_image(tmp_path / "a.png"), expected)
    (tmp_path / "a.png").write_bytes(whole[:33] + content + whole[33:-30])  # here the pixels are cut, too
    with pytest.raises(ValueError, match=r"a\.png is not a readable image: "):
        load_image(tmp_path / "a.png")


def test_a_picture_has_a_number_of_bytes(tmp_path):
    """Neither an empty one nor 20 GB of zeros, or what a kernel shows as a file without end, is read through."""
    save_image(NOISE, tmp_path / "a.png")
    with open(tmp_path / "a.png", "r+b") as file:
        file.truncate(20 << 30)
    (tmp_path / "b.png").touch()
    pair = data.Pair(tmp_path / "b.png", tmp_path / "a.png", "", 1)
    for name in ("a.png", "b.png", "/proc/self/pagemap"):
        for read in (open_image, lambda path: data.digest([dataclasses.replace(pair, hint=path)])):
            if (tmp_path / name).exists():
                with pytest.raises(ValueError, match=r" has [\d,]+ bytes, but must have 1 to 1,073,741,824: name an image"):
                    read(tmp_path / name)


def test_what_pillow_logs_of_a_picture_is_no_second_line(tmp_path, capsys, monkeypatch):
    """A TIFF that claims 31,898 channels: Pillow logs an error of its own before it raises one."""
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's, which people do not have
    monkeypatch.setattr(logging.getLogger("PIL"), "handlers", [])
    (tmp_path / "a.tiff").write_bytes(tiff(1, (0x115, 3, 1, struct.pack("<HH", 31898, 0))))
    with pytest.raises(SystemExit):
        run("condition", "canny", tmp_path / "a.tiff", tmp_path / "hint.png")
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_nothing_waits_for_what_is_no_ordinary_file(tmp_path, what):
    path = tmp_path / "a.png"
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match=r"a\.png does not exist or is not a file"):
        open_image(path)


@pytest.mark.parametrize(("ending", "size"), [(".webp", (16384, 8)), (".jpg", (8, 65501)), (".gif", (65536, 8))])
def test_a_format_that_cannot_hold_a_picture_loses_none(tmp_path, refused, ending, size):
    """It is said before anything is written, and in one line: libjpeg would write its own."""
    save_image(NOISE, old := tmp_path / f"old{ending}")
    before = old.read_bytes()
    save_image(Image.new("L", size), tmp_path / "large.png")
    line = refused(run, "condition", "canny", tmp_path / "large.png", old)
    assert f"old{ending}: a picture of {size[0]}x{size[1]} pixels does not fit into" in line
    assert old.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["large.png", old.name])


def test_a_full_disk_loses_no_picture(tmp_path, refused, monkeypatch):
    save_image(NOISE, tmp_path / "in.png")
    save_image(NOISE, old := tmp_path / "old.png")
    before = old.read_bytes()

    def full(self, path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    line = refused(run, "condition", "canny", tmp_path / "in.png", old)
    assert "old.png cannot be written (No space left on device): free space" in line
    assert old.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.png", "old.png"]


def test_a_picture_that_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    save_image(NOISE, old := tmp_path / "old.png")
    before, buffer = old.read_bytes(), io.BytesIO()
    NOISE.resize((8, 8)).save(buffer, "PNG")
    monkeypatch.setattr(Image.Image, "save", lambda self, path, *_, **__: path.write_bytes(buffer.getvalue()))
    with pytest.raises(OSError, match="it read back with another size"):
        save_image(NOISE, old)
    assert old.read_bytes() == before


def test_an_output_never_replaces_an_input(tmp_path, refused):
    save_image(NOISE, tmp_path / "a.png")
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        line = refused(run, "condition", "canny", tmp_path / "a.png", tmp_path / name)
        assert f"{name} is also read, and would be lost: name another file" in line
    assert np.array_equal(load_image(tmp_path / "a.png"), NOISE)


@pytest.mark.parametrize(("form", "allowed"), [("GIF", False), ("PNG", True), ("TIFF", True)])
def test_a_picture_has_no_more_pixels_than_its_bytes_can_hold(tmp_path, form, allowed):
    """A GIF of 50 bytes with a canvas of 24 million pixels; black and white ones of the same size are what they say."""
    path = tmp_path / "a.picture"
    if allowed:
        Image.new("1", (6000, 4000)).save(path, form, **({"compression": "group4"} if form == "TIFF" else {}))
        assert open_image(path).size == (6000, 4000)
    else:
        NOISE.resize((4, 4)).save(path, form)
        raw = path.read_bytes()
        path.write_bytes(raw[:6] + struct.pack("<HH", 6000, 4000) + raw[10:])
        with pytest.raises(ValueError, match=r"6000x4000 pixels in \d+ bytes exceed the limit of \d+: downscale it"):
            open_image(path)


def test_an_unpacked_tiff_has_a_bit_for_each_pixel(tmp_path):
    """One of 1,000 bytes with a million rows, whose others Pillow would make up, from a picture that is what it says."""
    whole = tiff(1)
    height = struct.pack("<HHII", 0x101, 4, 1, NOISE.height)
    assert whole.count(height) == 1
    rows = struct.pack("<HHII", 0x101, 4, 1, 10**6)
    for name, content in (("whole.tiff", whole), ("claims.tiff", whole.replace(height, rows))):
        (tmp_path / name).write_bytes(content)
    assert open_image(tmp_path / "whole.tiff").size == NOISE.size
    with pytest.raises(ValueError, match=r"40x1000000 pixels in \d+ bytes exceed the limit of \d+: downscale it"):
        open_image(tmp_path / "claims.tiff")


def test_libtiff_writes_nothing_to_the_terminal(tmp_path, capfd):
    """A palette without colours: libtiff says so by itself, in a second line."""
    entries = [(0x106, 3, 1, struct.pack("<HH", 3, 0)), (0x103, 3, 1, struct.pack("<HH", 5, 0))]
    (tmp_path / "a.tiff").write_bytes(tiff(1, *entries))
    with pytest.raises(ValueError, match=r"a\.tiff is not a readable image"):
        open_image(tmp_path / "a.tiff")
    assert capfd.readouterr().err == ""
    os.write(2, b"again")
    assert capfd.readouterr().err == "again"
