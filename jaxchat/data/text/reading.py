"""The documents in files of parquet and JSON, and what to do about damaged ones; `plain` has those of txt files.

Readers report broken lines, unreadable files and the like to `Findings`, which either refuses them or counts them and
lets the reader continue without them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.data.text.forms import DAMAGE, HEAD_BYTES, form_of, from_latin_1, not_packed, read_whole, something_else
from jaxchat.data.text.remedies import join_strings, one_text_column, rename_column
from jaxchat.errors import UserError, check
from jaxchat.storage import AnyPath, first_line, of_the_cloud
from jaxchat.tokenizer.text_files import is_text

OnBad = Literal["refuse", "skip"]

BLOCK_BYTES = 4 << 20  # of jsonl or txt: a few thousand documents, read and parsed in about 50 ms
LONGEST_CHARS = 10_000_000  # of a document; War and Peace has 3 million. More mean lost line breaks, or not text
LONGEST_DELIMITER = 16  # bytes
# Where a block that reaches at least to an offset of a file ends.
Border = Callable[[IO[bytes], int], int]
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BLANK = b" \t\r\n\xef\xbb\xbf"  # around JSON: white space, and the byte order mark of a file


class Findings:
    """The bad text found in a block.

    Args:
      on_bad: whether bad text ends the reading or is left out.
      say: prints a line for the user about each thing that is left out.

    Attributes:
      left_out: how many of each kind were left out: `empty_documents`, `long_documents`, `documents_not_utf8`,
        `broken_lines`, `unreadable_blocks` (row groups of parquet, parts of other files), `unreadable_files`,
        `missing_files`.
    """

    def __init__(self, on_bad: OnBad = "refuse", say: Callable[[str], None] = print):
        self._on_bad, self._say = on_bad, say
        self.left_out: Counter[str] = Counter()

    def bad(self, kind: str, message: str, remedy: str = "") -> None:
        """Counts one of a kind.

        Raises:
          UserError: with the message and the remedy, where bad text is refused.
        """
        check(self._on_bad == "skip", f"{message}{remedy}; --data.on-bad=skip leaves it out")
        self.left_out[kind] += 1
        self._say(f"{message}; left out")

    def keep(self, texts: list[str | None], where: str) -> list[str]:
        """The documents that are neither empty nor too long. Empty ones are counted, and never refused."""
        kept = []
        for text in texts:
            if not text:
                self.left_out["empty_documents"] += 1
            elif len(text) > LONGEST_CHARS:
                length = f"{len(text):,} characters, more than the {LONGEST_CHARS:,} that a document may have"
                self.bad("long_documents", f"{where}: the document beginning {text[:20]!r} has {length}")
            else:
                kept.append(text)
        return kept


class Unreadable(UserError):
    """A file cannot be read at all. `kind` is one of those that `Findings` counts."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def open_parquet(path: AnyPath) -> pq.ParquetFile:
    """Opens a parquet file that has one column `text`, of strings or bytes in UTF-8, plain or as a dictionary.

    Raises:
      Unreadable: it is not parquet, cut short, empty, or missing.
      UserError: it has other columns.
    """
    try:
        file = pq.ParquetFile(_source(path))
    except FileNotFoundError:
        raise Unreadable("missing_files", f"{path} is missing") from None
    except (pa.ArrowException, OSError) as error:
        check_damage(path, error)
        raise Unreadable("unreadable_files", f"{path} is not a parquet file: {first_line(error)}") from None
    schema = file.schema_arrow
    count = schema.names.count("text")
    check(count < 2, f"{path} has {count} columns 'text'; {one_text_column(path)}")
    if not count:
        names = ", ".join(schema.names)
        raise UserError(f"{path} has no column 'text'; its columns are: {names}{_renamed(path, _texts_of(schema))}")
    kind = schema.field("text").type
    check(is_text(kind), f"{path}: column 'text' contains {kind}, not strings; {_of_strings(path, schema)}")
    return file


def _of_strings(path: AnyPath, schema: pa.Schema) -> str:
    """What to do about a column `text` without strings."""
    kind, others = schema.field("text").type, _texts_of(schema)
    if others:
        return f"to train on {others[0]!r}, give it the name 'text' and the other another one"
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list and (pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)):
        return f"to join the strings of each row: {join_strings(path)}"
    return "write the file again with strings in it"


