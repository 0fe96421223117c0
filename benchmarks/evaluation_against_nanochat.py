"""Compares jaxchat's evaluation with nanochat's own, item by item, on the same weights.

`python benchmarks/against_nanochat.py core`, `chat` and `bpb` run this. The model of a run is exported, and both
evaluators ask it the same questions, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from timing import run, say, table

from jaxchat.errors import UserError, check

HERE = Path(__file__).parent
EQUAL = 0.999  # the least share of equal decisions
CLOSE = 1e-3  # nats or logits: where two choices are as near as that, rounding decides
BPB = 1e-4  # the largest difference in bits per byte
TASKS = ("nanochat_arc_easy", "nanochat_arc_challenge", "nanochat_mmlu", "nanochat_gsm8k")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
WHAT = {
    "core": "CORE: the decision on each item, in nanochat's core_eval.py and in jaxchat.",
    "chat": "Chat tasks: each answer and its outcome, in nanochat's chat_eval.py and in jaxchat's mode for it.",
    "bpb": "Bits per byte of the first rows that nanochat's loader makes of the validation text.",
}


def main(work: str, argv: Sequence[str]) -> int:
    """Prints the comparison. Returns 1 if the two disagree on more than 0.1 % of the items, 2 if one of them fails."""
    options = _parser(work).parse_args(argv)
    try:
        check(
            (Path(options.checkout) / "nanochat" / "gpt.py").exists(),
            f"{options.checkout} is not a nanochat checkout (no nanochat/gpt.py); clone one and name its folder",
        )
        check(Path(options.data).exists(), f"{options.data} does not exist; name the folder with the questions or text")
        with tempfile.TemporaryDirectory() as directory:
            found = {"core": _core, "chat": _chat, "bpb": _bpb}[work](options, Path(directory))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    return 0 if found["agree"] else 1


def _parser(work: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"against_nanochat.py {work}", description=WHAT[work], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--checkout", required=True, metavar="DIR", help="a nanochat checkout")
    add("--python", default=sys.executable, metavar="FILE", help="a Python with torch, safetensors and tiktoken")
    add("--run", required=True, metavar="DIR", help="the run whose model is asked")
    add("--stage", default=None, help="its stage; by default the last one that trains")
    add("--precision", choices=DTYPES, default="fp32", help="that both compute in; bf16 moves near-ties")
    add("--json", metavar="FILE", default=None, help="write all figures to FILE")
    data = {"core": "the bundle", "chat": "the data folder, with eval/ in it", "bpb": "a folder of parquet"}[work]
    add("--data", required=True, metavar="DIR", help=data)
    if work == "bpb":
        add("--rows", type=int, default=8, help="of a batch")
        add("--sequence-len", type=int, default=2048, help="of a row")
        add("--batches", type=int, default=4, help="how many")
        return parser
    add("--tasks", nargs="+", default=None if work == "core" else TASKS, help="which tasks; by default all of them")
    add("--limit", type=int, default=None, help="the most items of a task, of which nanochat takes the first")
    if work == "core":
        add("--processes", type=int, default=1, help="of nanochat at once, which share the items")
    else:
        add("--max-new-tokens", type=int, default=512, help="of an answer")
        add("--rows", type=int, default=64, help="answers that jaxchat writes at once")
    return parser


# --- what runs both ---------------------------------------------------------------------------------------------------


class Peers:
    """The processes of both, over one exported model."""

    def __init__(self, options: argparse.Namespace, work: str, directory: Path):
        self.work, self.directory, self.python = work, directory, options.python
        self.model = ["--run", options.run, *(["--stage", options.stage] if options.stage else [])]
        self.folder, self.precision = directory / "exported", options.precision
        export = [sys.executable, "-m", "jaxchat.cli.main", "export", *self.model, "--to", "hf", str(self.folder)]
        run("jaxchat export", export, dict(os.environ), None)
        base = {"NANOCHAT_DTYPE": DTYPES[self.precision], "NANOCHAT_BASE_DIR": str(directory / "base")}
        self.environment = {**os.environ, **base, "PYTHONPATH": str(Path(options.checkout).absolute())}

    def ours(self, *arguments: object) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "jaxchat_evaluation.py"), self.work, *self.model]
        result = self.directory / "jaxchat.json"
        command += [f"--precision={self.precision}", f"--json={result}", *map(str, arguments)]
        return run("jaxchat", command, dict(os.environ), result, show=True)

    def theirs(self, *arguments: object, rank: int = 0) -> dict[str, Any]:
        result = self.directory / f"nanochat-{rank}.json"
        command = [self.python, str(HERE / "nanochat_evaluation.py"), self.work, f"--folder={self.folder}"]
        return run(
            "nanochat", [*command, f"--json={result}", *map(str, arguments)], self.environment, result, show=True
        )


def _common(options: argparse.Namespace) -> list[object]:
    limit = [f"--limit={options.limit}"] if options.limit else []
    return [f"--data={options.data}", *limit, *(["--tasks", *options.tasks] if options.tasks else [])]


# --- CORE -------------------------------------------------------------------------------------------------------------


def _core(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    peers, common = Peers(options, "core", directory), _common(options)
    ours = peers.ours(*common, f"--keep={directory / 'kept'}")
    count = options.processes
    with ThreadPoolExecutor(count) as pool:
        shares = [f"--processes={count}"]
        parts = list(pool.map(lambda rank: peers.theirs(*common, *shares, f"--rank={rank}", rank=rank), range(count)))
    tasks = {}
    for label in ours["tasks"]:
        decided = {d["index"]: d for part in parts for d in part["tasks"][label]["decisions"]}
        with (directory / "kept" / f"{label}.jsonl").open(encoding="utf-8") as lines:
            kept = [json.loads(line) for line in lines]
        tasks[label] = compare_decisions(kept, decided)
        tasks[label]["seconds"] = max(part["tasks"][label]["seconds"] for part in parts)
    found = {
        "tasks": tasks,
        **totals(tasks),
        "jaxchat": ours,
        "nanochat": {k: parts[0][k] for k in ("torch", "device")},
    }
    _print_core(options, found)
    return found


def compare_decisions(ours: list[dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What both say of the items of a task: how often the same, and each item on which they differ.

    `ours` are the lines that `evaluate_core` keeps, `theirs` the decisions of `nanochat_evaluation.py` by index. An
    item that nanochat's tokenisation cannot ask is none on which they can agree, and is counted apart.
    """
    check(
        sorted(theirs) == [line["index"] for line in ours],
        f"jaxchat decided {len(ours):,} items and nanochat {len(theirs):,}, not the same ones",
    )
    differences, apart, refused = [], 0.0, 0
    for line in ours:
        other = theirs[line["index"]]
        if "error" in other:
            refused += 1
            continue
        gaps = [
            abs(a - b)
            for a, b in zip(line["scores"], other["scores"], strict=True)
            if a is not None and not math.isnan(b)
        ]
        apart = max([apart, *gaps])
        if line["right"] != other["right"] or line.get("chosen") != other.get("choice"):
            differences.append({"index": line["index"], "jaxchat": line, "nanochat": other})
    asked = len(ours) - refused
    accuracies = (sum(line["right"] for line in ours) / len(ours),
                  sum(other.get("right", False) for other in theirs.values()) / len(ours))  # fmt: skip
    return {
        "items": asked,
        "refused_by_nanochat": refused,
        "accuracy": dict(zip(("jaxchat", "nanochat"), accuracies, strict=True)),
        "largest_score_difference": apart,
        "differences": differences,
    }


