"""Measures the speed of evaluation on this machine: CORE beside nanochat's evaluator, and GSM8K's answers.

    python benchmarks/evaluation.py core --checkout nanochat --tokenizer runs/d12 --data data/eval/eval_bundle
    python benchmarks/evaluation.py gsm8k --tokenizer runs/d12 --data data

CORE: both have a model of one depth and vocabulary with random weights and the same bundle, each in a process of its
own, in bf16. nanochat evaluates its own model, with full context, one item at a time. --limit cuts the tasks for both,
--peer-limit for nanochat alone; the time for all items is then its seconds an item in each task times the task's items.

GSM8K: all answers are written greedily by a model with random weights, which does not end before the last token that it
may write, so that all answers have full length. --run measures a trained model instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from timing import run, table

from jaxchat.errors import UserError, check
from jaxchat.tokenizer import load_tokenizer

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 2 if one of them fails."""
    options = _parser().parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as directory:
            found = (_core if options.work == "core" else _gsm8k)(options, Path(directory))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        settings = {**vars(options), "date": date.today().isoformat()}
        Path(options.json).write_text(json.dumps({**settings, **found}, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="work", required=True)
    core = commands.add_parser("core", help="the tasks of a bundle", allow_abbrev=False)
    gsm8k = commands.add_parser("gsm8k", help="the answers to GSM8K's test questions", allow_abbrev=False)
    for add in (core.add_argument, gsm8k.add_argument):
        add("--data", required=True, metavar="DIR", help="the bundle, or the data folder")
        add("--tokenizer", metavar="PATH", help="of the model with random weights: a run directory or tokenizer.json")
        add("--depth", type=int, default=20, help="of the model with random weights (default 20)")
        add("--limit", type=int, help="the most items of a task (default all)")
        add("--precision", choices=("bf16", "fp32"), default="bf16", help="that is computed in (default bf16)")
        add("--json", metavar="FILE", help="write all figures to FILE")
    core.add_argument("--checkout", metavar="DIR", help="a nanochat checkout; without one, jaxchat alone is measured")
    core.add_argument("--python", default=sys.executable, metavar="FILE", help="a Python with torch (default this one)")
    core.add_argument("--peer-limit", type=int, help="the most items of a task that nanochat is measured with")
    core.add_argument("--tasks", nargs="+", help="which tasks (default all)")
    gsm8k.add_argument("--run", metavar="DIR", help="a run, whose trained model answers")
    gsm8k.add_argument("--rows", type=int, default=256, help="answers that are written at once (default 256)")
    gsm8k.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (default 512)")
    return parser


def _ours(options: argparse.Namespace, directory: Path, *arguments: object) -> dict[str, Any]:
    """What jaxchat's evaluator reports."""
    model = ["--run", options.run] if getattr(options, "run", None) else ["--random-depth", str(options.depth)]
    check(
        "--run" in model or options.tokenizer is not None,
        "a model with random weights needs --tokenizer, a run directory or a tokenizer.json",
    )
    result = directory / "jaxchat.json"
    command = [sys.executable, str(HERE / "jaxchat_evaluation.py"), "core" if options.work == "core" else "chat"]
    command += [*model, f"--data={options.data}", f"--precision={options.precision}", f"--json={result}"]
    command += [f"--tokenizer={options.tokenizer}"] if options.tokenizer else []
    command += [f"--limit={options.limit}"] if options.limit else []
    return run("jaxchat", [*command, *map(str, arguments)], dict(os.environ), result, show=True)


def _core(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    tasks = ["--tasks", *options.tasks] if options.tasks else []
    ours = _ours(options, directory, *tasks)
    found: dict[str, Any] = {"jaxchat": ours}
    if options.checkout:
        found["nanochat"] = theirs = _theirs(options, directory, tasks)
        found["nanochat_seconds"] = whole_time(theirs["tasks"], {k: v["items"] for k, v in ours["tasks"].items()})
        found["ratio"] = found["nanochat_seconds"] / ours["seconds"]
    _print_core(options, found)
    return found


def _theirs(options: argparse.Namespace, directory: Path, tasks: list[str]) -> dict[str, Any]:
    """What nanochat's evaluator reports, on its own model with the same tokenizer."""
    folder, result, checkout = directory / "peer", directory / "nanochat.json", Path(options.checkout).absolute()
    check(
        (checkout / "nanochat" / "core_eval.py").exists(),
        f"{options.checkout} is not a nanochat checkout (no nanochat/core_eval.py); clone one and name its folder",
    )
    load_tokenizer(options.tokenizer).save(folder)
    command = [options.python, str(HERE / "nanochat_evaluation.py"), "core", f"--folder={folder}", f"--json={result}"]
    command += [f"--data={options.data}", f"--own-depth={options.depth}", "--sequence-len=2048", *tasks]
    command += [f"--checkout={checkout}", "--speed"]
    limit = options.peer_limit or options.limit
    command += [f"--limit={limit}"] if limit else []
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[options.precision]
    more = {"PYTHONPATH": str(checkout), "NANOCHAT_DTYPE": dtype, "NANOCHAT_BASE_DIR": str(directory / "base")}
    return run("nanochat", command, {**os.environ, **more}, result, show=True)


def whole_time(tasks: Mapping[str, dict[str, Any]], items: Mapping[str, int]) -> float:
    """Seconds for all `items` of each task, from the seconds and the number of those that were measured."""
    return sum(tasks[label]["seconds"] / tasks[label]["asked"] * count for label, count in items.items())


def _print_core(options: argparse.Namespace, found: dict[str, Any]) -> None:
    ours, theirs = found["jaxchat"], found.get("nanochat")
    items = {label: task["items"] for label, task in ours["tasks"].items()}
    print(f"\nd{options.depth}, random weights, {options.precision}; {ours['device']}, jax {ours['jax']}"
          + (f", torch {theirs['torch']}" if theirs else ""))  # fmt: skip
    if theirs:
        rows = [
            [label, f"{count:,}", f"{theirs['tasks'][label]['asked']:,}",
             f"{theirs['tasks'][label]['seconds'] / theirs['tasks'][label]['asked'] * 1000:.1f}"]
            for label, count in items.items()
        ]  # fmt: skip
        table(["nanochat", "items", "measured", "ms an item"], rows)
    total = sum(items.values())
    rows = [["jaxchat", f"{total:,}", f"{ours['seconds']:.1f}", f"{total / ours['seconds']:,.0f}", ""]]
    if theirs:
        seconds = found["nanochat_seconds"]
        rows.append(["nanochat", f"{total:,}", f"{seconds:.1f}", f"{total / seconds:,.0f}", f"{found['ratio']:.1f}"])
    table(["CORE, from the bundle to the scores", "items", "seconds", "items a second", "jaxchat / this"], rows)


def _gsm8k(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    new = f"--max-new-tokens={options.max_new_tokens}"
    ours = _ours(options, directory, "--tasks", "gsm8k", f"--rows={options.rows}", new)
    task = ours["tasks"]["gsm8k"]
    who = f"{options.run}" if options.run else f"d{options.depth}, random weights"
    print(f"\n{who}, {options.precision}; {ours['device']}, jax {ours['jax']}")
    count, tokens, seconds = len(task["answers"]), task["tokens"], task["seconds"]
    table(
        ["GSM8K", "answers", "rows at once", "tokens", "seconds", "tokens a second"],
        [["jaxchat", f"{count:,}", options.rows, f"{tokens:,}", f"{seconds:.1f}", f"{tokens / seconds:,.0f}"]],
    )
    return {"seconds": seconds, "count": count, "tokens": tokens}


if __name__ == "__main__":
    sys.exit(main())
