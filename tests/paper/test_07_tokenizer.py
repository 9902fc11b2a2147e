"""Section 3.2, words: the byte-pair tokenizer, on a list of merges so small that every split can be derived on paper."""

import pytest
import torch

from minicn import Tokenizer
from minicn.tokenizer import byte_letters, clean

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
START, END = 521, 522


@pytest.fixture
def tokenizer():
    return Tokenizer.from_merges(MERGES)


def byte(letter):
    """The id of one letter inside a word: its byte's place, "!" (33) being the first; of its end: + 256."""
    return ord(letter) - ord("!")


def last(letter):
    return byte(letter) + 256


# Bytes


def test_byte_letters_is_the_table_of_gpt2():
    """256 bytes have 256 different printable letters: themselves where printable, else those from 256 on, in order."""
    table = byte_letters()
    assert sorted(table) == list(range(256))
    assert len(set(table.values())) == 256
    assert (table[ord("!")], table[ord("~")], table[0], table[ord(" ")], table[255]) == ("!", "~", "Ā", "Ġ", "ÿ")
    assert (table[ord("\n")], table[127], table[0xA0], table[0xAD]) == ("Ċ", "ġ", "ł", "Ń")
    assert all(not letter.isspace() and letter.isprintable() for letter in table.values())
    kept = {b for b, letter in table.items() if ord(letter) == b}
    assert kept == {*range(33, 127), *range(161, 173), *range(174, 256)}


def test_vocabulary_is_bytes_then_ends_then_merges_then_specials(tokenizer):
    """ids 0..255 are bytes ("!" first), 256..511 bytes that end a word, then the merges, then start and end."""
    assert (tokenizer.vocab["!"], tokenizer.vocab["a"], tokenizer.vocab["a</w>"]) == (0, 64, 320)  # as in CLIP
    assert (tokenizer.vocab["lo"], tokenizer.vocab["red</w>"]) == (512, 520)
    assert (tokenizer.start, tokenizer.end, len(tokenizer.vocab)) == (START, END, 523)


# Merges


SPLITS = {
    "low": [513],  # l o w| -> lo w| -> low|
    "lo": [byte("l"), last("o")],  # the merge is of o inside a word, not of o at its end
    "lower": [512, byte("w"), 514],  # l o w e r| -> lo w e r| -> lo w er|
    "new": [515, last("w")],  # n e w| -> ne w|; the merge of ne needs w inside a word
    "newer": [516, 514],  # n e w e r| -> n e w er| -> ne w er| -> new er|
    "red": [520],  # r e d| -> re d| -> red|
    "here": [byte("h"), byte("e"), byte("r"), last("e")],  # neither r| nor re: the last e ends the word
    "aaaaa": [517, 517, last("a")],  # from the left: aa aa a|
    "aaaa": [517, byte("a"), last("a")],  # aa a a|: the last letter never joins
    "nered": [515, 520],  # ne (rank 3) comes before re (rank 7); both fit here
    "er": [514],
    "x": [last("x")],
}


@pytest.mark.parametrize("word", SPLITS)
def test_merges_are_applied_earliest_learned_first(tokenizer, word):
    """Each split follows on paper from the list of merges above."""
    assert tokenizer.encode(word) == SPLITS[word]


def test_rank_decides_and_not_the_place_in_the_word():
    """Of two overlapping pairs the one learned earlier is merged, though the other comes first in the word."""
    right = Tokenizer.from_merges([("b", "c</w>"), ("a", "b")])
    assert right.encode("abc") == [byte("a"), 512]
    left = Tokenizer.from_merges([("a", "b"), ("b", "c</w>")])
    assert left.encode("abc") == [512, last("c")]


# Words


def words(text):
    """Tokens of a text by a tokenizer without merges, joined to words again."""
    plain = Tokenizer.from_merges([])
    names = {i: token for token, i in plain.vocab.items()}
    return "".join(names[i] for i in plain.encode(text)).split("</w>")[:-1]


WORDS = {
    "A Red BALL": ["a", "red", "ball"],
    "  a \t red\n\nball ": ["a", "red", "ball"],
    "cat &amp; dog": ["cat", "&", "dog"],
    "cat &amp;amp; dog": ["cat", "&", "dog"],  # resolved twice, as OpenAI does
    "1 < 2 &amp;amp; 3": ["1", "<", "2", "&", "3"],  # also where ftfy, because of the <, resolves none
    "&lt;b&gt;": ["<", "b", ">"],
    "“cat” isn’t": ['"', "cat", '"', "isn", "'t"],  # curly quotes are straightened
    "2024": ["2", "0", "2", "4"],
    "4k": ["4", "k"],
    "dog's": ["dog", "'s"],
    "we're they've I'll I'd I'm don't": ["we", "'re", "they", "'ve", "i", "'ll", "i", "'d", "i", "'m", "don", "'t"],
    "o'clock": ["o", "'", "clock"],
    "red, blue...and": ["red", ",", "blue", "...", "and"],
    "a_b-c": ["a", "_", "b", "-", "c"],
    "": [],
    " \n ": [],
}


@pytest.mark.parametrize("text", WORDS)
def test_words_of_a_prompt(text):
    """Lower case, single spaces, entities and quotes resolved; endings, digits and punctuation stand apart."""
    assert words(text) == WORDS[text]


def test_clean_is_the_same_twice():
    """A cleaned prompt stays as it is."""
    for text in [*WORDS, "Café &quot;ﬁn&quot;", "schön"]:
        assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize("text", ["a cat 🐱 on a mat", "猫 と 犬", "naïve café", "👩‍🎨 paints", "привет мир", "a 猫!"])
def test_any_script_survives_encode_and_decode(tokenizer, text):
    """Every UTF-8 byte has a token, so emoji, CJK and accents come back whole, words parted by spaces."""
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("猫!", "猫 !")


def test_letters_beyond_ascii_are_their_utf8_bytes(tokenizer):
    """é is two bytes, C3 A9, whose letters are Ã and ©; the last one ends the word."""
    assert tokenizer.encode("é") == [tokenizer.vocab["Ã"], tokenizer.vocab["©</w>"]]
    assert len(tokenizer.encode("猫")) == 3
    assert len(tokenizer.encode("🐱")) == 4


def test_special_tokens_written_in_a_prompt_are_one_token(tokenizer):
    """<|endoftext|> in a prompt is the end token itself, in any case; a broken one is punctuation and letters."""
    assert tokenizer.encode("low <|endoftext|> low") == [513, END, 513]
    assert tokenizer.encode("<|StartOfText|>red") == [START, 520]
    assert START not in tokenizer.encode("<|startoftext>")
    assert tokenizer.decode([START, 513, END, 520, END]) == "low red"


# 77 tokens


def test_prompts_become_rows_of_77(tokenizer):
    """(B, 77) int64: start, tokens, end, and end again up to 77."""
    got = tokenizer(["low", "", "newer red"])
    assert got.shape == (3, 77)
    assert got.dtype == torch.int64
    assert got[0].tolist() == [START, 513] + [END] * 75
    assert got[1].tolist() == [START] + [END] * 76  # the empty prompt
    assert got[2].tolist() == [START, 516, 514, 520] + [END] * 73
    assert tokenizer([]).shape == (0, 77)


@pytest.mark.parametrize(("count", "kept"), [(74, 74), (75, 75), (76, 75), (200, 75)])
def test_long_prompts_are_cut_and_keep_the_end(tokenizer, count, kept):
    """75 tokens at most stand between start and end; the end is never cut off."""
    row = tokenizer(["low " * count])[0].tolist()
    assert row == [START] + [513] * kept + [END] * (76 - kept)
