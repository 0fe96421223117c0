"""Plain text becomes documents: nothing is lost, nothing is there twice, and the rule is the expected one."""

import gzip
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.data.text import plain, reading
from jaxchat.data.text.folder import find_text
from jaxchat.data.text.plain import MARKER, Cut, choose_cut, documents
from jaxchat.data.text.shards import TextBlocks, TextFiles, iterate_texts

WORDS = "Ada saw the wide lake. Bo ran home, and Cem slept; è 日本語 😀 naïve. Straße!".split()


def sentences(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(f"{draw.choice(WORDS)} {draw.choice(WORDS)} {draw.randrange(1000)}." for _ in range(count))


def solid(text: str) -> str:
    """The text without what it may be cut at."""
    return "".join(text.replace(MARKER, "").split())


PIECES = st.sampled_from(
    [
        "\n",
        "\n\n",
        "\r\n",
        "\r\n\r\n",
        " ",
        ". ",
        "。",
        "! ",
        MARKER,
        "x" * 70,
        "é" * 9,
        "日本",
        "😀",
        "word ",
        "a line\n",
        "\t",
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(PIECES, max_size=120),
    block=st.integers(1, 300),
    chars=st.integers(1, 60),
    long=st.sampled_from([1, 50, 10**6]),
)
def test_documents_of_any_text_in_blocks_of_any_size_are_the_text(tmp_path_factory, pieces, block, chars, long):
    path, text = tmp_path_factory.mktemp("text") / "a.txt", "".join(pieces)
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block)
        patch.setattr(plain, "LONG_FILE_BYTES", long)
        for side in (TextFiles((path,)), TextFiles((path,), document_chars=chars)):
            assert solid("".join(iterate_texts(side))) == solid(text)


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(PIECES, max_size=60),
    rule=st.sampled_from(["markers", "blank lines", "lines", "wrapped lines", "sentences"]),
    chars=st.integers(1, 50),
)
def test_every_rule_keeps_every_character(pieces, rule, chars):
    text = "".join(pieces).replace("\r\n", "\n")
    found = list(documents(text, Cut(rule, chars)))
    assert solid("".join(found)) == solid(text)


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["good words", "é", "\n", "\n\n", ". ", " "]), max_size=40),
    at=st.integers(0, 200),
    chars=st.integers(1, 40),
)
def test_one_bad_byte_takes_only_its_record(tmp_path_factory, pieces, at, chars):
    path, data = tmp_path_factory.mktemp("text") / "a.txt", "".join(pieces).encode()
    at = min(at, len(data))
    path.write_bytes(data[:at] + b"\xff" + data[at:])
    said = []
    side = TextFiles((path,), document_chars=chars, on_bad="skip", say=said.append)
    left = solid("".join(iterate_texts(side)))
    assert len(said) == 1 and "a.txt is not UTF-8 text" in said[0]
    assert len(solid("".join(pieces))) >= len(left)
    if not pieces:
        assert left == ""


RULES = {
    "each line is a document": [
        "\n".join(f"name{i}" for i in range(20_000)),
        "\n".join(sentences(20, i) for i in range(400)) + "\n",
        "\r\n".join(sentences(20, i) for i in range(400)),
        "\r".join(sentences(20, i) for i in range(400)),
    ],
    "cut at blank lines into documents of about 16,000 characters": [
        "\n\n".join(sentences(20, i) for i in range(400)),
        "\r\n\r\n".join(sentences(20, i) for i in range(400)),
        "\r\r".join(sentences(20, i) for i in range(400)),
        "Title\n\n\n" + "\n\n".join("\n".join(sentences(3, i + j) for j in range(4)) for i in range(1000)),
    ],
    f"a document ends at {MARKER}": [
        MARKER.join(sentences(20, i) for i in range(400)),
        "".join(f"{sentences(20, i)}\n\nMore.\n{MARKER}\n" for i in range(400)),
    ],
    "cut at the ends of sentences into documents of about 16,000 characters": [
        sentences(8000),
        "".join("日本語の文。" for _ in range(40_000)),
        "x" * 300_000,
        "Title\n" + sentences(30_000),
    ],
    "cut at line ends into documents of about 16,000 characters": [
        "\n".join((sentences(6, i) + " " + sentences(6, i))[:68].ljust(68, "x") for i in range(3000)),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in RULES.items() for text in texts])
def test_the_rule_of_a_long_file(tmp_path, rule, text):
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert str(plain.cut_of(tmp_path / "a.txt")) == rule
    split = find_text(tmp_path, "b")
    found = list(iterate_texts(split.train))
    assert len(found) > 5 and solid("".join(found)) == solid(text)
    assert max(map(len, found)) <= 2 * plain.DOCUMENT_CHARS or "blank" in rule
    assert list(iterate_texts(split.val)) == found or "sentences" in rule  # a compressed file is one block


def test_items_are_documents_without_their_separators():
    stories = [f"Story {i}.\n\nIt has two paragraphs.\n" for i in range(3)]
    assert list(documents(f"\n{MARKER}\n".join(stories), Cut("markers"))) == [story.strip("\n") for story in stories]
    assert list(documents("ada\nbo\n\n cem \n", Cut("lines"))) == ["ada", "bo", " cem "]


def test_markers_are_never_text_even_in_a_short_file(tmp_path):
    (tmp_path / "a.txt").write_text(f"one\n{MARKER}\ntwo\n{MARKER}\n")
    (tmp_path / "b.txt").write_text("three")
    assert list(iterate_texts(find_text(tmp_path).train)) == ["one", "two"]


def test_one_line_of_a_long_text_in_pieces_ends_with_sentences(tmp_path):
    text = sentences(10_000)
    found = list(documents(text, choose_cut(text.encode()[: 1 << 18])))
    assert len(found) > 5 and all(piece.endswith(".") for piece in found)
    assert " ".join(found) == text


def test_a_paragraph_too_long_for_a_document_is_cut_and_others_are_not():
    paragraphs = [sentences(20), "\n".join(sentences(40, i) for i in range(60)), sentences(30)]
    found = list(documents("\n\n".join(paragraphs), Cut("blank lines", 1000)))
    assert found[0] == paragraphs[0] and found[-1] == paragraphs[-1] and len(found) > 20
    assert "\n".join(found[1:-1]).replace("\n", " ") == paragraphs[1].replace("\n", " ")


LONE = [
    sentences(30),
    "\n".join(["ada", "bo", "cem", "dil"] * 9),
    "\n\n".join(sentences(2, i) for i in range(40)),
    sentences(40).replace(". ", ".\r"),
    f"\n{MARKER}\n".join(sentences(3, i) for i in range(9)),
    "two\nlines",
]


@pytest.mark.parametrize("text", LONE)
def test_a_lone_short_file_is_enough(tmp_path, text):
    (tmp_path / "poems.txt").write_bytes(text.encode())
    split = find_text(tmp_path)
    train, val = list(iterate_texts(split.train)), list(iterate_texts(split.val))
    assert train and val and split.how_split.startswith("one in ")
    assert len(solid("".join(train))) + len(solid("".join(val))) == len(solid(text))


def test_long_files_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 50_000)
    (tmp_path / "a.txt").write_text(sentences(20_000))
    blocks = TextBlocks(TextFiles((tmp_path / "a.txt",)))
    size = (tmp_path / "a.txt").stat().st_size
    assert len(blocks) == -(-size // 50_000)
    assert max(sum(map(len, block)) for block in blocks) < 60_000
