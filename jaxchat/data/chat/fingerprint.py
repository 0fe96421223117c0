"""A fingerprint of conversations, by which a training that resumes knows whether it continues with the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SAMPLED = 10_000  # conversations that are hashed, of all tasks together: half a second

Json = dict[str, Any]


def fingerprint(tasks: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Json:
    """For the name of each task, how many conversations it has, and their hash; of very many only some are hashed."""
    every = max(1, math.ceil(sum(len(conversations) for _, conversations in tasks) / SAMPLED))
    counts: Counter[str] = Counter()
    hashes: dict[str, Any] = {}
    for name, conversations in tasks:
        counts[name] += len(conversations)
        found = hashes.setdefault(name, hashlib.blake2b(digest_size=8))
        for conversation in conversations[::every]:
            found.update(_encoded(conversation))
    return {name: [counts[name], found.hexdigest()] for name, found in hashes.items()}


def _encoded(conversation: Mapping[str, Any]) -> bytes:
    # A user's own task may keep in a conversation what JSON cannot say; that counts for nothing.
    return json.dumps(conversation, default=lambda value: None, skipkeys=True).encode()


def what_changed(before: Json, now: Json) -> str | None:
    """How the conversations differ from what they were, for a message; None if they are the same."""
    changes = [*_changes(before, now)]
    return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "") if changes else None


def _changes(before: Json, now: Json) -> Iterator[str]:
    for name in {**before, **now}:
        if name not in now:
            yield f"{name} is gone"
        elif name not in before:
            yield f"{name} is new"
        elif before[name][0] != now[name][0]:
            yield f"{name} has {now[name][0]:,} items, not {before[name][0]:,}"
        elif before[name] != now[name]:
            yield f"{name} has other content"
