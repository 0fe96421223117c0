"""What the text is: which files are read as what, in lines for the user and as a record; and a look at all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxchat.data.text.folder import TextSplits
from jaxchat.data.text.listing import LeftOut
from jaxchat.data.text.plain import DOCUMENT_CHARS, LONG_FILE_BYTES, cut_of
from jaxchat.data.text.shards import TextBlocks, TextFiles, known_form, text_bytes
from jaxchat.errors import UserError, check
from jaxchat.runs.progress import format_left_out
from jaxchat.storage import AnyPath, size_of

CHECKED_BYTES = 64 << 20  # of each side: a text up to this long is read as a whole before the first stage
_NAMED = 50  # files in the record
_NAMED_AT_ONCE = 3  # files in a line

Encode = Callable[[Sequence[str]], int]


def text_record(text: TextSplits) -> dict[str, Any]:
    """What is read as what, for a stage's record.

    Returns:
      `format`: of the files, such as "jsonl" or "jsonl, txt"; `train_files`, `val_files`: the first names, and how many
      more there are; `train_bytes`, `val_bytes`: of these files, None while they may still be downloading;
      `how_split`: what decided that; `cut`: how txt files become documents, if there are any; `left_out`: what else is
      in the folder, grouped by the reason.
    """
    train, val = _shown(text, text.train), _shown(text, text.val)
    return {
        "format": ", ".join(sorted({str(known_form(path)) for path in (*train, *val)})),
        "train_files": _names(text, train, _NAMED),
        "train_bytes": _size(text.train, train),
        "val_files": _names(text, val, _NAMED),
        "val_bytes": _size(text.val, val),
        "how_split": text.how_split,
        "cut": _how_cut(text),
        "left_out": _grouped(text.left_out),
    }


def text_lines(text: TextSplits) -> list[str]:
    """What is read as what, in lines for the user."""
    train, val = _shown(text, text.train), _shown(text, text.val)
    files = ", ".join(_names(text, train, _NAMED_AT_ONCE))
    if len(train) > _NAMED_AT_ONCE:
        files = f"{len(train):,} files of {' and '.join(sorted({known_form(path).format for path in train}))}"
    files += _megabytes(_size(text.train, train))
    if text.train.hold_out is not None:
        lines = [f"text: {files}; {text.how_split} for validation, the rest to train on"]
    else:
        arriving = "" if text.train.complete else " as they arrive"
        held_out = ", ".join(_names(text, val, _NAMED_AT_ONCE)) + _megabytes(_size(text.val, val))
        lines = [f"text: to train on {files}{arriving}; for validation {held_out} ({text.how_split})"]
    if (cut := _how_cut(text)) is not None:
        lines.append(f"txt: {cut}")
    if text.left_out:
        lines.append(f"left out: {', '.join(_grouped(text.left_out))}")
    if text.how_split == "the last file" and (_size(text.val, val) or 0) > (_size(text.train, train) or 0):
        lines.append(f"{val[0].name} is longer than all that is trained on; --data.val-shard=NAME chooses another file")
    return lines


def _shown(text: TextSplits, side: TextFiles) -> list[AnyPath]:
    """The files of a side that have text."""
    without = {entry.name for entry in text.left_out}
    return [path for path in side.files if _name(text, path) not in without]


def _name(text: TextSplits, path: AnyPath) -> str:
    return path.relative_to(text.folder).as_posix()


def _names(text: TextSplits, files: Sequence[AnyPath], most: int) -> list[str]:
    return _first((_name(text, path) for path in files), most)


def _first(names: Iterable[str], most: int) -> list[str]:
    names = list(names)
    return names if len(names) <= most else [*names[:most], f"{len(names) - most:,} more"]


def _size(side: TextFiles, files: Sequence[AnyPath]) -> int | None:
    return None if side.wait is not None else sum(map(size_of, files))


def _megabytes(size: int | None) -> str:
    if size is None:
        return ""
    return f" ({size / 1e6:,.1f} MB)" if size >= 1e6 else f" ({size / 1e3:,.1f} kB)"


def _grouped(left_out: Iterable[LeftOut]) -> list[str]:
    """`a.md, b.md and 12 more (not text)`, one for each reason."""
    groups: dict[str, list[str]] = {}
    for name, why in left_out:
        groups.setdefault(why, []).append(name)
    return [f"{', '.join(_first(names, _NAMED_AT_ONCE))} ({why})" for why, names in groups.items()]


def _how_cut(text: TextSplits) -> str | None:
    """How txt files become documents, in the words of the commonest rule first; None without txt files."""
    files = [path for path in text.train.files if known_form(path) == ("txt", "")]
    chars = text.train.document_chars
    long = [path for path in files if chars is not None or size_of(path) > LONG_FILE_BYTES]
    rules = Counter(str(cut_of(path, chars or DOCUMENT_CHARS)) for path in long)
    if len(long) < len(files):
        rules["a short file is a document"] = len(files) - len(long)
    return "; ".join(rule for rule, _ in rules.most_common()) or None


# --- a look at all of it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What `look_through` has found.

    Attributes:
      left_out: bad text that will be left out, by kind (see `Findings`).
      blocks, seen: of training text, in all and looked at.
    """

    left_out: Counter[str]
    blocks: int
    seen: int

    def lines(self) -> list[str]:
        """What the user should know: what is left out, and what is checked only when it is read."""
        lines = []
        bad = {kind: count for kind, count in self.left_out.items() if kind != "empty_documents"}
        if bad:
            lines.append(
                f"to be left out: {format_left_out(bad)}{' in what was looked at' if self.seen < self.blocks else ''}"
            )
        if self.seen < self.blocks:
            lines.append(f"looked through {self.seen:,} of {self.blocks:,} blocks; the others when they are read")
        return lines


