"""What is tried: constants for decoding, by name. Nothing here needs JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IN_USE = "in use"


@dataclass(frozen=True)
class Variant:
    """What is changed of what is in use.

    Attributes:
      settings: constants of modules of `jaxchat/ops`.
      least_rows, most_rows: with which it is tried.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    least_rows: int = 1
    most_rows: int = 64


def _parts(**more: int) -> Variant:
    """With so many blocks that share columns, at most, where it is not the number in use."""
    return Variant({"few_rows.PARTS": {"o": 1, "up": 1, "down": 4, "joint": 1} | more})


def _ring(kilobytes: int) -> Variant:
    return Variant({"product_chain.RING": kilobytes << 10})


PRODUCTS = {
    IN_USE: Variant(),
    "o in 5 parts": _parts(o=5),
    "down in 2 parts": _parts(down=2),
    "down in 5 parts": _parts(down=5),
    "o, down in 5 parts, joint in 2": _parts(o=5, down=5, joint=2),
    "ring of 140 KB": _ring(140),
    "ring of 200 KB": _ring(200),
}
VARIANTS = {"check": PRODUCTS, "products": PRODUCTS, "step": PRODUCTS}
