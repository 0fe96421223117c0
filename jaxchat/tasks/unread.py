"""The files of a data folder that lie where tasks look for theirs, and that no task reads."""

from __future__ import annotations

from jaxchat.data.records import has_records, stem_of
from jaxchat.storage import AnyPath
from jaxchat.tasks.conversations import find_chats

# The files of records in `eval/` and its folders that tasks read, without their endings.
_SPLIT = ("train", "test")
_READ = {
    "eval": ("arc_easy", "arc_challenge", "humaneval", "humaneval_train", "nanochat_spelling"),
    "eval/mmlu": ("dev", "val", "test"),
    **dict.fromkeys(("eval/arc_easy", "eval/arc_challenge"), ("train", "val")),
    **dict.fromkeys(("eval/gsm8k", "eval/sums", "eval/letters", "eval/facts", "eval/long_sums"), _SPLIT),
}
_OTHERS = ("eval/words.txt", "eval/eval_bundle", "chat/smoltalk")  # eval_bundle: as 'jaxchat data get core' unpacks it


def unread_files(folder: AnyPath) -> list[str]:
    """The paths in `folder` of the files and folders in `chat/` and `eval/` that no task reads, in order.

    Hidden files and notes (`.md`) are none.
    """
    unread = []
    for place in ("chat", "chat/smoltalk", *_READ):
        chats = find_chats(folder / place) if place.startswith("chat") else None
        for path in sorted((folder / place).iterdir()) if (folder / place).is_dir() else ():
            name = f"{place}/{path.name}"
            if path.name.startswith(".") or path.name.lower().endswith(".md") or name in (*_READ, *_OTHERS):
                continue
            if chats is not None:
                read = path in (*chats.train, *chats.val)
            else:
                read = has_records(path.name) and stem_of(path.name) in _READ[place]
            if not read:
                unread.append(name)
    return unread
