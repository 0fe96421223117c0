"""Conversations to train on: the data folder's, SmolTalk, or any file of them."""

from __future__ import annotations

from jaxchat.errors import UserError
from jaxchat.storage import AnyPath
from jaxchat.tasks.base import Conversation, ListTask, Split, hold_out, read_items


class Conversations(ListTask):
    """Conversations without an answer that can be checked, for training only."""

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        raise UserError(
            f"{self.name} has no answers that can be checked; evaluate and reward with a task that has, such as 'gsm8k'"
        )


def load_chat(split: Split, data_dir: AnyPath, limit: int | None) -> Conversations:
    """Loads `chat/{split}.jsonl`, or the same with `.gz`."""
    return Conversations("chat", read_items(data_dir / "chat" / split, ("messages",), "chat"), limit)


def load_smoltalk(split: Split, data_dir: AnyPath, limit: int | None) -> Conversations:
    """Loads `chat/smoltalk/{split}.jsonl`, or the same with `.gz`."""
    return Conversations(
        "smoltalk", read_items(data_dir / "chat" / "smoltalk" / split, ("messages",), "smoltalk"), limit
    )


def load_file(path: AnyPath, split: Split, limit: int | None) -> Conversations:
    """Loads any file of conversations; every 20th line is for validation and test, the others for training."""
    items = read_items(path, ("messages",), str(path))
    return Conversations(str(path), hold_out(items, "train" if split == "train" else "val"), limit)
