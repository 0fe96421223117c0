"""Plain text files as documents: where a long one is cut.

A short file is one document. A longer one, and a file that is all the text there is, is cut by the first of these
rules that its beginning fits: at `<|endoftext|>`; at blank lines, into documents of about `DOCUMENT_CHARS`; at line
ends, each line being a document, or about as many characters as above where the lines are wrapped prose; at the ends of
sentences, or else at spaces. Lines end with LF, CR LF or, in a file without LF, with CR.

Only the separators at which a text is cut are left out of its documents, whatever blocks it is read in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Literal

from jaxchat.data.text import reading
from jaxchat.data.text.forms import from_latin_1
from jaxchat.data.text.reading import Border, Findings, after
from jaxchat.storage import AnyPath

Rule = Literal["markers", "blank lines", "lines", "wrapped lines", "sentences"]

DOCUMENT_CHARS = 16_000
LONG_FILE_BYTES = 100_000  # a longer file is a book or a corpus rather than one document
TOO_LONG = 4  # a paragraph or line of more than this many documents' characters is cut itself
MARKER = "<|endoftext|>"
_SAMPLE_BYTES = 1 << 18  # from which the rule for a file is chosen
_WRAPPED_WIDTHS = range(40, 101)  # of the longest line, where prose is broken into lines
_WINDOW_BYTES = 1 << 16  # in which the end of a sentence is looked for

_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？]\s*")
_SPACE = re.compile(r"\s+")
# A class of bytes would match parts of characters.
_SENTENCE_END_BYTES = re.compile(
    r"(?:[.!?]|…)(?:[\"')\]]|”|’|»)*[ \t\r\n]+|(?:。|！|？)[ \t\r\n]*".encode()  # noqa: RUF001
)
_SPACE_BYTES, _CHARACTER = re.compile(rb"[ \t\r\n]+"), re.compile(rb"[^\x80-\xbf]")
_DELIMITERS: dict[Rule, re.Pattern[bytes]] = {
    "markers": re.compile(re.escape(MARKER).encode()),
    "blank lines": re.compile(rb"\r?\n\r?\n"),
    "lines": re.compile(rb"\n"),
    "wrapped lines": re.compile(rb"\n"),
    "sentences": _SPACE_BYTES,
}
_MAC_DELIMITERS = _DELIMITERS | {
    "blank lines": re.compile(rb"\r\r"),
    "lines": re.compile(rb"\r"),
    "wrapped lines": re.compile(rb"\r"),
}


@dataclass(frozen=True)
class Cut:
    """How a file is cut into documents: the rule, about how long documents are, and whether CR alone ends its lines."""

    rule: Rule
    chars: int = DOCUMENT_CHARS
    mac: bool = False

    def __str__(self) -> str:
        about = f"documents of about {self.chars:,} characters"
        return {
            "markers": f"a document ends at {MARKER}",
            "blank lines": f"cut at blank lines into {about}",
            "lines": "each line is a document",
            "wrapped lines": f"cut at line ends into {about}",
            "sentences": f"cut at the ends of sentences into {about}",
        }[self.rule]

    @property
    def delimiter(self) -> re.Pattern[bytes]:
        """Between the records that a block consists of."""
        return (_MAC_DELIMITERS if self.mac else _DELIMITERS)[self.rule]

    @property
    def border(self) -> Border:
        """Where a block ends."""
        return _sentence_border if self.rule == "sentences" else after(self.delimiter)


def choose_cut(sample: bytes, chars: int = DOCUMENT_CHARS) -> Cut:
    """The rule for a file that begins with `sample`."""
    mac = _is_mac(sample)
    text = _with_line_feeds(sample.decode("utf-8", "ignore"), mac)
    if MARKER in text:
        return Cut("markers", chars, mac)
    if 0 < len(text) <= TOO_LONG * chars * len(re.findall("\n\n+", text.strip())):
        return Cut("blank lines", chars, mac)
    lines = text.strip("\n").split("\n")
    if len(lines) == 1 or len(text) > TOO_LONG * chars * len(lines):
        return Cut("sentences", chars, mac)
    return Cut("wrapped lines" if _are_wrapped(lines) else "lines", chars, mac)


def _are_wrapped(lines: list[str]) -> bool:
    """Whether lines are prose that was broken at a width: then most of them are nearly as long as the longest."""
    lengths = [len(line) for line in lines if line]
    width = max(lengths)
    return width in _WRAPPED_WIDTHS and sum(length > 0.8 * width for length in lengths) > len(lengths) / 2


def cut_of(path: AnyPath, chars: int = DOCUMENT_CHARS) -> Cut:
    """The rule for a file that is not compressed."""
    with path.open("rb") as file:
        return choose_cut(file.read(_SAMPLE_BYTES), chars)


def _with_line_feeds(text: str, mac: bool) -> str:
    if "\r" not in text:  # far faster to see than to replace nothing
        return text
    return text.replace("\r", "\n") if mac else text.replace("\r\n", "\n")


# --- from text to documents -----------------------------------------------------------------------------------------


def documents(text: str, cut: Cut) -> Iterator[str]:
    """The documents of a text whose lines end with LF."""
    for part in _between_markers(text):
        if cut.rule == "markers":
            yield part.strip("\n")
        elif cut.rule == "blank lines":
            yield from _group(part.split("\n\n"), "\n\n", cut.chars)
        elif cut.rule == "lines":
            for line in filter(str.strip, part.split("\n")):
                yield from _sentences(line, DOCUMENT_CHARS) if len(line) > TOO_LONG * DOCUMENT_CHARS else [line]
        elif cut.rule == "wrapped lines":
            yield from _group(part.split("\n"), "\n", cut.chars)
        else:
            yield from _sentences(part, cut.chars)


def _between_markers(text: str) -> list[str]:
    if MARKER not in text:
        return [text]
    return [part for part in (part.strip("\n") for part in text.split(MARKER)) if part]


def _group(parts: Iterable[str], separator: str, chars: int) -> Iterator[str]:
    """Joins consecutive parts to documents of at least `chars`, but for the last; far longer ones are cut instead."""
    collected: list[str] = []
    length = 0
    for part in parts:
        if len(part) > TOO_LONG * chars:
            if length:
                yield separator.join(collected)
            collected, length = [], 0
            yield from _group(part.split("\n"), "\n", chars) if "\n" in part else _sentences(part, chars)
            continue
        collected.append(part)
        length += len(part)
        if length >= chars:
            yield separator.join(collected)
            collected, length = [], 0
    if length:
        yield separator.join(collected)


def _sentences(text: str, chars: int) -> Iterator[str]:
    """Pieces of one to two times `chars`: cut where a sentence ends, else at a space, else anywhere."""
    at = 0
    while len(text) - at > 2 * chars:
        window = at + chars, at + 2 * chars
        found = _SENTENCE_END.search(text, *window) or _SPACE.search(text, *window)
        end = window[1] if found is None else found.end()
        yield text[at:end].rstrip()
        at = end
    if rest := text[at:].rstrip():
        yield rest


# --- from files to text -----------------------------------------------------------------------------------------------


def read_short_files(paths: tuple[AnyPath, ...], findings: Findings) -> list[str | None]:
    """The texts of short files: one document each, unless there are markers in it."""
    texts: list[str | None] = []
    for path in paths:
        data = reading.try_read(path, findings)
        text = None if data is None else _decode(path, data, 0, _is_mac(data), findings)
        if text is not None:
            texts += _between_markers(text)
    return texts


def read_packed_file(path: AnyPath, chars: int | None, findings: Findings) -> list[str | None]:
    """The documents of a compressed file. It is cut like any other: with `chars` even if it is short."""
    data = reading.try_read(path, findings)
    if data is None:
        return []
    if chars is None and len(data) <= LONG_FILE_BYTES:
        text = _decode(path, data, 0, _is_mac(data), findings)
        return [] if text is None else [*_between_markers(text)]
    cut = choose_cut(data[:_SAMPLE_BYTES], chars or DOCUMENT_CHARS)
    return [*documents(_decode_records(path, data, 0, cut, findings), cut)]


def read_block(path: AnyPath, start: int, cut: Cut, findings: Findings) -> list[str | None]:
    """The documents of the `BLOCK_BYTES` from `start` of a file that is not compressed."""
    block = reading.try_read_block(path, start, cut.border, findings)
    if block is None:
        return []
    data, begin = block
    return [*documents(_decode_records(path, data, begin, cut, findings), cut)]


def _sentence_border(file: IO[bytes], offset: int) -> int:
    """Where a block may end at or after `offset`: after a sentence if one ends nearby, else after a space, else a
    character."""
    file.seek(offset)
    window = file.read(_WINDOW_BYTES)
    found = _SENTENCE_END_BYTES.search(window) or _SPACE_BYTES.search(window)
    if found is not None:
        return offset + found.end()
    character = _CHARACTER.search(window)
    return offset + (len(window) if character is None else character.start())


def _is_mac(data: bytes) -> bool:
    return b"\r" in data and b"\n" not in data


def _decode_records(path: AnyPath, data: bytes, begin: int, cut: Cut, findings: Findings) -> str:
    """The text of bytes from position `begin` of a file, without the records that are not UTF-8."""
    try:
        return _with_line_feeds(data.decode("utf-8-sig"), cut.mac)
    except UnicodeDecodeError:
        pass
    good, at = [], 0
    ends = [match.span() for match in cut.delimiter.finditer(data)]
    for end, next_begin in [*ends, (len(data), len(data))]:
        text = _decode(path, data[at:end], begin + at, cut.mac, findings)
        if text is not None:
            good += [text, _with_line_feeds(data[end:next_begin].decode(), cut.mac)]
        at = next_begin
    return "".join(good[:-1])


def _decode(path: AnyPath, data: bytes, begin: int, mac: bool, findings: Findings) -> str | None:
    """The text of bytes from position `begin` of a file; None if they are not UTF-8."""
    try:
        return _with_line_feeds(data.decode("utf-8-sig"), mac)
    except UnicodeDecodeError as error:
        remedy = from_latin_1(path, data) or "; convert or remove it"
        findings.bad("documents_not_utf8", f"{path} is not UTF-8 text (byte {begin + error.start})", remedy)
        return None
