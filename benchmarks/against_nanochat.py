"""Compares jaxchat and nanochat on this machine: speed of training and RL, what is learned, what evaluation says.

    git clone https://github.com/karpathy/nanochat
    python benchmarks/against_nanochat.py --checkout nanochat --python nanochat/.venv/bin/python --depth 12 20

Training: both do the same work (depth, rows, context, vocabulary, random tokens, optimizer step included) in separate
processes, taking turns on one GPU in each round. Both attend to the full context unless --window-pattern says
otherwise: nanochat's own default has sliding windows, which are slow without FlashAttention-3. With --fp8 each uses its
own recipe: nanochat puts the head into fp8 too, jaxchat leaves it in bf16. Checkouts from October 2025 or later work.

Evaluation, item by item (`evaluation_against_nanochat.py`); `core --help` and so on list the options:

    python benchmarks/against_nanochat.py core --checkout nanochat --run runs/d6 --data data/eval/eval_bundle
    python benchmarks/against_nanochat.py chat --checkout nanochat --run runs/d6 --data data
    python benchmarks/against_nanochat.py bpb --checkout nanochat --run runs/d6 --data data/pretrain

Quality, bits per byte after so many steps and seconds (`quality_against_nanochat.py`):

    python benchmarks/against_nanochat.py quality --checkout nanochat --data data --recipe guide: --peer "its own rule:"

Reinforcement learning, a step of sampling, scoring and updating (`rl_against_nanochat.py`):

    python benchmarks/against_nanochat.py rl --checkout nanochat --tokenizer runs/d12 --data data
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import evaluation_against_nanochat
import quality_against_nanochat
import rl_against_nanochat
from timing import run, say, table

from jaxchat.devices.machine import device_peak_flops
from jaxchat.errors import UserError, check

HERE = Path(__file__).parent
EVALUATIONS = tuple(evaluation_against_nanochat.WHAT)
WORK = ("rows", "sequence_len", "vocab_size", "accumulation", "steps")
LONG = 3600  # seconds, so that no window of ours is cut short
GIB = 1 << 30


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 2 if either of the two fails at a depth."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in EVALUATIONS:
        return evaluation_against_nanochat.main(argv[0], argv[1:])
    if argv and argv[0] == "quality":
        return quality_against_nanochat.main(argv[1:])
    if argv and argv[0] == "rl":
        return rl_against_nanochat.main(argv[1:])
    options = _parser().parse_args(argv[1:] if argv[:1] == ["train"] else argv)
    try:
        _check(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = open(options.json, "w") if options.json else None
    settings = {**vars(options), "date": date.today().isoformat()}
    contests = []
    with tempfile.TemporaryDirectory() as directory:
        for depth in options.depth:
            contest: dict[str, Any] = {**settings, "depth": depth}
            try:
                rounds = _rounds(options, depth, Path(directory))
                contest |= {**_summary(rounds), "rounds": rounds}
            except UserError as error:
                say(f"d{depth}: {error}")
                contest["error"] = str(error)
            contests.append(contest)
            if file:
                print(json.dumps(contest), file=file, flush=True)
    _print(options, contests)
    return 2 if any("error" in contest for contest in contests) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkout", required=True, metavar="DIR", help="a nanochat checkout")
    add("--python", default=sys.executable, metavar="FILE", help="a Python with torch (default: this one)")
    add("--depth", type=int, nargs="+", default=[12], help="one or more depths (default 12)")
    add("--rows", type=int, default=32, help="(default 32)")
    add("--sequence-len", type=int, default=2048, help="(default 2048)")
    add("--vocab-size", type=int, default=32768, help="(default 32768)")
    add("--accumulation", type=int, default=1, help="micro-batches per step (default 1)")
    add("--steps", type=int, default=20, help="steps measured per round, after a warm-up (default 20)")
    add("--rounds", type=int, default=2, help="rounds per depth (default 2)")
    add("--window-pattern", default="L", help="L full context, S a quarter of it, for both (default L)")
    add("--fp8", action="store_true", help="train both in fp8")
    add("--json", metavar="FILE", help="write all figures to FILE, one JSON object per depth")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for options that are wrong at every depth."""
    checkout = Path(options.checkout).absolute()
    check(
        (checkout / "nanochat" / "gpt.py").exists() and (checkout / "scripts" / "base_train.py").exists(),
        f"{options.checkout} is not a nanochat checkout (no nanochat/gpt.py or scripts/base_train.py); clone one and "
        "name its folder",
    )
    check(options.rounds >= 1 and options.steps >= 1, "--rounds and --steps must be at least 1")