def totals(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Over all tasks: items, equal decisions, and whether these are as many as they have to be."""
    items = sum(task["items"] for task in tasks.values())
    different = sum(len(task["differences"]) for task in tasks.values())
    return {"items": items, "equal": items - different, "agree": items > 0 and (items - different) / items >= EQUAL}


def _print_core(options: argparse.Namespace, found: dict[str, Any]) -> None:
    _title(options, found)
    head = ["CORE", "items", "accuracy, jaxchat", "nanochat", "different", "largest difference of scores"]
    rows = [
        [label, f"{task['items']:,}", f"{task['accuracy']['jaxchat']:.4f}", f"{task['accuracy']['nanochat']:.4f}",
         len(task["differences"]), f"{task['largest_score_difference']:.1e}"]
        for label, task in found["tasks"].items()
    ]  # fmt: skip
    table(head, rows)
    refused = sum(task["refused_by_nanochat"] for task in found["tasks"].values())
    if refused:
        print(f"\n{refused:,} items end nanochat's evaluation with an error: with this vocabulary, a token covers the "
              "end of the context and the beginning of the continuation.")  # fmt: skip
    print(f"\n{found['equal']:,} of {found['items']:,} decisions are equal ({found['equal'] / found['items']:.3%}).")
    for label, task in found["tasks"].items():
        for difference in task["differences"]:
            margin = difference["nanochat"]["margin"]
            why = "near-tie" if margin < CLOSE else "not a near-tie"
            print(f"{label}, item {difference['index']}: {why}, {margin:.1e} apart in nanochat; scores "
                  f"{difference['jaxchat']['scores']} and {difference['nanochat']['scores']}")  # fmt: skip


def _title(options: argparse.Namespace, found: dict[str, Any]) -> None:
    ours, theirs = found["jaxchat"], found["nanochat"]
    stage = f", {options.stage}" if options.stage else ""
    print(
        f"\n{options.run}{stage}, in {options.precision}; {ours['device']}, jax {ours['jax']}, torch {theirs['torch']}"
    )


# --- chat tasks -------------------------------------------------------------------------------------------------------


def _chat(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    peers, common = Peers(options, "chat", directory), _common(options)
    common.append(f"--max-new-tokens={options.max_new_tokens}")
    ours, theirs = peers.ours(*common, f"--rows={options.rows}"), peers.theirs(*common)
    tasks = {
        name: compare_answers(task["answers"], theirs["tasks"][name]["answers"]) for name, task in ours["tasks"].items()
    }
    for name, task in tasks.items():
        task["seconds"] = {"jaxchat": ours["tasks"][name]["seconds"], "nanochat": theirs["tasks"][name]["seconds"]}
    found = {"tasks": tasks, **totals(tasks)}
    found |= {name: {k: v for k, v in one.items() if k != "tasks"} for name, one in
              (("jaxchat", ours), ("nanochat", theirs))}  # fmt: skip
    _print_chat(options, found)
    return found


def compare_answers(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """What both say to the questions of a task, which must be the same ones in the same order."""
    check(
        [one["question"] for one in ours] == [other["question"] for other in theirs],
        f"jaxchat asked {len(ours):,} questions and nanochat {len(theirs):,}, not the same ones in the same order",
    )
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "items": len(pairs),
        "accuracy": {name: sum(one["right"] for one in some) / len(pairs) for name, some in
                     (("jaxchat", ours), ("nanochat", theirs))},
        "equal_answers": sum(one["answer"] == other["answer"] for one, other in pairs),
        "differences": [
            {"index": i, "jaxchat": one, "nanochat": other, "same_until": len(_common_beginning(one, other))}
            for i, (one, other) in enumerate(pairs)
            if one["right"] != other["right"]
        ],
    }  # fmt: skip


def _common_beginning(one: dict[str, Any], other: dict[str, Any]) -> str:
    return os.path.commonprefix([one["answer"], other["answer"]])


def _print_chat(options: argparse.Namespace, found: dict[str, Any]) -> None:
    _title(options, found)
    head = ["chat task", "items", "accuracy, jaxchat", "nanochat", "equal answers", "different outcomes"]
    rows = [
        [name, f"{task['items']:,}", f"{task['accuracy']['jaxchat']:.4f}", f"{task['accuracy']['nanochat']:.4f}",
         f"{task['equal_answers']:,}", len(task["differences"])]
        for name, task in found["tasks"].items()
    ]  # fmt: skip
    table(head, rows)
    print(f"\n{found['equal']:,} of {found['items']:,} outcomes are equal ({found['equal'] / found['items']:.3%}).")
    for name, difference in _differences(found):
        print(f"{name}, question {difference['index']}: the answers are the same for {difference['same_until']:,} "
              f"characters, then {difference['jaxchat']['answer'][difference['same_until'] :][:60]!r} and "
              f"{difference['nanochat']['answer'][difference['same_until'] :][:60]!r}")  # fmt: skip


def _differences(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, difference) for name, task in found["tasks"].items() for difference in task["differences"])


# --- bits per byte ----------------------------------------------------------------------------------------------------


def _bpb(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    peers = Peers(options, "bpb", directory)
    work = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in ("rows", "sequence-len", "batches")]
    theirs = peers.theirs(f"--data={options.data}", *work)
    ours = peers.ours(f"--data={directory / 'nanochat-0.npy'}")
    difference = ours["bpb"] - theirs["bpb"]
    found = {"jaxchat": ours, "nanochat": theirs, "difference": difference, "agree": abs(difference) < BPB}
    _title(options, found)
    tokens = options.rows * options.sequence_len * options.batches
    table(
        ["bits per byte", "tokens", "jaxchat", "nanochat", "difference"],
        [["nanochat's rows", f"{tokens:,}", f"{ours['bpb']:.6f}", f"{theirs['bpb']:.6f}", f"{difference:.1e}"]],
    )
    say("equal to 1e-4" if found["agree"] else "not equal to 1e-4")
    return found
