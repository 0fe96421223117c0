"""How fast is training, from the batch on the host to the updated weights?

    python benchmarks/train.py --depth 6 12 20 --rows 32
    python benchmarks/train.py --depth 12 --data DIR --json results.json
    python benchmarks/train.py --depth 20 --precision fp32 --mesh.fsdp 2 --accumulation 4 --model.num-kv-heads=2

The step, its optimizer, its donated state on the mesh and the way of a batch to the devices are pretraining's own
(`jaxchat/stages/training.py`). As in the training loop, a step is dispatched before the metrics of the last one are
read. After a warm-up come several windows of steps, at whose ends the device is waited for; the table has the median
over all their steps. Each depth runs in a process of its own, so that memory is its own too, and one that does not fit
is a line in the table. Other fields of an experiment may follow, as for launch.py. Compilation is from nothing unless
JAX_COMPILATION_CACHE_DIR is set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any, get_args, get_type_hints

from timing import Failed, alone, say, table

sys.path.insert(0, str(Path(__file__).parent.parent))

import launch
from jaxchat.config import Experiment, ModelConfig, UserError, check

WARM_UP = 3
TOKENIZER_CHARS = 100_000_000
PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}
# JAX keeps a quarter of the GPU free unless told otherwise.
MEMORY = {name: os.environ.get(name, "0.92") for name in ["XLA_PYTHON_CLIENT_MEM_FRACTION"]}
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Work:
    """One line of the table; `experiment.data.path` is None for random tokens."""

    experiment: Experiment
    rows: int
    accumulation: int
    steps: int
    windows: int


# --- in a process of its own ------------------------------------------------------------------------------------------


def measure(work: Work) -> dict[str, Any]:
    """The figures of one model, or `{"error": one line}` if it is refused or does not fit."""
    import jax

    try:
        with tempfile.TemporaryDirectory() as directory:
            return _measure(work, directory)
    except UserError as error:
        return {"error": str(error)}
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            return {"error": f"out of memory: {' '.join(text.split())[:160]}"}
        raise


def _measure(work: Work, directory: str) -> dict[str, Any]:
    import jax

    from jaxchat.mesh import make_mesh
    from jaxchat.metrics import device_peak_flops, machine_info, peak_memory_bytes
    from jaxchat.scaling import count_parameters, flops_per_token
    from jaxchat.stages.run import Run
    from jaxchat.stages.training import Training, fresh_params

    experiment = work.experiment
    mesh = make_mesh(experiment.mesh).shape
    tokens = work.accumulation * work.rows * mesh["data"] * mesh["fsdp"] * experiment.model.sequence_len
    pretrain = dataclasses.replace(experiment.pretrain, batch_tokens=tokens, device_rows=work.rows)
    run = Run(dataclasses.replace(experiment, pretrain=pretrain), Path(directory) / "run", say=say)
    model, source = _model_and_batches(run)
    total = 1 + WARM_UP + work.steps * work.windows
    training = Training(run, "pretrain", pretrain, model, None, total)
    seconds = {"init": time.perf_counter()}
    state, step = training.prepare(lambda: fresh_params(run, model))
    batch, _ = source.next_batch(0, state["params"])
    jax.block_until_ready((state, batch))
    seconds["trace"] = time.perf_counter()
    lowered = step.lower(state, batch)
    seconds["compile"] = time.perf_counter()
    compiled = lowered.compile()
    seconds["first_step"] = time.perf_counter()
    state, metrics = step(state, batch)
    first_loss = float(metrics["loss"])
    seconds["end"] = time.perf_counter()
    names = list(seconds)
    parts = {f"{a}_seconds": seconds[b] - seconds[a] for a, b in zip(names, names[1:], strict=False)}

    state, _, _ = _window(step, state, source, WARM_UP)
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compilations.append(event) if event == COMPILED else None
    )
    times, windows = [], []
    for _ in range(work.windows):
        state, window, metrics = _window(step, state, source, work.steps)
        times += window
        windows.append(sum(window) / len(window))
    median, mean = statistics.median(times), sum(times) / len(times)
    machine = machine_info()
    peak = device_peak_flops(machine["device_kind"])
    memory = compiled.memory_analysis()
    held = memory and memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    flops = flops_per_token(model)
    return {
        "mesh": dict(mesh),
        "parameters": count_parameters(model).total,
        "flops_per_token": flops,
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / median,
        "tokens_per_second_mean": tokens / mean,
        "step_ms": 1000 * median,
        "window_step_ms": [1000 * window for window in windows],
        "mfu": tokens / median * flops / (peak * machine["device_count"]) if peak else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "compiled_memory_bytes": memory and held + memory.temp_size_in_bytes,
        **parts,
        "compilations_while_measuring": len(compilations),
        "first_loss": first_loss,
        "last_loss": float(metrics["loss"]),
        "machine": machine,
    }


def _model_and_batches(run):
    """The model, and a source of random batches, or of the loader's with a tokenizer trained on the text or brought."""
    from jaxchat.data.shards import find_text
    from jaxchat.stages import tokenizer as tokenizer_stage
    from jaxchat.stages.pretrain import training_batches
    from jaxchat.stages.training import random_batches

    experiment = run.experiment
    if experiment.data.path is None:
        model = dataclasses.replace(experiment.model, vocab_size=experiment.tokenizer.vocab_size)
        return model, random_batches(run, model)
    tokenizer_stage.run(run)
    tokenizer = run.tokenizer()
    text = find_text(run.text_dir, experiment.data.val_shard)
    return run.model_config(tokenizer), training_batches(run, tokenizer, text)


