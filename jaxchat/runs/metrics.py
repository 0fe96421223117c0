"""The log of a run: `metrics.jsonl`, the live line, TensorBoard, and Weights & Biases.

`metrics.jsonl` has one JSON object a line, in the order of logging:

    {"stage": "pretrain", "step": 120, "time": 1767225600.125, "loss": 3.21, "tokens_per_second": 412000.0}

`time` is seconds since 1970. JSON has neither NaN nor infinity; they are written as null. The first line that
a process writes for a stage has `"start": true`: after a resume at step s, it supersedes the stage's earlier lines from
step s on, and `read_metrics` leaves them out. It also has the `id` of this making of the stage: lines of another one
are superseded from step 0 on. And it has `total_steps`, where that is known: how many steps the stage is to take.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from jaxchat.errors import UserError, check
from jaxchat.runs.files import Object, parse_line, read_bytes, read_json, read_lines, split_lines, write_bytes
from jaxchat.runs.progress import LiveLine
from jaxchat.stopping import NO_ROOM, same_command
from jaxchat.storage import append_bytes, is_remote, reason, storage_errors

NAME = "metrics.jsonl"
REMEDY = "move it aside: the run goes on without its metrics so far"
_LINE = Object(
    required={"stage": str, "step": int},
    optional={
        "time": float,
        "start": bool,
        "total_steps": int,
        **dict.fromkeys(("id", "of", "model", "prompt", "sample", "questions"), str),
    },
    others=(float, None, str, bool),  # numbers first, which most are: it reads a large file in a third of the time
)
# An object store rewrites the whole file for an append, so lines for it are gathered.
REMOTE_FLUSH_SECONDS = 30.0


class Metrics:
    """Logs one stage of a run.

    Values may be Python, NumPy or JAX scalars, or text. Reading a JAX array waits for it: pass host
    floats in a loop that must not wait for its device. Use it as a context manager, or call `close`.

    Args:
      run_dir: the run directory, anything `etils.epath` opens.
      stage: name of the stage, in every line.
      identity: what tells this making of the stage from others, for the first line.
      tensorboard: also write event files to `run_dir/tensorboard/stage`.
      wandb: also log to Weights & Biases (project "jaxchat", grouped by run); `WANDB_MODE=offline` needs no account.
      total_steps: for the first line, and for the live line, which then shows `1234/5000` and the time left.
      live: show the live line and samples on stderr.
      enabled: False makes every method do nothing, as in all processes except process 0.

    Raises:
      UserError: TensorBoard or Weights & Biases is not installed, or does not start.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        stage: str,
        *,
        identity: str | None = None,
        tensorboard: bool = False,
        wandb: bool = False,
        total_steps: int | None = None,
        live: bool = True,
        enabled: bool = True,
    ):
        self._line: LiveLine | None = None
        self._sinks: list[_JsonLines | _TensorBoard | _WeightsAndBiases] = []
        if not enabled:
            return
        run_dir = epath.Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._sinks.append(_JsonLines(run_dir / NAME, stage, identity, total_steps))
        if tensorboard:
            self._sinks.append(_TensorBoard(run_dir, stage))
        if wandb:
            self._sinks.append(_WeightsAndBiases(run_dir, stage))
        if live:
            self._line = LiveLine(stage, total_steps)

    def log(self, step: int, **values: Any) -> None:
        """Appends one line to `metrics.jsonl` (on disk when the call returns, if the run directory is local)."""
        values = {name: _plain(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.write(int(step), values)
        if self._line:
            self._line.remember(values)

    def live(self, step: int, **values: Any) -> None:
        """Updates the live line, which shows these values and the last ones logged."""
        if self._line:
            self._line.update(int(step), {name: _plain(value) for name, value in values.items()})

    def sample(self, step: int, prompt: str, completion: str, seed: int | None = None) -> None:
        """Logs the model's completion of a prompt as `prompt` and `sample`, and prints it above the live line.

        `seed`, of one that was drawn at random, is logged too: it tells apart those with the same prompt.
        """
        self.log(step, prompt=prompt, sample=completion, **({} if seed is None else {"seed": seed}))
        if self._line:
            self._line.show_sample(int(step), prompt, completion)

    def expect(self, total_steps: int) -> None:
        """Tells the live line how many steps there will be, where that has changed."""
        if self._line:
            self._line.expect(total_steps)

    def progress(self, doing: str, done: int, total: int) -> None:
        """Shows in the live line's place how far something has come that the steps wait for."""
        if self._line:
            self._line.show_progress(doing, done, total)

    def note(self, text: str) -> None:
        """Prints a line above the live line without logging it."""
        if self._line:
            self._line.show_note(text)

    def flush(self) -> None:
        """Writes lines that wait to be written together; if remote storage fails, they stay for the next time."""
        for sink in self._sinks:
            if isinstance(sink, _JsonLines):
                sink.flush()

    def close(self) -> None:
        """Writes the remaining lines and ends the live line; a second call does nothing.

        Raises:
          UserError: remote storage does not accept them.
        """
        if self._line:
            self._line.close()
        for sink in self._sinks:
            sink.close()
        self._line, self._sinks = None, []

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_installed(*, tensorboard: bool, wandb: bool) -> None:
    """Raises a UserError if the package that a log is written with is not installed."""
    for name, extra, package, asked in (
        ("TensorBoard", "tensorboard", "tensorboardX", tensorboard),
        ("Weights & Biases", "wandb", "wandb", wandb),
    ):
        there = not asked or _is_installed(package)
        check(there, f"{name} logging needs {package}: pip install 'jaxchat[{extra}]'")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is hidden, as by `sys.modules[package] = None`
        return False


def read_metrics(run_dir: epath.PathLike, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in file order, without those that a later line supersedes; [] without the file.

    When a stage is resumed at step s, its lines from step s on are superseded (at s itself, only those that are logged
    again); when it is made again, all its lines are. Of several lines with the same stage, step and names, only the
    last one counts. A resume never supersedes an evaluation result (a line with `of`, the stage evaluated), so that
    evaluating one stage again keeps the results of the others. Lines that a crash or a bad disk has damaged are left
    out, and counted by `say`.

    Raises:
      UserError: the file cannot be read at all.
    """
    path = epath.Path(run_dir) / NAME
    records, broken = read_lines(path, _LINE, REMEDY)
    if broken:
        say(f"{path}: {broken:,} damaged {'line is' if broken == 1 else 'lines are'} left out")
    return in_force(records)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line of `metrics.jsonl`; None if it is damaged."""
    return parse_line(line, _LINE)


def in_force(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, in file order, without those that a later one supersedes, as `read_metrics` says."""
    kept: dict[tuple, dict[str, Any]] = {}
    makings: dict[str, str] = {}
    for record in records:
        stage, step = record["stage"], record["step"]
        if record.pop("start", False):
            record.pop("total_steps", None)
            making = record.pop("id", None)
            if making is not None and makings.setdefault(stage, making) != making:
                makings[stage] = making
                kept = {key: earlier for key, earlier in kept.items() if earlier["stage"] != stage or "of" in earlier}
            kept = {key: earlier for key, earlier in kept.items() if not _supersedes(record, earlier)}
        key = (stage, step, record.get("of"), record.get("prompt"), record.get("seed"), frozenset(record))
        kept.pop(key, None)
        kept[key] = record
    return list(kept.values())


def move(run_dir: epath.Path, to: epath.Path, chosen: Callable[[dict[str, Any]], bool]) -> None:
    """Moves the chosen lines of a run directory's `metrics.jsonl` to the one of another folder."""
    stay, go = [], []
    for line in split_lines(read_bytes(run_dir / NAME, REMEDY) or b""):
        record = parse_record(line)
        (go if record is not None and chosen(record) else stay).append(line + b"\n")
    if go:
        write_bytes(to / NAME, b"".join(go))
        write_bytes(run_dir / NAME, b"".join(stay))


def _supersedes(start: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Whether the line `earlier` is superseded by a process whose first line is `start`."""
    if earlier["stage"] != start["stage"] or "of" in earlier:
        return False
    # An evaluation at step s before the process stopped remains valid when training resumes at step s.
    same_names = set(earlier) & set(start) - {"stage", "step", "time"}
    return earlier["step"] > start["step"] or (earlier["step"] == start["step"] and bool(same_names))


def _plain(value: Any) -> Any:
    """The value as a Python scalar or text."""
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    return value.item()


class _JsonLines:
    """Appends to a JSON-lines file; the first line is marked as the start of a process."""

    def __init__(self, path: epath.Path, stage: str, identity: str | None, total_steps: int | None):
        self._path, self._stage = path, stage
        facts = {"id": identity, "total_steps": total_steps}
        self._first = {"start": True} | {name: value for name, value in facts.items() if value}
        self._remote = is_remote(path)
        self._flushed = time.monotonic()
        self._started = False
        # A crash in the middle of a line must not swallow the next one.
        cut_short = (read_bytes(path, REMEDY) or b"")[-1:] not in (b"", b"\n")
        self._waiting = b"\n" if cut_short else b""

    def write(self, step: int, values: dict[str, Any]) -> None:
        record: dict[str, Any] = {"stage": self._stage, "step": step, "time": round(time.time(), 3)}
        if not self._started:
            record |= self._first
            self._started = True
        for name, value in values.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            record[name] = value if finite else None
        self._waiting += json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if not self._remote or time.monotonic() - self._flushed >= REMOTE_FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        try:
            self._append()
        except storage_errors() as error:
            if not self._remote:
                raise self._unwritable(error) from error
            self._flushed = time.monotonic()  # it may recover; hours of training must not end because of a log

    def _append(self) -> None:
        if self._waiting:
            append_bytes(self._path, self._waiting)
        self._waiting = b""
        self._flushed = time.monotonic()

    def close(self) -> None:
        try:
            self._append()
        except storage_errors() as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> UserError:
        remedy = "make room, and " if isinstance(error, OSError) and error.errno in NO_ROOM else ""
        return UserError(
            f"{self._path} cannot be written ({reason(error)}); {remedy}{same_command()} resumes from the last "
            "checkpoint"
        )


class _TensorBoard:
    """Event files with one TensorBoard run per stage, so that stages share the plot of a metric."""

    def __init__(self, run_dir: epath.Path, stage: str):
        check_installed(tensorboard=True, wandb=False)
        import tensorboardX  # pyright: ignore[reportMissingImports]

        self._open = functools.partial(tensorboardX.SummaryWriter, os.fspath(run_dir / "tensorboard" / stage))
        self._writer = None

    def write(self, step: int, values: dict[str, Any]) -> None:
        # Opened at the first step: after a resume TensorBoard drops everything from there on (purge_step).
        self._writer = self._writer or self._open(purge_step=step)
        for name, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            elif value is not None and name != "seed":  # of a sample
                self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class _WeightsAndBiases:
    """One W&B run per stage, grouped by run directory, where its id is kept so that a resume continues it."""

    def __init__(self, run_dir: epath.Path, stage: str):
        check_installed(tensorboard=False, wandb=True)
        import wandb  # pyright: ignore[reportMissingImports]

        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        id_file, config_file = folder / f"{stage}.id", run_dir / "config.json"
        resumed = id_file.exists()
        if not resumed:
            id_file.write_text(uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project="jaxchat",
                group=run_dir.name,
                name=f"{run_dir.name}-{stage}",
                id=id_file.read_text().strip(),
                resume="allow" if resumed else None,
                dir=None if "://" in os.fspath(run_dir) else os.fspath(run_dir),
                config=read_json(config_file, Object(), "delete it: the same launch.py command writes it again"),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"Weights & Biases does not start ({reason}); run `wandb login`, or set WANDB_MODE=offline"
            ) from None
        # W&B's own step must not decrease, but an evaluation of step s can be logged after the loss of step s + 1.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
