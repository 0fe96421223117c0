"""Interrupts commands at random moments, and counts how they end.

    python benchmarks/robustness/interrupts.py --times=20 --seed=0

Each command is started, and stopped in each way at moments drawn from its length; `--times` is for each command and
way. What is right: the exit code of the way, or 0 if the command had finished; at most one line of its own about it; no
traceback, and no other words of Python's or of a library's about an exception; an end within seconds. A training is
stopped again and again in one run directory, until it ends by itself, undisturbed after the last interrupt of a way;
then its losses and scores must be those of one that was never stopped.

The first few hundredths of a second belong to Python itself, which then ends by the signal, or with a traceback for
Ctrl-C. They are counted apart, as are the other failures, which are printed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jaxchat.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "launch.py"]
JAXCHAT = [sys.executable, "-m", "jaxchat"]
# What the installed command does.
SCRIPT = [sys.executable, "-c", "import sys; from jaxchat.cli.main import main; sys.exit(main())"]
TINY = [
    "--experiment=quickstart", "--data.synthetic-documents=200", "--data.synthetic-conversations=200",
    "--tokenizer.vocab-size=300", "--model.depth=1", "--model.sequence-len=64",
    *(f"--{stage}.{setting}" for stage in ("pretrain", "midtrain", "sft") for setting in (
        "device-rows=1", "batch-tokens=512", "num-iterations=120", "save-every=20", "eval-every=50", "eval-tokens=256",
        "sample-every=100")),
    "--rl.tasks=sums", "--rl.questions-per-step=2", "--rl.samples-per-question=4", "--rl.num-iterations=20",
    "--rl.max-new-tokens=8", "--rl.eval-questions=8", "--rl.pass-k=1",
    "--rl.eval-every=5", "--rl.device-rows=2", "--rl.save-every=3",
    "--evaluate.tasks=sums,letters", "--evaluate.limit=16", "--evaluate.max-new-tokens=8",
]  # fmt: skip
WORDS = ("Traceback", "Exception ignored", "Fatal", "terminate called", "Segmentation", "Error:", "Aborted")
STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "rl", "evaluate", "report")
# What differs between two trainings with the same result.
INCIDENTAL = {"time", "start", "id", "model", "tokens_per_second", "step_seconds", "input_seconds", "mfu"}
LIMIT = 120.0  # seconds from the interrupt to the end, on a busy machine

# Each way: its signals, and the right exit codes. The second of two comes a moment after the first.
WAYS: dict[str, tuple[tuple[signal.Signals, ...], set[int]]] = {
    "Ctrl-C": ((signal.SIGINT,), {130}),
    "SIGTERM": ((signal.SIGTERM,), {75}),
    "SIGHUP": ((signal.SIGHUP,), {75}),
    "Ctrl-C twice": ((signal.SIGINT, signal.SIGINT), {130}),  # with `gap` one press or two
    "Ctrl-C and SIGTERM": ((signal.SIGINT, signal.SIGTERM), {75, 130}),
    "closed pipe": ((), {141}),
}


@dataclasses.dataclass(frozen=True)
class End:
    """How a command ended: exit code, what it wrote to stderr, and seconds from the interrupt to the end."""

    code: int
    err: str
    seconds: float

    def faults(self, right: set[int]) -> list[str]:
        """What is wrong with this end; 0 is always right, since a command may have finished before."""
        found = [] if self.code in {0, *right} else [f"exit code {self.code}"]
        return found + [word for word in WORDS if word in self.err]

    @property
    def of_python(self) -> bool:
        """Whether Python itself was still starting: it knows no handler yet, or only its own."""
        return self.code in (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP) or (
            "Traceback" in self.err and "jaxchat" not in self.err.replace(str(ROOT), "")
        )


def environment(cache: Path | str) -> dict[str, str]:
    """That of the commands: one CPU device, and a cache of compiled programs that they share."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


def interrupt(
    command: Sequence[str],
    signals: Sequence[int],
    *,
    after: float = 0.0,
    line: str | None = None,
    env: dict[str, str] | None = None,
    stdin: str | None = None,
    gap: float = 0.05,
) -> End:
    """Starts a command, and interrupts it.

    Args:
      signals: sent `gap` seconds apart; none closes the pipe that reads stdout and stderr.
      after: seconds before the interrupt, from the start or from `line`.
      line: text to wait for on stdout or stderr.
      stdin: what is written to standard input, which then ends; None for an empty one.
    """
    with tempfile.TemporaryFile("w+") as kept, contextlib.ExitStack() as stack:
        read, write = os.pipe()
        out = stack.enter_context(open(read, "rb", buffering=0))
        # Without a signal, both streams are the pipe that is closed, as in `2>&1 | head`.
        streams = {"stdout": write, "stderr": write if line or not signals else kept}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            **streams,
            # Started by a shell without job control, this process ignores Ctrl-C, and so would the command.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(write)
        try:
            if stdin is not None and process.stdin is not None:
                process.stdin.write(stdin.encode())
                process.stdin.close()
            seen = b""
            while line is not None and line.encode() not in seen:
                data = out.read(4096)
                if not data:
                    break
                seen += data
            time.sleep(after)
            began = time.monotonic()
            if not signals:
                out.close()
            for number in signals:
                process.send_signal(number)
                time.sleep(gap)
            while not out.closed and (data := out.read(4096)):
                seen += data
            code = process.wait(LIMIT)
        finally:
            process.kill()
            process.wait()
        kept.seek(0)
        return End(code, seen.decode(errors="replace") * (line is not None) + kept.read(), time.monotonic() - began)