def _texts_of(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if is_text(field.type)]


def _renamed(path: AnyPath, names: list[str]) -> str:
    return f"; to train on one, rename it: {rename_column(path, names)}" if names else ""


def _source(path: AnyPath) -> Path | IO[bytes]:
    """A path that pyarrow can open itself, which it can on this machine only, or an open file."""
    return path if isinstance(path, Path) else path.open("rb")


def read_row_group(path: AnyPath, metadata: pq.FileMetaData, group: int, findings: Findings) -> list[str | None]:
    """The documents of a row group."""
    where = f"{path}: row group {group}"
    try:
        file = pq.ParquetFile(_source(path), metadata=metadata, page_checksum_verification=True)
        column = file.read_row_group(group, columns=["text"]).column("text")
    except FileNotFoundError:
        findings.bad("missing_files", f"{path} is missing")
        return []
    except (pa.ArrowException, OSError) as error:
        check_damage(path, error)
        findings.bad("unreadable_blocks", f"{where} cannot be read: {first_line(error)}")
        return []
    try:
        return (column if pa.types.is_string(column.type) else column.cast(pa.large_string())).to_pylist()
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return _decode_each(column, where, findings)


def _decode_each(column: pa.ChunkedArray, where: str, findings: Findings) -> list[str | None]:
    texts: list[str | None] = []
    for number, data in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            texts.append(None if data is None else data.decode())
        except UnicodeDecodeError as error:
            findings.bad("documents_not_utf8", f"{where}, document {number} is not UTF-8 (byte {error.start})")
    return texts


def check_damage(path: AnyPath, error: Exception) -> None:
    """Distinguishes damage from a failure of the disk or storage, which may pass, and may affect one process alone.

    Raises:
      UserError: it is such a failure; text must not be left out because of it.
    """
    failed = of_the_cloud(error) or (isinstance(error, OSError) and error.errno is not None)
    check(not failed, f"{path} cannot be read now: {first_line(error)}; fix that, and the same command continues")


def after(delimiter: re.Pattern[bytes]) -> Border:
    """The border after the first delimiter that begins at or after an offset, or at the file's end if there is none."""

    def border(file: IO[bytes], offset: int) -> int:
        file.seek(offset)
        tail = b""
        while data := file.read(1 << 16):
            if found := delimiter.search(tail + data):
                return file.tell() - len(tail) - len(data) + found.end()
            tail = (tail + data)[-LONGEST_DELIMITER + 1 :]
        return file.seek(0, 2)

    return border


_LINE_BORDER = after(re.compile(rb"\n"))


