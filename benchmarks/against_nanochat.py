"""How fast is training against nanochat, on this machine, now?

    git clone https://github.com/karpathy/nanochat
    python benchmarks/against_nanochat.py --checkout nanochat --python nanochat/.venv/bin/python --depth 12 --rows 32

The same work (depth, rows, context, vocabulary, random tokens, the optimizer step included) in processes of their own,
jaxchat and nanochat in turn, round by round, one at a time on one GPU. Both attend to the full context unless
--window-pattern says otherwise: nanochat's own default has sliding windows, which are slow without FlashAttention-3.
Checkouts from October 2025 on work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from timing import say, table

sys.path.insert(0, str(Path(__file__).parent.parent))

from jaxchat.config import UserError, check
from jaxchat.metrics import device_peak_flops

HERE = Path(__file__).parent
WORK = ("depth", "rows", "sequence_len", "vocab_size", "accumulation", "steps")


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 2 if one of the two cannot do the work."""
    options = _parser().parse_args(argv)
    try:
        rounds = _measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = _summary(rounds)
    _print(options, rounds, summary)
    if options.json:
        settings = {**vars(options), "date": date.today().isoformat()}
        Path(options.json).write_text(json.dumps({"settings": settings, **summary, "rounds": rounds}, indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkout", required=True, metavar="DIR", help="a nanochat checkout")
    add("--python", default=sys.executable, metavar="FILE", help="a Python with torch (default: this one)")
    add("--depth", type=int, default=12, help="(default 12)")
    add("--rows", type=int, default=32, help="(default 32)")
    add("--sequence-len", type=int, default=2048, help="(default 2048)")
    add("--vocab-size", type=int, default=32768, help="(default 32768)")
    add("--accumulation", type=int, default=1, help="micro-batches a step (default 1)")
    add("--steps", type=int, default=20, help="measured in a round, after a warm-up (default 20)")
    add("--rounds", type=int, default=3, help="(default 3)")
    add("--window-pattern", default="L", help="of both: L full context, S a quarter of it (default L)")
    add("--fp8", action="store_true", help="both train in fp8")
    add("--json", metavar="FILE", help="all figures")
    return parser


def _measure(options: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """One entry a round, the figures of both by name."""
    checkout = Path(options.checkout).absolute()
    check(
        (checkout / "nanochat" / "gpt.py").exists() and (checkout / "scripts" / "base_train.py").exists(),
        f"{options.checkout} is not a nanochat checkout (no nanochat/gpt.py or scripts/base_train.py); clone one and "
        "name its folder",
    )
    check(options.rounds >= 1 and options.steps >= 1, "--rounds and --steps must be at least 1")
    work = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in WORK]
    rounds = []
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        ours = [sys.executable, str(HERE / "train.py"), *work, "--windows=1", "--mesh.data=1", f"--json={result}"]
        ours += ["--precision=fp8"] if options.fp8 else []
        ours += [] if options.window_pattern == "L" else [f"--model.window-pattern={options.window_pattern}"]
        theirs = [options.python, str(HERE / "nanochat_steps.py"), str(checkout), *work, f"--json={result}"]
        theirs += [f"--window-pattern={options.window_pattern}", *(["--fp8"] if options.fp8 else [])]
        # Later rounds need not compile again; base_train.py sets the allocator.
        caches = {"JAX_COMPILATION_CACHE_DIR": f"{directory}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{directory}/inductor"}
        allocator = {name: "expandable_segments:True" for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
        one = {"CUDA_VISIBLE_DEVICES": "0", "NANOCHAT_BASE_DIR": f"{directory}/nanochat"}
        environment = {**caches, **allocator, **one, **os.environ}
        for number in range(options.rounds):
            figures = {}
            for name, command in (("jaxchat", ours), ("nanochat", theirs)):
                figures[name] = _run(name, command, environment, result)
                speed = figures[name]["tokens_per_second"]
                say(f"round {number + 1} of {options.rounds}: {name} {speed:,.0f} tokens/s")
            rounds.append(figures)
    return rounds


def _run(name: str, command: list[str], environment: dict[str, str], result: Path) -> dict[str, Any]:
    """The figures that a process writes to `result`; it has ended, and its memory is free, when this returns.

    Raises:
      UserError: with its last line, if it does not end well.
    """
    result.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started ({error.strerror}); give --python a Python") from None
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    figures = json.loads(result.read_text()) if result.exists() and result.stat().st_size else {"error": lines[-1:]}
    if done.returncode or "error" in figures:
        say("\n".join(lines[-30:]))
        reason = figures.get("error") or lines[-1:]
        raise UserError(f"{name} failed: {reason if isinstance(reason, str) else ' '.join(reason)}")
    return figures


def _summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratio ours to theirs: of the medians, and of each round."""
    speeds = {name: [figures[name]["tokens_per_second"] for figures in rounds] for name in rounds[0]}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = [ours / theirs for ours, theirs in zip(speeds["jaxchat"], speeds["nanochat"], strict=True)]
    return {"tokens_per_second": medians, "ratio": medians["jaxchat"] / medians["nanochat"], "round_ratios": ratios}


def _print(options: argparse.Namespace, rounds: list[dict[str, dict[str, Any]]], summary: dict[str, Any]) -> None:
    ours, theirs = rounds[-1]["jaxchat"], rounds[-1]["nanochat"]
    precision = "fp8" if options.fp8 else "bf16"
    print(f"\n{theirs['device']}, d{options.depth}, {options.rows} rows of {options.sequence_len:,}, accumulation "
          f"{options.accumulation}, {precision}, windows {options.window_pattern}; jax {ours['machine']['jax']}, "
          f"torch {theirs['torch']} with {theirs['attention']}; medians of {options.rounds} rounds")  # fmt: skip
    peak = device_peak_flops(ours["machine"]["device_kind"])
    rows = []
    for name, last in (("jaxchat", ours), ("nanochat", theirs)):
        speed = summary["tokens_per_second"][name]
        memory = last["peak_memory_bytes"]
        rows.append([
            name,
            f"{speed:,.0f}",
            f"{1000 * options.accumulation * options.rows * options.sequence_len / speed:.2f}",
            f"{speed * last['flops_per_token'] / peak:.1%}" if peak else "?",
            f"{memory / (1 << 30):.1f}" if memory else "?",
            f"{last['first_loss']:.3f}",
            f"{last['last_loss']:.3f}",
        ])  # fmt: skip
    table(["", "tokens/s", "ms a step", "MFU, by its own FLOPs", "GiB", "loss, first", "last"], rows)
    spread = f"{min(summary['round_ratios']):.3f} to {max(summary['round_ratios']):.3f}"
    print(f"\njaxchat / nanochat: {summary['ratio']:.3f} (rounds {spread})")


if __name__ == "__main__":
    sys.exit(main())
