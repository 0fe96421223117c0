"""Compares candidates and constants of the kernels for decoding (`benchmarks/candidates`) to what is in use.

    python benchmarks/decode_candidates.py --rows 1 32
    python benchmarks/decode_candidates.py --rows 1 32 --profile

For an H200: d20 in bf16, rows of 552 to 744 tokens. Everything is compiled first, by several processes at once; then
one process measures one variant after the other. One that takes too long or fails is given up, and another process goes
on with the rest. Tables have the fastest first. With `--profile` a profile of a step follows, with every kernel of a
microsecond or more. On a CPU sizes are tiny, the formulas run instead of the kernels, and times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from candidates.variants import IN_USE, VARIANTS
from timing import say, table

Task = tuple[str, str, int]  # a measure, a variant of it, and rows
CALLS, QUEUED = 3, 8  # timings; calls in each, which wait for the GPU: so starting them takes no time
ALLOWED = {"check": 0.05}  # the largest difference, as a share of the largest number
UNIT = {"products": "µs a layer", "attention": "µs a layer", "step": "µs a step"}
LONGEST_NAME = 70


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; returns 1 if a variant is wrong, failed or took too long."""
    options = _parser().parse_args(argv)
    if options.work:
        return _work(options.work, [tuple(task) for task in json.loads(options.tasks)])
    wanted = [IN_USE, *options.variants] if options.variants else None
    tasks = [
        (measure, name, rows)
        for measure in options.only for rows in options.rows for name, variant in VARIANTS[measure].items()
        if variant.least_rows <= rows <= variant.most_rows and (wanted is None or name in wanted)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        # What is in use goes first: others find there which cuBLAS algorithms were chosen for it.
        for first in (True, False):
            began = time.perf_counter()
            part = [task for task in tasks if (task[1] == IN_USE) == first]
            _compile(part, options.processes, environment, options.limit)
            say(f"{len(part)} programs compiled in {time.perf_counter() - began:.0f} s")
        found = _measure(tasks, environment, options.limit)
        wrong = sum([_print(measure, options.rows, found) for measure in options.only])
        if options.profile:
            for rows in options.rows:
                for line in _lines("profile", [("step", IN_USE, rows)], environment, 6 * options.limit):
                    print(line.get("text", f"the profile of {rows} rows failed: {line.get('error')}"))
    return min(wrong, 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[1, 32], help="rows at a time (default 1 32)")
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="measures (default all)")
    add("--variants", nargs="+", metavar="NAME", help="variants beside what is in use (default all)")
    add("--profile", action="store_true", help="also profile a step of what is in use")
    add("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile (default: cores less 2)")
    add("--limit", type=float, default=15, help="seconds for a variant's measure, four times as much to start (15)")
    add("--work", choices=["compile", "time", "profile"], help=argparse.SUPPRESS)
    add("--tasks", help=argparse.SUPPRESS)
    return parser


# --- processes --------------------------------------------------------------------------------------------------------


def _compile(tasks: Sequence[Task], processes: int, environment: dict[str, str], limit: float) -> None:
    """Fills the cache of compiled programs; what cannot be compiled is told when it is measured."""
    shares = [tasks[number::processes] for number in range(min(processes, len(tasks)))]
    environment = environment | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.05"}
    with ThreadPoolExecutor(max(1, len(shares))) as pool:
        list(pool.map(lambda share: list(_lines("compile", share, environment, 4 * limit)), shares))


def _measure(tasks: Sequence[Task], environment: dict[str, str], limit: float) -> dict[Task, dict[str, Any]]:
    """What was found of each task, by processes that replace each other when one fails or takes too long."""
    found: dict[Task, dict[str, Any]] = {}
    left = list(tasks)
    while left:
        for line in _lines("time", left, environment, limit):
            task = left.pop(0)
            found[task] = line
            say(f"{task}: {line}")
        # A process whose first task failed at once is replaced too, so that each round has at least one line.
    return found


