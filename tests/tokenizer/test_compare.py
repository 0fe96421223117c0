"""Bytes per token, counted by hand; the samples; the table."""

import unicodedata

import pytest

from jaxchat.tokenizer import Tokenizer
from jaxchat.tokenizer.compare import Compression, measure, samples, table

BYTES = [bytes([byte]) for byte in range(256)]


@pytest.fixture
def tokenizers():
    """One with single bytes only, one with pairs of `a` too, and one that has only lower case."""
    return [Tokenizer(BYTES), Tokenizer([*BYTES, b"aa"]), Tokenizer(BYTES, "[a-z]+")]


def test_counts(tokenizers):
    one, two = measure(tokenizers, {"one": ["aaaaa", ""], "two": ["Aa", "é"]})
    assert one == Compression("one", 5, (5, 3, 5), (True, True, True))
    assert two == Compression("two", 4, (4, 4, 1), (True, True, False))
    assert [one.bytes_per_token(i) for i in range(3)] == [1, 5 / 3, 1]
    assert [one.more_tokens(i) for i in range(3)] == [0, pytest.approx(-0.4), 0]
    empty = measure(tokenizers, {"empty": []})[0]
    assert (empty.bytes, empty.bytes_per_token(0)) == (0, 0)


def test_table(tokenizers):
    rows = measure(tokenizers, {"one": ["aaaaa"], "two": ["Aa"]})
    assert table(["runs/a", "b.json", "c"], [265, 1_000_266, 265], rows).splitlines() == [
        "A  runs/a        265 tokens",
        "B  b.json  1,000,266 tokens",
        "C  c             265 tokens",
        "",
        "bytes/token           bytes      A       B       C   B tokens  C tokens",
        "one                       5   1.00    1.67*   1.00     -40.0%     +0.0%",
        "two                       2   1.00*   1.00*   2.00!     +0.0%    -50.0%",
        "",
        "! C does not give the text back (it changes or drops some of it): two",
    ]


def test_table_of_one_and_of_many():
    alone = table(["a"], [300], [Compression("news", 1000, (250,), (True,))])
    assert alone.splitlines()[-1] == "news                  1,000   4.00", "nothing to be best of"
    row = Compression("validation text", 123_456_789, tuple(range(30_000_000, 37_000_000, 1_000_000)), (True,) * 7)
    many = table([f"runs/{i}" for i in range(7)], [100_277] * 7, [row]).splitlines()
    assert max(map(len, many)) <= 100
    heads = [line for line in many if line.startswith("bytes/token")]
    assert [head.split()[2:6] for head in heads] == [["A", "B", "C", "D"], ["A", "E", "F", "G"]]


SCRIPTS = {
    "arabic": "ARABIC",
    "chinese": "CJK",
    "greek": "GREEK",
    "hindi": "DEVANAGARI",
    "japanese": "HIRAGANA",
    "korean": "HANGUL",
    "russian": "CYRILLIC",
}


def test_samples():
    """Each is what its name says, and long enough for reliable counts."""
    texts = samples()
    assert list(texts) == ["news", "code", "math", *SCRIPTS]
    assert all(2000 < len(texts[kind][0].encode()) < 5000 for kind in ("news", "code", "math"))
    for kind, script in SCRIPTS.items():
        letters = [letter for letter in texts[kind][0] if letter.isalpha()]
        share = sum(unicodedata.name(letter).startswith(script) for letter in letters) / len(letters)
        assert share > 0.5 and len(texts[kind][0].encode()) > 800, kind


def test_the_samples_go_through_a_tokenizer(tokenizers):
    rows = measure(tokenizers[:2], samples())
    assert all(row.tokens[0] == row.bytes >= row.tokens[1] and all(row.restored) for row in rows)