def finish(command: Sequence[str], env: dict[str, str], stdout=subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Runs a command undisturbed."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": subprocess.PIPE}
    return subprocess.run(command, cwd=ROOT, env=env, text=True, **streams)


def outcome(run: Path) -> list[str]:
    """All that a run has measured, apart from times, in an order of its own."""
    lines = [{name: value for name, value in line.items() if name not in INCIDENTAL} for line in read_metrics(run)]
    return sorted(json.dumps(line, sort_keys=True) for line in lines if len(line) > 2)


def stage_of(run: Path) -> str:
    """The stage that a training is in, or begins with when it is started again."""
    return next((stage for stage in STAGES[:-1] if not (run / stage / "stage.json").exists()), STAGES[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="Interrupts of each command in each way. (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments. (default 0)")
    parser.add_argument("--only", default="", metavar="TEXT", help="Only commands whose name contains TEXT.")
    arguments = parser.parse_args()
    draw, work = random.Random(arguments.seed), Path(tempfile.mkdtemp(prefix="interrupts-"))
    env, ended = environment(work / "cache"), work / "finished"
    tables: dict[str, collections.Counter[str]] = {}
    failures = 0
    print("a finished run to talk to, and compiled programs for all", flush=True)
    done = finish([*LAUNCH, *TINY, f"--run-dir={ended}"], env)
    if done.returncode:
        print(done.stderr)
        return 1
    for name, command, stdin in commands(work, ended):
        if arguments.only not in name:
            continue
        training, run = "training" in name, work / "run"
        began = time.monotonic()
        if stdin is None:
            finish(command, env)
        length = min(30.0, time.monotonic() - began) if stdin is None else 8.0
        shutil.rmtree(run, ignore_errors=True)
        for way, (signals, right) in WAYS.items():
            counts = tables.setdefault(name, collections.Counter())
            for time_ in range(arguments.times):
                # Half of the moments in the first two seconds, while Python imports; of a training, one in six.
                early = time_ % 6 == 5 if training else time_ % 2 == 1
                after = draw.uniform(0.02, min(2.0, length) if early else length)
                gap = draw.choice((0.05, 0.5))
                end = interrupt(command, signals, after=after, env=env, stdin=stdin, gap=gap)
                faults = end.faults(right)
                what = "right" if not faults else "Python's own start" if end.of_python and after < 0.5 else "wrong"
                counts[f"finished before ({end.code})" if not faults and end.code == 0 else what] += 1
                counts["seconds to the end, at most"] = max(counts["seconds to the end, at most"], round(end.seconds))
                if what != "right":
                    failures += what == "wrong"
                    print(f"{name}, {way} after {after:.3f} s: {', '.join(faults)} ({what})\n{end.err[-2000:]}")
                if training:
                    counts[f"in {stage_of(run)}"] += 1
                    if end.code == 0 or time_ + 1 == arguments.times:
                        done = finish(command, env) if end.code else None
                        fault = done.stderr if done is not None and done.returncode else ""
                        fault = fault or "\n".join(set(outcome(run)) ^ set(outcome(ended)))
                        counts["then unlike the other" if fault else "then as the other"] += 1
                        failures += bool(fault)
                        if fault:
                            print(f"{name} after {way}: {fault[-4000:]}")
                        shutil.rmtree(run, ignore_errors=True)
        print(f"{name}: {dict(counts)}", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    total = sum(
        sum(n for what, n in c.items() if not what.startswith(("seconds", "then", "in "))) for c in tables.values()
    )
    print(f"{total} interrupts, {failures} wrong")
    return min(failures, 1)


def commands(work: Path, ended: Path) -> list[tuple[str, list[str], str | None]]:
    """Each command with a name and its standard input."""
    run = f"--run-dir={work / 'run'}"
    text = shlex.split("tokenizer eval") + [str(ended)]
    return [
        ("help", [*LAUNCH, "--experiment=d12", "--help"], None),
        ("list", [*LAUNCH, "--list"], None),
        ("dry run", [*LAUNCH, *TINY, "--dry-run"], None),
        ("data list", [*JAXCHAT, "data", "list"], None),
        ("help of jaxchat", [*SCRIPT, "--help"], None),
        ("tokenizer eval", [*JAXCHAT, *text], None),
        ("chat", [*JAXCHAT, "chat", "--run", str(ended), "-p", "What is 3 + 4?", "--seed=1"], None),
        ("chat on a pipe", [*JAXCHAT, "chat", "--run", str(ended)], "What is 3 + 4?\n"),
        ("training, all stages", [*LAUNCH, *TINY, run], None),
    ]


if __name__ == "__main__":
    sys.exit(main())
