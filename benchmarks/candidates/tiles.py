"""Attention that asks for more of the pages ahead, in parts of a page."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxchat.ops import decode


@functools.cache
def attend(tile: int, stages: int, warps: int) -> Callable:
    """`decode.attend` with other numbers."""
    return functools.partial(decode.attend, tile=tile, stages=stages, warps=warps)
