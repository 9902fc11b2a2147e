"""`minicn scene`: what is known of a toy scene, as files from which `minicn condition` makes the toy's own hints."""

import numpy as np
import pytest
from PIL import Image

from minicn import toy
from minicn.__main__ import main

# Made from which file; the toy's lineart is its exact outlines, which no picture tells.
SOURCES = {
    **dict.fromkeys(("canny", "hough", "hed"), "picture.png"),
    "scribble": "drawing.png",
    "depth": "depth.npy",
    "normal": "normals.npy",
    "ade20k": "labels_ade20k.png",
    "coco_stuff": "labels_coco_stuff.png",
    "openpose": "openpose.json",
    "openpifpaf": "openpifpaf.json",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    assert main(["scene", "3", "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("condition", SOURCES)
def test_the_hint_of_a_written_scene_is_the_toys_own(folder, condition, tmp_path):
    size = ["--size", "128x128"] if condition == "openpifpaf" else []
    assert main(["condition", condition, str(folder / SOURCES[condition]), str(tmp_path / "hint.png"), *size]) == 0
    made, kept = (np.asarray(Image.open(path)) for path in (tmp_path / "hint.png", folder / "hints" / f"{condition}.png"))
    assert np.array_equal(kept, toy.scene(3, "test").hint(condition))
    assert np.abs(made.astype(int) - kept).max() <= (condition == "normal")  # float32 normals are made unit length anew


def test_classes_are_named(folder, tmp_path, capsys):
    """Whoever reads labels in another numbering sees it."""
    main(["condition", "ade20k", str(folder / "labels_ade20k.png"), str(tmp_path / "hint.png")])
    names = [toy.ADE20K[label] for label in np.unique(toy.scene(3, "test").labels)]
    out = capsys.readouterr().out
    assert f"{len(names)} labels: " in out
    assert all(name in out for name in names)


def test_a_scene_is_written_with_its_caption_and_shown_in_a_line(folder, capsys):
    scene = toy.scene(3, "test")
    assert (folder / "caption.txt").read_text("utf-8") == scene.caption + "\n"
    assert np.array_equal(np.asarray(Image.open(folder / "picture.png")), scene.image)
    assert repr(scene) == f"<toy scene 3 of test: {scene.caption}>"
    assert scene._repr_png_().startswith(b"\x89PNG")


def test_a_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["scene", "0", "--output", str(tmp_path / "file")])
    assert stop.value.code == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_scene_replaces_nothing_and_is_written_whole(tmp_path, refused, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "caption.txt").write_text("mine")
    assert "is there already, and not empty" in refused(main, ["scene", "0", "--output", str(tmp_path / "mine")])
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    words = f"{tmp_path / 'new'} cannot be written (No space left on device)"
    assert words in refused(main, ["scene", "0", "--output", str(tmp_path / "new")])
    assert [*tmp_path.rglob("*")] == [tmp_path / "mine", tmp_path / "mine" / "caption.txt"]
