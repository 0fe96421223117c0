"""Checks of single settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxchat.errors import check


def check_each(config: Any, section: str, fits: Callable[[Any], bool], what: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(fits(value), f"{section}{name.replace('_', '-')} is {value}; it must be {what}")
