"""An answer's text: the same for every way of cutting it into tokens and chunks, in a pipe and on a terminal."""

import contextlib
import io
import os
import pty
import termios
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.serve.terminal import show
from jaxchat.serve.writer import Writer
from jaxchat.tokenizer import Tokenizer
from jaxchat.verbatim import segments

TOKENIZER = Tokenizer.train_from_iterator(["nice :smile: day, 50:50 a:b:c 🙂 Grüße " * 3], 285)
MARKED = {name.strip("<|>"): id for name, id in TOKENIZER.special_tokens.items()}
ODD = [":smile: :100:", "3:100:5", "[bold]x[/bold]", "[/]", "\tif x:\n\t\treturn\n", " \n  two  ", "a\n\n\n", "x" * 300]
texts = st.text() | st.text("a🙂é\t\n\r\x1b\x9b:[]/ \u202e\u200d\u2028") | st.sampled_from(ODD)


def plain(text):
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def shown(ids, sizes):
    """What a pipe gets when the tokens come in chunks of these sizes, over and over."""
    raw = io.BytesIO()
    out, writer, at = io.TextIOWrapper(raw, encoding="utf-8", newline=""), Writer(TOKENIZER), 0
    while at < len(ids):
        for size in sizes:
            show(writer.write(ids[at : at + size]), out)
            at += size
    show(writer.close(), out)
    return raw.getvalue()


@given(texts, st.lists(st.integers(1, 9), min_size=1), st.booleans())
def test_a_pipe_gets_the_text_without_control_codes(text, sizes, as_bytes):
    ids = list(text.encode()) if as_bytes else TOKENIZER.encode(text)
    assert shown(ids, sizes) == plain(text).encode()


@given(st.binary() | st.binary().map(lambda data: "🙂é".encode() + data), st.lists(st.integers(1, 9), min_size=1))
def test_bytes_that_are_not_text_are_replaced_alike_for_every_cut(data, sizes):
    assert shown(list(data), sizes) == plain(data.decode(errors="replace")).encode()


@given(texts, st.lists(st.integers(1, 9), min_size=1), st.sampled_from([1, 10, 80, 1000]))
def test_a_terminal_of_any_width_gets_the_same(text, sizes, width):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, width))
    attributes = termios.tcgetattr(slave)
    attributes[1] &= ~termios.OPOST  # the terminal itself would write \r\n for \n
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    text = text[:200]
    with open(slave, "w", encoding="utf-8", newline="") as out:
        writer, ids = Writer(TOKENIZER), TOKENIZER.encode(text)
        for at in range(0, len(ids), sizes[0]):
            show(writer.write(ids[at : at + sizes[0]]), out)
        show(writer.close(), out)
        os.set_blocking(master, False)
        seen = b""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(master, 65536):
                seen += data
    os.close(master)
    assert seen == plain(text).encode()


def spelled(*parts):
    """The text and its styles for parts that are names of special tokens, or text."""
    ids = [id for part in parts for id in ([MARKED[part]] if part in MARKED else TOKENIZER.encode(part))]
    writer = Writer(TOKENIZER)
    pieces = [*writer.write(ids), *writer.close()]
    return "".join(text for text, _ in pieces), "".join(text for text, style in pieces if style == "dim")


CALL = ("python_start", "1+1", "python_end", "output_start", "2", "output_end")


@pytest.mark.parametrize(
    ("parts", "text", "dim"),
    [
        ((*CALL, "two"), "⟨1+1 → 2⟩ two", "⟨1+1 → 2⟩ "),
        (CALL[:1], "⟨", "⟨"),
        (CALL[:2], "⟨1+1", "⟨1+1"),
        (CALL[:3], "⟨1+1", "⟨1+1"),
        (CALL[:5], "⟨1+1 → 2", "⟨1+1 → 2"),
        (("a", "output_end", "b"), "a<|output_end|>b", "<|output_end|>"),
        (("python_start", "1", "python_start"), "⟨1<|python_start|>", "⟨1<|python_start|>"),
        (("python_start", "python_end", "output_start", "output_end", "x"), "⟨ → ⟩ x", "⟨ → ⟩ "),
    ],
)
def test_tool_calls_are_marked_as_far_as_they_went(parts, text, dim):
    assert spelled(*parts) == (text, dim)


def test_whole_characters_come_as_soon_as_they_are_whole():
    writer = Writer(TOKENIZER)
    pieces = ["".join(text for text, _ in writer.write([byte])) for byte in "a🙂é".encode()]
    assert pieces == ["a", "", "", "", "🙂", "", "é"]
    half = [*"🙂".encode()[:3], MARKED["python_start"]]
    assert "".join(text for text, _ in writer.write(half)) == "\ufffd⟨"


@given(texts)
def test_a_console_prints_segments_unchanged(text):
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=20).print(segments((text, "dim"), ("\n", "")), soft_wrap=True)
    assert out.getvalue() == plain(text) + "\n"
