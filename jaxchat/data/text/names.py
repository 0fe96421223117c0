"""What the names of files and folders say about the text in them."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Literal

Role = Literal["train", "val", "test"]

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("dev", "devel", "devset", "valid", "validation", "val", "valset", "heldout"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "eval", "evaluation"), "test"),
}
# Words that number the parts of a split, or say that it is one: `train-00000-of-00004`, `val_part2`, `test_set`.
_NUMBERING = re.compile(r"\d+|[0-9a-f]*\d[0-9a-f]*|v\d+|of|part|shard|chunk|split|set|data|dataset|text", re.ASCII)
_ABOUT = ("readme", "license", "licence", "copying", "copyright", "notice", "changelog", "citation", "contributing",
          "contributors", "authors", "credits")  # fmt: skip
_ABOUT_ALONE = ("notes", "note", "changes", "todo", "about", "requirements", "robots", "urls", "sources", "terms")


def role_of(path: PurePath) -> Role | None:
    """The role that the name of a file or the nearest of its folders states, None if none does.

    The word (train, dev, valid, validation, val, eval, heldout, test) stands by itself, at the beginning or the end of
    the name but for numbers and the like: `train-00000-of-00004`, `wiki.valid`, `books/test/a`, but not `contest` or
    `the_test_of_time`.

    Args:
      path: relative to the folder of the text; the last name without its endings.
    """
    return next((role for name in reversed(path.parts) if (role := _role_of_name(name)) is not None), None)


def _role_of_name(name: str) -> Role | None:
    lower = re.sub(r"held[-_. ]out", "heldout", name.lower())
    words = [word for word in re.findall(r"[^\W_]+", lower) if not _NUMBERING.fullmatch(word)]
    return next((role for word in (words[:1] + words[-1:]) if (role := _ROLES.get(word.rstrip("0123456789")))), None)


def is_about(name: str) -> bool:
    """Whether a file of this name, without its endings, is about the text beside it: README, LICENSE, notes."""
    words = re.findall(r"[^\W_]+", name.lower())
    return bool(words) and (words[0] in _ABOUT or (len(words) == 1 and words[0] in _ABOUT_ALONE))
