"""Measures the time and memory of contenders side by side; shared by the benchmarks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError


class Failed(Exception):
    """Work in a separate process failed; the message says how."""


def have(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def machine(*packages: str) -> dict[str, Any]:
    """What the figures depend on: processor, number of cores, versions."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
            processor = next(names, processor)
    versions = {package: importlib.metadata.version(package) for package in packages if have(package)}
    return {"processor": processor, "cores": os.cpu_count(), "python": platform.python_version()} | versions


def say(text: str, end: str = "\n") -> None:
    """Prints progress to stderr, separate from the tables."""
    print(text, end=end, file=sys.stderr, flush=True)


def medians(title: str, contenders: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each contender. Each run measures all of them, so that a busy moment affects all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(runs):
        say(f"{title}, run {run + 1} of {runs}:", end="")
        for name, work in contenders.items():
            start = time.perf_counter()
            result = work()
            seconds[name].append(time.perf_counter() - start)
            del result  # frees its memory outside the timing
            say(f"  {name} {seconds[name][-1]:.3f} s", end="")
        say("")
    return {name: statistics.median(times) for name, times in seconds.items()}


def alone(
    work: Callable, *arguments, timeout: float | None = None, environment: Mapping[str, str] | None = None
) -> tuple[Any, int]:
    """The result of `work(*arguments)` in a fresh process with these variables set, and its peak memory in bytes.

    Raises:
      Failed: it raised (or panicked, in Rust), died, or was stopped because it took longer than `timeout` seconds.
    """
    # Started from a small server process: a child of this process would inherit its peak memory.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, dict(environment or {}), work, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise Failed(f"not done after {timeout:.0f} s")
        result, peak = ours.recv()
    except EOFError:
        raise Failed("died") from None
    finally:
        process.kill()
        process.join()
    if isinstance(result, Failed):
        raise result
    return result, peak


def _work(pipe, environment: dict[str, str], work: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    try:
        result = work(*arguments)
    except BaseException as error:  # noqa: B036 (a panic is not an Exception)
        result = Failed("panics" if "Panic" in type(error).__name__ else f"{type(error).__name__}: {error}")
    unit = 1 if sys.platform == "darwin" else 1024
    pipe.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))


def run(
    name: str, command: list[str], environment: dict[str, str], result: Path | None, *, show: bool = False
) -> dict[str, Any]:
    """The figures that a process writes to `result`. When this returns, the process has ended and its memory is free.

    With `show`, what it prints goes to stderr at once. Without a `result` there are no figures.

    Raises:
      UserError: the process fails; the message has its last line of output.
    """
    if result:
        result.unlink(missing_ok=True)
    try:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started ({error.strerror}); give --python a Python") from None
    lines = []
    with process:
        assert process.stdout
        for line in filter(str.strip, process.stdout):
            lines.append(line.rstrip("\n"))
            if show:
                say(lines[-1])
    written = result.read_text() if result and result.exists() else ""
    figures = json.loads(written) if written else {"error": lines[-1:]} if result else {}
    if process.returncode or "error" in figures:
        if not show:
            say("\n".join(lines[-30:]))
        reason = figures.get("error") or lines[-1:]
        raise UserError(f"{name} failed: {reason if isinstance(reason, str) else ' '.join(reason)}")
    return figures


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a Markdown table: the first column is text, the others are numbers."""
    print(f"\n| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    sys.stdout.flush()


def contest(title: str, seconds: Mapping[str, float], megabytes: float, ours: str = "jaxchat") -> dict[str, Any]:
    """Prints each contender's seconds and speed, and its time as a multiple of each of ours."""
    bases = [name for name in seconds if name.startswith(ours)]
    rows = [
        [name, f"{median:.3f}", f"{megabytes / median:.1f}", *(f"{median / seconds[base]:.2f}" for base in bases)]
        for name, median in seconds.items()
    ]
    table([f"{title}, {megabytes:.3g} MB", "seconds", "MB/s", *(f"time / {base}" for base in bases)], rows)
    return {name: {"seconds": median, "megabytes": megabytes} for name, median in seconds.items()}
