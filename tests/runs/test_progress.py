"""The live line on a terminal, and what is printed above it."""

import contextlib
import os
import pty
import sys
import termios

import pytest

from jaxchat.runs.progress import LiveLine, format_left_out, format_number

MARKUP, INDENTED, FORMAT = ":smile: 3:100:5 [bold]x[/bold]", "a\tb\n\tif x:\n", "👨\u200d👩\u200d👧 \u202eabc\u202c"
COMPLETION = f" {MARKUP}\t{INDENTED}{'long ' * 30}\x1b[2J{FORMAT} end"


@pytest.mark.parametrize("width", [20, 80])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_sample_is_what_the_model_wrote(monkeypatch, width, drawn):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, width))
    attributes = termios.tcgetattr(slave)
    attributes[1] &= ~termios.OPOST  # the terminal itself would write \r\n for \n
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with open(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        line = LiveLine("sft", 10)
        if drawn:
            line.update(1, {"loss": 1.0})
        line.show_sample(1, "> [who]", COMPLETION)
        line.close()
    os.set_blocking(master, False)
    seen = b""
    with contextlib.suppress(OSError):
        while data := os.read(master, 65536):
            seen += data
    os.close(master)
    text = f"> [who]{COMPLETION}\n".replace("\x1b", "")
    plain = seen.decode().replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert f"sft  sample at step 1: {text}" in plain


def test_what_is_printed_to_a_file_meanwhile_stays_there(monkeypatch, capsys):
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with open(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        line = LiveLine("evaluate", 1)
        line.show_progress("sft gsm8k", 1, 2)
        print("evaluate  sft  gsm8k  50.0%")
        line.close()
    os.close(master)
    assert capsys.readouterr().out == "evaluate  sft  gsm8k  50.0%\n"


def test_numbers_and_what_was_left_out():
    assert [format_number(n, "file") for n in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]
    assert format_left_out({"documents_not_utf8": 1, "bad_conversations": 1, "broken_lines": 1234}) == (
        "1 bad conversation, 1,234 broken lines, 1 document not UTF-8"
    )


def test_what_the_steps_wait_for_shows_its_progress(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("jaxchat.runs.progress.time.monotonic", lambda: clock[0])
    line = LiveLine("pretrain", 10)
    for clock[0], done in ((100.0, 1000), (105.0, 2000), (120.0, 5000), (200.0, 1000), (220.0, 9000)):
        line.show_progress("CORE", done, 9000)
    assert capsys.readouterr().err.splitlines() == [
        "pretrain  CORE  11%",
        "pretrain  CORE  56%  20s left",  # 5 seconds after the first line was too soon for another
        "pretrain  CORE  11%",  # the next time it is measured
        "pretrain  CORE  100%",
    ]
