"""Errors that are the user's to mend, and how to say so in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input by the user. The message is one line that says what is wrong and what to do instead."""


class MissingData(UserError):
    """A task or text that the data folder does not have."""


def check(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def closest(name: str, candidates: Iterable[str]) -> str:
    """How a message about an unknown name goes on: `, did you mean 'd12'?`, or a full stop if nothing is near."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else "."