def _window(step, state, source, count: int):
    """Runs `count` steps as the training loop does; returns the state, the seconds of each, and the last metrics."""
    import jax

    times, waiting = [], []
    before = time.perf_counter()
    for index in range(count + 1):
        if index < count:
            batch, _ = source.next_batch(index, state["params"])
            state, metrics = step(state, batch)
            waiting.append(metrics)
        if len(waiting) > 1 or index == count:
            metrics = jax.device_get(waiting.pop(0))
            now = time.perf_counter()
            times.append(now - before)
            before = now
    return state, times, metrics


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 2 if nothing could be measured."""
    parser = _parser()
    options, overrides = parser.parse_known_args(argv)
    try:
        names = launch.option_strings(parser)
        works = [_work(options, overrides, depth, names) for depth in options.depth]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = open(options.json, "w") if options.json else None
    records = []
    for depth, work in zip(options.depth, works, strict=True):
        say(f"d{depth}: measuring")
        try:
            figures, _ = alone(measure, work, environment=MEMORY)
        except Failed as failure:
            figures = {"error": " ".join(str(failure).split())}
        record = {
            **{"depth": depth, "rows": work.rows, "accumulation": work.accumulation},
            **{"sequence_len": options.sequence_len, "vocab_size": options.vocab_size},
            **{"precision": options.precision, "data": options.data, "steps": work.steps, "windows": work.windows},
            **{"overrides": overrides, "date": date.today().isoformat()},
            **figures,
        }
        records.append(record)
        say(f"d{depth}: {figures.get('error') or _speed(figures)}")
        if file:
            print(json.dumps(record), file=file, flush=True)
    _print(records)
    return 0 if any("error" not in record for record in records) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--depth", type=int, nargs="+", default=[12], help="one or more, a line each (default 12)")
    add("--rows", type=int, default=32, help="rows that a device takes at once (default 32)")
    add("--sequence-len", type=int, default=2048, help="tokens of a row (default 2048)")
    add("--vocab-size", type=int, default=32768, help="(default 32768)")
    add("--accumulation", type=int, default=1, help="micro-batches a step (default 1)")
    add("--precision", default="bf16", help="bf16, fp32, or what an experiment's precision may be (default bf16)")
    add("--data", default="random", metavar="random|DIR", help="random tokens, or text through the loader")
    add("--steps", type=int, default=20, help="of a window (default 20)")
    add("--windows", type=int, default=3, help="(default 3)")
    add("--json", metavar="FILE", help="one object a line for all figures")
    return parser


def _work(options: argparse.Namespace, overrides: list[str], depth: int, names: list[str]) -> Work:
    """Raises UserError for what no experiment may be."""
    for name in ("rows", "accumulation", "steps", "windows"):
        check(getattr(options, name) >= 1, f"--{name} must be at least 1")
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
    experiment = launch.override(base, overrides, names)
    return Work(experiment, options.rows, options.accumulation, options.steps, options.windows)


def _speed(figures: dict[str, Any]) -> str:
    mfu = f", {figures['mfu']:.1%} MFU" if figures["mfu"] else ""
    return f"{figures['tokens_per_second']:,.0f} tokens/s{mfu}"


def _print(records: list[dict[str, Any]]) -> None:
    head = ["model", "tokens/s", "mean", "ms a step", "MFU", "GiB", "trace + compile, s", "loss, first", "last"]
    measured = [record for record in records if "error" not in record]
    if measured:
        machine = measured[0]["machine"]
        mesh = " x ".join(f"{size} {axis}" for axis, size in measured[0]["mesh"].items() if size > 1) or "1 device"
        print(f"\n{machine['device_count']} x {machine['device_kind']} ({mesh}), jax {machine['jax']}; "
              f"{records[0]['rows']} rows of {records[0]['sequence_len']:,} a device, accumulation "
              f"{records[0]['accumulation']}, {records[0]['precision']}, data {records[0]['data']}")  # fmt: skip
    table(head, [_line(record) for record in records])


def _line(record: dict[str, Any]) -> list[str]:
    name = f"d{record['depth']}"
    if "error" in record:
        return [name, record["error"], *[""] * 7]
    return [
        name,
        f"{record['tokens_per_second']:,.0f}",
        f"{record['tokens_per_second_mean']:,.0f}",
        f"{record['step_ms']:.2f}",
        f"{record['mfu']:.1%}" if record["mfu"] else "?",
        f"{record['peak_memory_bytes'] / (1 << 30):.1f}",
        f"{record['trace_seconds']:.1f} + {record['compile_seconds']:.1f}",
        f"{record['first_loss']:.3f}",
        f"{record['last_loss']:.3f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
