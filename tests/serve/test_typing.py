"""What a person types at the prompt: messages of several lines, pasted text, and the history across sessions."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from jaxchat.serve.line_editor import KEPT, LineEditor, history_file
from jaxchat.serve.standard_input import Typed, whole_message
from tests.serve.pseudo_terminal import Terminal

ROOT = Path(__file__).parents[2]
READER = """
import sys
from pathlib import Path
from jaxchat import stopping
stopping.begin()
from jaxchat.serve.commands import completions
from jaxchat.serve.line_editor import LineEditor
from jaxchat.serve.standard_input import typed
print("ready")
for message in typed(LineEditor(Path(sys.argv[1]), completions)):
    print("got", repr(message.text), message.block)
print("left")
"""
UP = "\x1b[A"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one"], Typed("one")),
        ([" one "], Typed("one")),
        ([""], Typed("")),
        (["one\\"], None),
        (["one\\", "two"], Typed("one\ntwo")),
        (["one\\", ""], Typed("one")),
        (["/system one\\", "two"], Typed("/system one\ntwo")),
        (["pasted\n\tcode\\\nmore\n"], Typed("pasted\n\tcode\\\nmore")),
        (['"""'], None),
        (['"""', "/quit"], None),
        (['"""', "/quit", '"""'], Typed("/quit", block=True)),
        (['"""  one', "", '  two"""'], Typed("  one\n\n  two", block=True)),
        (['"""one"""'], Typed("one", block=True)),
        (['"""', '"""'], Typed("", block=True)),
        (['"""\n/pasted\n"""'], Typed("/pasted", block=True)),
        (['He said """hm"""'], Typed('He said """hm"""')),
    ],
)
def test_lines_make_a_message(lines, message):
    assert whole_message(lines) == message


def test_the_end_of_input_ends_a_message():
    assert whole_message(['"""', "one", "two"], ended=True) == Typed("one\ntwo", block=True)
    assert whole_message(["one\\"], ended=True) == Typed("one")


def reader(history, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "INPUTRC": "/dev/null", **variables}
    return Terminal(["-c", READER, str(history)], environment)


def say(terminal, typed, expected):
    """Types at the prompt; keys that come before it would be read by the terminal itself."""
    terminal.expect("> ")
    terminal.type(typed)
    terminal.expect(expected)


def end(terminal):
    terminal.expect("> ")
    terminal.type("\x04")
    code, rest = terminal.expect_end()
    assert code == 0 and "left" in rest and "Traceback" not in rest


def test_messages_of_several_lines_in_a_terminal(tmp_path):
    with reader(tmp_path / "history") as terminal:
        say(terminal, "one\\\n", "... ")
        terminal.type("two\n")
        terminal.expect(r"got 'one\ntwo' False")
        say(terminal, '"""\n', "... ")
        terminal.type("/quit\n")
        terminal.expect("... ")
        terminal.type('"""\n')
        terminal.expect("got '/quit' True")
        say(terminal, "half\\\n", "... ")
        terminal.type("\x03")
        terminal.expect("(message discarded; press Ctrl-D or type /quit to leave)")
        say(terminal, '"""left\n', "... ")
        terminal.type("open\n")
        terminal.expect("... ")
        terminal.type("\x04")
        terminal.expect(r"got 'left\nopen' True")
        end(terminal)


readline = pytest.importorskip("readline")
gnu = pytest.mark.skipif("libedit" in (readline.__doc__ or ""), reason="this Python has libedit instead of readline")


@gnu
def test_pasted_lines_are_one_message(tmp_path):
    with reader(tmp_path / "history") as terminal:
        say(terminal, "\x1b[200~def f():\r\treturn 1\r\x1b[201~\n", r"got 'def f():\n\treturn 1' False")
        end(terminal)


@gnu
def test_the_history_outlives_the_session(tmp_path):
    history = tmp_path / "state" / "history"
    with reader(history) as terminal:
        for text in ("What is one?", "Who are you?", "/set top-k 3"):
            say(terminal, f"{text}\n", "got ")
        say(terminal, "a\\\n", "... ")
        terminal.type("b\n")
        terminal.expect("got ")
        end(terminal)
    assert stat.S_IMODE(history.stat().st_mode) == 0o600 and stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    entries = [json.loads(line) for line in history.read_text().splitlines()]
    assert entries == ["What is one?", "Who are you?", "/set top-k 3", "a\nb"]
    with reader(history) as terminal:
        say(terminal, f"{UP}\n", r"got 'a\nb' False")
        say(terminal, f"W{UP}{UP}\n", "got 'What is one?' False")  # what begins like the line
        say(terminal, "/sett\t\n", "got '/settings' False")
        end(terminal)


def test_colours_degrade(tmp_path):
    for variables, styled in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        with reader(tmp_path / "history", **variables) as terminal:
            terminal.expect("> ")
            assert ("\x1b[1m" in terminal.raw) == styled
            assert "TERM" not in variables or "\x1b" not in terminal.raw
            terminal.seen = "> "
            end(terminal)


def test_a_history_that_cannot_be_kept_is_told_once(tmp_path):
    (tmp_path / "file").touch()
    with reader(tmp_path / "file" / "history") as terminal:
        say(terminal, "one\n", "(the history is not kept: ")
        terminal.expect("got 'one'")
        say(terminal, "two\n", "got 'two'")
        assert terminal.raw.count("not kept") == 1
        end(terminal)


class Readline:
    """As much of readline as reading and writing the file needs."""

    def __init__(self):
        self.entries = []

    def add_history(self, entry):
        self.entries.append(entry)


def editor(path):
    made = LineEditor(None)
    made._history, made._readline = path, Readline()
    return made


def test_a_long_or_damaged_history_is_shortened(tmp_path):
    path = tmp_path / "history"
    path.write_bytes(b'\xff\n{"a": 1}\n"damaged\n' + b"".join(b'"%d"\n' % i for i in range(3 * KEPT)))
    one = editor(path)
    one._load(path)
    assert one._readline.entries == [str(i) for i in range(2 * KEPT, 3 * KEPT)]
    assert len(path.read_text().splitlines()) == KEPT and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["history"]


def test_two_sessions_share_the_file(tmp_path):
    path = tmp_path / "history"
    one, other = editor(path), editor(path)
    one.remember("a")
    other.remember("b\nc")
    one.remember("d")
    one.remember("d")
    one.remember("x" * 100_000)
    assert [json.loads(line) for line in path.read_text().splitlines()] == ["a", "b\nc", "d"]


def test_where_the_history_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # is ignored, as the specification says
    assert history_file() == tmp_path / ".local/state/jaxchat/chat_history.jsonl"
    monkeypatch.setenv("XDG_STATE_HOME", "/var/mine")
    assert history_file() == Path("/var/mine/jaxchat/chat_history.jsonl")


@pytest.mark.skipif(sys.platform == "win32", reason="os.path asks for another variable there")
def test_without_a_home_there_is_none(monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert history_file() is None