def look_through(text: TextSplits, *, sequence_len: int, lanes: int = 1) -> Look | None:
    """Reads the text as pretraining will: all of a side of up to `CHECKED_BYTES`, else blocks spread over it.

    Args:
      sequence_len: the model's context in tokens.
      lanes: parts of the text that are read independently.

    Returns:
      What it has found; None for text that may still be downloading, which is checked as it arrives.

    Raises:
      UserError: what pretraining would refuse: bad text, unless it is to be left out; training text that does not fill
        one row with any tokenizer (see `check_fills_row`), or has fewer blocks than lanes; no text to validate with.
    """
    if text.train.wait is not None:
        return None
    left_out: Counter[str] = Counter()
    count = seen = 0
    for side in (text.val, text.train):
        blocks = TextBlocks(_quiet(side))
        indices = _spread(len(blocks), text_bytes(side))
        documents = 0
        for index in indices:
            block = blocks[index]
            left_out.update(block.left_out)
            documents += len(block)
        count, seen = len(blocks), len(indices)
        check(documents > 0 or seen < count, f"{_where(text, side)} has no text; --data.val-shard=NAME chooses another")
    name = _where(text, text.train)
    check(lanes <= count, f"data.lanes is {lanes}, but {name} has only {count} blocks; lower it")
    if lanes == 1:
        check_fills_row(text, sequence_len)
    return Look(left_out, count, seen)


def check_fills_row(text: TextSplits, sequence_len: int, encode: Encode | None = None) -> None:
    """Checks that the training text has as many tokens as a row, which it could not be read for otherwise.

    Args:
      encode: gives the number of tokens of documents, without `<|bos|>`. None while there is no tokenizer: then only
        text that is too short for any is refused.
    """
    tokens = 0
    for block in TextBlocks(_quiet(text.train)):
        tokens += len(block) + (encode(block) if encode else sum(len(document.encode()) for document in block))
        if tokens > sequence_len:
            return
    raise UserError(
        f"{_where(text, text.train)} holds {'only' if encode else 'at most'} {tokens:,} tokens, fewer than the "
        f"{sequence_len + 1:,} of one row; add text or lower model.sequence-len"
    )


def _quiet(side: TextFiles) -> TextFiles:
    return replace(side, say=lambda line: None)


def _spread(blocks: int, size: int) -> list[int]:
    """Which blocks to look at: all, or as many as `CHECKED_BYTES` allow, the first and the last among them."""
    if size <= CHECKED_BYTES or blocks <= 2:
        return list(range(blocks))
    count = min(blocks, max(2, CHECKED_BYTES * blocks // size))
    return np.unique(np.linspace(0, blocks - 1, count).round().astype(int)).tolist()


def _where(text: TextSplits, side: TextFiles) -> str:
    return f"{side.files[0]}" if len(side.files) == 1 else f"the text in {text.folder}"
