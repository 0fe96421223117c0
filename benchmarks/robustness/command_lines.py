"""Draws command lines at random, runs them, and counts how they end.

    python benchmarks/robustness/command_lines.py --lines=3000 --seed=0
    python benchmarks/robustness/command_lines.py --seed=0 --only=1234      # one of them again

A line is one of the commands with options that are right, misspelt, repeated, cut off or without their section, and
values that are in range, at its limits, absurd, of another type, text in other scripts, control codes, huge numbers, or
paths of all kinds. What is right: exit code 0, 2, 75 or 130; no traceback; with 2 exactly one line on stderr; an end
within `LIMIT` seconds; and nothing written outside the folder that the lines run in.

`launch.py` gets --dry-run, or trains no more than a tokenizer; what passes all checks of `lr-range` and `profile` would
train, and is drawn for them rarely.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxchat.cli.launch import launch_parser
from jaxchat.cli.launch import main as launch
from jaxchat.cli.main import jaxchat_parser
from jaxchat.cli.main import main as jaxchat
from jaxchat.cli.options import field_types
from jaxchat.config import Experiment, Section, declared, declared_range

RIGHT_CODES = (0, 2, 75, 130)
LIMIT = 120  # seconds for a line, on a busy machine
# A model whose training step compiles in a second.
TINY = (
    "--model.depth=1", "--model.sequence-len=16", "--tokenizer.vocab-size=270",
    *(f"--{stage}.{field}" for stage in ("pretrain", "midtrain", "sft")
      for field in ("batch-tokens=256", "device-rows=4")),
)  # fmt: skip
ABSURD = (
    "", " ", "0", "-0", "-0.0", "-1", "1", "2", "3", "1.5", "-1e9", "1e3", "1e308", "1e309", "-1e400", "1e-40",
    "nan", "inf", "-inf", "NaN", "Infinity", "None", "none", "null", "True", "false", "yes", "0x10", "1_000",
    "1,000", "9" * 20, "9" * 40, "9" * 5000, "-" + "9" * 30, "10**9", "2**40", "٣", "½", "１２", "²", "a", "A,B",
    "a,,b", ",", ",,", "a b", "chat", "sums", "sums:0", "sums:5", "sums:-1", "gsm8k:9999999999999999999999",
    "humaneval", "chat:many", "sft", "rl", "pretrain,sft", "sft,pretrain", "tokenizer", "fineweb-edu:0",
    "fineweb-edu:3", "smoltalk", "S", "SL", "XYZ", "S" * 999, "ünï", "日本語", "🙂", "e\u0301", "\u202e", "\ufeff",
    "\x1b[31m", "a\nb", "a\rb", "\t", "\x07", "\0", "\udcff", "x" * 300, "x" * 5000, "%s", "%d", "{}", "{0}",
    "{x!r}", "$HOME", "`id`", "';--", '"', "'", "\\", "--", "-", "---", "-h", "=", "==",
)  # fmt: skip
PATHS = (
    "~", "~/x", "~nobody/x", "/", ".", "..", "/etc/passwd", "/etc/passwd/x", "/dev/null", "/proc/self/x",
    "/nowhere/x", "text", "text/", "chats", "empty", "file.txt", "nothing", "link", "loop", "a b", "-dash", "model",
    "run", "other", "new/deep/run", "bad.jsonl", "chats/chat/train.jsonl", "missing.jsonl", "tokenizer.json",
    "run/config.json", "file.tiktoken", "gs://", "gs:///x", "s4://x/y", "file:///tmp", "http://x", "x" * 256,
    "d/" * 300, "d/" * 3000,
)  # fmt: skip


def draw_line(draw: random.Random) -> list[str]:
    """A command line: the program's name and its arguments."""
    command = draw.choices(
        ("launch.py", "chat", "eval", "export", "import", "data", "tokenizer", "lr-range", "profile", ""),
        (12, 3, 3, 3, 3, 2, 2, 2, 2, 1),
    )[0]
    if command == "launch.py":
        return ["launch.py", *_experiment_line(draw, launch_parser(), ["--dry-run"])]
    if command in ("lr-range", "profile"):
        broken = [] if draw.random() < 0.01 else [draw.choice(("--steps=0", "--rl.top-k=0", "--stepz=3", "--seed=x"))]
        parser = _command(command)
        return ["jaxchat", command, *_experiment_line(draw, parser, broken)]
    if command == "":
        return ["jaxchat", *(_word(draw) for _ in range(draw.randrange(3)))]
    parser, words = _command(command), [command]
    if command in ("data", "tokenizer"):
        deeper = draw.choice(("get", "list") if command == "data" else ("eval",))
        parser, words = _command(command, deeper), [command, deeper]
        words += [draw.choice(("smoltalk", "mmlu", "core", *PATHS)) for _ in range(draw.randrange(3))]
    if command in ("chat", "eval", "export", "import") and draw.random() < 0.8:
        words.append(f"--run={draw.choice(PATHS)}")
    if command in ("export", "import") and draw.random() < 0.8:
        form = "--to=hf" if command == "export" else draw.choice(("--from=hf", "--from=nanochat"))
        words += [form, draw.choice(PATHS)]
    for _ in range(draw.randrange(4)):
        words += _option(draw, {name: _own(parser, name) for name in parser._option_string_actions})
    words = [_misspelt(draw, word) if draw.random() < 0.03 else word for word in words]
    return ["jaxchat", *words]


