"""CLIP's byte-pair tokenizer: a prompt to 77 token ids.

Source: Radford et al., arXiv:2103.00020, and the published vocab.json, merges.txt and bpe_simple_vocab_16e6.txt.gz.
Cleaning is OpenAI's: ftfy, HTML entities resolved twice, white space collapsed, lower case. (transformers' fast
tokenizer only normalises to NFC instead: the ids agree unless a prompt holds curly quotes, entities or mojibake.)
"""

import gzip
import html
import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import regex
import torch
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = regex.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
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

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
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
            text = gzip.decompress(path.read_bytes()).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(f"{path} is not a gzip file of merges ({error}): name bpe_simple_vocab_16e6.txt.gz") from error
        if not text.strip():
            raise ValueError(f"{path} is not a gzip file of merges (it is empty): name bpe_simple_vocab_16e6.txt.gz")
        # The file holds more merges than CLIP uses: 49,408 ids minus 512 byte tokens and 2 specials.
        return cls.from_merges(_parse_merges(text, path)[: 49408 - 512 - 2])

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
                ids.extend(self.vocab.get(token, self.end) for token in self._split(letters))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, words separated by single spaces, without start and end."""
        letter_bytes = {letter: b for b, letter in byte_letters().items()}
        text = "".join(self._word[int(i)] for i in ids if int(i) not in (self.start, self.end)).replace("</w>", " ")
        return b"".join(bytes([letter_bytes[c]]) if c != " " else b" " for c in text).decode("utf-8", "replace").strip()

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
        """Merge neighbours, the earliest-learned pair first, until no pair is known."""
        parts = [*letters[:-1], letters[-1] + "</w>"]
        while len(parts) > 1:
            best = min(zip(parts, parts[1:], strict=False), key=lambda pair: self._rank.get(pair, len(self._rank)))
            if best not in self._rank:
                break
            merged, i = [], 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        return tuple(parts)


def _read_folder(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read vocab.json and merges.txt, else tokenizer.json, which is all that transformers 5 writes."""
    whole = folder / "tokenizer.json"
    if not (folder / "vocab.json").is_file() and whole.is_file():
        try:
            model = json.loads(whole.read_text("utf-8"))["model"]
            vocab, merges = model["vocab"], [p.split(" ") if isinstance(p, str) else p for p in model["merges"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{whole} holds no vocabulary and merges ({error!r}): fetch it again") from error
        text, source = "\n".join(["", *(" ".join(pair) for pair in merges)]), whole
    else:
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: a tokenizer folder holds vocab.json and merges.txt")
        try:
            vocab, source = json.loads((folder / "vocab.json").read_text("utf-8")), folder / "merges.txt"
            text = source.read_text("utf-8")
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{folder} holds a damaged vocab.json or merges.txt: {error}") from error
    if not isinstance(vocab, dict) or START not in vocab or END not in vocab:
        named = folder / "vocab.json" if (folder / "vocab.json").is_file() else whole
        raise ValueError(f"{named} holds no {START} and {END}: this is not CLIP's vocabulary")
    return vocab, _parse_merges(text, source)


def _parse_merges(text: str, path: Path) -> list[tuple[str, str]]:
    """Read "a b" lines below the version line."""
    pairs = [line.split() for line in text.splitlines()[1:] if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path} has a line that is not a pair of tokens: this is not a list of merges")
    return [(a, b) for a, b in pairs]
