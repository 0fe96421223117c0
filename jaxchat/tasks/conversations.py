"""Conversations to train on: the data folder's, SmolTalk, or any file of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from jaxchat.data.chat.forms import Content, contents_of, to_conversation
from jaxchat.data.records import has_records, list_records, stem_of
from jaxchat.data.text.names import role_of
from jaxchat.data.text.reading import Findings
from jaxchat.data.text.remedies import convert
from jaxchat.errors import MissingData, UserError, check, closest
from jaxchat.storage import AnyPath, is_remote, to_path
from jaxchat.tasks.base import Conversation, ListTask, Split
from jaxchat.tasks.items import hold_out, read_items, spread


class Conversations(ListTask):
    """Conversations without an answer that can be checked, for training only.

    In the place of a bad one that was left out there is a conversation without messages, so that the others keep their
    places, and the same ones are held out for validation.

    Attributes:
      held_out: those for validation that were in the same file as these for training.
    """

    held_out: Conversations | None = None

    def __init__(self, name: str, contents: Sequence[tuple[Content, ...] | None], limit: int | None = None):
        self.name = name
        self.items = spread(contents, limit)

    def item(self, index: int) -> Conversation:
        return to_conversation(self.items[index] or ())

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        raise UserError(
            f"{self.name} has no answers that can be checked; evaluate and reward with a task that has, such as 'gsm8k'"
        )


@dataclass(frozen=True)
class ChatFiles:
    """The files of a folder of conversations, by what they are for."""

    train: tuple[AnyPath, ...]
    val: tuple[AnyPath, ...]
    unread: tuple[AnyPath, ...]


def find_chats(folder: AnyPath) -> ChatFiles:
    """The files of conversations in a folder. Names that say what they are for are believed (see `role_of`).

    Files with other names are for training if none says that it is; else they are not read. Without a file for
    validation, one for testing takes its place.

    Raises:
      UserError: two files have the same name but for their endings.
    """
    files = list_records(folder)
    sides = {path: role_of(PurePath(stem_of(path.name))) for path in files}
    for one, other in zip(files, files[1:], strict=False):
        same = stem_of(one.name).lower() == stem_of(other.name).lower()
        check(
            not same, f"{folder} has {one.name} and {other.name}, of which only one can be read; remove or rename one"
        )
    train = [path for path in files if sides[path] == "train"] or [path for path in files if sides[path] is None]
    val = [path for path in files if sides[path] == "val"] or [path for path in files if sides[path] == "test"]
    return ChatFiles(tuple(train), tuple(val), tuple(path for path in files if path not in (*train, *val)))


def load_chat(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> Conversations:
    """Loads the conversations in `chat/`."""
    return _load_folder("chat", data_dir / "chat", split, limit, findings)


def load_smoltalk(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> Conversations:
    """Loads the conversations in `chat/smoltalk/`."""
    return _load_folder("smoltalk", data_dir / "chat" / "smoltalk", split, limit, findings)


def _load_folder(name: str, folder: AnyPath, split: Split, limit: int | None, findings: Findings) -> Conversations:
    """Loads the conversations of a folder; where it has no file for validation, every 20th is for validation."""
    files = find_chats(folder)
    if not files.train:
        raise MissingData(f"{name} needs {folder / 'train.jsonl'}, which does not exist{_table_in(folder)}")
    if files.val:
        return Conversations(name, _read(files.train if split == "train" else files.val, name, findings), limit)
    return _part(name, _read(files.train, name, findings), split, limit)


def _part(name: str, contents: list[tuple[Content, ...] | None], split: Split, limit: int | None) -> Conversations:
    val = Conversations(name, hold_out(contents, "val"), limit)
    if split != "train":
        return val
    train = Conversations(name, hold_out(contents, "train"), limit)
    train.held_out = val
    return train


def load_file(entry: str, split: Split, limit: int | None, findings: Findings) -> Conversations:
    """Loads any file of conversations; every 20th is for validation and test, the others for training.

    Raises:
      UserError: there is no such file, or as `read_items`.
    """
    return _part(entry, _read((file_of(entry),), entry, findings), split, limit)


def file_of(entry: str) -> AnyPath:
    """The file of conversations that an entry of a mixture names by its path.

    Raises:
      UserError: there is no such file, or its ending is not one of those that are read.
    """
    path = to_path(entry if is_remote(entry) else os.path.expanduser(entry))
    if not path.is_file():
        near = [other.name for other in list_records(path.parent)]
        what = "is a folder; name a file in it" if path.is_dir() else f"does not exist{closest(path.name, near)}"
        raise UserError(f"{entry} {what}".removesuffix("."))
    command = convert(path)
    how = f"convert it with: {command}" if command else "convert it"
    check(has_records(path.name), f"{entry}: a file of conversations is .jsonl, .json or .parquet; {how}")
    return path


def _table_in(folder: AnyPath) -> str:
    """How a message about missing conversations goes on where a table or a sub-folder has them."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name != "smoltalk" and (inside := list_records(path)):
            return f"; sub-folders are not read: move {path.name}/{inside[0].name} up"
        if command := convert(path):
            return f"; convert {path.name} with: {command}"
    return ""


def _read(paths: Sequence[AnyPath], task: str, findings: Findings) -> list[tuple[Content, ...] | None]:
    options = {"kind": "bad_conversations", "keep_places": True}
    return [item for path in paths for item in read_items(path, contents_of, task, findings, **options)]
