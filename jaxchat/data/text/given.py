"""Text that a user names file by file or folder by folder, to be read as a whole: by its files, without two sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxchat.data.records import place, read_records
from jaxchat.data.text import plain
from jaxchat.data.text.folder import why_not
from jaxchat.data.text.forms import HEAD_BYTES, form_of, read_head, something_else
from jaxchat.data.text.listing import is_run, list_text, text_folder
from jaxchat.data.text.reading import Findings, Unreadable, kind_of
from jaxchat.data.text.shards import TextFiles, iterate_texts, text_bytes
from jaxchat.errors import UserError, check, closest
from jaxchat.storage import AnyPath, reason, size_of, storage_errors, to_path

_LEAVE_OUT = "; --data.on-bad=skip leaves it out"  # which is for text to train on


@dataclass(frozen=True)
class GivenFile:
    """A file of text.

    Attributes:
      name: how the user named it, or the folder that it is in.
      text: how it is read; None for a file whose name says nothing of its form, which is read as plain text.
    """

    name: str
    path: AnyPath
    text: TextFiles | None

    @property
    def bytes(self) -> int:
        """About how many bytes of text it has."""
        if self.text is None:
            return size_of(self.path)
        held_out = self.text.hold_out if self.text.held_out else None
        return text_bytes(self.text) // (held_out or 1)

    def documents(self) -> Iterator[tuple[str, str]]:
        """The source and the text of each document, a part of the file in memory at a time.

        The source is the file, by its name, unless its records have a field or column `source`.

        Raises:
          UserError: text that is damaged or cannot be read.
        """
        try:
            if self.text is None:
                findings = Findings("refuse")
                texts = findings.keep(plain.read_packed_file(self.path, None, findings), self.name)
                yield from ((self.name, text) for text in texts)
            elif _has_sources(self.path):
                yield from self._records(self.text)
            else:
                yield from ((self.name, text) for text in iterate_texts(self.text))
        except UserError as error:
            raise UserError(str(error).removesuffix(_LEAVE_OUT)) from None

    def _records(self, side: TextFiles) -> Iterator[tuple[str, str]]:
        findings = Findings("refuse")
        for number, record in read_records(self.path):
            where = place(self.path, number)
            if isinstance(record, ValueError):
                raise UserError(f"{where}: {record}")
            text, source = record.get("text"), record.get("source")
            check(text is None or isinstance(text, str), f"{where}: 'text' is {kind_of(text)}, not a string")
            for kept in findings.keep([text], where):
                if side.keeps(kept):
                    yield source if isinstance(source, str) and source else self.name, kept


def _has_sources(path: AnyPath) -> bool:
    """Whether the first record of a file has a text and a source."""
    form = form_of(path)
    if form is None or form.format == "txt":
        return False
    _, first = next(read_records(path), (0, None))
    return isinstance(first, dict) and all(isinstance(first.get(name), str) for name in ("text", "source"))


def given_files(names: Sequence[str], say: Callable[[str], None] = print) -> list[GivenFile]:
    """The files of text that `names` are, or that are in the folders that they name, each once.

    Of a data folder these are the files of its text (see `list_text`), for training and for validation. What is left
    out of a folder is said.

    Raises:
      UserError: nothing is there; a file is not text; a folder has none, or is a run's.
    """
    found: dict[str, GivenFile] = {}
    for name in names:
        path = to_path(name)
        try:
            there = _in_folder(name, path, say) if path.is_dir() else [_file(name, path)]
        except storage_errors() as error:
            raise UserError(f"{name} cannot be read ({reason(error)}); correct that, and try again") from error
        for one in there:
            found.setdefault(str(one.path.resolve()), one)
    return [*found.values()]


def _in_folder(name: str, path: AnyPath, say: Callable[[str], None]) -> list[GivenFile]:
    check(not is_run(path), f"{name} is the directory of a run; name a file or folder of text")
    listing = list_text(text_folder(path))
    check(bool(listing.texts), f"no text in {name}; name a folder with .parquet, .jsonl or .txt files, or a file")
    if listing.left_out:
        names = [f"{entry.name} ({entry.why})" for entry in listing.left_out]
        say(f"not read: {', '.join(names[:3])}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''}")
    shown = name.rstrip("/")
    return [_file(f"{shown}/{one.relative_to(path).as_posix()}", one) for one in listing.texts]


def _file(name: str, path: AnyPath) -> GivenFile:
    beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    check(path.exists(), f"there is no {name}{closest(path.name, beside)} Name files or folders of text")
    form = form_of(path)
    try:
        why = something_else(path, read_head(path)[:HEAD_BYTES]) if form is None else why_not(path)
    except Unreadable as error:
        raise UserError(str(error)) from None
    except UserError as error:
        raise UserError(str(error).partition("; --data.on-bad=skip")[0]) from None
    check(why is None, f"{name} {why}")
    check(size_of(path) > 0, f"{name} is empty; name a file with text")
    return GivenFile(name, path, None if form is None else TextFiles((path,)))
