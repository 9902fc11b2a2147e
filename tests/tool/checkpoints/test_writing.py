"""Files and folders are written whole or not at all, and never over anything else (`files.replacing`)."""

import os
import re

import pytest
import torch

from minicn.checkpoints import files


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_file_is_replaced_only_when_all_of_it_is_written(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with files.replacing(tmp_path / "a.txt") as new:
        new.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert tree(tmp_path) == {"a.txt": b"new"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64\nvs 0"), KeyError(1)]
)
def test_an_error_half_way_leaves_what_was_there_and_nothing_else(tmp_path, error):
    """PyTorch says a full disk by RuntimeError; a mistake of ours stays what it is."""
    (tmp_path / "a.txt").write_text("old")

    def write():
        with files.replacing(tmp_path / "a.txt") as new:
            new.write_text("half")
            raise error

    with pytest.raises(KeyError if isinstance(error, KeyError) else OSError) as said:
        write()
    words = str(said.value)
    if not isinstance(error, KeyError):
        assert words.startswith(f"{tmp_path / 'a.txt'} cannot be written (")
        assert "free space, or name another place; what was there is intact" in words
        assert not {".minicn-", "\n"} & {*words.split("/"), *words}
    assert tree(tmp_path) == {"a.txt": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_no_link_is_followed_and_no_other_file_touched(tmp_path):
    """Neither what a link in the file's place points to, nor files with names that a writer may think of."""
    (tmp_path / "precious").write_text("mine")
    os.symlink(tmp_path / "precious", tmp_path / "w.safetensors")
    for name in ("w.safetensors.part", "w.part", "w.safetensors.tmp"):
        (tmp_path / name).write_text("mine")
    files.write(tmp_path / "w.safetensors", {"a": torch.ones(1)})
    found = tree(tmp_path)
    assert not (tmp_path / "w.safetensors").is_symlink()
    assert files.read(tmp_path / "w.safetensors")["a"].item() == 1
    assert {name for name, content in found.items() if content == b"mine"} == {*found} - {"w.safetensors"}


def test_a_new_folder_is_written_whole_too(tmp_path):
    with files.replacing(tmp_path / "in" / "folder") as new:
        files.write_json(new / "sub" / "config.json", {"a": 1})
    assert [*tree(tmp_path)] == ["in/folder/sub/config.json"]


def test_what_went_wrong_in_a_folder_is_said_once(tmp_path):
    """In the system's words, without the names of files that nobody will see."""

    def write():
        with files.new_folder(tmp_path / "folder") as new, files.replacing(new / "a.bin"):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'folder'} cannot be written (No space left")) as said:
        write()
    assert "a.bin" not in str(said.value)
    assert [*tmp_path.iterdir()] == []


def test_files_get_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "w.safetensors", {"a": torch.ones(1)})
        files.write_json(tmp_path / "c.json", {})
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == {"0o640"}
