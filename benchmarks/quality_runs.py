"""The runs of a comparison of quality, of any program: each leaves a line of JSON, and is done once.

Seconds are those of training steps. The first steps, which may still compile, count as the median of the others at
most.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from timing import say

from jaxchat.config import Experiment
from jaxchat.errors import UserError

FIRST = 10  # steps that may compile; nanochat does not count them in its own total either
Record = dict[str, Any]
# The seconds of each step as `times`, (step, bits per byte) as `scores`, and what else is known.
Measured = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training: of a recipe, with all options that decide it, evaluated after the steps `at`; the last ends it."""

    program: str
    recipe: str
    options: tuple[str, ...]
    experiment: Experiment
    seed: int
    at: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.recipe}, seed {self.seed}"


def carry_out(
    runs: Iterable[Run], measure: Callable[[Run], Measured], file: str | None, within: float | None
) -> list[Record | None]:
    """The records of the runs, in their order; those that are in `file` are not done again. None for what fails.

    What there is no time for `within` seconds, or is left when the user stops it, is not among them.
    """
    began, known = time.perf_counter(), read(file)
    done: list[Record | None] = []
    for run in runs:
        found = find(known, run)
        if found is None:
            longest = max((one["all_seconds"] for one in known if one["program"] == run.program), default=0.0)
            if within is not None and time.perf_counter() - began + longest > within:
                say(f"{run.name}: left for another time")
                continue
            try:
                found = _record(run, measure)
            except UserError as error:
                say(f"{run.name} failed: {error}")
                done.append(None)
                continue
            except KeyboardInterrupt:
                say(f"{run.name}: stopped")
                break
            known.append(found)
            write(file, found)
            say(f"{run.name}: {in_words(found)}")
        done.append({**found, "recipe": run.recipe})
    return done


def _record(run: Run, measure: Callable[[Run], Measured]) -> Record:
    began = time.perf_counter()
    measured = measure(run)
    return {
        **{"program": run.program, "recipe": run.recipe, "options": list(run.options), "seed": run.seed},
        **{"steps": run.at[-1], "batch_tokens": round(run.experiment.pretrain.mean_batch_tokens)},
        **figures(measured["times"], measured["scores"]),
        **{name: value for name, value in measured.items() if name not in ("times", "scores")},
        **{"all_seconds": time.perf_counter() - began, "date": date.today().isoformat()},
    }


def figures(times: Sequence[float], scores: Iterable[tuple[int, float]]) -> dict[str, Any]:
    """The curve, as lists of steps, seconds until then and bits per byte (None for NaN), and how long steps take."""
    times = steady(times)
    ends = list(itertools.accumulate(times))
    curve = [[step, ends[step - 1], bpb if math.isfinite(bpb) else None] for step, bpb in scores]
    return {"curve": curve, "step_ms": 1000 * statistics.median(times), "seconds": ends[-1]}


def steady(times: Sequence[float]) -> list[float]:
    """The seconds of each step, of the first `FIRST` at most the median of the others."""
    median = statistics.median(times[FIRST:] or times)
    return [*(min(seconds, median) for seconds in times[:FIRST]), *times[FIRST:]]


def in_words(found: Record) -> str:
    step, seconds, bpb = found["curve"][-1]
    if bpb is None:
        return f"diverged before step {step:,}"
    return f"{bpb:.4f} after {step:,} steps, {seconds:.1f} s of {found['all_seconds']:.0f} s in all"


# --- the file ---------------------------------------------------------------------------------------------------------


def find(known: Iterable[Record], run: Run) -> Record | None:
    """The record of a run with these options, if it was evaluated after all these steps, or broke off."""
    for one in known:
        same = (one["program"], one["options"], one["seed"]) == (run.program, list(run.options), run.seed)
        if same and (set(run.at) <= {step for step, *_ in one["curve"]} or one["curve"][-1][2] is None):
            return one
    return None


def read(file: str | None) -> list[Record]:
    """The records in a file of lines, [] if there is none; a line that was cut off is left out.

    Raises:
      UserError: the file is something else.
    """
    if file is None or not Path(file).exists():
        return []
    records = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            records.append({**found, "options": list(found["options"]), "curve": list(found["curve"])})
        except json.JSONDecodeError:
            say(f"{file}, line {number} is cut off; its run is done again")
        except (KeyError, TypeError):
            raise UserError(f"{file}, line {number} is no record of a run; name another file") from None
    return records


def write(file: str | None, found: Record) -> None:
    """Adds a record to a file, on a line of its own even after one that was cut off."""
    if file is None:
        return
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    cut = bool(before) and not before.endswith(b"\n")
    with path.open("a", encoding="utf-8") as lines:
        lines.write("\n" * cut + json.dumps(found) + "\n")
