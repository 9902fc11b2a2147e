"""Folders of hint, image and prompt: both formats, what is broken in them, and those that minicn makes."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from minicn import __main__, conditions, toy
from minicn.trainer import data


def write(path, size=(40, 30), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def table(folder, rows, name="prompt.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return folder


def row(i, prompt="a red ball"):
    return {"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": prompt}


def test_both_formats_are_read(tmp_path):
    """Fill50K's prompt.json and Hugging Face's metadata.jsonl name the same three things; empty lines do not count."""
    fill = data.read_pairs(table(tmp_path / "fill", [row(1), "", row(2, "a café")]))
    hugging = {"conditioning_image": "source/1.png", "file_name": "target/1.png", "text": "a red ball", "extra": 3}
    face = data.read_pairs(table(tmp_path / "face", [hugging], "metadata.jsonl"))
    assert [(p.prompt, p.line) for p in fill] == [("a red ball", 1), ("a café", 3)]
    assert fill[0].hint == tmp_path / "fill" / "source" / "1.png"
    assert fill[0].image == tmp_path / "fill" / "target" / "1.png"
    assert (face[0].hint.name, face[0].image.parent.name, face[0].prompt) == ("1.png", "target", "a red ball")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(1), "{broken"], r"prompt\.json, line 2, is not a JSON object"),
        ([row(1), "[1]"], r"line 2, is not a JSON object but list"),
        ([{**row(1), "prompt": 7}], r"line 1: prompt is 7, but must be text"),
        ([{"source": "a"}], r"line 1: target is None"),
        ([{**row(1), "source": "a\0b"}], r"line 1: source is 'a\\x00b', but must be the name of a picture"),
        ([{**row(1), "source": "a\x9b2Jb"}], r"line 1: source is 'a\\x9b2Jb', but must be the name of a picture"),
        ([r'{"source": "source\target.png", "target": "b", "prompt": "c"}'], r"line 1: source is .*with / instead of \\"),
        ([{**row(1), "prompt": "\ud800"}], r"line 1: prompt is '\\ud800', but must be text"),
        ([row(1), "[" * 100_000], r"line 2, is not a JSON object: lists or objects are nested more than 32 deep"),
        ([row(1), '{"a": ' * 50 + "1" + "}" * 50], r"line 2, is not a JSON object: lists or objects are nested"),
        ([json.dumps(row(1))[:-1] + ', "n": ' + "9" * 5000 + "}"], r"line 1, is not a JSON object"),
        ([""], r"prompt\.json is empty"),
    ],
)
def test_a_broken_table_is_named_with_its_line(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        data.read_pairs(table(tmp_path / "d", rows))


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_lines_end_where_json_says(tmp_path, character):
    """At a line feed alone: what else Python takes for the end of a line may stand in a prompt."""
    rows = [json.dumps(row(i, f"red{character}ball"), ensure_ascii=False) for i in (1, 2)]
    pairs = data.read_pairs(table(tmp_path / "d", rows))
    assert [(pair.prompt, pair.line) for pair in pairs] == [(f"red{character}ball", 1), (f"red{character}ball", 2)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_tables_as_other_systems_write_them(tmp_path, encoding):
    """With a byte-order mark, in UTF-16 with one, with a carriage return before each line feed."""
    (tmp_path / "prompt.json").write_bytes("".join(json.dumps(row(i, "café")) + "\r\n" for i in (1, 2)).encode(encoding))
    if encoding == "utf-16-le":  # without a mark it might be anything
        with pytest.raises(ValueError, match=r"prompt\.json"):
            data.read_pairs(tmp_path)
    else:
        assert [(pair.prompt, pair.hint.name) for pair in data.read_pairs(tmp_path)] == [
            ("café", "1.png"),
            ("café", "2.png"),
        ]


def test_a_table_that_no_memory_holds_is_refused(tmp_path):
    with open(tmp_path / "prompt.json", "wb") as file:
        file.truncate(20_000_000_000)  # a sparse file
    with pytest.raises(ValueError, match=r"prompt\.json is not a table of pairs: it is larger than 256 MB"):
        data.read_pairs(tmp_path)


def test_windows_paths_are_named_as_such(tmp_path):
    """Elsewhere a backslash is a part of the name; JSON wants two, or one slash."""
    [pair] = data.read_pairs(table(tmp_path / "d", [{**row(1), "source": "source\\1.png"}]))
    with pytest.raises(FileNotFoundError, match=r"source\\1\.png does not exist .*write / instead of \\"):
        data.load_pair(pair, 32)
    with pytest.raises(ValueError, match=r"line 1, is not a JSON object: Invalid \\escape.* write / instead of \\"):
        data.read_pairs(table(tmp_path / "d", [r'{"source": "source\1.png", "target": "b", "prompt": "c"}']))


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none is not a folder"):
        data.read_pairs(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no prompt\.json"):
        data.read_pairs(tmp_path)


def test_hint_and_image_are_cut_alike(tmp_path):
    """The shorter side becomes `size`, the middle is kept: the same pixels of both, hints without new colours."""
    column = np.zeros((60, 100, 3), np.uint8)
    column[:, 50:] = 255
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        Image.fromarray(column).save(tmp_path / name / "1.png")
    [pair] = data.read_pairs(table(tmp_path, [row(1)]))
    hint, image = data.load_pair(pair, 120)
    assert hint.shape == image.shape == (120, 120, 3)
    assert np.array_equal(hint[:, :59], np.zeros_like(hint[:, :59]))
    assert (hint[:, 61:] == 255).all()
    assert set(np.unique(hint)) == {0, 255}
    assert abs(hint.astype(int) - image)[:, :50].max() == 0  # beyond, the smooth resizing of the image rings
    same, _ = data.load_pair(pair, 60)
    assert np.array_equal(same, column[:, 20:80])


def test_pictures_that_do_not_fit_are_named(tmp_path):
    write(tmp_path / "source" / "1.png", (40, 30))
    write(tmp_path / "target" / "1.png", (40, 32))
    pairs = data.read_pairs(table(tmp_path, [row(1), row(2)]))
    with pytest.raises(ValueError, match=r"source/1\.png has 40x30 pixels, but .*target/1\.png 40x32"):
        data.load_pair(pairs[0], 32)
    with pytest.raises(FileNotFoundError, match=r"source/2\.png does not exist"):
        data.load_pair(pairs[1], 32)


def test_check_data_says_every_problem(tmp_path, tmp_path_factory, capsys):
    """Missing, unreadable, sizes that differ, empty prompts, black and inverted hints; then a contact sheet, status 1."""
    sheets, lines = tmp_path_factory.mktemp("sheets"), np.zeros((30, 40, 3), np.uint8)
    lines[10:12] = 255
    for i, picture in enumerate((lines, 255 - lines, 0 * lines, lines[:20], lines, lines), 1):
        write(tmp_path / "target" / f"{i}.png")
        (tmp_path / "source").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "source" / f"{i}.png")
    (tmp_path / "target" / "5.png").write_text("no picture")
    (tmp_path / "target" / "6.png").unlink()
    table(tmp_path, [row(1), row(2), row(3), row(4), row(5), row(6), row(1, " ")])
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["check-data", str(tmp_path), "--sheet", str(sheets / "sheet.png")])
    out = capsys.readouterr().out
    assert stopped.value.code == 1
    said = out.splitlines()
    for number, words in (
        (2, "looks inverted"),
        (3, "it is all black"),
        (4, "has 40x20 pixels, but"),
        (5, "is not a readable image"),
        (6, "does not exist"),
        (7, "the prompt is empty"),
    ):
        assert [line for line in said if line.startswith(f"line {number}:")] == [line for line in said if words in line], (
            words
        )
    assert not any(line.startswith("line 1:") for line in said)
    assert said[-1].startswith("7 pairs, 6 problems; contact sheet: ")
    sheet = np.asarray(Image.open(sheets / "sheet.png"))
    assert (sheet == (255, 0, 0)).all(2).any()  # what is missing


def test_check_data_writes_nothing_into_the_data(tmp_path, refused, capsys):
    """Neither by default, nor where it is told to, also by another spelling or through a link."""
    folder, victim = tmp_path / "data", tmp_path / "victim"
    data.write_pairs(folder, data.circles(1, size=32))
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert __main__.main(["check-data", str(folder)]) == 0
    (tmp_path / "link").symlink_to(folder)
    for name in ("data/sheet.png", "data/source/0.png", "data/source/../new.png", "link/sheet.png"):
        assert "would lie among the data" in refused(
            __main__.main, ["check-data", str(folder), "--sheet", f"{tmp_path}/{name}"]
        )
    outside = (folder / "source" / "0.png").rename(tmp_path / "outside.png")
    (folder / "source" / "0.png").symlink_to(outside)
    assert "is also read, and would be lost" in refused(__main__.main, ["check-data", str(folder), "--sheet", str(outside)])
    victim.write_text("precious")
    (tmp_path / "sheet.png").symlink_to(victim)
    __main__.main(["check-data", str(folder), "--sheet", str(tmp_path / "sheet.png")])
    assert victim.read_text() == "precious"
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_data_that_are_not_made_to_the_end_leave_nothing(tmp_path, monkeypatch, name):
    """Whichever way the command is ended, but for a kill, which nobody can answer."""
    circles, begun, number = data.circles, [], getattr(signal, name)

    def pairs(*_):
        yield from circles(2, size=16)
        begun.extend(tmp_path.glob(".minicn-*/data/source/1.png"))
        os.kill(os.getpid(), number)
        yield from circles(9, size=16)

    monkeypatch.setattr(data, "circles", pairs)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    handlers = [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["make-data", str(tmp_path / "data")])
    for each, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), (interrupt, *handlers), strict=True):
        signal.signal(each, handler)
    assert stopped.value.code == 128 + number
    assert len(begun) == 1
    assert [*tmp_path.iterdir()] == []


def test_a_caption_of_any_length_is_drawn(tmp_path):
    pairs = data.read_pairs(table(tmp_path, [row(1, "x" * 1_000_000), row(2, "\u4e2d\u0007 " * 100_000)]))
    assert data.contact_sheet(pairs).size == (200, 248)


def test_what_a_table_says_is_printed_as_text(tmp_path, capsys):
    """Escape sequences, new lines and turned directions reach no terminal; a name of any length is cut."""
    names = "\u001b[31m\u0007\nerror: all is well\n.png", "\u202egnp.exe", "x" * 100_000
    table(tmp_path, [{**row(1), "target": names[1], "prompt": "\x1b[2J"}, {**row(1), "target": names[2]}])
    with pytest.raises(SystemExit):
        __main__.main(["check-data", str(tmp_path)])
    with pytest.raises(SystemExit):
        __main__.main(["check-data", str(table(tmp_path / "d", [{**row(1), "source": names[0]}]))])
    out, err = capsys.readouterr()
    said = [line for line in out.splitlines() + err.replace("\r", "\n").splitlines() if "pair/s" not in line]
    assert not [line for line in said if not line.isprintable() or len(line) > 1000 or line.startswith("error: all")]


def test_a_data_folder_is_made_whole_or_not_at_all(tmp_path):
    """What was there stays; pairs that cannot all be drawn leave nothing."""
    (tmp_path / "mine" / "source").mkdir(parents=True)
    (tmp_path / "mine" / "source" / "0.png").write_text("precious")
    with pytest.raises(ValueError, match="mine is there already, and not empty"):
        data.write_pairs(tmp_path / "mine", data.circles(1))
    assert (tmp_path / "mine" / "source" / "0.png").read_text() == "precious"

    def broken():
        yield from data.circles(2, size=16)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"new cannot be written \(No space left on device\)"):
        data.write_pairs(tmp_path / "new", broken())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert data.write_pairs(tmp_path / "empty", data.circles(2, size=16)) == 2
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop cannot be written"):
        data.write_pairs(tmp_path / "loop", data.circles(1))
    assert len(data.read_pairs(tmp_path / "empty")) == 2


def test_the_toys_hints_do_not_look_inverted():
    assert not any(conditions.looks_inverted(toy.scene(i).hint("canny")) for i in range(30))
    assert all(conditions.looks_inverted(255 - toy.scene(i).hint("canny")) for i in range(30))


def test_make_data_writes_what_check_data_likes(tmp_path, capsys):
    """`minicn make-data` then `minicn check-data`: no problem; twice the same seed, twice the same bytes."""
    for name in ("a", "b"):
        assert __main__.main(["make-data", str(tmp_path / name), "--count", "5", "--seed", "3"]) == 0
    assert __main__.main(["make-data", str(tmp_path / "toy"), "--count", "3", "--condition", "canny"]) == 0
    for name in ("a", "toy"):
        assert __main__.main(["check-data", str(tmp_path / name)]) == 0
    assert "5 pairs, no problems" in capsys.readouterr().out
    for path in (tmp_path / "a").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    pairs = data.read_pairs(tmp_path / "toy")
    assert [pair.prompt for pair in pairs] == [toy.scene(i).caption for i in range(3)]
    hint, image = data.load_pair(pairs[1], 128)
    assert np.array_equal(image, toy.scene(1).image)
    assert np.array_equal(hint, toy.scene(1).hint("canny"))
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["make-data", str(tmp_path / "a")])
    assert stopped.value.code == 2
    assert "is there already, and not empty" in capsys.readouterr().err


def test_circles_are_what_they_say():
    """The hint is the outline of the disc in the image; colours are those of the prompt; pair i does not depend on count."""
    for (hint, image, prompt), (again, _, _) in zip(data.circles(6, 1), data.circles(20, 1), strict=False):
        assert np.array_equal(hint, again)
        colour, ground = prompt.split()[0], prompt.split()[3]
        inside = (image == toy.COLOURS[colour]).all(2)
        outside = (image == toy.BACKGROUNDS[ground]).all(2)
        assert 0.02 < inside.mean() < 0.4
        assert (inside | outside).mean() > 0.95
        y, x = np.nonzero(inside)
        radius = np.sqrt(inside.sum() / np.pi)
        bright_y, bright_x = np.nonzero(hint[..., 0] > 200)
        distance = np.hypot(bright_y - y.mean(), bright_x - x.mean())
        assert abs(distance - radius).max() < 2


def test_a_transparent_hint_is_a_problem(tmp_path):
    """A pose drawn on nothing would be trained on white."""
    write(tmp_path / "target" / "1.png")
    (tmp_path / "source").mkdir()
    hint = Image.new("RGBA", (40, 30))
    hint.putpixel((5, 5), (255, 0, 0, 255))
    hint.save(tmp_path / "source" / "1.png")
    [pair] = data.read_pairs(table(tmp_path, [row(1)]))
    [problem] = data.problems(pair)
    assert problem.startswith(f"line 1: {pair.hint}: the hint is transparent in places, which become white")


def test_a_thin_pair_is_not_enlarged_without_a_limit(tmp_path, monkeypatch):
    """1x3000 pixels at a resolution of 64 would be 12 million; at 16 they are 0.8."""
    monkeypatch.setattr(conditions.images, "MOST_PIXELS", 10**6)
    for name in ("source", "target"):
        write(tmp_path / name / "1.png", (1, 3000))
    [pair] = data.read_pairs(table(tmp_path, [row(1)]))
    with pytest.raises(
        ValueError, match=r"1\.png: 1x3000 pixels would become 64x192000: choose a lower resolution, or crop it"
    ):
        data.load_pair(pair, 64)
    assert data.load_pair(pair, 16)[0].shape == (16, 16, 3)
