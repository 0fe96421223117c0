"""Text of models and users on a terminal, in a pipe or in a file: as it was written.

Only control codes are left out, Unicode's category Cc: a terminal obeys them. Line breaks and tabs stay. So does
everything else, including marks of the writing direction, which Arabic and Hebrew need and which act within their own
line only. Nothing is wrapped, and neither markup nor emoji codes mean anything: all of it is written by `write`, or
above a live display of rich's as `segments`.
"""

from __future__ import annotations

import os
from typing import Literal, TextIO

from rich.segment import Segment, Segments
from rich.style import Style as RichStyle

Style = Literal["", "bold", "dim", "red"]
_SGR = {"bold": 1, "dim": 2, "red": 31}  # "select graphic rendition", the terminal's own codes
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0)}
_REMOVED = dict.fromkeys(_CONTROLS - {ord("\n"), ord("\t")})
_ESCAPED = {code: repr(chr(code))[1:-1] for code in _CONTROLS | {0x2028, 0x2029}}


def without_controls(text: str) -> str:
    """`text` without control codes, other than line breaks and tabs."""
    return text.translate(_REMOVED)


def one_line(text: str) -> str:
    r"""`text` with control codes and line breaks spelled out, as in `\x1b` and `\n`: for messages that hold a name."""
    return text.translate(_ESCAPED)


def write(text: str, stream: TextIO | None, *, style: Style = "", end: str = "") -> None:
    """Writes `text` without control codes, then `end`, and flushes.

    A style is shown on a terminal, unless NO_COLOR is set or TERM says that it knows none. A stream that was closed
    when the program began is None, and gets nothing.
    """
    if stream is None:
        return
    text = without_controls(text)
    begin, reset = codes(style, stream) if text else ("", "")
    stream.write(f"{begin}{text}{reset}{end}")
    stream.flush()


def codes(style: Style, stream: TextIO) -> tuple[str, str]:
    """What begins and what ends a style on this stream; nothing where none is shown."""
    return (f"\x1b[{_SGR[style]}m", "\x1b[0m") if style and _shows_styles(stream) else ("", "")


def segments(*pieces: tuple[str, Style]) -> Segments:
    """Pieces of text and their styles, which a console of rich's prints unchanged, apart from control codes."""
    styles = {"": None, "bold": RichStyle(bold=True), "dim": RichStyle(dim=True), "red": RichStyle(color="red")}
    return Segments([Segment(without_controls(text), styles[style]) for text, style in pieces])


def _shows_styles(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")
