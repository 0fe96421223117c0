"""Measures training speed, from the batch on the host to the updated weights.

    python benchmarks/train.py --depth 6 12 20 --rows 32
    python benchmarks/train.py --depth 20 --devices 1 2 4
    python benchmarks/train.py --depth 12 --data DIR --json results.json
    python benchmarks/train.py --depth 12 20 --cold
    python benchmarks/train.py --depth 20 --precision fp32 --mesh.fsdp 2 --accumulation 4 --model.num-kv-heads=2

As in the training loop, a step is dispatched before the metrics of the previous one are read. After a warm-up, several
windows of steps are measured, each ending when the device is done; the table has the median over all their steps. With
text from the loader, each window is followed by one with the same batches held ready: the difference is the cost of the
loader. Each line of the table is measured in a separate process, so memory is measured per line, and a model that does
not fit still gets a line. Other fields of an experiment may follow, as for launch.py. Programs are compiled from
scratch unless JAX_COMPILATION_CACHE_DIR is set.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from datetime import date
from typing import Any, get_args, get_type_hints

from jaxchat_steps import Work, measure
from timing import Failed, alone, say, table

from jaxchat.cli.options import override
from jaxchat.cli.parser import option_strings
from jaxchat.config import Experiment, ModelConfig
from jaxchat.errors import UserError, check

TOKENIZER_CHARS = 100_000_000
PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}
# By default JAX leaves a quarter of the GPU's memory unused.
MEMORY = {name: os.environ.get(name, "0.92") for name in ["XLA_PYTHON_CLIENT_MEM_FRACTION"]}
GIB = 1 << 30


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 2 if nothing could be measured."""
    parser = _parser()
    options, overrides = parser.parse_known_args(argv)
    try:
        works = _works(options, overrides, option_strings(parser))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = open(options.json, "w") if options.json else None
    records = []
    for work in works:
        depth = work.experiment.model.depth
        name = f"d{depth}" + (f" on {_count(work.devices)}" if work.devices else "")
        say(f"{name}: measuring")
        record = {
            **{"depth": depth, "devices": work.devices, "rows": work.rows, "accumulation": work.accumulation},
            **{"sequence_len": options.sequence_len, "vocab_size": options.vocab_size},
            **{"precision": options.precision, "data": options.data},
            **{"overrides": overrides, "date": date.today().isoformat()},
            **_figures(work, options.cold),
        }
        records.append(record)
        say(f"{name}: {record.get('error') or _speed(record)}")
        if file:
            print(json.dumps(record), file=file, flush=True)
    _print(records)
    return 0 if any("error" not in record for record in records) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--depth", type=int, nargs="+", default=[12], help="one or more depths, a line each (default 12)")
    add("--devices", type=int, nargs="+", metavar="N", help="use only the first N devices, a line each (default: all)")
    add(
        "--rows",
        type=int,
        nargs="+",
        default=[32],
        help="per device and micro-batch; one, or one per depth (default 32)",
    )
    add("--fit", action="store_true", help="use fewer rows and more micro-batches if memory is short")
    add("--sequence-len", type=int, default=2048, help="tokens per row (default 2048)")
    add("--vocab-size", type=int, default=32768, help="(default 32768)")
    add("--accumulation", type=int, default=1, help="micro-batches per step (default 1)")
    add("--precision", default="bf16", help="bf16, fp32, or any precision of an experiment (default bf16)")
    add("--data", default="random", metavar="random|DIR", help="random tokens, or text through the loader")
    add("--cold", action="store_true", help="also measure the start without compiled programs, up to the first step")
    add("--steps", type=int, default=20, help="steps per window (default 20)")
    add("--seconds", type=float, default=6.0, help="the most a window may take (default 6)")
    add("--windows", type=int, default=3, help="(default 3)")
    add("--json", metavar="FILE", help="write all figures to FILE, one JSON object per line")
    return parser


def _works(options: argparse.Namespace, overrides: list[str], names: list[str]) -> list[Work]:
    """Every depth on every number of devices. Raises UserError for invalid settings."""
    for name in ("accumulation", "steps", "windows"):
        check(getattr(options, name) >= 1, f"--{name} must be at least 1")
    check(min(options.rows) >= 1, "--rows must be at least 1")
    check(options.devices is None or min(options.devices) >= 1, "--devices must be at least 1")
    check(options.seconds > 0, "--seconds must be above 0")
    depths = len(options.depth)
    check(
        len(options.rows) in (1, depths),
        f"--rows has {len(options.rows)} numbers for {depths} depths; give one for all depths, or one for each",
    )
    rows = options.rows * depths if len(options.rows) == 1 else options.rows
    experiments = [_experiment(options, overrides, depth, names) for depth in options.depth]
    shared = (options.accumulation, options.steps, options.windows, options.seconds, options.fit)
    return [
        Work(experiment, devices, rows, *shared)
        for (experiment, rows), devices in itertools.product(
            zip(experiments, rows, strict=True), options.devices or [None]
        )
    ]


