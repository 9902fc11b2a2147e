"""Text that others wrote: read in bounds, whatever it holds, and shown as text."""

import codecs
import json
import os
import re

import pytest

from minicn.__main__ import main
from minicn.checkpoints import files

NESTED = {
    "lists": "[" * 200_000,
    "objects": '{"a":' * 200_000,
    "33 lists": "[" * 33 + "]" * 33,
    "mixed": '[{"a":' * 17 + "1" + "}]" * 17,
}


@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_with_any_byte_order_mark(tmp_path, mark):
    """Editors and consoles on Windows write one; a tab, and a line separator, may stand in a string."""
    text = '{"prompt":\t"a\tred\u2028b\u00e4ll"}\r\n'
    (tmp_path / "a.json").write_bytes(text.encode(mark))
    assert files.read_text(tmp_path / "a.json", "a text") == text
    assert files.read_json(tmp_path / "a.json") == {"prompt": "a\tred\u2028b\u00e4ll"}
    (tmp_path / "b.json").write_bytes(codecs.BOM_UTF16_BE + text.encode("utf-16-be"))
    assert files.read_text(tmp_path / "b.json", "a text") == text


@pytest.mark.parametrize("what", NESTED)
def test_json_is_read_to_a_depth(what):
    with pytest.raises(ValueError, match=r"x\.json, line 3 is not a table: .*nested more than 32 deep"):
        files.parse_json(NESTED[what], "x.json, line 3", "a table")
    assert files.parse_json("[" * 32 + "]" * 32, "x.json")


def test_text_has_a_size(tmp_path):
    """A sparse file of 20 GB is refused without being read."""
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(ValueError, match=r"a\.json is not a JSON configuration: it is larger than 16 MB"):
        files.read_json(tmp_path / "a.json")


def test_nothing_waits_on_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path / "config.json", "/dev/zero", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{path} does not exist or is not a file: name a list")):
            files.read_text(path, "a list")


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"a\.json is not a JSON configuration in UTF-8: .*0xff"):
        files.read_json(tmp_path / "a.json")
    for text in ("[1]", "3", "{", '{"a": 1}{}', "9" * 5000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json is not a JSON configuration: "):
            files.read_json(tmp_path / "a.json")


def test_text_of_files_is_shown_as_text():
    """Escapes of terminals, turned writing and half characters are seen, not obeyed; letters of any language stay."""
    assert files.printable("\x1b[31m\x07 \u202egnp.\u2069 \ud800 \x9b") == r"\x1b[31m\x07 \u202egnp.\u2069 \ud800 \x9b"
    assert (
        files.printable("  zwei\n    Zeilen\tund\u2028\u4e00\u00e9\U0001f600 ")
        == "  zwei Zeilen und \u4e00\u00e9\U0001f600 "
    )
    long = files.printable("\x00" * 10**7 + "the end", longest=100)
    assert len(long) < 120
    assert long.startswith(r"\x00")
    assert long.endswith("the end")


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "a\nerror: all is well", "\u202e", "x" * 10_000])
def test_names_in_files_reach_the_terminal_as_text(tmp_path, refused, name):
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name + "/"}}))
    line = refused(main, ["inspect", str(tmp_path / "m.safetensors.index.json")])
    assert line.startswith("error: ")
    assert line.isprintable()
    assert len(line) < 650
