"""The files in a folder of text: which of them are text, and why each of the others is not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

from jaxchat.data.manifest import FILE_NAME
from jaxchat.data.text.forms import DAMAGE, bare_name, form_of, read_whole
from jaxchat.data.text.names import is_about, role_of
from jaxchat.data.text.remedies import convert
from jaxchat.runs.files import LOCK
from jaxchat.storage import AnyPath, reason, size_of, storage_errors

OTHER_DATA = ("chat", "eval")  # folders of a data folder that contain no text for pretraining
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".br")
_PREFERRED = ("parquet", "jsonl", "json", "txt")
_JSON_HEAD_BYTES = 1 << 16
_OBJECTS_WITH_TEXT = re.compile(rb'\s*\[?\s*\{.*?"text"\s*:\s*(?:"|null)', re.DOTALL)


class LeftOut(NamedTuple):
    """A file, or a folder, in a folder of text that is not read, and why. The name is relative to that folder."""

    name: str
    why: str


@dataclass
class Listing:
    """What is in a folder of text.

    Attributes:
      folder: the folder.
      texts: its files of text, sorted by their paths.
      left_out: everything else but hidden files and the manifest.
      tables: those that a command converts.
      empty: those that would be text.
    """

    folder: AnyPath
    texts: list[AnyPath] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    tables: list[AnyPath] = field(default_factory=list)
    empty: list[AnyPath] = field(default_factory=list)

    def name(self, path: AnyPath) -> str:
        """The path of a file in the folder, with slashes."""
        return path.relative_to(self.folder).as_posix()

    def leave_out(self, whys: Mapping[AnyPath, str]) -> None:
        self.left_out += [LeftOut(self.name(path), why) for path, why in whys.items()]
        self.texts = [path for path in self.texts if path not in whys]


def text_folder(data_dir: AnyPath) -> AnyPath:
    """The folder of the text in a data folder: its `pretrain/`, or itself."""
    return data_dir / "pretrain" if (data_dir / "pretrain").is_dir() else data_dir


def list_text(folder: AnyPath) -> Listing:
    """Lists a folder and what is in it, without reading more than the beginnings of files.

    Of files that have one name but for their endings, such as `a.jsonl` and `a.jsonl.gz`, one is read. Plain text
    beside other forms is taken for notes unless its name states a role (see `role_of`), and so are README, LICENSE and
    the like beside other plain text.
    """
    listing, others = Listing(folder), {}
    for path in _walk(listing, folder, {_real(folder)}):
        if (why := _why_not_text(path)) is None:
            listing.texts.append(path)
        else:
            others[path] = why
            if convert(path) is not None:
                listing.tables.append(path)
            if form_of(path) is not None and size_of(path) == 0:
                listing.empty.append(path)
    listing.leave_out(others)
    listing.texts.sort()
    _leave_out_links(listing)
    _leave_out_twins(listing)
    _leave_out_notes(listing)
    listing.left_out.sort()
    return listing


def _walk(listing: Listing, folder: AnyPath, seen: set[str]) -> Iterator[AnyPath]:
    """All files but hidden ones. `seen` has the folders that were listed, which links may lead back to."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == FILE_NAME:
            continue
        if path.is_file():
            yield path
        elif not path.is_dir():
            is_link = isinstance(path, Path) and path.is_symlink()
            listing.leave_out({path: "a link to nothing" if is_link else "not a file"})
        elif is_run(path):
            listing.leave_out({path: "a run"})
        elif not (folder == listing.folder and path.name in OTHER_DATA and folder.name != "pretrain"):
            real = _real(path)
            if real in seen or any(around.startswith(os.path.join(real, "")) for around in seen):
                listing.leave_out({path: "a link to a folder that is read already"})
                continue
            seen.add(real)
            try:
                yield from _walk(listing, path, seen)
            except storage_errors() as error:
                listing.leave_out({path: reason(error)})


def is_run(folder: AnyPath) -> bool:
    """Whether it is a run directory, which has files that look like text, and others at each start."""
    return (folder / "config.json").is_file() and any((folder / name).exists() for name in (LOCK, "tokenizer"))


def _real(path: AnyPath) -> str:
    return os.path.realpath(path) if isinstance(path, Path) else os.fspath(path)


def _why_not_text(path: AnyPath) -> str | None:
    """Why a file is no text; None if it is."""
    form, name = form_of(path), path.name.lower()
    if form is None:
        if convert(path) is not None:
            return f"{name.rpartition('.')[2]} is not read as it is"
        return "compressed or an archive; unpack it" if name.endswith(_ARCHIVES) else "not text"
    if form.format != "parquet" and size_of(path) == 0:
        return "empty"
    return None if form.format != "json" or _has_objects_with_text(path) else "json without a field 'text'"


def _has_objects_with_text(path: AnyPath) -> bool:
    try:
        if form_of(path) == ("json", ""):
            with path.open("rb") as file:
                head = file.read(_JSON_HEAD_BYTES)
        else:
            head = read_whole(path)[:_JSON_HEAD_BYTES]
    except (OSError, *DAMAGE):
        return True  # what is wrong is said when it is read
    return _OBJECTS_WITH_TEXT.match(head.removeprefix(b"\xef\xbb\xbf")) is not None


def _leave_out_links(listing: Listing) -> None:
    """Of links and what they lead to, each file is read once."""
    links = {path: _real(path) for path in listing.texts if isinstance(path, Path) and path.is_symlink()}
    if not links:
        return
    real = {_real(path): path for path in listing.texts if path not in links}
    others = {path: real.setdefault(target, path) for path, target in links.items()}
    listing.leave_out(
        {path: f"a link to what {listing.name(other)} is" for path, other in others.items() if other is not path}
    )


def _leave_out_twins(listing: Listing) -> None:
    best: dict[AnyPath, AnyPath] = {}
    twins = {}
    for path in sorted(listing.texts, key=_preference):
        first = best.setdefault(path.parent / bare_name(path), path)
        if form_of(first) != form_of(path):
            twins[path] = f"the name of {listing.name(first)} with another ending"
    listing.leave_out(twins)
    # What was converted has served its purpose.
    listing.tables = [path for path in listing.tables if path.with_suffix("") not in best]


def _preference(path: AnyPath) -> tuple[int, str]:
    form = form_of(path)
    assert form is not None
    return _PREFERRED.index(form.format), form.compression


def _leave_out_notes(listing: Listing) -> None:
    plain = [path for path in listing.texts if _preference(path)[0] == _PREFERRED.index("txt")]
    if len(plain) < len(listing.texts):
        why = "taken for notes beside the other files; its own folder would make it text"
        listing.leave_out({path: why for path in plain if role_in(listing, path) is None})
        return
    about = [path for path in plain if is_about(bare_name(path))]
    if len(about) < len(plain):
        listing.leave_out(dict.fromkeys(about, "about the text"))


def role_in(listing: Listing, path: AnyPath):
    """The role of a file by its name (see `role_of`)."""
    return role_of(PurePath(listing.name(path)).with_name(bare_name(path)))
