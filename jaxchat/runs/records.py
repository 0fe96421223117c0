"""What the records of a stage hold: stage.json when it is finished, begun.json from its beginning."""

from __future__ import annotations

from typing import Any

from jaxchat.runs.files import Object

_MACHINE = {
    **dict.fromkeys(("platform", "device_kind", "jax", "python"), str),
    **dict.fromkeys(("device_count", "cores", "memory_bytes"), int),
}
RECORD = Object(
    optional={
        "id": str,
        "stage": str,
        "parent": (None, Object({"stage": str, "step": int})),
        **dict.fromkeys(("seconds", "started", "finished", "train_seconds", "peak_memory_bytes"), (None, float)),
        **dict.fromkeys(("steps", "tokens"), (None, int)),
        "result_step": int,
        "turned": Object({"bpb": float, "bpb_at_end": float}),
        "machine": Object(_MACHINE),
        "divergences": [Object({"step": int, "back_to": int, "batches": int, "why": str})],
        "packing": Object(others=float),
        "left_out": Object(others=int),
        "mixture": Object(others=int),
        "text_fraction": float,
        "metrics": Object(others=(None, float)),
        "samples": [Object({"prompt": str, "completion": str})],
        "method": str,
        "device_rows": int,
        "remat": str,
        "skipped": bool,
        "groups_without_signal": float,
        "cut": float,
        "steps_without_signal": int,
        "questions_retired": float,
        "imported": Object({"from": str}, optional={"run": str, "stage": str, "step": int}),
        "fingerprint": (None, Object()),
        "text": Object(
            optional={
                **dict.fromkeys(("format", "how_split"), str),
                **dict.fromkeys(("train_files", "val_files", "left_out"), [str]),
                **dict.fromkeys(("train_bytes", "val_bytes"), (None, int)),
                "cut": (None, str),
            }
        ),
    }
)
BEGUN = Object(
    {"stage": str, "id": str, "started": float, "made_from": Object(others=str), "config": Object()},
    optional={"step": Object({"device_rows": int, "remat": str, "devices": Object()})},
)

IMPORT_AGAIN = "import the model again, to a new --run"  # the remedy for what no stage has made


def came_by_import(record: dict[str, Any]) -> bool:
    """Whether `jaxchat import` has made what a stage.json is about, rather than a stage or --init-from."""
    return "imported" in record and "run" not in record["imported"]


def result_step(record: dict[str, Any]) -> int:
    """The step whose checkpoint is the stage's result, from its stage.json; before there was a choice, the last."""
    return record.get("result_step") or record.get("steps") or 0


def turned_at(record: dict[str, Any]) -> int | None:
    """The step at which the stage's validation turned; None if it did not."""
    return record["result_step"] if "turned" in record else None
