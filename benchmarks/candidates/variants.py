"""What is tried: candidates and constants for decoding, by name. Nothing here needs JAX."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

MEGABYTE = 1 << 20
IN_USE = "in use"
O_PARTS = {"few_rows.PARTS": {"o": 5, "up": 1, "down": 4, "joint": 1}}
MORE_PARTS = {"few_rows.PARTS": {"o": 5, "up": 1, "down": 5, "joint": 2}}


@dataclass(frozen=True)
class Variant:
    """Candidates that take the place of what is in use.

    Attributes:
      products: of the products between two attentions: "in use", "chain", "relay" or "shares".
      attention: whether the candidate's attention takes part.
      settings: constants of modules.
      least_rows, most_rows: with which it is tried.
    """

    products: str = IN_USE
    attention: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    least_rows: int = 1
    most_rows: int = 64


def _chain(ahead: int = 0, parts: dict[str, Any] | None = None, after: int = 1) -> Variant:
    settings = {"chain.AHEAD": ahead * MEGABYTE, "chain.AFTER": after} | (parts or {})
    return Variant("chain", settings=settings)


def _attention(warm: int = 0, **constants: Any) -> Variant:
    settings = {"attention.WARM": warm * MEGABYTE} | {f"attention.{name}": value for name, value in constants.items()}
    return Variant(attention=True, settings=settings)


def _relay(**constants: Any) -> Variant:
    return Variant("relay", settings={f"relay.{name}": value for name, value in constants.items()}, most_rows=2)


def _shares(**constants: Any) -> Variant:
    return Variant("shares", settings={f"shares.{name}": value for name, value in constants.items()}, most_rows=1)


def _one_row(variant: Variant) -> Variant:
    """Not tried with more, to save time."""
    return replace(variant, most_rows=1)


def _many_rows(variant: Variant) -> Variant:
    """Not tried with few, to save time."""
    return replace(variant, least_rows=8)


def _both(products: Variant, attention: Variant) -> Variant:
    return replace(products, attention=True, settings=products.settings | attention.settings)


PRODUCTS = {
    IN_USE: Variant(),
    "o in 5 parts": Variant(settings=O_PARTS),
    "o, down in 5 parts, joint in 2": _one_row(Variant(settings=MORE_PARTS)),
    "ring of 200 KB": _one_row(Variant(settings={"few_rows.RING": 200 << 10})),
    "chain": _chain(),
    "chain, o in 5 parts": _one_row(_chain(0, O_PARTS)),
    "chain, 10 MB ahead": _one_row(_chain(10)),
    "chain, 20 MB ahead": _chain(20),
    "chain, 20 MB ahead after down": _one_row(_chain(20, after=2)),
    "chain, 20 MB ahead, o in 5 parts": _chain(20, O_PARTS),
    "chain, 30 MB ahead, o in 5 parts": _one_row(_chain(30, O_PARTS)),
    "relay": _one_row(_relay()),
    "shares": _shares(),
    "shares, nothing ahead": _shares(DOWN_AHEAD=0, JOINT_AHEAD=0),
    "shares, more ahead": _shares(DOWN_AHEAD=2, JOINT_AHEAD=2),
    "shares, up by columns": _shares(UP_BY_ROWS=False),
}
ATTENTION = {
    IN_USE: Variant(),
    "adds up": _one_row(_attention()),  # with 32 rows there is nothing to add up
    "adds up, 8 splits": _one_row(_attention(SPLITS=8)),
    "adds up, 2 splits": _many_rows(_attention(SPLITS=2)),
    "adds up, 3 splits": _many_rows(_attention(SPLITS=3)),
    "adds up, 4 splits": _many_rows(_attention(SPLITS=4)),
    "adds up, 2 splits, 3 stages": _many_rows(_attention(SPLITS=2, STAGES=3)),
    "adds up, 3 stages": _many_rows(_attention(STAGES=3)),
    "adds up, warms 10 MB": _attention(10),
    "adds up, warms 20 MB": _attention(20),
    "adds up, warms 20 MB, no policy": _attention(20, EVICTION=None),
}
STEPS = {
    IN_USE: Variant(),
    "o in 5 parts": Variant(settings=O_PARTS),
    "adds up": _one_row(_attention()),
    "chain": _one_row(_chain()),
    "chain + adds up": _both(_chain(), _attention()),
    "two steps a turn": _one_row(Variant(settings={"measures.UNROLL": 2})),
    "chain, o in 5 parts + adds up": _both(_chain(0, O_PARTS), _attention()),
    "chain, 20 MB ahead + adds up": _both(_chain(20), _attention()),
    "chain, 20 MB ahead, o in 5 parts + adds up": _both(_chain(20, O_PARTS), _attention()),
    "chain, o in 5 parts + adds up, 2 splits": _many_rows(_both(_chain(0, O_PARTS), _attention(SPLITS=2))),
    "chain, o in 5 parts + adds up, 4 splits": _many_rows(_both(_chain(0, O_PARTS), _attention(SPLITS=4))),
    "chain, o in 5 parts + warms 10 MB": _one_row(_both(_chain(0, O_PARTS), _attention(10))),
    "chain, o in 5 parts + warms 20 MB": _both(_chain(0, O_PARTS), _attention(20)),
    "shares + adds up": _both(_shares(), _attention()),
    "shares + warms 10 MB": _both(_shares(), _attention(10)),
    "shares + warms 20 MB": _both(_shares(), _attention(20)),
}
# The products that are compared with the plain formula: one of each kind.
CHECKED = (
    IN_USE, "o in 5 parts", "o, down in 5 parts, joint in 2", "chain", "chain, 20 MB ahead, o in 5 parts", "relay",
    "shares", "shares, more ahead", "shares, up by columns",
)  # fmt: skip
CHECK = {name: PRODUCTS[name] for name in CHECKED}
VARIANTS = {"check": CHECK, "products": PRODUCTS, "attention": ATTENTION, "step": STEPS}
