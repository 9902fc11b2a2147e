"""CLIP's byte-pair tokenizer: a prompt to 77 token ids.

Source: Radford et al., arXiv:2103.00020, and the published vocab.json, merges.txt and bpe_simple_vocab_16e6.txt.gz.
Cleaning is OpenAI's: ftfy, HTML entities resolved twice, white space collapsed, lower case. (transformers' fast
tokenizer only normalises to NFC instead: the ids agree unless a prompt holds curly quotes, entities or mojibake.)
"""

import contextlib
import gzip
import heapq
import html
import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import regex
import torch
from torch import Tensor

GZ_BYTES = 2**24  # of unpacked merges, at most; OpenAI's file has 3.1 MB
START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = regex.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
NESTED = regex.compile(r"&(?:(?:amp|#0*38|#x0*26);){9,}", regex.IGNORECASE)  # ftfy resolves them one by one
# English contractions, runs of letters, single digits, runs of anything else but white space.
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@lru_cache
def byte_letters() -> dict[int, str]:
    """Map each of the 256 bytes to a printable letter: its own where it has one, else the next free one from 256 up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def clean(text: str) -> str:
    """Repair, unescape and lowercase a prompt, with single spaces."""
    import ftfy  # imported here: it would double the time that importing minicn takes

    text = ftfy.fix_text(NESTED.sub("&" + 8 * "amp;", text))
    for _ in range(2):
        with contextlib.suppress(ValueError):  # "&#" and thousands of digits stay as they are
            text = html.unescape(text)
    return regex.sub(r"\s+", " ", text).strip().lower()


class Tokenizer:
    """Prompts to token ids: start, up to 75 tokens, end, then padding with end."""

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], max_length: int = 77):
        self.vocab = vocab
        self.merges = list(merges)
        self.max_length = max_length
        self.start, self.end = vocab[START], vocab[END]
        self._rank = {pair: i for i, pair in enumerate(self.merges)}
        self._word = {i: token for token, i in vocab.items()}
        self._split = lru_cache(maxsize=65536)(self._split_word)

    @classmethod
    def from_merges(cls, merges: Sequence[tuple[str, str]], max_length: int = 77) -> "Tokenizer":
        """Build the vocabulary that a list of merges implies: 256 bytes, 256 bytes that end a word, merges, 2 specials."""
        letters = list(byte_letters().values())
        tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
        return cls({token: i for i, token in enumerate(tokens)}, merges, max_length)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a folder with vocab.json and merges.txt (or tokenizer.json), or OpenAI's bpe_simple_vocab_16e6.txt.gz.

        Raises FileNotFoundError or ValueError, naming the file, if one is missing or not in this format.
        """
        path = Path(path)
        if path.is_dir():
            return cls(*_read_folder(path))
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: name a folder with vocab.json and merges.txt")
        try:
            with gzip.open(path) as file:
                text = file.read(GZ_BYTES + 1).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(f"{path} is not a gzip file of merges ({error}): name bpe_simple_vocab_16e6.txt.gz") from error
        if not text.strip() or len(text) > GZ_BYTES:
            size = "empty" if len(text) <= GZ_BYTES else f"more than {GZ_BYTES >> 20} MB when unpacked"
            raise ValueError(f"{path} is not a gzip file of merges (it is {size}): name bpe_simple_vocab_16e6.txt.gz")
        # The file holds more merges than CLIP uses: 49,408 ids minus 512 byte tokens and 2 specials.
        return cls.from_merges(_pairs(_rows(text)[: 49408 - 512 - 2], path))

    def save(self, folder: str | Path) -> None:
        """Write vocab.json and merges.txt, and the two small files that other tools look for."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.max_length, **special}
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in self.merges)]
        (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), "utf-8")
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")

    def encode(self, text: str) -> list[int]:
        """Return all ids of a text, without start, end and padding."""
        ids = []
        for part in SPECIAL.split(clean(text)):  # first, as transformers does: "!<|endoftext|>" ends with the token
            if part in (START, END):
                ids.append(self.vocab[part])
                continue
            for word in WORD.findall(part):
                letters = "".join(byte_letters()[b] for b in word.encode("utf-8"))
                split = self._split if len(letters) < 100 else self._split_word  # only words that may come again are kept
                ids.extend(self.vocab.get(token, self.end) for token in split(letters))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, words separated by single spaces, without start and end."""
        letter_bytes = {letter: b for b, letter in byte_letters().items()}
        text = "".join(self._word[int(i)] for i in ids if int(i) not in (self.start, self.end)).replace("</w>", " ")
        raw = b"".join(bytes([letter_bytes[c]]) if c in letter_bytes else c.encode() for c in text)
        return raw.decode("utf-8", "replace").strip()

    def lost(self, prompt: str) -> str:
        """Return the end of a prompt that does not fit into max_length tokens; "" if all of it fits."""
        return self.decode(self.encode(prompt)[self.max_length - 2 :])

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids (B, 77) int64 for B prompts.

        A prompt that is too long is truncated; the end token is kept. Raises TypeError for anything but text.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            came = "one string" if isinstance(prompts, str) else next(type(p) for p in prompts if not isinstance(p, str))
            raise TypeError(f"prompts are {came}, but the tokenizer takes a list of strings, e.g. ['a red ball']")
        rows = []
        for prompt in prompts:
            ids = [self.start, *self.encode(prompt)[: self.max_length - 2], self.end]
            rows.append(ids + [self.end] * (self.max_length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.max_length)

    def _split_word(self, letters: str) -> tuple[str, ...]:
        """Merge neighbours, everywhere the earliest-learned pair first, until no pair is known.

        A heap of ranks, instead of a search in each round, keeps a long word's cost at n log n.
        """
        parts = [*letters[:-1], letters[-1] + "</w>"]  # merged ones leave "" behind
        left, right = [*range(-1, len(parts) - 1)], [*range(1, len(parts) + 1)]  # neighbours of each part
        places: dict[int, list[int]] = {}  # rank of a pair: where it begins
        ranks: list[int] = []  # a heap of the keys of places

        def note(i: int) -> None:
            rank = self._rank.get((parts[i], parts[right[i]])) if i >= 0 and right[i] < len(parts) else None
            if rank is not None:
                if rank not in places:
                    heapq.heappush(ranks, rank)
                places.setdefault(rank, []).append(i)

        for i in range(len(parts)):
            note(i)
        while ranks:
            rank, merged = heapq.heappop(ranks), []
            for i in sorted(places.pop(rank)):
                j = right[i]
                if j < len(parts) and self._rank.get((parts[i], parts[j])) == rank:  # not merged into another pair since
                    parts[i], parts[j], right[i] = parts[i] + parts[j], "", right[j]
                    if right[i] < len(parts):
                        left[right[i]] = i
                    merged.append(i)
            for i in merged:
                note(left[i])
                note(i)
        return tuple(part for part in parts if part)


def _read_folder(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read vocab.json and merges.txt, else tokenizer.json, which is all that transformers 5 writes."""
    from minicn.checkpoints import files

    table, pairs, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    if not table.is_file() and whole.is_file():
        table = pairs = whole
        model = files.read_json(whole, "a tokenizer").get("model")
        vocab, rows = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
        rows = [row.split(" ") if isinstance(row, str) else row for row in rows] if isinstance(rows, list) else [None]
    else:
        for path in (table, pairs):
            if not path.is_file():
                raise FileNotFoundError(f"{folder} has no {path.name}: a tokenizer folder holds vocab.json and merges.txt")
        vocab, rows = files.read_json(table, "a vocabulary"), _rows(files.read_text(pairs, "a list of merges"))
    if not isinstance(vocab, dict) or START not in vocab or END not in vocab:
        raise ValueError(f"{table} holds no {START} and {END}: this is not CLIP's vocabulary")
    if any(type(i) is not int or not 0 <= i < 2**20 for i in vocab.values()) or len({*vocab.values()}) < len(vocab):
        raise ValueError(f"{table} does not give each token an integer of its own, from 0: this is not CLIP's vocabulary")
    return vocab, _pairs(rows, pairs)


def _rows(text: str) -> list[list[str]]:
    """Return the words of the lines below the version line."""
    return [line.split() for line in text.split("\n")[1:] if line.strip()]


def _pairs(rows: list, path: Path) -> list[tuple[str, str]]:
    """Return merges as pairs. Raises ValueError for a row that is something else."""
    if not all(
        isinstance(row, list) and len(row) == 2 and all(isinstance(token, str) and token for token in row) for row in rows
    ):
        raise ValueError(f"{path} has a line that is not a pair of tokens: this is not a list of merges")
    return [(a, b) for a, b in rows]
