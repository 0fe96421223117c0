"""Checks the kernels in `benchmarks/candidates` against plain formulas, and times them beside the kernels in use.

    timeout 120 python benchmarks/decode_candidates.py

On a GPU: d20 in bf16, rows of 576 to 704 tokens. On a CPU the kernels are interpreted, which checks them, at small
sizes; the times mean nothing there. The folder's README.md says what each candidate is.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from candidates import relay
from timing import table

from jaxchat.infer import programs
from jaxchat.infer.request import Sampling
from jaxchat.infer.sampling import settings_of
from jaxchat.model import generation
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params
from jaxchat.ops import few_rows, triton
from jaxchat.ops.pages import PAGE

ON_CPU = jax.default_backend() == "cpu"
DTYPE = jnp.float32 if ON_CPU else jnp.bfloat16
# Layers are as many as keep the GPU's cache from helping; everything is repeated within a program of its own.
CONFIG = (
    GPTConfig(depth=2, sequence_len=256, vocab_size=640)
    if ON_CPU else GPTConfig(depth=20, sequence_len=2048, vocab_size=65_536)
)  # fmt: skip
REPEATS, CALLS = (1, 1) if ON_CPU else (16, 5)
ROWS = (1,) if ON_CPU else range(1, relay.MOST_ROWS + 1)


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; returns 1 if a candidate is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"products": compare_products, "steps": compare_steps}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="(default all)")
    options = parser.parse_args(argv)
    wrong = 0
    before, triton.INTERPRET = triton.INTERPRET, ON_CPU
    try:
        for name in options.only:
            rows = parts[name]()
            table([name, "rows", "in use, µs", "candidate, µs", "largest difference", ""], rows)
            wrong += sum(row[-1] == "WRONG" for row in rows)
    finally:
        triton.INTERPRET = before
    return min(wrong, 1)


def microseconds(run: Callable, carry: Any, beside: Any, work: int) -> float:
    """The median time of carry = run(carry, beside), for each of `work` parts."""
    compiled = jax.jit(run, donate_argnums=0)
    carry, took = jax.block_until_ready(compiled(carry, beside)), []
    for _ in range(CALLS):
        began = time.perf_counter()
        carry = jax.block_until_ready(compiled(carry, beside))
        took.append(time.perf_counter() - began)
    return 1e6 * statistics.median(took) / work


def numbers(seed: int, *shape: int, dtype: Any = DTYPE):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def row(name: str, rows: int, times: list[float], difference: float, allowed: float) -> list[Any]:
    verdict = "WRONG" if not difference <= allowed else "faster" if times[1] < times[0] else ""
    return [name, rows, *(f"{took:,.1f}" for took in times), f"{difference:.4f}", verdict]


def difference(got: Any, expected: Any) -> float:
    """The largest difference of two trees, as a share of the largest number of each array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    wide = [(np.asarray(one, np.float64), np.asarray(other, np.float64)) for one, other in pairs]
    return max(float(np.max(np.abs(one - other)) / np.max(np.abs(other))) for one, other in wide)


# --- products ---------------------------------------------------------------------------------------------------------


def compare_products() -> list[list[Any]]:
    """The products between two attentions, of all layers in turn."""
    return [_products(rows) for rows in ROWS]


def _products(rows: int) -> list[Any]:
    width, layers = CONFIG.width, CONFIG.depth
    shapes = (width, width), (width, 4 * width), (4 * width, width), (width, 3 * width)
    weights = [
        [(numbers(4 * i + j, *shape) / shape[0] ** 0.5).astype(DTYPE) for j, shape in enumerate(shapes)]
        for i in range(layers)
    ]

    def run(use_relay, carry, weights):
        def step(carry, _):
            between = Relay(layers) if use_relay else few_rows.between_attentions
            x, mixed = carry
            for of_layer in weights:
                x, heads = between(x, mixed, *of_layer)
                x, mixed = x * 0.5, heads[:, :width]
            return (x, mixed), None

        return jax.lax.scan(step, carry, length=REPEATS)[0]

    x, mixed = numbers(100, rows, width), numbers(101, rows, width)
    times = [
        microseconds(functools.partial(run, use_relay), (x + 0, mixed + 0), weights, REPEATS * layers)
        for use_relay in (False, True)
    ]
    got = Relay(layers)(x, mixed, *weights[0])
    exact = jax.tree.map(lambda array: array.astype(jnp.float32), (x, mixed, *weights[0]))
    return row("a layer", rows, times, difference(got, few_rows.between_attentions.formula(*exact)), 0.02)