def _experiment(options: argparse.Namespace, overrides: list[str], depth: int, names: list[str]) -> Experiment:
    random = options.data == "random"
    check(random or os.path.isdir(options.data), f"data folder {options.data!r} does not exist; give a folder of text")
    precision = PRECISIONS.get(options.precision, options.precision)
    known = get_args(get_type_hints(Experiment)["precision"])
    check(precision in known, f"--precision {precision!r} is unknown; choose bf16, fp32, or one of {', '.join(known)}")
    base = Experiment(name="benchmark", precision=precision, model=ModelConfig(depth, options.sequence_len))
    base = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, path=None if random else os.path.abspath(options.data), generate=random),
        tokenizer=dataclasses.replace(base.tokenizer, vocab_size=options.vocab_size, max_chars=TOKENIZER_CHARS),
    )
    return override(base, overrides, names)


def _figures(work: Work, cold: bool) -> dict[str, Any]:
    """The figures of a fresh process; with `cold`, of a second one, with those of the first under "cold"."""
    if not cold:
        return _alone(work, {})
    with tempfile.TemporaryDirectory() as cache:
        work = dataclasses.replace(work, cached=True)
        first = _alone(dataclasses.replace(work, only_first=True), {"JAX_COMPILATION_CACHE_DIR": cache})
        if "error" in first:
            return first
        return {**_alone(work, {"JAX_COMPILATION_CACHE_DIR": cache}), "cold": first}


def _alone(work: Work, environment: dict[str, str]) -> dict[str, Any]:
    environment = MEMORY | environment
    if work.devices:
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        first = given[: work.devices] if given[0] else map(str, range(work.devices))
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(first), "JAX_NUM_CPU_DEVICES": str(work.devices)}
    try:
        return alone(measure, work, time.time(), environment=environment)[0]
    except Failed as failure:
        return {"error": " ".join(str(failure).split())}


# --- the table --------------------------------------------------------------------------------------------------------


def _count(devices: int) -> str:
    return f"{devices} device{'s' if devices > 1 else ''}"


def _speed(record: dict[str, Any]) -> str:
    mfu = f", {record['mfu']:.1%} MFU" if record["mfu"] else ""
    return f"{record['tokens_per_second']:,.0f} tokens/s{mfu}"


def _print(records: list[dict[str, Any]]) -> None:
    head = ["model", "devices", "rows", "tokens/s", "ms per step", "MFU", "GiB", "GiB of state", "trace + compile, s"]
    head += ["first step after, s", "loss, first", "last"]
    measured = [record for record in records if "error" not in record]
    if measured:
        first = measured[0]
        machine = first["machine"]
        print(f"\n{machine['device_kind']}, jax {machine['jax']}; rows of {first['sequence_len']:,} per device x "
              f"micro-batches, {first['precision']}, data {first['data']}")  # fmt: skip
    table(head, [_line(record, len(head)) for record in records])
    for line in _beneath(measured):
        print(f"\n{line}")


def _line(record: dict[str, Any], columns: int) -> list[str]:
    name = f"d{record['depth']}"
    if "error" in record:
        cells = [name, str(record["devices"] or ""), record["error"]]
        return cells + [""] * (columns - len(cells))
    mesh = " x ".join(f"{size} {axis}" for axis, size in record["mesh"].items() if size > 1)
    return [
        name,
        mesh or "1",
        f"{record['rows']} x {record['accumulation']}",
        f"{record['tokens_per_second']:,.0f}",
        f"{record['step_ms']:.2f}",
        f"{record['mfu']:.1%}" if record["mfu"] else "?",
        f"{record['peak_memory_bytes'] / GIB:.1f}",
        f"{record['state_bytes_per_device'] / GIB:.2f}",
        f"{record['trace_seconds']:.1f} + {record['compile_seconds']:.1f}",
        f"{record['first_step_seconds_from_start']:.1f}",
        f"{record['first_loss']:.3f}",
        f"{record['last_loss']:.3f}",
    ]


def _beneath(measured: list[dict[str, Any]]) -> list[str]:
    """Summaries below the table: scaling over devices, the cost of the loader, the first step of a cold start."""
    lines = []
    for depth in dict.fromkeys(record["depth"] for record in measured):
        same = sorted((record for record in measured if record["depth"] == depth), key=lambda record: record["devices"])
        few, *more = same
        times = [f"{r['devices']} {r['tokens_per_second'] / few['tokens_per_second']:.3f} times" for r in more]
        if times:
            lines.append(f"d{depth}: {_count(few['devices'])}, and {', '.join(times)} that speed")
        for record in same:
            name = f"d{depth} on {_count(record['devices'])}"
            if "loader_cost_percent" in record:
                ready = f"{record['ready_tokens_per_second']:,.0f} tokens/s with the batches ready"
                lines.append(f"{name}: {ready}; the loader adds {record['loader_cost_percent']:.2f}% to a step")
            if "cold" in record:
                cold, warm = (r["first_step_seconds_from_start"] for r in (record["cold"], record))
                lines.append(f"{name}: first step {cold:.1f} s after the start, {warm:.1f} s from the cache")
    return lines


if __name__ == "__main__":
    sys.exit(main())
