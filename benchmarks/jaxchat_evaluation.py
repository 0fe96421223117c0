"""Runs jaxchat's evaluators in a process of their own; `against_nanochat.py` and `evaluation.py` start it.

It is the counterpart of `nanochat_evaluation.py`, with the same kinds of work. The model is that of a run or, to
measure speed, one with random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import say

from jaxchat.errors import UserError
from jaxchat.eval.bpb import evaluate_bpb
from jaxchat.eval.chat import evaluate_task
from jaxchat.eval.core import evaluate_core, load_bundle
from jaxchat.infer.engine import Engine
from jaxchat.infer.trained import load_model
from jaxchat.model.config import GPTConfig
from jaxchat.ops.compute import Compute
from jaxchat.tasks import load_task
from jaxchat.tokenizer import load_tokenizer

PRECISIONS = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
Model = tuple[GPTConfig, Any, Any]  # with parameters and tokenizer
SAY_EVERY = 5.0  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("core", "chat", "bpb"))
    parser.add_argument("--run")
    parser.add_argument("--stage")
    parser.add_argument("--random-depth", type=int, help="a model with random weights instead of a run's")
    parser.add_argument("--tokenizer", help="of the model with random weights")
    parser.add_argument("--data", type=Path, required=True, help="the bundle, the data folder, or the file of rows")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--precision", choices=PRECISIONS, required=True)
    parser.add_argument("--keep", help="folder for the decisions of CORE")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int)
    options = parser.parse_args()
    try:
        if options.precision == "fp32":  # as torch does: no TF32
            jax.config.update("jax_default_matmul_precision", "highest")
        result = {"core": core, "chat": chat, "bpb": bpb}[options.work](options, _load(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.json.write_text(json.dumps({**result, "jax": jax.__version__, "device": jax.devices()[0].device_kind}))
    return 0


def _load(options: argparse.Namespace) -> Model:
    if options.random_depth is None:
        trained = load_model(options.run, options.stage)
        return trained.model, trained.params, trained.tokenizer
    from jaxchat.analysis.generation import random_model

    tokenizer = load_tokenizer(options.tokenizer)
    config = GPTConfig(depth=options.random_depth, vocab_size=tokenizer.vocab_size)
    return config, random_model(config)[0], tokenizer


def core(options: argparse.Namespace, model: Model) -> dict[str, Any]:
    """The accuracy of each task, the seconds of all of them, and in `--keep` the decision on each item."""
    bundle, last, start = load_bundle(options.data), time.monotonic(), time.perf_counter()

    def progress(done: int, total: int, label: str) -> None:
        nonlocal last
        if time.monotonic() - last > SAY_EVERY:
            last = time.monotonic()
            say(f"jaxchat {label}: {done / total:.0%} after {time.perf_counter() - start:.0f} s")

    result = evaluate_core(
        *model,
        bundle,
        compute=Compute(PRECISIONS[options.precision]),
        max_per_task=options.limit,
        tasks=options.tasks,
        keep=options.keep,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    tasks = {label: {"accuracy": task.accuracy, "items": task.count} for label, task in result.tasks.items()}
    return {"seconds": seconds, "tasks": tasks, **result.scores()}


def chat(options: argparse.Namespace, model: Model) -> dict[str, Any]:
    """The outcome of each question of each task, in the order in which they are asked."""
    config, params, tokenizer = model
    engine = Engine(config, params, tokenizer, dtype=PRECISIONS[options.precision], rows=options.rows)
    found = {}
    for name in options.tasks:
        task = load_task(name, "test", str(options.data))
        new = options.max_new_tokens or 512
        if task.mode is not None:
            task.mode = dataclasses.replace(task.mode, max_new_tokens=new)
        start = time.perf_counter()
        result = evaluate_task(engine, task, limit=options.limit, max_new_tokens=new, batch_size=options.rows)
        seconds = time.perf_counter() - start
        say(f"jaxchat {name}: {result} in {seconds:.1f} s")
        answers = [{"question": a.question, "answer": a.answer, "right": a.score == 1} for a in result.answers]
        # Those of an answer that was cut are as many as it could have, whatever its text is encoded to.
        tokens = sum(new if a.cut else len(tokenizer.encode(a.answer)) for a in result.answers)
        found[name] = {"score": result.score, "seconds": seconds, "tokens": tokens, "answers": answers}
    return {"tasks": found}


def bpb(options: argparse.Namespace, model: Model) -> dict[str, Any]:
    """Bits per byte of rows of tokens: int32[batches, 2, rows, T], inputs and targets, in a file of NumPy."""
    config, params, tokenizer = model
    batches = ({"inputs": inputs, "targets": targets} for inputs, targets in np.load(options.data))
    compute = Compute(PRECISIONS[options.precision])
    return {"bpb": evaluate_bpb(params, config, batches, tokenizer.token_bytes(), compute=compute)}


if __name__ == "__main__":
    sys.exit(main())