def try_read_block(path: AnyPath, start: int, border: Border, findings: Findings) -> tuple[bytes, int] | None:
    """The whole records of the block of `BLOCK_BYTES` at byte `start`, and the byte at which they begin.

    Both ends of a block are moved to the next border. So each record is read once, whatever its length, without an
    index of the file. None if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            begin = 0 if start == 0 else border(file, start)
            end = border(file, start + BLOCK_BYTES)
            file.seek(begin)
            return file.read(end - begin), begin
    except OSError as error:
        unreadable = _unreadable(path, error)
        findings.bad(unreadable.kind, str(unreadable))
        return None


def read_json_block(path: AnyPath, start: int, findings: Findings) -> list[str | None]:
    """The texts of the lines that begin in the `BLOCK_BYTES` from `start`."""
    block = try_read_block(path, start, _LINE_BORDER, findings)
    if block is None:
        return []
    data, begin = block
    return _parse_texts(path, data, lambda: _count_lines(path, begin), findings)


def _count_lines(path: AnyPath, end: int) -> int:
    with path.open("rb") as file:
        return sum(file.read(min(1 << 20, end - at)).count(b"\n") for at in range(0, end, 1 << 20))


def read_json_file(path: AnyPath, findings: Findings) -> list[str | None]:
    """The texts of a whole file: a compressed one, or `.json`, which has one object a line or is a list of objects."""
    data = try_read(path, findings)
    if data is None:
        return []
    form = form_of(path)
    if form is None or form.format == "jsonl" or not data.lstrip(_BLANK).startswith(b"["):
        return _parse_texts(path, data, lambda: 0, findings)
    texts: list[str | None] = []
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        findings.bad("unreadable_blocks", f"{path}: broken JSON ({first_line(error)}); mend it, or write jsonl")
        return []
    for number, value in enumerate(values, start=1):
        try:
            texts.append(_text_of(_checked(value)))
        except ValueError as error:
            findings.bad("broken_lines", f"{path}: item {number}: {error}", _remedy(path, value))
    return texts


def _parse_texts(path: AnyPath, data: bytes, lines_before: Callable[[], int], findings: Findings) -> list[str | None]:
    texts: list[str | None] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip(_BLANK):
            continue
        value = None
        try:
            value = parse_object(line)
            texts.append(_text_of(value))
        except ValueError as error:
            remedy = from_latin_1(path, line) if value is None else _remedy(path, value)
            findings.bad("broken_lines", f"{path}:{lines_before() + number}: {error}", remedy)
    return texts


def _text_of(value: dict[str, Any]) -> str | None:
    """The text of an object; None where it is null, as in a row of parquet. Raises ValueError if it has none."""
    text = value.get("text")
    if isinstance(text, str) or (text is None and "text" in value):
        return text
    if "text" in value:
        raise ValueError(f"field 'text' is {kind_of(text)}, not a string")
    raise ValueError(f"no field 'text'; the fields are: {', '.join(value) or 'none'}")


def _remedy(path: AnyPath, value: Any) -> str:
    """How to rename a field to `text`, where there is one of strings and none of that name."""
    if not isinstance(value, dict) or "text" in value:
        return ""
    if "messages" in value or "conversations" in value:
        return "; conversations belong in the folder chat/ of the data folder, beside pretrain/ with the text"
    if form_of(path) != ("jsonl", ""):
        return ""
    return _renamed(path, [name for name, text in value.items() if isinstance(text, str)])


def try_read(path: AnyPath, findings: Findings) -> bytes | None:
    """All bytes of a file, decompressed; None if they cannot be read."""
    try:
        data = _read_bytes(path)
    except Unreadable as error:
        findings.bad(error.kind, str(error))
        return None
    form = form_of(path)
    if form is not None and form.compression:  # of other files `find_text` has looked at the beginning
        other = something_else(path.with_suffix(""), data[:HEAD_BYTES])
        if other is not None:
            findings.bad("documents_not_utf8", f"{path}, unpacked, {other}")
            return None
    return data


def _read_bytes(path: AnyPath) -> bytes:
    try:
        return read_whole(path)
    except (OSError, *DAMAGE) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: AnyPath, error: Exception) -> Unreadable:
    if isinstance(error, FileNotFoundError):
        return Unreadable("missing_files", f"{path} cannot be read: it is missing")
    check_damage(path, error)
    return Unreadable("unreadable_blocks", f"{path} cannot be read: {not_packed(path) or first_line(error)}")


def parse_object(line: bytes) -> dict[str, Any]:
    """Parses one JSON object. Raises ValueError for anything else, and for text that UTF-8 cannot represent."""
    try:
        value = json.loads(line.decode("utf-8-sig"))  # json alone accepts encoded surrogates
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(_broken(line, error)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({first_line(error)}); fix or remove the line") from None
    return _checked(value, _ESCAPED_SURROGATE.search(line) is not None)


def _broken(line: bytes, error: json.JSONDecodeError) -> str:
    if line.strip() in (b"{", b"["):
        return "JSON that goes on in the next line; write one object a line (jq -c . FILE does)"
    if b"\0" in line:
        return "zero bytes, as a crash may leave them; remove the line"
    return f"broken JSON ({error.msg} at character {error.pos + 1}); fix or remove the line"


def kind_of(value: Any) -> str:
    """What kind of JSON a value is, for messages: "an object", "a list", "a string" and so on."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _checked(value: Any, may_have_surrogates: bool = True) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {kind_of(value)}; write one object a line")
    if may_have_surrogates:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(r"half a surrogate pair (\ud800 to \udfff) is not text; fix or remove the line") from None
    return value
