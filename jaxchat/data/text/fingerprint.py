"""A fingerprint of the text, by which a training that resumes knows whether it continues with the same."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from jaxchat.data.text.folder import TextSplits
from jaxchat.data.text.shards import TextFiles, known_form
from jaxchat.storage import AnyPath, size_of

SAMPLED_BYTES = 64 << 20  # that are read of all files together
NAMED = 50  # of more files the fingerprint does not say which of them has changed
_PIECE_BYTES = 1 << 16
_FOOTER_BYTES = 8  # at the end of a parquet file: the length of its metadata, and "PAR1"
_THREADS = 16
_SIDES = {"train": "training", "val": "validation"}

Json = dict[str, Any]


def fingerprint(text: TextSplits) -> Json | None:
    """Sizes, names within the folder, and hashes of the text; None while its files may still be downloading.

    The hash of a parquet file is that of its metadata, which has the places and statistics of all its parts. Of other
    files it is that of pieces spread over the file, or of a small file as a whole.
    """
    if text.train.wait is not None:
        return None
    return {side: _of_side(getattr(text, side), text.folder) for side in _SIDES}


def _of_side(side: TextFiles, folder: AnyPath) -> Json:
    share = max(_PIECE_BYTES, SAMPLED_BYTES // len(side.files))
    with ThreadPoolExecutor(_THREADS) as pool:
        files = list(pool.map(partial(_of_file, share), side.files))
    each = {
        path.relative_to(folder).as_posix(): [size, digest]
        for path, (size, digest) in zip(side.files, files, strict=True)
    }
    found: Json = {"files": len(files), "bytes": sum(size for size, _ in files), "hash": _hash(repr(each).encode())}
    if side.hold_out is not None:
        found["hold_out"] = side.hold_out
    return found | ({"each": each} if len(each) <= NAMED else {})


def _of_file(share: int, path: AnyPath) -> tuple[int, str]:
    try:
        size = size_of(path)
        with path.open("rb") as file:
            if known_form(path).format == "parquet":
                file.seek(max(0, size - _FOOTER_BYTES))
                length = int.from_bytes(file.read(4), "little")
                file.seek(max(0, size - _FOOTER_BYTES - length))
                return size, _hash(file.read())
            if size <= share:
                return size, _hash(file.read())
            pieces = share // _PIECE_BYTES
            starts = [(size - _PIECE_BYTES) * i // max(1, pieces - 1) for i in range(pieces)]
            return size, _hash(b"".join(_read_at(file, start) for start in starts))
    except OSError:
        return 0, "unreadable"  # what is wrong is said when it is read


def _read_at(file, start: int) -> bytes:
    file.seek(start)
    return file.read(_PIECE_BYTES)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def what_changed(before: Json, now: Json) -> str | None:
    """How the text differs from what it was, for a message; None if it is the same, or if `before` is damaged."""
    for side, name in _SIDES.items():
        old, new = before.get(side) if isinstance(before, dict) else None, now[side]
        if old is None or old == new or not _is_whole(old):
            continue
        if "each" not in old or "each" not in new:
            counts = [f"{found['files']:,} files of {found['bytes']:,} bytes" for found in (new, old)]
            return f"{name} has {counts[0]}, not {counts[1]}" if counts[0] != counts[1] else f"{name} has other content"
        changes = [*_changes(old["each"], new["each"])]
        if changes:
            return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
        return f"one in {new.get('hold_out')} documents is for validation, not one in {old.get('hold_out')}"
    return None


def _is_whole(side: Any) -> bool:
    """Whether a side is as `_of_side` writes it."""
    try:
        sizes = [int(size) for size, _ in side.get("each", {}).values()]
        return isinstance(side["hash"], str) and side["files"] + side["bytes"] + sum(sizes) >= 0
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _changes(old: dict[str, list], new: dict[str, list]):
    for name in sorted({*old, *new}):
        if name not in new:
            yield f"{name} is gone"
        elif name not in old:
            yield f"{name} is new"
        elif old[name][0] != new[name][0]:
            yield f"{name} has {new[name][0]:,} bytes, not {old[name][0]:,}"
        elif old[name] != new[name]:
            yield f"{name} has other content"
