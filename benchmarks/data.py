"""Compares how fast jaxchat and nanochat turn text into packed batches on this machine.

    git clone https://github.com/karpathy/nanochat
    python benchmarks/data.py DIR --checkout nanochat --python nanochat/.venv/bin/python

Both read parquet files, tokenize them with the same vocabulary and pack batches of token ids. They take turns in each
round, each in a separate process that may use --cores cores, and are timed from the start to the last batch. Speed is
given per second of processor time, which other programs disturb less than elapsed time. Without --checkout, only
jaxchat is measured. Checkouts from 2026 or later work.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import Failed, alone, machine, say, table

from jaxchat.errors import UserError, check

PEER = Path(__file__).parent / "nanochat_loader.py"
PACKINGS = ("best-fit", "concat")


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 2 after bad input."""
    options = _parser().parse_args(argv)
    try:
        results = measure(options)
    except (UserError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(options, results)
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine("grain", "pyarrow"), **results}, indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("text", metavar="DIR", help="a folder of parquet files; the last one is not read")
    add("--checkout", metavar="DIR", help="a nanochat checkout")
    add("--python", default=sys.executable, metavar="FILE", help="a Python with torch, tiktoken and rustbpe")
    add("--vocab-size", type=int, default=32768, help="(default 32768)")
    add("--rows", type=int, default=32, help="(default 32)")
    add("--sequence-len", type=int, default=2048, help="(default 2048)")
    add("--batches", type=int, default=300, help="batches per round (default 300)")
    add("--processes", type=int, default=1, metavar="N", help="also measure one process of N, with its share of text")
    add("--cores", type=int, nargs="+", default=[1], help="numbers of cores to measure with (default 1)")
    add("--rounds", type=int, default=3, help="(default 3)")
    add("--json", metavar="FILE", help="write all figures to FILE")
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The medians of each contender, by cores and name.

    Raises:
      UserError: no parquet files, no checkout, fewer cores than asked for.
      Failed: a process failed.
    """
    from jaxchat.data.text.folder import find_text
    from jaxchat.tokenizer import Tokenizer

    text = Path(options.text).absolute()
    split = find_text(text)
    parquet = all(file.suffix == ".parquet" for file in split.train.files)
    check(parquet and split.train.hold_out is None, f"{text} needs at least two parquet files")
    here = len(os.sched_getaffinity(0))
    check(max(options.cores) <= here, f"--cores {max(options.cores)}: this machine has {here}")
    checkout = options.checkout and Path(options.checkout).absolute()
    exists = not checkout or (checkout / "nanochat" / "dataloader.py").exists()
    check(exists, f"{options.checkout} is not a nanochat checkout: it has no nanochat/dataloader.py")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        say(f"a vocabulary of {options.vocab_size:,} tokens from {split.train.files[0].parent}")
        tokenizer = Tokenizer.train_from_files(split.train.files, options.vocab_size, max_chars=200_000_000)
        tokenizer.save(folder / "tokenizer")
        _write_ranks(tokenizer, folder / "ranks.json")
        for cores in options.cores:
            rounds: dict[str, list[dict[str, float]]] = {}
            for number in range(options.rounds):
                for name, figures in _round(options, cores, folder, split.train.files[0].parent, checkout):
                    rounds.setdefault(name, []).append(figures)
                    speed = figures["tokens"] / figures["cpu_seconds"]
                    say(f"{cores} cores, round {number + 1}: {name} {speed / 1e6:.2f} M tokens per core-second")
            results[str(cores)] = {
                name: {key: statistics.median(one[key] for one in found) for key in found[0]}
                for name, found in rounds.items()
            }
    return results


def _write_ranks(tokenizer: Any, path: Path) -> None:
    ranks = tokenizer.mergeable_ranks
    tokens = [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.__getitem__)]
    saved = {"pattern": tokenizer.pattern, "tokens": tokens, "special_tokens": tokenizer.special_tokens}
    path.write_text(json.dumps(saved))


def _round(options: argparse.Namespace, cores: int, folder: Path, text: Path, checkout: Path | None):
    work = {"rows": options.rows, "sequence_len": options.sequence_len}
    for processes in sorted({1, options.processes}):
        share = {**work, "process_count": processes, "lanes": processes}
        for packing in PACKINGS:
            figures, peak = alone(load, text, folder / "tokenizer", cores, options.batches, packing, share)
            of = f", one of {processes}" if processes > 1 else ""
            yield f"jaxchat, {packing}{of}", {**figures, "peak_bytes": peak}
    if checkout is None:
        return
    result = folder / "result.json"
    command = [options.python, str(PEER), f"--text={text}", f"--ranks={folder / 'ranks.json'}"]
    command += [f"--rows={options.rows}", f"--sequence-len={options.sequence_len}", f"--batches={options.batches}"]
    command += [f"--cores={cores}", f"--json={result}"]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(folder / "nanochat"), "OMP_NUM_THREADS": str(cores)}
    environment["PYTHONPATH"] = str(checkout.absolute())
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    check(done.returncode == 0, f"nanochat's loader failed: {(done.stderr.splitlines() or ['no output'])[-1]}")
    yield "nanochat", json.loads(result.read_text())


def load(text: Path, tokenizer: Path, cores: int, batches: int, packing: str, work: dict[str, int]) -> dict[str, float]:
    """Reads `batches` batches on `cores` cores, in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    from jaxchat.data.loader import pretrain_batches
    from jaxchat.data.positions import totals
    from jaxchat.data.text.folder import find_text
    from jaxchat.tokenizer import load_tokenizer

    words, side = load_tokenizer(tokenizer), find_text(text).train
    wall, cpu = time.perf_counter(), time.process_time()
    iterator = pretrain_batches(side, words, seed=0, packing=packing, num_threads=cores, **work)
    for _ in range(batches):
        next(iterator)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    packed = totals(iterator.get_state())["packed"]
    utilisation = packed["targets"] / packed["rows"] / work["sequence_len"]
    tokens = batches * work["rows"] * work["sequence_len"]
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens, "utilisation": utilisation}
    cut = {"cut": packed["cut"] / packed["documents"]} if "cut" in packed else {}
    return {**figures, "cropped": 0.0, **cut}


def _print(options: argparse.Namespace, results: dict[str, Any]) -> None:
    head = ["loader", "cores", "M tokens/s per core", "M tokens/s", "rows full", "tokens cropped", "peak MiB"]
    rows = []
    for cores, found in results.items():
        for name, figures in found.items():
            rows.append([
                name, cores, f"{figures['tokens'] / figures['cpu_seconds'] / 1e6:.2f}",
                f"{figures['tokens'] / figures['seconds'] / 1e6:.2f}", f"{figures['utilisation']:.2%}",
                f"{figures['cropped']:.1%}", f"{figures['peak_bytes'] / (1 << 20):,.0f}",
            ])  # fmt: skip
    work = f"{options.rows} x {options.sequence_len:,} tokens per batch, {options.batches} batches, vocabulary"
    print(f"{work} {options.vocab_size:,}; medians of {options.rounds}")
    table(head, rows)
    for cores, found in results.items():
        ours = found[f"jaxchat, {PACKINGS[0]}"]
        print(f"\n{ours['cut']:.1%} of documents are cut into pieces by best fit.")
        if theirs := found.get("nanochat"):
            times = theirs["cpu_seconds"] / ours["cpu_seconds"]
            print(f"On {cores} cores, jaxchat is {times:.1f} times as fast as nanochat per core-second, and "
                  f"{theirs['seconds'] / ours['seconds']:.1f} times in elapsed time.")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
