"""Lines typed at the prompt: edited, completed and found again by readline, where Python has it."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from jaxchat.runs.files import parse_line, split_lines
from jaxchat.verbatim import codes, one_line, write

KEPT = 1000  # entries of the history that are read
LONGEST_ENTRY = 1 << 16  # characters; a longer one is not kept on disk
# The arrow keys search for what begins like the line so far. Both forms of their codes: terminals differ.
_GNU = (
    "tab: complete",
    *(rf'"\e{key}A": history-search-backward' for key in "[O"),
    *(rf'"\e{key}B": history-search-forward' for key in "[O"),
)
_LIBEDIT = ("bind ^I rl_complete", r"bind \e[A ed-search-prev-history", r"bind \e[B ed-search-next-history")


def history_file() -> Path | None:
    """Where what was typed is kept: `jaxchat/chat_history.jsonl` in the user's folder for state; None without one."""
    folder = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(folder):
        folder = os.path.expanduser("~/.local/state")
    return Path(folder) / "jaxchat" / "chat_history.jsonl" if os.path.isabs(folder) else None


class LineEditor:
    """Reads lines. What is typed is remembered, also for later sessions if there is a `history`, a file of JSON lines.

    Args:
      complete: what the word in the second argument may become, after the text in the first.
    """

    def __init__(self, history: Path | None, complete: Callable[[str, str], Sequence[str]] = lambda before, word: ()):
        self._history, self._complete, self._last = history, complete, ""
        self._readline: Any = None
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return  # input() does without it there
        with contextlib.suppress(ImportError):
            import readline

            self._readline = readline
            self._set_up()

    def _set_up(self) -> None:
        readline, libedit = self._readline, "libedit" in (self._readline.__doc__ or "")
        for line in _LIBEDIT if libedit else _GNU:
            readline.parse_and_bind(line)
        if not libedit and os.environ.get("TERM") not in (None, "", "dumb", "unknown"):
            readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
        readline.set_auto_history(False)  # a message may have several lines
        readline.set_completer_delims(" \t\n")
        readline.set_completer(self._completion)
        self._on_disk(self._load)

    def read(self, prompt: str, terminal: TextIO | None) -> str:
        """The next line, which may have line breaks if it was pasted. The prompt goes to `terminal` if output does not.

        Raises:
          EOFError: the input ends.
        """
        if not sys.stdout.isatty():  # input() would write its prompt to standard output
            write(prompt, terminal, style="bold")
            return input()
        begin, end = codes("bold", sys.stdout)
        if begin and self._readline is not None:
            begin, end = (f"\x01{code}\x02" for code in (begin, end))  # readline must know that they take no room
        return input(f"{begin}{prompt.rstrip()}{end} ")

    def remember(self, text: str) -> None:
        """Adds what was typed to the history, as one entry."""
        if self._readline is None or not text or text == self._last:
            return
        self._last = text
        self._readline.add_history(text)
        if len(text) <= LONGEST_ENTRY:
            self._on_disk(lambda path: self._append(path, [text]))

    def _on_disk(self, action: Callable[[Path], None]) -> None:
        """Does something with the file; one that cannot be used is told once, and then left alone."""
        if self._history is None:
            return
        try:
            action(self._history)
        except OSError as error:
            line = f"(the history is not kept: {self._history}: {error.strerror or error})"
            write(one_line(line), sys.stderr, style="dim", end="\n")
            self._history = None

    def _load(self, path: Path) -> None:
        if not path.exists():
            return
        lines = split_lines(path.read_bytes())
        entries = [entry for line in lines[-KEPT:] if (entry := parse_line(line, str))]
        for entry in entries:
            self._readline.add_history(entry)
        self._last = entries[-1] if entries else ""
        if len(lines) > 2 * KEPT:
            part = path.with_name(f"{path.name}.{os.getpid()}")
            self._append(part, entries)
            part.replace(path)

    def _append(self, path: Path, entries: Sequence[str]) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(file, "ab") as out:
            os.chmod(path, 0o600)  # whatever it was
            out.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())

    def _completion(self, word: str, number: int) -> str | None:
        before = self._readline.get_line_buffer()[: self._readline.get_begidx()]
        found = self._complete(before, word)
        return found[number] if number < len(found) else None


def files_like(word: str) -> list[str]:
    """The files and folders whose paths begin with `word`; a folder ends with a slash."""
    found = sorted(glob.glob(f"{glob.escape(os.path.expanduser(word))}*"))
    return [f"{path}{os.sep * os.path.isdir(path)}" for path in found]
