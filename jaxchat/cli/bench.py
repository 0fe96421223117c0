"""`jaxchat bench infer`: how fast a model generates on this machine."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxchat.cli.options import configure
from jaxchat.cli.parser import shorten, take_overrides
from jaxchat.cli.precision import add_precision_options, precision
from jaxchat.cli.values import number, path, whole, words
from jaxchat.config import Experiment, Range
from jaxchat.errors import UserError, check

if TYPE_CHECKING:
    from jaxchat.analysis.generation import Work
    from jaxchat.infer.engine import Engine
    from jaxchat.infer.trained import TrainedModel

LONGEST_PROMPT, MOST_NEW = 512, 256  # by default, where the model's context allows twice as much


def add_command(commands: Any) -> None:
    """Adds `bench` to the commands of `jaxchat`."""
    bench = commands.add_parser("bench", help="Measure how fast a model generates.")
    infer = bench.add_commands().add_parser(
        "infer",
        help="Measure generation: time to the first token, tokens a second, use of the memory's bandwidth.",
        description="Generates with a run's model, or with random weights of an experiment's size, and measures the "
        "time to the first token, tokens a second, and how near that is to the limit that the memory's bandwidth sets: "
        "for each number of rows and length of the prompts, each row with a prompt of its own and as samples of one "
        "prompt; then with a queue of mixed requests that never runs empty. For a run's model also what 8 bits cost, "
        "in bits per byte of its validation text.",
        epilog="With --experiment, its fields can be given too, such as --model.depth=20; "
        "python launch.py --experiment=NAME --help lists them.",
        allow_abbrev=False,
    )
    add = infer.add_argument
    add("--run", type=path, metavar="DIR", help="The run whose model is measured.")
    add("--stage", metavar="STAGE", help="Stage of that run. (default: the last finished one)")
    add("--step", metavar="N", help="A kept checkpoint of that stage: its step, or best. (default: its result)")
    add("--experiment", metavar="NAME", help="The experiment whose model is measured, with random weights.")
    counts = _wholes(Range(at_least=1, at_most=4096))
    add("--rows", type=counts, metavar="N,N", help="Rows that are generated at a time. (default 1,32,128)")
    lengths = whole(Range(at_least=1, at_most=1 << 20))
    add(
        "--context",
        type=_wholes(Range(at_least=1, at_most=1 << 20)),
        metavar="N,N",
        help="Tokens of a prompt. (default 512, or a quarter of the model's context)",
    )
    add(
        "--new",
        type=lengths,
        metavar="N",
        help="New tokens of each row. (default 256, or an eighth of the model's context)",
    )
    add("--repeats", type=whole(Range(at_least=1)), default=5, metavar="N", help="Runs of each kind. (default 5)")
    add(
        "--queue-seconds",
        type=number(Range(at_least=0)),
        default=10.0,
        metavar="S",
        help="How long each mixed queue is measured; 0 for none. (default 10.0)",
    )
    add_precision_options(add)
    add("--json", type=path, metavar="FILE", help="Write all figures to FILE.")
    take_overrides(infer, _infer)


def _wholes(limits: Range) -> Callable[[str], tuple[int, ...]]:
    """Whole numbers in a range, separated by commas."""
    one = whole(limits)
    return lambda text: tuple(one(word) for word in words(text))


def _infer(arguments: argparse.Namespace) -> int:
    check((arguments.run is None) != (arguments.experiment is None),
          "give either --run=DIR, for its model, or --experiment=NAME, for random weights")  # fmt: skip
    if arguments.json is not None:
        _check_file(arguments.json)
    experiment = _experiment(arguments)
    import jax  # slow to import, as what follows: --help and bad options need not wait for it

    from jaxchat.analysis import generation
    from jaxchat.devices.compile_cache import keep_compiled
    from jaxchat.devices.machine import machine_info
    from jaxchat.infer.quantized import cache_dtype
    from jaxchat.infer.trained import TrainedModel, load_model
    from jaxchat.model.parameters import count_parameters
    from jaxchat.stages.workspace import planned_model

    keep_compiled()
    if experiment is None:
        trained = load_model(arguments.run, arguments.stage, arguments.step)
        works = _works(arguments, trained.model.sequence_len)
    else:
        model = planned_model(experiment)
        works = _works(arguments, model.sequence_len)
        _say(f"random weights of {experiment.name}")
        params, tokenizer = generation.random_model(model)
        trained = TrainedModel(experiment, model, tokenizer, params, stage="pretrain")
    model, cost = trained.model, None if experiment else _cost(arguments.run, trained)
    engine = trained.engine(rows=max(work.rows for work in works), **precision(arguments))
    if arguments.queue_seconds:  # the rest compiles what it needs, which is far less, in runs that are not timed
        _compile(engine)
    kept = jax.numpy.dtype(cache_dtype(engine.dtype, arguments.kv_cache))
    measured = generation.bench(
        engine,
        works,
        repeats=arguments.repeats,
        queue_seconds=arguments.queue_seconds,
        cache_itemsize=kept.itemsize,
        say=_say,
    )
    result = {
        "model": {"depth": model.depth, "parameters": count_parameters(model).total, "vocab_size": model.vocab_size,
                  "sequence_len": model.sequence_len, "experiment": trained.experiment.name, "run": arguments.run},
        "machine": machine_info(), "dtype": engine.dtype,
        "weights": engine.dtype if arguments.weights == "auto" else arguments.weights, "kv_cache": kept.name,
        **measured, "bits_per_byte": cost,
    }  # fmt: skip
    print(generation.tables(result))
    if arguments.json is not None:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    return 0


def _experiment(arguments: argparse.Namespace) -> Experiment | None:
    """The experiment that `--experiment` names; None for a run's model."""
    if arguments.experiment is None:
        strange = next(iter(arguments.overrides), None)
        check(strange is None, f"unknown option {shorten(str(strange))}; fields go with --experiment, not with --run")
        return None
    for name in ("stage", "step"):
        check(getattr(arguments, name) is None, f"--{name} goes with --run, not with --experiment")
    return configure(arguments.experiment, arguments.overrides, None, arguments.options)