def _lines(work: str, tasks: Sequence[Task], environment: dict[str, str], limit: float) -> Iterator[dict[str, Any]]:
    """What a process says about each of the tasks, until it ends. The last may be an error that ended it.

    A process has `limit` seconds for each line, and four times as much for the first.
    """
    command = [sys.executable, str(Path(__file__)), "--work", work, "--tasks", json.dumps(tasks)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        told: queue.Queue[str | None] = queue.Queue()

        def listen(stream=process.stdout):
            for line in stream:
                told.put(line)
            told.put(None)

        threading.Thread(target=listen, daemon=True).start()
        try:
            for number in range(len(tasks)):
                line = told.get(timeout=limit * (1 if number else 4))
                if line is None:
                    errors.seek(0)
                    yield {"error": (errors.read().strip().splitlines() or ["the process ended"])[-1]}
                    return
                said = json.loads(line)
                yield said
                if "error" in said and work != "compile":
                    return  # what it says later would count for the wrong task
        except queue.Empty:
            yield {"error": f"not done in {limit:.0f} s"}
        finally:
            process.kill()
            process.wait()


def _work(work: str, tasks: Sequence[Task]) -> int:
    """What a process does: a line of JSON for each task, and an end at the first error, which may have harmed more."""
    kept: dict[tuple[str, int], Any] = {}  # what all variants of a measure share
    for task in tasks:
        try:
            line = {"compile": _compiled, "time": _timed, "profile": _profiled}[work](task, kept)
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            print(json.dumps({"error": text.splitlines()[0][:200]}), flush=True)
            if work == "compile":
                continue
            return 1
        print(json.dumps(line), flush=True)
    return 0


def _program(task: Task):
    """A measure and its compiled program."""
    import jax
    from candidates import measures

    name, variant, rows = task
    chosen = VARIANTS[name][variant]
    one = measures.MEASURES[name](rows)
    with measures.applied(chosen):
        shapes = jax.eval_shape(one.carry), jax.eval_shape(one.beside)
        return one, jax.jit(one.run, donate_argnums=0).lower(*shapes).compile()


def _compiled(task: Task, kept) -> dict[str, Any]:
    _program(task)
    return {}


def _timed(task: Task, kept: dict[tuple[str, int], Any]) -> dict[str, Any]:
    """The median time, and the largest difference of the first results from what they should be."""
    import jax

    name, variant, rows = task
    one, compiled = _program(task)
    if (name, rows) not in kept:
        kept.clear()  # variants come measure by measure
        kept[name, rows] = _shared(name, rows)
    beside, expected = kept[name, rows]
    carry = one.carry()
    carry, took = compiled(carry, beside), []
    got = jax.tree.map(jax.device_get, one.results(carry))
    for _ in range(CALLS if one.work else 0):
        began = time.perf_counter()
        for _ in range(QUEUED):
            carry = compiled(carry, beside)
        jax.block_until_ready(carry)
        took.append((time.perf_counter() - began) / QUEUED)
    line = {"difference": one.compare(got, expected)}
    return line | ({"time": 1e6 * statistics.median(took) / one.work} if one.work else {})


def _shared(name: str, rows: int) -> Any:
    """What all variants read, and the results that they should have: those of a formula, or of what is in use."""
    import jax

    one, compiled = _program((name, IN_USE, rows))
    beside = one.beside()
    expected = one.expected() if one.expected else one.results(compiled(one.carry(), beside))
    return beside, jax.tree.map(jax.device_get, expected)


def _print(measure: str, rows: Sequence[int], found: dict[Task, dict[str, Any]]) -> int:
    """A table of a measure, the fastest first, and how many variants are of no use."""
    lines, bad = [], 0
    for count in rows:
        own = {task[1]: line for task, line in found.items() if task[0] == measure and task[2] == count}
        usual = own.get(IN_USE, {}).get("time")
        for name, line in sorted(own.items(), key=lambda item: item[1].get("time", float("inf"))):
            took, off = line.get("time"), line.get("difference")
            verdict = _verdict(measure, name, line, usual)
            bad += verdict.isupper() or "error" in line
            lines.append([
                measure, count, name, "" if took is None else f"{took:,.1f}",
                f"{took / usual:.3f}" if took and usual else "", "" if off is None else f"{off:.4f}", verdict,
            ])  # fmt: skip
    head = "share of other tokens" if measure == "step" else "largest difference"
    table(["measure", "rows", "variant", UNIT.get(measure, ""), "of what is in use", head, "verdict"], lines)
    return bad


def _verdict(measure: str, name: str, line: dict[str, Any], usual: float | None) -> str:
    if "error" in line:
        return line["error"]
    if not VARIANTS[measure][name].right:
        return "only its time counts"
    if not line["difference"] <= ALLOWED.get(measure, float("inf")):
        return "WRONG"
    if measure == "check":
        return "right"
    if name == IN_USE or not usual:
        return ""
    return "faster" if line["time"] < 0.99 * usual else "slower" if line["time"] > 1.01 * usual else "as fast"


# --- profile ----------------------------------------------------------------------------------------------------------


def _profiled(task: Task, kept) -> dict[str, Any]:
    """A table of the kernels of a step, in the order of their time; those of all layers are one line."""
    import jax

    from jaxchat.analysis.trace import Program, break_down, read_trace

    one, compiled = _program(task)
    beside = one.beside()
    carry = jax.block_until_ready(compiled(one.carry(), beside))
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(CALLS):
                carry = compiled(carry, beside)
            jax.block_until_ready(carry)
        program = Program.parse(compiled.as_text() or "")
        devices = read_trace(next(Path(folder).glob("plugins/profile/*/*.xplane.pb")), program)
    found, steps = break_down(devices, program), CALLS * one.work
    alike: dict[tuple[str, str], list[float]] = {}  # XLA numbers the kernels of layers; time and runs of a step
    for (name, _), total in found.kernels.items():
        op = total.ops.most_common(1)[0][0]
        place = next((instruction.path for instruction in program.find(op, name) if instruction.path), op)
        sums = alike.setdefault((re.sub(r"[._]\d+$", "", name), place), [0.0, 0.0])
        sums[0] += total.time / steps / 1e3
        sums[1] += total.count / steps
    lines = [f"\n{task[2]} rows: {found.span / steps / 1e3:,.1f} µs a step, idle {found.idle / steps / 1e3:,.1f}\n"]
    lines += ["| µs a step | runs | µs a run | kernel | its place in the code |", "| ---: | ---: | ---: | --- | --- |"]
    for (name, place), (took, runs) in sorted(alike.items(), key=lambda item: -item[1][0]):
        if took >= 1:
            shown = f"`{name[:LONGEST_NAME]}` | {place[-LONGEST_NAME:]}"
            lines.append(f"| {took:.1f} | {runs:.1f} | {took / runs:.2f} | {shown} |")
    short = [sums for sums in alike.values() if sums[0] < 1]
    lines.append(f"| {sum(took for took, _ in short):.1f} | {sum(runs for _, runs in short):.1f} | | all others | |")
    return {"text": "\n".join(lines)}


if __name__ == "__main__":
    sys.exit(main())
