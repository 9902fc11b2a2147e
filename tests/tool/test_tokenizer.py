"""The tokenizer's files, and what it refuses."""

import gzip
import json

import pytest
import torch

from minicn import Tokenizer

MERGES = [
    ("l", "o"),  # id 512
    ("lo", "w</w>"),  # 513
    ("e", "r</w>"),  # 514
    ("n", "e"),  # 515
    ("ne", "w"),  # 516
    ("a", "a"),  # 517
    ("aa", "aa</w>"),  # 518, never reached: nothing makes aa</w>
    ("r", "e"),  # 519
    ("re", "d</w>"),  # 520
]


@pytest.fixture
def tokenizer():
    return Tokenizer.from_merges(MERGES)


# Files


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    """A folder with vocab.json and merges.txt gives the same tokenizer again."""
    tokenizer.save(tmp_path / "tokenizer")
    again = Tokenizer.load(tmp_path / "tokenizer")
    assert (again.vocab, again.merges) == (tokenizer.vocab, tokenizer.merges)
    prompts = ["lower 猫 newer!", "", "aaaaa"]
    assert torch.equal(again(prompts), tokenizer(prompts))
    lines = (tmp_path / "tokenizer" / "merges.txt").read_text("utf-8").splitlines()
    assert lines[:3] == ["#version: 0.2", "l o", "lo w</w>"]
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert (config["model_max_length"], config["pad_token"]) == (77, "<|endoftext|>")


def gz(path, lines):
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode("utf-8")))
    return path


def test_the_gz_of_openai_is_a_version_line_and_merges(tokenizer, tmp_path):
    """bpe_simple_vocab_16e6.txt.gz: one line of version, then merges in order."""
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *(f"{a} {b}" for a, b in MERGES)]
    again = Tokenizer.load(gz(tmp_path / "merges.txt.gz", lines))
    assert (again.vocab, again.merges) == (tokenizer.vocab, tokenizer.merges)


def test_the_gz_goes_on_beyond_what_clip_uses(tmp_path):
    """Only the first 48,894 merges count, so that start and end are CLIP's 49406 and 49407."""
    pairs = [f"{chr(0x4E00 + i // 300)} {chr(0x4E00 + i % 300)}" for i in range(50_000)]
    again = Tokenizer.load(gz(tmp_path / "merges.txt.gz", ["#version", *pairs]))
    assert (len(again.merges), again.start, again.end) == (48_894, 49_406, 49_407)
    assert again([""])[0, :2].tolist() == [49_406, 49_407]


# Errors


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_a_folder_that_is_not_whole_is_refused(tokenizer, tmp_path, missing):
    """The error names the folder and the file."""
    tokenizer.save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} has no {missing}: a tokenizer folder holds"):
        Tokenizer.load(tmp_path)


def test_a_path_to_nothing_is_refused(tmp_path):
    """The error names the path and what is wanted."""
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: name a folder with vocab\.json"):
        Tokenizer.load(tmp_path / "nowhere")


MANY = gzip.compress(b"#version\n" + b"".join(b"%d x\n" % i for i in range(2000)), mtime=0)
NO_GZ = {
    "text": b"#version\nl o\n",
    "empty": b"",
    "cut off": gzip.compress(b"#version\n" + b"l o\n" * 999)[:30],
    "no text inside": gzip.compress(b"#version\n\xff\xfe"),
    "one wrong byte": MANY[:74] + bytes([MANY[74] ^ 0x55]) + MANY[75:],
}


@pytest.mark.parametrize("case", NO_GZ)
def test_a_file_that_is_no_gz_is_refused(tmp_path, case):
    """What is no gzip file of text is refused, named."""
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(NO_GZ[case])
    with pytest.raises(ValueError, match=r"merges\.txt\.gz is not a gzip file of merges"):
        Tokenizer.load(path)


@pytest.mark.parametrize("line", ["one", "one two three"])
def test_lines_that_are_no_pairs_are_refused(tokenizer, tmp_path, line):
    """merges.txt and the gz hold two tokens a line."""
    tokenizer.save(tmp_path)
    (tmp_path / "merges.txt").write_text(f"#version\nl o\n{line}\n", "utf-8")
    with pytest.raises(ValueError, match=r"merges\.txt has a line that is not a pair of tokens"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"x\.gz has a line that is not a pair of tokens"):
        Tokenizer.load(gz(tmp_path / "x.gz", ["#version", line]))


@pytest.mark.parametrize("text", ["{}", "[]", '{"<|startoftext|>": 0}', "{", ""])
def test_a_vocabulary_of_something_else_is_refused(tokenizer, tmp_path, text):
    """vocab.json must be JSON with the two special tokens; the error names the file."""
    tokenizer.save(tmp_path)
    (tmp_path / "vocab.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json"):
        Tokenizer.load(tmp_path)


def test_what_is_no_list_of_texts_is_refused(tokenizer):
    """A bare string would be read letter by letter, and a number not at all: the error says what is taken."""
    with pytest.raises(TypeError, match=r"prompts are one string, but the tokenizer takes a list of strings"):
        tokenizer("a red ball")
    with pytest.raises(TypeError, match=r"prompts are <class 'int'>, but"):
        tokenizer(["low", 3])
    with pytest.raises(TypeError, match=r"prompts are <class 'NoneType'>, but"):
        tokenizer([None])