def _compile(engine: Engine) -> None:
    """Compiles every program of the engine, and shows how far that is."""
    from jaxchat.runs.progress import LiveLine

    lines: list[LiveLine] = []

    def show(done: int, total: int) -> None:
        if not lines:
            lines.append(LiveLine("compile", total))
        lines[0].update(done, {})

    engine.warm_up(show)
    gc.collect()
    gc.freeze()  # as the server does
    for line in lines:
        line.close()


def _works(arguments: argparse.Namespace, sequence_len: int) -> list[Work]:
    """What to measure, the largest last."""
    from jaxchat.analysis.generation import Work

    contexts = arguments.context or (max(1, min(LONGEST_PROMPT, sequence_len // 4)),)
    new = arguments.new or max(1, min(MOST_NEW, sequence_len // 8))
    longest = max(contexts)
    check(longest + new <= sequence_len,
          f"prompts of {longest:,} and {new:,} new tokens do not fit the model's context of {sequence_len:,}; "
          f"give --context and --new that together have at most so many")  # fmt: skip
    rows = sorted(arguments.rows or (1, 32, 128))
    return [Work(count, context, new) for context in sorted(contexts) for count in rows]


def _cost(run: str, trained: TrainedModel) -> dict[str, Any] | None:
    """Bits per byte of the run's validation text, by what is in 8 bits; None if the text is not there."""
    import jax.numpy as jnp

    from jaxchat.analysis.rounding import paged_bpb, validation_batches
    from jaxchat.ops.compute import compute_dtype
    from jaxchat.runs.directory import RunDirectory

    dtype = jnp.dtype(compute_dtype(trained.experiment))
    _say("bits per byte: reads the validation text")
    try:
        batches = validation_batches(RunDirectory(run), trained)
    except UserError as error:
        _say(f"bits per byte are left out: {error}")
        return None
    cost: dict[str, Any] = {"tokens": sum(batch["targets"].size for batch in batches)}
    kinds: dict[str, dict[str, Any]] = {
        f"in_{dtype.name}": {},
        "with_int8_weights": {"weights": "int8"},
        "with_fp8_cache": {"kv_cache": "fp8"},
        "with_both": {"weights": "int8", "kv_cache": "fp8"},
    }
    for name, options in kinds.items():
        _say(f"bits per byte {name.replace('_', ' ')}")
        sizes = trained.tokenizer.token_bytes()
        cost[name] = paged_bpb(trained.params, trained.model, batches, sizes, dtype=dtype, **options)
    return cost


def _check_file(name: str) -> None:
    """Raises UserError for a file that cannot be written, before the measurement rather than after it."""
    try:
        with open(name, "a"):
            pass
    except OSError as error:
        raise UserError(f"{name} cannot be written ({error.strerror}); choose another --json") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
