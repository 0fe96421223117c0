"""What is tried: a candidate and constants for decoding, by name. Nothing here needs JAX."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

IN_USE = "in use"


@dataclass(frozen=True)
class Variant:
    """What is changed of what is in use.

    Attributes:
      products: of the products between two attentions: "in use" or "readers".
      settings: constants, or functions, of modules of `jaxchat/ops` or of the candidate.
      right: whether its results mean something; otherwise only its time does.
      least_rows, most_rows: with which it is tried.
    """

    products: str = IN_USE
    settings: dict[str, Any] = field(default_factory=dict)
    right: bool = True
    least_rows: int = 1
    most_rows: int = 64


def _parts(**more: int) -> Variant:
    """With so many blocks that share columns, at most, where it is not the number in use."""
    return Variant(settings={"few_rows.PARTS": {"o": 1, "up": 1, "down": 4, "joint": 1} | more})


def _ring(kilobytes: int) -> dict[str, Any]:
    return {"product_chain.RING": kilobytes << 10}


def _readers(settings: dict[str, Any] | None = None, **more: int) -> Variant:
    parts = {"readers.PARTS": {"o": 5, "up": 1, "down": 4, "joint": 1} | more}
    return Variant("readers", parts | (settings or {}), most_rows=1)


def _as_they_are(weights: Any, values: Any, _: Any) -> Any:
    """Instead of adding up what attention's splits have."""
    return weights, values


def _nothing(*_: Any) -> None:
    """Instead of waiting or signalling."""


def _wrong(variant: Variant, **functions: Any) -> Variant:
    """A diagnosis: what this costs in time. Blocks read what others have not written yet, and results are wrong."""
    without = {f"product_chain.{name}": function for name, function in functions.items()}
    return replace(variant, settings=variant.settings | without, right=False)


CONSTANTS = {
    IN_USE: Variant(),
    "o in 5 parts": _parts(o=5),
    "down in 2 parts": _parts(down=2),
    "down in 5 parts": _parts(down=5),
    "o, down in 5 parts, joint in 2": _parts(o=5, down=5, joint=2),
    "ring of 140 KB": Variant(settings=_ring(140)),
    "ring of 200 KB": Variant(settings=_ring(200)),
}
READERS = {
    "readers": _readers(),
    "readers, o in 1 part": _readers(o=1),
    "readers, down in 5 parts": _readers(down=5),
    "readers, ring of 200 KB": _readers(_ring(200)),
}
OF_SPLITS = {
    "readers, of splits": _readers({"decode.add_splits": _as_they_are}),
    "readers, of splits, down in 5 parts": _readers({"decode.add_splits": _as_they_are}, down=5),
}
DIAGNOSES = {
    "no waiting": _wrong(Variant(), _wait=_nothing),
    "no waiting, no signals": _wrong(Variant(), _wait=_nothing, _signal=_nothing),
    "readers, no waiting": _wrong(_readers(), _wait=_nothing),
    "readers, no waiting, no signals": _wrong(_readers(), _wait=_nothing, _signal=_nothing),
}
RIGHT = CONSTANTS | READERS
VARIANTS = {"check": RIGHT | OF_SPLITS, "products": RIGHT | DIAGNOSES, "step": RIGHT | OF_SPLITS}
