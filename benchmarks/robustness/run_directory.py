"""Damages the files of a finished run, one at a time, and counts how commands take it.

    python benchmarks/robustness/run_directory.py --cases=500 --seed=0

Makes a run of all stages that takes half a minute. A case is a file of it (of checkpoints those of the newest step), a
kind of damage and a command: the same command again, the report, other questions, a chat. What is right: exit code 0 or
2; no traceback; with 2 one line, and when its remedy is followed (what it says to delete or to move is moved, what it
says to do again is done again) the command ends with 0. The arrays of a model that a command reads must not be used
when they are damaged.

Each case runs in a process forked from one that has imported everything, on a copy of the run.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ("device-rows=1", "batch-tokens=512", "num-iterations=4", "save-every=2", "eval-every=0", "eval-tokens=256")
ARGUMENTS = [
    "--experiment=quickstart", "--data.synthetic-documents=200", "--data.synthetic-conversations=200",
    "--tokenizer.vocab-size=300", "--model.depth=1", "--model.sequence-len=64",
    *(f"--{stage}.{setting}" for stage in ("pretrain", "midtrain", "sft") for setting in TRAINING),
    "--rl.tasks=sums", "--rl.questions-per-step=2", "--rl.samples-per-question=4", "--rl.num-iterations=2",
    "--rl.max-new-tokens=8", "--rl.eval-questions=8", "--rl.pass-k=1",
    "--rl.eval-every=0", "--rl.device-rows=2", "--rl.save-every=1",
    "--evaluate.tasks=sums", "--evaluate.of=pretrain,sft,rl", "--evaluate.limit=4",
    "--evaluate.max-new-tokens=8", "--evaluate.batch-rows=8",
]  # fmt: skip
RIGHT_CODES = (0, 2)
MOST_REMEDIES = 4  # one command may find several files that the damage concerns

# --- damage --------------------------------------------------------------------------------------------------------


def _json_with(change: Callable[[str], str]) -> Callable[[bytes, random.Random], bytes]:
    def damage(data: bytes, draw: random.Random) -> bytes:
        return change(data.decode(errors="replace")).encode()

    return damage


def _flipped(data: bytes, draw: random.Random) -> bytes:
    if not data:
        return b"\x01"
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _in_a_character(data: bytes, draw: random.Random) -> bytes:
    return data[: len(data) // 2] + "ü".encode()[:1]


CONTENTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda data, draw: b"",
    "cut at half": lambda data, draw: data[: len(data) // 2],
    "cut in a character": _in_a_character,
    "a bit flipped": _flipped,
    "not UTF-8": lambda data, draw: b"\xff\xfe" + data,
    "NULs": lambda data, draw: bytes(len(data) or 1),
    "NULs at the end": lambda data, draw: data + bytes(512),
    "[]": lambda data, draw: b"[]",
    "null": lambda data, draw: b"null",
    "{}": lambda data, draw: b"{}",
    "text for numbers": _json_with(lambda text: re.sub(r"(?<=: )-?[\d.e+-]+(?=[,\n}])", '"x"', text)),
    "numbers for text": _json_with(lambda text: re.sub(r'(?<=: )"[^"\n]*"(?=[,\n}])', "7", text)),
    "huge numbers": _json_with(lambda text: re.sub(r"(?<=: )-?[\d.e+-]+(?=[,\n}])", "9" * 400, text)),
    "null for all": _json_with(lambda text: re.sub(r'(?<=: )("[^"\n]*"|-?[\d.e+-]+)(?=[,\n}])', "null", text)),
}
PLACES = ("missing", "a folder", "a dangling link", "no permission")


def kinds_of_damage() -> list[str]:
    """The names of all kinds; root can read everything, so that for root permission is none."""
    return [kind for kind in (*PLACES, *CONTENTS) if kind != "no permission" or os.geteuid()]


def damage(path: Path, kind: str, draw: random.Random) -> bool:
    """Damages a file; returns whether it is now another."""
    if kind in CONTENTS:
        before = path.read_bytes()
        after = CONTENTS[kind](before, draw)
        path.write_bytes(after)
        return after != before
    if kind == "no permission":
        path.chmod(0)
        return True
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a dangling link":
        path.symlink_to("nowhere")
    return True


# --- commands ------------------------------------------------------------------------------------------------------


def commands(run: Path) -> dict[str, list[str]]:
    """The commands that a case may start, by name: `launch` or `chat`, and its arguments."""
    launch = ["launch", *ARGUMENTS, f"--run-dir={run}"]
    return {
        "again": launch,
        "report": [*launch, "--stages=report"],
        "other questions": [*launch, "--stages=evaluate,report", "--evaluate.of=rl", "--evaluate.limit=2"],
        "chat": ["chat", "--run", str(run), "-p", "What is 2 + 2?", "--max-tokens", "4"],
    }


def forked(arguments: Sequence[str], log: Path) -> tuple[int, str]:
    """Runs a command in a child of this process; returns its exit code, and what it wrote to stderr."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            out, err = os.open(os.devnull, os.O_RDWR), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 0)
            os.dup2(out, 1)
            os.dup2(err, 2)
            from jaxchat.cli import launch, main

            words = list(arguments[1:]) if arguments[0] == "launch" else list(arguments)
            code = launch.main(words) if arguments[0] == "launch" else main.main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")


