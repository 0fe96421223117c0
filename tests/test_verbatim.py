"""Text of models and users: unchanged but for control codes, and styled only where a terminal shows styles."""

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.verbatim import one_line, without_controls, write


class Terminal(io.StringIO):
    def isatty(self):
        return True


@given(st.text())
def test_control_codes_and_nothing_else_are_left_out(text):
    assert without_controls(text) == "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


@given(st.text())
def test_one_line_is_one_line_and_loses_nothing(text):
    line = one_line(text)
    assert len(line.splitlines()) <= 1 and without_controls(line) == line
    assert one_line("run\x1b[31m\n[b] :smile:\u202e") == "run\\x1b[31m\\n[b] :smile:\u202e"


@pytest.mark.parametrize(
    ("stream", "variables", "styled"),
    [
        (Terminal, {}, True),
        (io.StringIO, {}, False),
        (Terminal, {"NO_COLOR": "1"}, False),
        (Terminal, {"NO_COLOR": ""}, True),
        (Terminal, {"TERM": "dumb"}, False),
    ],
)
def test_styles(monkeypatch, stream, variables, styled):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = stream()
    write("a\x1b[2J\tb", out, style="dim", end="\n")
    assert out.getvalue() == ("\x1b[2ma[2J\tb\x1b[0m\n" if styled else "a[2J\tb\n")


def test_a_closed_stream_gets_nothing():
    write("text", None)
