"""What a person types at the prompt, and what a pipe or a file brings."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

from jaxchat.errors import UserError, check
from jaxchat.serve.line_editor import LineEditor
from jaxchat.stopping import Interrupted, signals_raise
from jaxchat.verbatim import write

LONGEST = 16 * 2**20  # bytes: more than fits into any context, and soon read
QUOTES = '"""'  # around a message of several lines


def piped_message(stream: TextIO | None) -> str:
    """All of standard input as one message: UTF-8, or else in the encoding of the locale.

    Line breaks of Windows and a byte order mark are taken off, and so are line breaks at the end.

    Raises:
      UserError: it is closed, unreadable, empty, not text, or longer than 16 MiB.
    """
    instead = "pipe in a question, give -p TEXT, or start the chat in a terminal"
    if stream is None:
        raise UserError(f"standard input is closed; {instead}")
    try:
        data = stream.buffer.read(LONGEST + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"standard input cannot be read ({error}); {instead}") from None
    check(len(data) <= LONGEST, f"standard input has more than {LONGEST // 2**20} MiB; ask about a part of it")
    text = io.IncrementalNewlineDecoder(None, translate=True).decode(_decoded(data, stream.encoding), final=True)
    text = text.removeprefix("\ufeff").rstrip("\n")
    check(bool(text.strip()), f"standard input is empty; {instead}")
    return text


def _decoded(data: bytes, locale: str) -> str:
    convert = "give it as text; iconv -f ENCODING -t UTF-8 converts it from another encoding"
    at = data.find(b"\0")
    check(at < 0, f"standard input is not text: byte {at:,} is 0; {convert}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            return data.decode(locale)
        raise UserError(
            f"standard input is not UTF-8: byte {error.start:,} is 0x{data[error.start]:02x}; {convert}"
        ) from None


class Typed(NamedTuple):
    """What was typed at the prompt: a message or, if it begins with a slash and is no `block`, a command."""

    text: str
    block: bool = False


def typed(editor: LineEditor) -> Iterator[Typed]:
    """The messages and commands typed at the prompt that are not blank, until Ctrl-D.

    A line that ends in a backslash goes on with the next one, and a message between lines of three quotation marks has
    all that stands between them; there Ctrl-D only ends the message. Pasted lines are one message where the terminal
    marks them as pasted. The prompt goes to the terminal, and never into a file that standard output was redirected to.
    """
    with contextlib.ExitStack() as stack:
        terminal = sys.stderr if sys.stderr.isatty() else None
        if terminal is None:
            with contextlib.suppress(OSError):
                terminal = stack.enter_context(open("/dev/tty", "w"))
        lines: list[str] = []  # of a message that goes on
        while True:
            ended = False
            try:
                with signals_raise():
                    lines.append(editor.read("... " if lines else "> ", terminal))
            except (EOFError, OSError):  # Ctrl-D, or the terminal is gone
                write("\n", terminal)
                if not lines:
                    return
                ended = True
            except Interrupted:  # by another signal than Ctrl-C
                raise
            except KeyboardInterrupt:
                what = "message discarded; " if lines else ""
                write(f"\n({what}press Ctrl-D or type /quit to leave)\n", terminal)
                lines.clear()
                continue
            message = whole_message(lines, ended=ended)
            if message is not None:
                editor.remember("\n".join(lines).strip() if message.block else message.text)
                lines.clear()
                if message.text:
                    yield message


def whole_message(lines: Sequence[str], *, ended: bool = False) -> Typed | None:
    """The message that typed lines are; None if it goes on with the next one. `ended` says that there is none."""
    text = "\n".join(lines).strip()
    if text.startswith(QUOTES):
        inside = text.removeprefix(QUOTES)
        if not inside.endswith(QUOTES) and not ended:
            return None
        return Typed(inside.removesuffix(QUOTES).strip("\n"), block=True)
    if lines[-1].endswith("\\") and not ended:
        return None
    return Typed("\n".join(line.removesuffix("\\") for line in lines).strip())
