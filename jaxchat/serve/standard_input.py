"""What a person types at the prompt, and what a pipe or a file brings."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import TextIO

from jaxchat.errors import UserError, check
from jaxchat.stopping import Interrupted, signals_raise
from jaxchat.verbatim import write

LONGEST = 16 * 2**20  # bytes: more than fits into any context, and soon read


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


def typed_lines() -> Iterator[str]:
    """The lines typed at the prompt that are not blank, until Ctrl-D.

    The prompt goes to the terminal, and never into a file that standard output was redirected to.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    with contextlib.ExitStack() as stack:
        terminal = sys.stderr if sys.stderr.isatty() else None
        if terminal is None:
            with contextlib.suppress(OSError):
                terminal = stack.enter_context(open("/dev/tty", "w"))
        while True:
            try:
                with signals_raise():
                    if sys.stdout.isatty():
                        line = input("> ")
                    else:  # input() would write its prompt to standard output
                        write("> ", terminal)
                        line = input()
            except (EOFError, OSError):  # Ctrl-D, or the terminal is gone
                write("\n", terminal)
                return
            except Interrupted:  # by another signal than Ctrl-C
                raise
            except KeyboardInterrupt:
                write("\n(press Ctrl-D or type /quit to leave)\n", terminal)
                continue
            if line := line.strip():
                yield line