def _rounds(options: argparse.Namespace, depth: int, directory: Path) -> list[dict[str, dict[str, Any]]]:
    """One entry per round: the figures of both, by name.

    Raises:
      UserError: either of the two fails.
    """
    result = directory / "result.json"
    work = [f"--depth={depth}", *(f"--{name.replace('_', '-')}={getattr(options, name)}" for name in WORK)]
    work.append(f"--json={result}")
    ours = [sys.executable, str(HERE / "train.py"), *work, "--windows=1", f"--seconds={LONG}", "--devices=1"]
    ours += ["--precision=fp8"] if options.fp8 else []
    ours += [] if options.window_pattern == "L" else [f"--model.window-pattern={options.window_pattern}"]
    checkout = str(Path(options.checkout).absolute())
    theirs = [options.python, str(HERE / "nanochat_steps.py"), checkout, *work]
    theirs += [f"--window-pattern={options.window_pattern}", *(["--fp8"] if options.fp8 else [])]
    # Caches save later rounds the compilation. The allocator is set as base_train.py sets it.
    caches = {"JAX_COMPILATION_CACHE_DIR": f"{directory}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{directory}/inductor"}
    allocator = {name: "expandable_segments:True" for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    environment = {**caches, **allocator, "NANOCHAT_BASE_DIR": f"{directory}/nanochat", **os.environ}
    rounds = []
    for number in range(options.rounds):
        figures = {}
        for name, command, more in (("jaxchat", ours, {}), ("nanochat", theirs, {"PYTHONPATH": checkout})):
            figures[name] = run(name, command, environment | more, result)
            speed, memory = figures[name]["tokens_per_second"], _gib(figures[name])
            say(f"d{depth}, round {number + 1} of {options.rounds}: {name} {speed:,.0f} tokens/s, {memory} GiB")
        rounds.append(figures)
    return rounds


def _summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratio of ours to theirs, of the medians and of each round."""
    speeds = {name: [figures[name]["tokens_per_second"] for figures in rounds] for name in rounds[0]}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = [ours / theirs for ours, theirs in zip(speeds["jaxchat"], speeds["nanochat"], strict=True)]
    return {"tokens_per_second": medians, "ratio": medians["jaxchat"] / medians["nanochat"], "round_ratios": ratios}


def _print(options: argparse.Namespace, contests: list[dict[str, Any]]) -> None:
    rows, measured = [], [contest for contest in contests if "error" not in contest]
    if measured:
        ours, theirs = (measured[0]["rounds"][-1][name] for name in ("jaxchat", "nanochat"))
        print(f"\n{theirs['device']}, {options.rows} rows of {options.sequence_len:,}, accumulation "
              f"{options.accumulation}, {'fp8' if options.fp8 else 'bf16'}, windows {options.window_pattern}; jax "
              f"{ours['machine']['jax']}, torch {theirs['torch']} with {theirs['attention']}; medians of "
              f"{options.rounds} rounds")  # fmt: skip
    head = ["", "tokens/s", "ms per step", "MFU, by its own FLOPs", "GiB", "loss, first", "last", "jaxchat / nanochat"]
    for contest in contests:
        if "error" in contest:
            rows.append([f"d{contest['depth']}", contest["error"], *[""] * 6])
            continue
        rows += [_line(contest, name) for name in ("jaxchat", "nanochat")]
        # The overall ratio, and its range over the rounds.
        low, high = min(contest["round_ratios"]), max(contest["round_ratios"])
        rows[-2][-1] = f"{contest['ratio']:.3f}"
        rows[-1][-1] = f"rounds {low:.3f} to {high:.3f}" if len(contest["rounds"]) > 1 else ""
    table(head, rows)


def _line(contest: dict[str, Any], name: str) -> list[str]:
    last, speed = contest["rounds"][-1][name], contest["tokens_per_second"][name]
    peak = device_peak_flops(contest["rounds"][-1]["jaxchat"]["machine"]["device_kind"])
    return [
        f"d{contest['depth']} {name}",
        f"{speed:,.0f}",
        f"{1000 * contest['accumulation'] * contest['rows'] * contest['sequence_len'] / speed:.2f}",
        f"{speed * last['flops_per_token'] / peak:.1%}" if peak else "?",
        _gib(last),
        f"{last['first_loss']:.3f}",
        f"{last['last_loss']:.3f}",
        "",
    ]


def _gib(figures: dict[str, Any]) -> str:
    memory = figures["peak_memory_bytes"]
    return f"{memory / GIB:.1f}" if memory else "?"


if __name__ == "__main__":
    sys.exit(main())
