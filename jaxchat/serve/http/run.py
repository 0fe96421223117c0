"""What the page's view of a run is drawn from: the files that a training writes, also while it writes them.

GET /api/run/metrics?from=BYTE&mark=MARK    records of metrics.jsonl from a byte on
GET /api/run/stages                         what is finished, under way and to come
GET /api/run/samples                        texts of the model, and answers to held-out questions
GET /api/run/report                         report.md and report.json

Nothing here imports JAX: a run can be watched without a model, and without a device.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxchat.config import STAGES, TRAINED
from jaxchat.errors import UserError
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.files import Object, parse_json, parse_line
from jaxchat.runs.metrics import NAME, in_force, parse_record
from jaxchat.serve.http.errors import ApiError, JsonResponse, expect
from jaxchat.storage import reason, size_of, storage_errors

PIECE = 1 << 20  # bytes of metrics.jsonl in one reply
MARK = 64  # bytes before an offset that tell whether the file is still the one that was read
SAMPLES = 300  # in one reply, the last ones
ANSWERS = 4  # to the questions of each task
ANSWER_BYTES = 1 << 18  # read of the answers to one task
REPORT_BYTES = 1 << 22
_ANSWER = Object({"question": str, "answer": str, "right": str, "score": float, "cut": bool})


def routes(run_dir: epath.PathLike) -> list[Route]:
    """The routes over a run directory, which may still be empty. No path in it comes from a client."""
    directory = RunDirectory(run_dir)

    def metrics(request: Request) -> dict[str, Any]:
        given = request.query_params.get("from", "0")
        known = given.isdecimal() and len(given) < 19
        expect(known, "from must be a byte of metrics.jsonl: 0, or `next` of the reply before", "from")
        return read_tail(directory.path / NAME, int(given), request.query_params.get("mark"))._asdict()

    def answering(read: Callable[[Request], Any]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            try:
                return JsonResponse(read(request))
            except UserError as error:
                raise ApiError(503, str(error)) from None
            except storage_errors() as error:
                raise ApiError(503, f"{directory} cannot be read ({reason(error)})") from None

        return answer

    return [
        Route("/api/run/metrics", answering(metrics)),
        Route("/api/run/stages", answering(lambda _: stages(directory))),
        Route("/api/run/samples", answering(lambda _: samples(directory))),
        Route("/api/run/report", answering(lambda _: report(directory))),
    ]


class Tail(NamedTuple):
    """Records of metrics.jsonl, as they are in the file: later ones may supersede earlier ones.

    Attributes:
      records: those of whole lines; damaged ones are left out.
      next: the byte to go on from.
      mark: what must be sent with it.
      size: bytes that the file has; the reply is followed by more if `next` is smaller and moves.
      restart: the file is another one than before, and the records are its first: forget the earlier ones.
    """

    records: list[dict[str, Any]]
    next: int
    mark: str
    size: int
    restart: bool


def read_tail(path: epath.Path, offset: int, mark: str | None) -> Tail:
    """At most `PIECE` bytes of records from a byte on; from the start if the file was replaced or cut since.

    Raises:
      OSError: it cannot be read; a missing file has no records.
    """
    try:
        size = size_of(path)
    except FileNotFoundError:
        return Tail([], 0, "", 0, offset > 0)
    with path.open("rb") as file:
        before = _read(file, max(0, offset - MARK), min(offset, MARK)) if offset <= size else b""
        restart = offset > size or (mark is not None and mark != _mark(before))
        offset = 0 if restart else offset
        data = _read(file, offset, PIECE)
        end = data.rfind(b"\n") + 1
        if not end and len(data) == PIECE:  # no line is as long: its rest is passed over as damaged
            end = PIECE
        records = [record for line in data[:end].split(b"\n") if line and (record := parse_record(line)) is not None]
        read_on = data[:end] if end >= MARK else _read(file, max(0, offset + end - MARK), min(offset + end, MARK))
    return Tail(records, offset + end, _mark(read_on[-MARK:]), size, restart)


def _read(file: Any, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _mark(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}" if data else ""


def stages(directory: RunDirectory) -> dict[str, Any]:
    """The run's name and stages, each with its `state`: "waiting", "begun", "finished", or "stale".

    `problem` is what is wrong with config.json or a stage's record, if anything is. `now` is this machine's clock.
    """
    found: dict[str, Any] = {"folder": directory.path.name, "name": None, "now": time.time(), "stages": []}
    try:
        config = directory.read_config()
    except UserError as error:
        return found | {"problem": str(error)}
    for stage in config.stages:
        entry: dict[str, Any] = {"stage": stage, "state": "waiting"}
        try:
            record, begun = directory.read_record(stage) or {}, directory.begun(stage) or {}
            entry |= {
                key: record[key]
                for key in ("steps", "result_step", "turned", "tokens", "seconds", "finished", "skipped")
                if key in record
            }
            entry |= {key: each[key] for each in (begun, record) for key in ("started", "id") if each.get(key)}
            if record:
                entry["state"] = "finished" if directory.stale(stage) is None else "stale"
            elif begun:
                entry["state"] = "begun"
            if stage == "report" and (directory.path / "report.json").exists():
                entry["state"] = "finished"
        except UserError as error:
            entry["problem"] = str(error)
        if stage in TRAINED:
            entry["total_steps"] = entry.get("steps") or getattr(config, stage).num_iterations
        found["stages"].append(entry)
    return found | {"name": config.name}


def samples(directory: RunDirectory) -> dict[str, Any]:
    """What the model said: `samples` as logged, oldest first, and `answers` by stage and task."""
    lines = (_bytes(directory.path / NAME) or b"").split(b"\n")
    # A small part of the lines; those that start a stage say which of the others still count.
    chosen = [line for line in lines if b'"sample"' in line or b'"start"' in line]
    records = in_force(record for line in chosen if (record := parse_record(line)) is not None)
    found = [
        {"stage": r["stage"], "step": r["step"], "prompt": r["prompt"], "completion": r["sample"]}
        for r in records
        if isinstance(r.get("sample"), str) and isinstance(r.get("prompt"), str)
    ]
    return {"samples": found[-SAMPLES:], "answers": _answers(directory)}


def _answers(directory: RunDirectory) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """A few answers to each task, spread over those that were asked, of every stage that was scored."""
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for stage in STAGES:
        folder = directory.path / "evaluate" / stage
        files = sorted(path for path in folder.iterdir() if path.suffix == ".jsonl") if folder.is_dir() else []
        for path in files:
            lines = (_bytes(path, ANSWER_BYTES) or b"").split(b"\n")[:-1]
            kept = [answer for line in lines if (answer := parse_line(line, _ANSWER)) is not None]
            if kept:
                few = min(ANSWERS, len(kept))
                answers.setdefault(stage, {})[path.stem] = [kept[i * len(kept) // few] for i in range(few)]
    return answers


def report(directory: RunDirectory) -> dict[str, Any]:
    """`markdown` and `report`, the contents of report.md and report.json; null where there is none yet."""
    text, facts = (_bytes(directory.path / name, REPORT_BYTES) for name in ("report.md", "report.json"))
    try:
        parsed = parse_json(facts) if facts is not None else None
    except ValueError:
        parsed = None  # report.md says the same
    return {"markdown": None if text is None else text.decode(errors="replace"), "report": parsed}


def _bytes(path: epath.Path, most: int = -1) -> bytes | None:
    """The first bytes of a file; None without the file."""
    try:
        with path.open("rb") as file:
            return file.read(most)
    except FileNotFoundError:
        return None
