"""The tokenizer's files, and what it refuses."""

import gzip
import itertools
import json
import time

import numpy as np
import pytest
import torch

from minicn import Tokenizer
from minicn.tokenizer import clean

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


def plain_split(tokenizer, word):
    """Byte-pair encoding as it is explained: look for the earliest-learned pair, merge it everywhere, and again."""
    rank = {pair: i for i, pair in enumerate(tokenizer.merges)}
    parts = [*word[:-1], word[-1] + "</w>"]
    while known := [pair for pair in zip(parts, parts[1:], strict=False) if pair in rank]:
        best, merged = min(known, key=rank.get), []
        while parts:
            count = 2 if (*parts[:2],) == best else 1
            merged.append("".join(parts[:count]))
            parts = parts[count:]
        parts = merged
    return tuple(parts)


def test_words_are_split_as_explained():
    """Whatever the order of the merges, also where a pair becomes known before one that it is made of."""
    random = np.random.default_rng(0)
    for _ in range(100):
        tokens = ["a", "b", "c", "a</w>"]
        pairs = {}
        for _ in range(12):
            a, b = random.choice(tokens, 2)
            if not a.endswith("</w>"):
                pairs[str(a), str(b)] = None
                tokens.append(str(a + b))
        tokenizer = Tokenizer.from_merges([*pairs][:: random.choice([1, -1])])
        word = "".join(random.choice([*"abc"], 30))
        assert tokenizer._split_word(word) == plain_split(tokenizer, word)


def test_a_long_word_costs_its_length(tokenizer):
    """A search through the word for each merge would take an hour for a word of 200,000 letters."""
    merges = [(a + b, c) for a in ("", *"abcd") for b in "abcd" for c in "abcd"]
    tokenizer = Tokenizer.from_merges([*merges, *((a + b, c + d) for a, b, c, d in itertools.product("abcd", repeat=4))])
    word = "".join(np.random.default_rng(0).choice([*"abcd"], 20_000))
    assert "".join(tokenizer._split_word(word)) == word + "</w>"
    assert tokenizer._split.cache_info().currsize == 0
    tokenizer([word])
    assert tokenizer._split.cache_info().currsize == 0  # nor is it kept


@pytest.mark.parametrize("again", ["amp;", "#38;", "&#x026;AMP;", "amp;#038;"])
def test_entities_within_entities_cost_their_length(tokenizer, again):
    """ftfy resolves one a pass, and makes as many passes: for a prompt of a megabyte, hours."""
    assert clean("&amp;amp;lt;a") == clean("&" + 50 * "amp;" + "lt;a") == "<a"
    start = time.process_time()
    assert tokenizer.encode("&" + again * 10_000 + "lt; low")[-1] == tokenizer.vocab["low</w>"]
    assert time.process_time() - start < 0.5


def test_odd_prompts_are_prompts(tokenizer):
    """An entity of more digits than Python converts, halves of characters, tokens of a foreign vocabulary."""
    assert tokenizer.encode("&#" + "9" * 5000 + "; low")[-1] == tokenizer.vocab["low</w>"]
    assert tokenizer(["\ud800 \udcff \x00 low"]).shape == (1, 77)
    vocab = {**tokenizer.vocab, "\u732b</w>": 521 + 2}
    assert Tokenizer(vocab, MERGES).decode([523, tokenizer.vocab["low</w>"]]) == "\u732b low"


VOCAB = Tokenizer.from_merges(MERGES).vocab
DAMAGED = {
    "nested": {"vocab.json": "[" * 200_000},
    "nested deeper in": {"tokenizer.json": '{"model": ' + "[" * 200_000},
    "an id that is a list": {"vocab.json": json.dumps({**VOCAB, "a": [1]})},
    "an id that is true": {"vocab.json": json.dumps({**VOCAB, "a": True})},
    "an id beyond 64 bits": {"vocab.json": json.dumps({**VOCAB, "a": -(2**64)})},
    "an id beyond what a text encoder has": {"vocab.json": json.dumps({**VOCAB, "a": 2**70})},
    "two tokens of one id": {"vocab.json": json.dumps({**VOCAB, "a": 1})},
    "merges of numbers": {"tokenizer.json": json.dumps({"model": {"vocab": VOCAB, "merges": [[1, 2]]}})},
    "merges of lists": {"tokenizer.json": json.dumps({"model": {"vocab": VOCAB, "merges": [[["a"], ["b"]]]}})},
    "merges of nothing": {"tokenizer.json": json.dumps({"model": {"vocab": VOCAB, "merges": [None]}})},
    "merges of halves": {"tokenizer.json": json.dumps({"model": {"vocab": VOCAB, "merges": [["", "a"]]}})},
    "no merges": {"tokenizer.json": json.dumps({"model": {"vocab": VOCAB}})},
    "no model": {"tokenizer.json": "{}"},
    "no text": {"merges.txt": b"#version\n\xff \xfe"},
    "a text without end": {"merges.txt": 2**40},
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_named(tokenizer, tmp_path, what):
    tokenizer.save(tmp_path)
    [(name, content)] = DAMAGED[what].items()
    if name == "tokenizer.json":
        (tmp_path / "vocab.json").unlink()
    with open(tmp_path / name, "wb") as file:
        file.truncate(content) if isinstance(content, int) else file.write(
            content if isinstance(content, bytes) else content.encode()
        )
    with pytest.raises(ValueError, match=rf"{name} (is not|holds no|has a line|does not give)"):
        Tokenizer.load(tmp_path)


def test_files_of_other_editors_are_read(tokenizer, tmp_path):
    """A byte-order mark and lines that end as on Windows."""
    tokenizer.save(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        text = (tmp_path / name).read_text("utf-8").replace("\n", "\r\n")
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    again = Tokenizer.load(tmp_path)
    assert (again.vocab, again.merges) == (tokenizer.vocab, tokenizer.merges)


def test_a_gz_is_not_unpacked_without_end(tmp_path):
    """A thousandth of its size on disk: it is given up at 16 MB."""
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(2**20)) * 40)
    with pytest.raises(ValueError, match=r"bomb\.gz is not a gzip file of merges \(it is more than 16 MB when unpacked\)"):
        Tokenizer.load(tmp_path / "bomb.gz")
