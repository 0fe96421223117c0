"""Compares the speed of generation of jaxchat and nanochat on this machine.

    git clone https://github.com/karpathy/nanochat
    python benchmarks/generation.py --checkout nanochat --python nanochat/.venv/bin/python

Both have a model of the same depth, width, vocabulary and context with random weights, and generate greedily with as
many rows, prompt tokens and new tokens, in separate processes, one after the other on one GPU. nanochat's engine
samples one prompt in all rows; jaxchat does so too, and with a prompt of its own for each row. Tokens/s are those after
the first token of all rows. Without FlashAttention-3 nanochat falls back on torch's SDPA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from timing import run, table

from jaxchat.errors import UserError, check

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 2 if either of the two fails."""
    options = _parser().parse_args(argv)
    try:
        check(
            (Path(options.checkout) / "nanochat" / "engine.py").exists(),
            f"{options.checkout} is not a nanochat checkout (no nanochat/engine.py); clone one and name its folder",
        )
        with tempfile.TemporaryDirectory() as directory:
            figures = _measure(options, Path(directory))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        settings = {**vars(options), "date": date.today().isoformat()}
        Path(options.json).write_text(json.dumps({**settings, **figures}, indent=1))
    _print(options, figures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkout", required=True, metavar="DIR", help="a nanochat checkout")
    add("--python", default=sys.executable, metavar="FILE", help="a Python with torch (default: this one)")
    add("--depth", type=int, default=20, help="(default 20)")
    add("--rows", type=int, nargs="+", default=[1, 32, 128], help="rows at a time (default 1 32 128)")
    add("--context", type=int, default=512, help="tokens of the prompt (default 512)")
    add("--new", type=int, default=256, help="new tokens a row (default 256)")
    add("--vocab-size", type=int, default=65536, help="(default 65536)")
    add("--sequence-len", type=int, default=2048, help="the model's context (default 2048)")
    add("--repeats", type=int, default=3, help="runs of each kind, of which the median counts (default 3)")
    add("--queue-seconds", type=float, default=0.0, help="how long jaxchat's mixed queues are measured (default 0)")
    add("--weights", default="auto", help="jaxchat's weights: auto or int8 (default auto)")
    add("--kv-cache", default="auto", help="jaxchat's cache: auto or fp8 (default auto)")
    add("--json", metavar="FILE", help="write all figures to FILE")
    return parser


def _measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The figures of both, by name.

    Raises:
      UserError: either of the two fails.
    """
    result = directory / "result.json"
    rows = [str(count) for count in options.rows]
    ours = [sys.executable, "-m", "jaxchat.cli.main", "bench", "infer", "--experiment=speedrun"]
    ours += [f"--model.depth={options.depth}", f"--model.sequence-len={options.sequence_len}"]
    ours += [f"--tokenizer.vocab-size={options.vocab_size}", f"--rows={','.join(rows)}", f"--context={options.context}"]
    ours += [f"--new={options.new}", f"--repeats={options.repeats}", f"--queue-seconds={options.queue_seconds}"]
    ours += [f"--weights={options.weights}", f"--kv-cache={options.kv_cache}", f"--json={result}"]
    theirs = [options.python, str(HERE / "nanochat_generation.py"), str(Path(options.checkout).absolute())]
    theirs += [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in
               ("depth", "context", "new", "vocab_size", "sequence_len", "repeats")]  # fmt: skip
    theirs += ["--rows", *rows, f"--json={result}"]
    environment = {"NANOCHAT_BASE_DIR": str(directory / "nanochat"), **os.environ}
    peer = environment | {"PYTHONPATH": str(Path(options.checkout).absolute())}
    figures = {"nanochat": run("nanochat", theirs, peer, result, show=True)}
    figures["jaxchat"] = run("jaxchat", ours, environment, result, show=True)
    return figures


def _print(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    ours, theirs = figures["jaxchat"], figures["nanochat"]
    print(f"\n{theirs['device']}, d{options.depth}, vocabulary {options.vocab_size:,}, prompts of {options.context:,} "
          f"tokens, {options.new:,} new tokens, greedy; jax {ours['machine']['jax']} with weights {ours['weights']} "
          f"and cache {ours['kv_cache']}, torch {theirs['torch']} in {theirs['dtype']} with {theirs['attention']}; "
          f"medians of {options.repeats} runs")  # fmt: skip
    head = ["", "rows", "first token, ms", "samples of one prompt: first token, ms", "tokens/s",
            "own prompts: tokens/s", "limit", "jaxchat / this"]  # fmt: skip
    speeds = {one["rows"]: one["samples_of_one_prompt"]["tokens_per_second"] for one in ours["measured"]}
    rows = []
    for count in options.rows:
        contenders = {f"nanochat, {name}": variant for name, variant in theirs["variants"].items()}
        for name, measured in (contenders | {"jaxchat": ours["measured"]}).items():
            one = next(one for one in measured if one["rows"] == count)
            samples = one["samples_of_one_prompt"]
            speed, own = samples["tokens_per_second"], one.get("tokens_per_second")
            limit = one.get("limit_tokens_per_second")
            ratio = "" if name == "jaxchat" or not speeds[count] else f"{speeds[count] / speed:.1f}"
            rows.append([
                name, count, _milliseconds(one), _milliseconds(samples), _rate(speed), _rate(own), _rate(limit), ratio,
            ])  # fmt: skip
    table(head, rows)
    queues = [
        [name.replace("_", " "), _rate(queue["tokens_per_second"]), f"{queue['share_of_uniform']:.0%}"]
        for name, queue in ours["mixed_queue"].items()
    ]
    if queues:
        table(["jaxchat, an endless queue with mixed", "tokens/s", "of the same rows, with prompts"], queues)


def _milliseconds(one: dict[str, Any]) -> str:
    return f"{1000 * one['first_token_seconds']:,.1f}"


def _rate(tokens: float | None) -> str:
    return "" if tokens is None else f"{tokens:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
