"""What a file of text is called, how it may be compressed, and what its first bytes show it to be instead."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import shlex
import zlib
from collections.abc import Callable
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa

from jaxchat.storage import AnyPath

Format = Literal["parquet", "jsonl", "json", "txt"]

_FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
}
HEAD_BYTES = 4096  # from which the contents of a file are recognised


def _by_arrow(codec: str) -> Callable[[IO[bytes]], Any]:
    return lambda file: io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec))


_UNPACK: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _by_arrow("zstd"),
    ".lz4": _by_arrow("lz4"),
    ".br": _by_arrow("brotli"),
}
# What reading a compressed file raises besides OSError if it is damaged.
DAMAGE = (EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException)


class Form(NamedTuple):
    """What a file's name says about it: the format, and the ending of its compression, "" for none."""

    format: Format
    compression: str

    def __str__(self) -> str:
        return self.format + self.compression


def form_of(path: AnyPath) -> Form | None:
    """The form of a file of text by its name, in upper or lower case; None if it is called something else.

    Parquet has its own compression, so `.parquet.gz` is none.
    """
    name = path.name.lower()
    compression = next((end for end in _UNPACK if name.endswith(end)), "")
    name = name.removesuffix(compression)
    kind: Format | None = next((kind for end, kind in _FORMATS.items() if name.endswith(end)), None)
    if kind is None or (kind == "parquet" and compression):
        return None
    return Form(kind, compression)


def bare_name(path: AnyPath) -> str:
    """A file's name without the endings that tell its form."""
    form = form_of(path)
    if form is None:
        return path.name
    name = path.name[: len(path.name) - len(form.compression)]
    return name[: name.rindex(".")]


def read_whole(path: AnyPath) -> bytes:
    """All bytes of a file, decompressed as its name says. Raises OSError or one of `DAMAGE`."""
    with path.open("rb") as file:
        return unpacked(path, file).read()


def unpacked(path: AnyPath, file: IO[bytes]) -> IO[bytes]:
    """A file that was opened, decompressed as its name says while it is read, which raises OSError or `DAMAGE`."""
    form = form_of(path)
    return _UNPACK[form.compression](file) if form is not None and form.compression else file


def read_head(path: AnyPath) -> bytes:
    """The first bytes of a file, as they are stored."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


_SIGNS = {
    b"\x1f\x8b": ("gzip-compressed", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", ".zst"),
    b"BZh": ("bzip2-compressed", ".bz2"),
    b"\xfd7zXZ\0": ("xz-compressed", ".xz"),
    b"\x04\x22\x4d\x18": ("lz4-compressed", ".lz4"),
    b"PAR1": ("parquet", ".parquet"),
}
_OTHERS = {b"PK\x03\x04": "a zip archive; unpack it", b"%PDF": "a PDF; convert it to plain text"}
_UTF32, _UTF16 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), (b"\xff\xfe", b"\xfe\xff")


def something_else(path: AnyPath, head: bytes) -> str | None:
    """What a file that is called text contains instead, and what to do about it; None if it may well be text.

    Args:
      head: its first bytes, decompressed.
    """
    for sign, (kind, ending) in _SIGNS.items():
        if head.startswith(sign):
            return f"is {kind}; rename it so that its name ends in {ending}"
    for sign, kind in _OTHERS.items():
        if head.startswith(sign):
            return f"is {kind}"
    encoding = _encoding(head)
    if encoding is not None:
        return f"is {encoding}, not UTF-8; convert it with: {_iconv(path, encoding)}"
    if b"\0" in head:
        return "contains zero bytes, so it is not text; remove it"
    return None


def not_packed(path: AnyPath) -> str | None:
    """What is wrong with a file whose name says that it is compressed, if its first bytes say that it is not."""
    form = form_of(path)
    signs = [sign for sign, (_, ending) in _SIGNS.items() if form is not None and ending == form.compression]
    head = read_head(path)
    if not signs or head.startswith(signs[0]):
        return None
    assert form is not None
    other = something_else(path, head)
    return f"it {other}" if other else f"it is not compressed as its name says; take {form.compression} off the name"


def from_latin_1(path: AnyPath, record: bytes) -> str:
    """How a message about a record that is not UTF-8 goes on, if it may be Latin-1; "" if it has UTF-8 as well."""
    try:
        is_utf8 = bool(record.decode())
    except UnicodeDecodeError:
        is_utf8 = not record.decode("utf-8", "ignore").isascii()
    if is_utf8 or form_of(path) not in (("txt", ""), ("jsonl", ""), ("json", "")):
        return ""
    encoding = "WINDOWS-1252" if re.search(rb"[\x80-\x9f]", record) else "LATIN1"
    return f"; if the file is {encoding}, convert it with: {_iconv(path, encoding)}"


def _encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 by the byte order mark, or UTF-16 by the zero bytes of its ASCII characters."""
    if head.startswith(_UTF32):
        return "UTF-32"
    if head.startswith(_UTF16):
        return "UTF-16"
    for zeros, others, name in ((head[1::2], head[::2], "UTF-16LE"), (head[::2], head[1::2], "UTF-16BE")):
        if zeros.count(0) > len(zeros) / 4 and others.count(0) == 0:
            return name
    return None


def _iconv(path: AnyPath, encoding: str) -> str:
    old, new = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    return f"iconv -f {encoding} -t UTF-8 {old} > {new} && mv {new} {old}"
