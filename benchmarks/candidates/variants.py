"""What is tried: candidates and constants for decoding, and diagnoses, by name. Nothing here needs JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IN_USE = "in use"


@dataclass(frozen=True)
class Variant:
    """What is changed of what is in use.

    Attributes:
      settings: constants, functions or classes of modules of jaxchat.
      right: whether its results mean something; otherwise only its time does.
      least_rows, most_rows: with which it is tried.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    right: bool = True
    least_rows: int = 1
    most_rows: int = 64


def _of_one_row(**more: int) -> Variant:
    """With so many blocks that share columns, at most, where it is not the number in use."""
    return Variant({"ops.one_row.PARTS": {"o": 5, "down": 4} | more}, most_rows=1)


def _of_several(**more: int) -> Variant:
    return Variant({"ops.few_rows.PARTS": {"o": 1, "up": 1, "down": 4, "joint": 1} | more}, least_rows=2)


def _ring(kilobytes: int) -> Variant:
    return Variant({"ops.product_chain.RING": kilobytes << 10})


def _attention(tile: int, stages: int, warps: int) -> Variant:
    """Attention that reads so many keys of a page at a time; `stages` and `warps` are Triton's."""
    settings = {"ops.decode.TILE": tile, "ops.decode.STAGES": stages, "ops.decode.WARPS": warps}
    return Variant(settings, least_rows=2, most_rows=256)


def _never(*_: Any) -> bool:
    """Instead of whether the kernel for one row takes the operands."""
    return False


def _nothing(*_: Any) -> None:
    """Instead of waiting or signalling."""


def _wrong(**functions: Any) -> Variant:
    """A diagnosis: what this costs in time. Blocks read what others have not written yet, and results are wrong."""
    settings = {f"ops.several_rows.{name}": function for name, function in functions.items()}
    return Variant(settings, right=False, least_rows=2)


# Keys at a time, Triton's stages, of which every other one is for pages' numbers, and warps. What is on its way takes
# shared memory: of 71 KB three programs fit on a multiprocessor, as many as 32 rows of 10 heads need.
SIZES = [(64, 2, 4), (64, 5, 4), (32, 3, 4), (32, 7, 4), (32, 5, 2), (16, 7, 4), (16, 9, 4)]
ATTENTION = {f"{sizes[0]} keys, {sizes[1]} stages, {sizes[2]} warps": _attention(*sizes) for sizes in SIZES}
RIGHT = {
    IN_USE: Variant(most_rows=256),
    "as several rows": Variant({"ops.one_row.fits": _never}, most_rows=1),
    "attention apart": Variant({"ops.one_row.attends": _never}, most_rows=1),
    "one row, o in 1 part": _of_one_row(o=1),
    "one row, down in 5 parts": _of_one_row(down=5),
    "o in 5 parts": _of_several(o=5),
    "down in 2 parts": _of_several(down=2),
    "down in 5 parts": _of_several(down=5),
    "o, down in 5 parts, joint in 2": _of_several(o=5, down=5, joint=2),
    **ATTENTION,
    "ring of 140 KB": _ring(140),
    "ring of 200 KB": _ring(200),
}
DIAGNOSES = {
    "no waiting": _wrong(_wait=_nothing),
    "no waiting, no signals": _wrong(_wait=_nothing, _signal=_nothing),
}
VARIANTS = {
    "check": RIGHT,
    "products": RIGHT | DIAGNOSES,
    "attention": {IN_USE: Variant(most_rows=256)} | ATTENTION,
    "step": RIGHT,
}