class Relay:
    """`between_attentions` by a mailbox that the `calls` of a step pass on; for one trace of a step at a time."""

    def __init__(self, calls: int):
        self._calls, self._next, self._mail = calls, 0, None

    def __call__(self, *operands):
        if self._next % self._calls == 0:
            self._mail = relay.mailbox(operands[0], *operands[2:])
        assert self._mail is not None, "this device does not run the kernel"
        x, heads, self._mail = relay.relayed(*operands, self._mail, jnp.int32(self._next))
        self._next = (self._next + 1) % self._calls
        return x, heads


# --- whole steps ------------------------------------------------------------------------------------------------------


def compare_steps() -> list[list[Any]]:
    """Steps of the engine's program `decode`, with the kernels in use, and with the candidate in its place."""
    setup = programs.Setup(CONFIG, DTYPE.dtype.name, None)
    leaves, tree = jax.tree.flatten(abstract_params(CONFIG))
    leaves = [(numbers(i, *leaf.shape) / leaf.shape[0] ** 0.5).astype(DTYPE) for i, leaf in enumerate(leaves)]
    weights = programs.weights_of(setup, jax.tree.unflatten(tree, leaves))
    lines = []
    for rows in ROWS:
        results = [_steps(setup, weights, rows, use_relay) for use_relay in (False, True)]
        times, tokens = zip(*results, strict=True)
        # Random weights make many tokens almost equally likely, and rounding then decides: no share of them is wrong.
        lines.append(row("a step", rows, list(times), float(np.mean(tokens[0] != tokens[1])), 1.0))
    return lines


def _steps(setup, weights, rows: int, use_relay: bool) -> tuple[float, np.ndarray]:
    """The time of a step, and the tokens of the first."""
    most, start, steps = (2, 20, 2) if ON_CPU else (12, 576, 8)
    table = np.zeros((rows, -(-CONFIG.sequence_len // PAGE)), np.int32)
    table[:, :most] = np.random.default_rng(0).permutation(rows * most).reshape(rows, most)
    fill = functools.partial(np.full, rows, dtype=np.int32)
    lanes = jnp.asarray(programs.packed(programs.Lanes(
        slot=np.arange(rows, dtype=np.int32), source=fill(0), position=fill(0), count=fill(0), last=None,
        limit=fill(1 << 20), pause=fill(-1), stops=np.full((rows, programs.STOPS), -1, np.int32), table=table,
        settings=programs.without_biases(settings_of([Sampling(temperature=0)] * rows), "plain"),
    )))  # fmt: skip
    pages, carried, _ = programs.new_cache(setup, rows * most, rows, DTYPE)
    carried = carried._replace(
        token=jnp.arange(rows, dtype=jnp.int32), position=jnp.asarray(fill(start)), status=jnp.asarray(fill(0))
    )

    def run(carry, weights):
        pages, carried, _, _ = carry
        return programs.decode.__wrapped__(setup, "plain", steps, weights, pages, carried, None, lanes)

    between = Relay(CONFIG.depth - 1) if use_relay else generation.between_attentions
    with mock.patch.object(generation, "between_attentions", between):
        tokens = np.asarray(jax.jit(run)((pages, carried, None, None), weights)[3])
        return microseconds(run, (pages, carried, None, jnp.zeros_like(tokens)), weights, steps), tokens[0]


if __name__ == "__main__":
    sys.exit(main())
