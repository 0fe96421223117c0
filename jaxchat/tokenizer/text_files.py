"""Text files in Arrow's layout, the form in which the Rust trainer reads text without a Python string for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from jaxchat.errors import UserError, check
from jaxchat.storage import first_line

COLUMN = "text"
ROWS = 128  # of parquet at once: about a megabyte, which fits a processor's cache
BLOCK_BYTES = 1 << 20  # of plain text at once

# Where some texts are from, for messages; their offsets; their UTF-8. Text i is `utf8[offsets[i] : offsets[i + 1]]`.
Batch = tuple[str, Int64[np.ndarray, "N+1"], UInt8[np.ndarray, "B"]]

# A place where the default split pattern ends a piece too: between a line break and something visible in ASCII.
_CUT = re.compile(rb"\n(?=[!-~])")


def read_batches(paths: Iterable[str]) -> Iterator[Batch]:
    """The texts of `.parquet` files (one column `text`, see `is_text`; null rows are skipped) and of plain text files.

    A row of parquet is one text. A plain file is cut into texts of about `BLOCK_BYTES`.

    Raises:
      UserError: a file is missing, damaged, has no column `text` or several, or is not UTF-8.
    """
    for path in paths:
        try:
            yield from _read_parquet(path) if path.lower().endswith(".parquet") else _read_plain(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type may be text: strings or bytes, also as a dictionary, or nothing but nulls."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binaries = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in (*strings, *binaries, pa.types.is_null))


def _read_parquet(path: str) -> Iterator[Batch]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        count = names.count(COLUMN)
        check(count > 0, f"{path} cannot be read: it has no column {COLUMN!r}; its columns are {', '.join(names)}")
        check(count == 1, f"{path} cannot be read: it has {count} columns {COLUMN!r}; keep one")
        kind = file.schema_arrow.field(COLUMN).type
        check(is_text(kind), f"{path} cannot be read: column {COLUMN!r} contains {kind}, not strings")
        for batch in file.iter_batches(ROWS, columns=[COLUMN]):
            # Large strings have offsets of 64 bits; the bytes of strings stay where they are.
            texts = batch.column(0).cast(pa.large_string()).drop_null()
            _, offsets, utf8 = texts.buffers()
            offsets = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
            yield path, offsets, np.frombuffer(utf8 or b"", np.uint8)


def _read_plain(path: str) -> Iterator[Batch]:
    rest, start = b"", 0  # `start`: of `rest` in the file
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK_BYTES)
            known, rest = len(rest), rest + block
            is_last = len(block) < BLOCK_BYTES
            cuts = (cut.end() for cut in _CUT.finditer(rest, max(0, known - 1)))
            end = len(rest) if is_last else max(cuts, default=0)
            text, rest = rest[:end], rest[end:]
            _check_utf8(path, text, start)
            yield path, np.array([0, end], np.int64), np.frombuffer(text, np.uint8)
            if is_last:
                return
            start += end


def _check_utf8(path: str, text: bytes, start: int) -> None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: byte {start + error.start} is not UTF-8") from None