def _experiment_line(draw: random.Random, parser: argparse.ArgumentParser, always: list[str]) -> list[str]:
    options = {
        name: _own(parser, name) for name in parser._option_string_actions if name not in ("--dry-run", "--fresh")
    }
    fields = _fields()
    words = [f"--experiment={draw.choices(('quickstart', 'quickstrat', '', 'd12'), (40, 1, 1, 1))[0]}", *TINY]
    if draw.random() < 0.5 and parser.prog == "launch.py":
        words.append(f"--run-dir={draw.choice(PATHS)}")
    for _ in range(draw.choices((0, 1, 2, 3, 5, 9), (1, 6, 5, 3, 2, 1))[0]):
        words += _option(draw, fields if draw.random() < 0.7 else options)
    if draw.random() < 0.1:
        draw.shuffle(words)
    if draw.random() < 0.03:
        words = words[: draw.randrange(len(words))]
    if any("d12" in word for word in words):  # a large model takes long to compile
        always = [*always, "--rl.top-k=0"]
    if parser.prog == "launch.py" and draw.random() < 0.05:
        always = ["--stages=tokenizer"]  # and no dry run
    return [*words, *always]


def _command(*names: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = jaxchat_parser()
    for name in names:
        (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parser = commands.choices[name]
    return parser


def _own(parser: argparse.ArgumentParser, name: str) -> list[str]:
    """Values that an option of a command's own may have."""
    action = parser._option_string_actions[name]
    if action.nargs == 0:
        return []
    return [*map(str, action.choices or ()), *(("1", "2", "20") if name in ("--steps", "--shards") else ())] or [*PATHS]


def _fields() -> dict[str, list[str]]:
    """The options of an experiment's fields, each with values that it may have, and its limits."""
    found: dict[str, list[str]] = {f"--{name}": [] for name in field_types(Experiment)}
    for prefix, section in {"": Experiment, **_sections()}.items():
        for name, kind, _ in declared(section):
            limits = declared_range(section, name)
            values = re.findall(r"'([\w-]+)'", str(kind))
            if limits is not None:
                least, most = limits.at_least if limits.above is None else limits.above, limits.at_most or 1 << 31
                # A model as large as can be takes long to compile, so that no upper limit is kept.
                values = [f"{value:g}" for value in (least, least - 1, least + 1, least + 0.5, most + 1)]
            found[f"--{prefix}{name}".replace("_", "-")] = values
    return found


def _sections() -> dict[str, type]:
    kinds = {name: kind for name, kind, _ in declared(Experiment)}
    return {f"{name}.": kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}


def _option(draw: random.Random, options: dict[str, list[str]]) -> list[str]:
    name = draw.choice([*options])
    values = [*options[name]] * 3
    kind = draw.random()
    value = draw.choice(values) if values and kind < 0.5 else draw.choice(PATHS if kind < 0.6 else ABSURD)
    if draw.random() < 0.08:
        name = _misspelt(draw, name)
    forms = ([f"{name}={value}"], [name, value], [name], [f"{name}="], [name, value, value], [f"{name}={value}"] * 2)
    return draw.choices(forms, (12, 4, 1, 1, 1, 1))[0]


def _misspelt(draw: random.Random, word: str) -> str:
    at, bare = draw.randrange(len(word) + 1), word.lstrip("-")
    return draw.choice((
        word[:at] + word[at + 1 :], word[:at] + draw.choice("ax-.=_ é") + word[at:], word[::-1], word.upper(), bare,
        f"-{bare}", f"---{bare}", f"—{bare}", word.replace("-", "_"), word.rpartition(".")[2], word[:at],
        word.replace(".", "-"),
    ))  # fmt: skip


def _word(draw: random.Random) -> str:
    words = ("--help", "-h", "chat", "caht", "train", "--run=x", "--version")
    return draw.choice((*words, draw.choice(ABSURD), draw.choice(PATHS)))


# --- running one ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How a line ended, and what was wrong with that; `code` is None for an exception."""

    code: int | None
    out: str
    err: str
    seconds: float
    wrong: str | None = None


def run_line(line: list[str], written: list[str]) -> End:
    """Runs a line in this process; `written` is the list that the audit hook fills."""
    out, err, began = io.StringIO(), io.StringIO(), time.monotonic()
    written.clear()
    code: int | None = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limited():
        try:
            code = (launch if line[0] == "launch.py" else jaxchat)(line[1:])
        except SystemExit as end:  # --help of argparse
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
    end = End(code, out.getvalue(), err.getvalue(), time.monotonic() - began)
    wrong = _wrong(line, end) or (f"written outside: {written[0]}" if written else None)
    return End(end.code, end.out, end.err, end.seconds, wrong)


def _wrong(line: list[str], end: End) -> str | None:
    if "Traceback" in end.out + end.err:
        return f"traceback: {end.err.strip().splitlines()[-1][:300]}"
    if end.code not in RIGHT_CODES:
        return f"exit code {end.code}"
    lines = end.err.splitlines()
    if line[1:2] == ["data"]:  # a download says on stderr how far it is
        lines = lines[-1:]
    if end.code == 2 and (len(lines) != 1 or not lines[0].removeprefix("error: ").strip()):
        return f"{len(lines)} lines on stderr"
    if end.code == 2 and len(lines[0]) > 1600:
        return f"a line of {len(lines[0]):,} characters"
    return None


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(number, frame):
        raise TimeoutError(f"not ended after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def watch_writes(inside: Path, written: list[str]) -> None:
    """Fills `written` with paths outside `inside` that this process writes from now on."""
    at = {"open": 0, "os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.symlink": 1, "os.truncate": 0}

    def hook(event: str, arguments: tuple) -> None:
        if event not in at:
            return
        if event == "open" and not (
            isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            return
        path = arguments[at[event]]
        if isinstance(path, (str, bytes, os.PathLike)):
            name = os.path.abspath(os.fsdecode(path))
            if not name.startswith((str(inside), "/dev/", "/proc/")):
                written.append(f"{event} {name}")

    sys.addaudithook(hook)


def make_folder(folder: Path) -> None:
    """The files that `PATHS` names."""
    for name in ("text", "chats/chat", "empty", "a b", "run", "other", "home", "model"):
        (folder / name).mkdir(parents=True)
    for part in range(3):
        (folder / "text" / f"{part}.txt").write_text("\n\n".join(f"Story {i} of part {part}." for i in range(50)))
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    (folder / "chats" / "chat" / "train.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 50)
    (folder / "chats" / "a.txt").write_text("\n\n".join(f"Text {i}." for i in range(50)))
    (folder / "bad.jsonl").write_text('{"messages": [\n')
    (folder / "file.txt").write_text("a file\n")
    (folder / "file.tiktoken").write_text("AA== 0\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "run" / "config.json").write_text("{}")
    (folder / "other" / "photo.jpg").write_bytes(b"x")
    (folder / "model" / "config.json").write_text('{"model_type": "nanochat"}')
    (folder / "model" / "model.safetensors").write_bytes(b"x")
    (folder / "link").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")


@contextlib.contextmanager
def prepared() -> Iterator[tuple[Path, list[str]]]:
    """A folder with the files that `PATHS` names as working directory and home, without a network; what was written."""
    changed = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "HF_HUB_OFFLINE": "1", "NO_GCE_CHECK": "true"}
    before, here = dict(os.environ), Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder, written = Path(name).resolve(), []
        make_folder(folder)
        os.environ.update(
            {"HOME": str(folder / "home"), "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), **changed}
        )
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        os.chdir(folder)
        watch_writes(folder, written)
        try:
            yield folder, written
        finally:
            os.chdir(here)
            tempfile.tempdir = None
            os.environ.clear()
            os.environ.update(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=3000, help="how many lines to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run only the line of this number, and show its output")
    options = parser.parse_args()
    sys.dont_write_bytecode = True
    ends, wrong, began = collections.Counter(), [], time.monotonic()
    numbers = range(options.lines) if options.only is None else [options.only]
    with prepared() as (_, written):
        for number in numbers:
            line = draw_line(random.Random(f"{options.seed}:{number}"))
            end = run_line(line, written)
            ends[line[1] if line[0] == "jaxchat" and len(line) > 1 and line[1].isalpha() else line[0], end.code] += 1
            if end.wrong:
                wrong.append(number)
                print(f"line {number}: {end.wrong}\n    {shlex.join(line)!a}\n", flush=True)
            if options.only is not None:
                print(shlex.join(line), end.out, end.err, end.seconds, sep="\n")
    taken = time.monotonic() - began
    codes = sorted({code for _, code in ends}, key=str)
    commands = sorted({command for command, _ in ends}, key=lambda name: -sum(ends[name, code] for code in codes))
    print(f"| command | {' | '.join(f'exit {code}' for code in codes)} |\n| --- |{' ---: |' * len(codes)}")
    for command in commands[:11]:
        print(f"| {command} | {' | '.join(str(ends[command, code]) for code in codes)} |")
    print(
        f"\n{len(numbers):,} lines, seed {options.seed}, {taken:.0f} s: {len(wrong)} ended in a wrong way {wrong or ''}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