def fault(code: int, err: str) -> str | None:
    """What is wrong with how a command has ended; None if nothing is."""
    if "Traceback" in err or code not in RIGHT_CODES:
        return f"exit code {code}"
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    if code == 2 and (len(said) != 1 or err.splitlines()[-1] != said[0]):
        return f"{len(said)} lines for the user"
    return None


def follow(message: str, run: Path, arguments: list[str]) -> list[str] | None:
    """Follows the remedy of a message; returns the command to start next, None if there is no remedy to follow."""
    remedy = message.partition("; ")[2]
    if found := re.search(r"--redo=(\w+)", remedy):
        return [*commands(run)["again"], f"--redo={found[1]}"]
    places = [Path(found) for found in re.findall(rf"{re.escape(str(run))}/[^\s;,:()]+", message)]
    if re.search("delete|move it aside|remove", remedy) and places:
        for place in places:
            aside = place.with_name(f"{place.name}.damaged")
            if os.path.lexists(place) and not os.path.lexists(aside):
                place.rename(aside)
        return arguments
    if "launch.py" in message or re.search("run the stage '\\w+' first", remedy):
        return commands(run)["again"]
    return None


def try_case(finished: Path, file: Path, kind: str, command: str, draw: random.Random, folder: Path) -> str | None:
    """Runs a case in `folder`; returns how it ended, or None if the damage changes nothing. Faults begin with !."""
    run = folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, run, symlinks=True)
    if not damage(run / file, kind, draw):
        return None
    code, err = forked(commands(run)[command], folder / "log")
    if wrong := fault(code, err):
        return f"! {wrong}: {err[-1500:]}"
    if code == 0:
        reads = command in ("chat", "other questions") and file.parts[0] == "rl" and "params" in file.parts
        return "! a damaged array was used" if reads and file.parts[-2] == "d" else "not needed"
    first = message = err.splitlines()[-1]
    for _ in range(MOST_REMEDIES):
        following = follow(message, run, commands(run)[command])
        if following is None:
            return f"! no remedy: {message}"
        code, err = forked(following, folder / "log")
        if wrong := fault(code, err):
            return f"! after the remedy of {first}: {wrong}: {err[-1500:]}"
        if code == 0:
            code, err = forked(commands(run)[command], folder / "log")
            if wrong := fault(code, err):
                return f"! after the remedy of {first}: {wrong}: {err[-1500:]}"
            if code == 0:
                return "mended"
        message = err.splitlines()[-1]
    return f"! still after {MOST_REMEDIES} remedies: {first} / {message}"


# --- all of it -----------------------------------------------------------------------------------------------------


def files_of(run: Path) -> list[Path]:
    """The files of a run that a case may damage, relative to it."""
    files = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    newest = {
        stage: max(int(step.name) for step in (run / stage / "checkpoints").iterdir() if step.name.isdecimal())
        for stage in ("pretrain", "midtrain", "sft", "rl")
    }
    return [
        file
        for file in files
        if "checkpoints" not in file.parts
        or not file.parts[2].isdecimal()
        or (file.parts[0] == "rl" and int(file.parts[2]) == newest["rl"])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500, help="How many cases are drawn. (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="What they are drawn with. (default 0)")
    parser.add_argument("--only", help="Only files whose path matches this pattern.")
    parser.add_argument("--folder", type=Path, help="Where to work; a finished run is found there again.")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="jaxchat-damage-"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    finished = folder / "finished"
    if not (finished / "report.md").exists():
        made = [sys.executable, "launch.py", *ARGUMENTS, f"--run-dir={finished}"]
        subprocess.run(made, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    import_everything()
    draw = random.Random(options.seed)
    files = [file for file in files_of(finished) if re.search(options.only or "", str(file))]
    every = [(f, kind, name) for f in files for kind in kinds_of_damage() for name in commands(finished)]
    cases = draw.sample(every, min(options.cases, len(every)))
    counts: collections.Counter[str] = collections.Counter()
    for number, (file, kind, command) in enumerate(cases):
        ended = try_case(finished, file, kind, command, draw, folder / "case")
        if ended is None:
            continue
        counts["FAULT" if ended.startswith("!") else ended] += 1
        if ended.startswith("!"):
            print(f"{file}, {kind}, {command}: {ended[2:]}", flush=True)
        if number % 50 == 49:
            print(f"{number + 1} of {len(cases)}: {dict(counts)}", flush=True)
    print(f"{sum(counts.values())} cases on {len(files)} files: {dict(counts)}")
    return int(counts["FAULT"] > 0)


def import_everything() -> None:
    """Imports what commands import, without starting JAX's devices: a child could not use its parent's."""
    import jaxchat.cli.launch
    import jaxchat.cli.main
    import jaxchat.serve.terminal
    import jaxchat.stages.pipeline  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
