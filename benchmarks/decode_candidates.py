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

import jax
import jax.numpy as jnp
import numpy as np
from candidates import attention, lowest_within, relay
from timing import table

from jaxchat.infer import programs, sampling
from jaxchat.infer.request import Sampling
from jaxchat.model import generation
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params
from jaxchat.ops import decode as in_use
from jaxchat.ops import few_rows, triton
from jaxchat.ops import lowest_within as lowest_in_use
from jaxchat.ops.pages import PAGE, Place
from jaxchat.ops.rope import rope_tables

ON_CPU = jax.default_backend() == "cpu"
DTYPE = jnp.float32 if ON_CPU else jnp.bfloat16
# Layers are as many as keep the GPU's cache from helping; everything is repeated within a program of its own.
CONFIG = (
    GPTConfig(depth=2, sequence_len=256, vocab_size=640)
    if ON_CPU else GPTConfig(depth=20, sequence_len=2048, vocab_size=65_536)
)  # fmt: skip
REPEATS, CALLS = (1, 1) if ON_CPU else (16, 5)
MIXED = [Sampling(temperature=0)] * 4 + [
    Sampling(seed=seed, **settings)
    for seed, settings in enumerate((
        {}, {"temperature": 0.8, "top_k": 50}, {"temperature": 0.6, "top_k": 10}, {"top_p": 0.95},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 100}, {"min_p": 0.05},
        {"temperature": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"repetition_penalty": 1.1, "logit_bias": {11: -5.0, 12: 2.0}},
    ))
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; returns 1 if a candidate is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"attention": compare_attention, "products": compare_products, "drawing": compare_drawing,
             "steps": compare_steps}  # fmt: skip
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


# --- attention --------------------------------------------------------------------------------------------------------


def compare_attention() -> list[list[Any]]:
    """One layer's attention; the pages of several layers take turns."""
    return [_attention(rows) for rows in ((3,) if ON_CPU else (1, 32, 128))]


def _attention(rows: int) -> list[Any]:
    heads, size, most = CONFIG.num_heads, CONFIG.head_dim, 3 if ON_CPU else 12
    draw = np.random.default_rng(0)
    table = jnp.asarray(draw.permutation(rows * most).reshape(rows, most), jnp.int32)
    start = jnp.asarray(draw.integers(20, 180, rows) if ON_CPU else draw.integers(576, 704, rows), jnp.int32)
    place, rope = Place(table, start, jnp.ones(rows, jnp.int32)), rope_tables(start[:, None], size, 1e4)
    joint, splits = numbers(1, rows, 3 * heads * size), in_use.splits_of(rows, heads)
    make = jax.jit(lambda: {name: numbers(i, rows * most, heads, PAGE, size) for i, name in enumerate("kv")})
    layers = 1 if ON_CPU else 4

    def run(attend, carry, beside):
        rope, place = beside

        def step(carry, _):
            joint, pages = carry
            pages = list(pages)
            for i, of_layer in enumerate(pages):
                mixed, pages[i] = attend(joint, rope, of_layer, place, None, splits)
                joint = joint.at[:, : heads * size].add(mixed * 0.01)
            return (joint, pages), None

        return jax.lax.scan(step, carry, length=REPEATS)[0]

    times = [
        microseconds(
            functools.partial(run, attend),
            (joint + 0, [make() for _ in range(layers)]),
            (rope, place),
            REPEATS * layers,
        )
        for attend in (in_use.attend, attention.attend)
    ]
    got = jax.jit(attention.attend, static_argnums=(4, 5))(joint, rope, make(), place, None, splits)
    expected = jax.jit(in_use.attend_next.formula, static_argnums=4)(joint, rope, make(), place, None)
    return row("a layer", rows, times, difference(got, expected), 0.02)


# --- products ---------------------------------------------------------------------------------------------------------


def compare_products() -> list[list[Any]]:
    """The products between two attentions, of all layers in turn."""
    return [_products(rows) for rows in ((1,) if ON_CPU else (1, 2))]


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


# --- drawing ----------------------------------------------------------------------------------------------------------


def compare_drawing() -> list[list[Any]]:
    """The cuts of top-k and top-p for a batch of mixed settings, of which a part of the rows uses each."""
    rows, runs = 3 if ON_CPU else 128, CONFIG.vocab_size // sampling.RUN
    logits = numbers(7, rows, runs, sampling.RUN, dtype=jnp.float32)
    tops = logits.max(-1)
    weights = jnp.round(jnp.exp(logits - tops[..., None]) * sampling.ONE).astype(jnp.uint32)
    mass = lowest_in_use.Mass(weights, jnp.exp(tops - tops.max(-1, keepdims=True)))
    used = jnp.arange(rows) % 4 == 1
    lines = []
    for name, counted, needed in (
        ("top-k", None, jnp.full(rows, 50.0)), ("top-p", mass, 0.95 * lowest_in_use.total_mass(logits, mass)),
    ):  # fmt: skip

        def run(kernel, carry, beside):
            counted, needed = beside

            def step(carry, _):
                logits, found = carry
                # Other logits each time, so that none of the work is done but once.
                return (logits * 1.0001, found ^ kernel(logits, counted, needed)), None

            return jax.lax.scan(step, carry, length=REPEATS)[0]

        times = [
            microseconds(
                functools.partial(run, kernel), (logits + 0, jnp.zeros(rows, jnp.uint32)), (counted, wanted), REPEATS
            )
            for kernel, wanted in (
                (lowest_in_use._kernel, needed), (lowest_within.kernel, jnp.where(used, needed, 0)),
            )
        ]  # fmt: skip
        expected = lowest_in_use.lowest_within(logits, counted, needed, on_cpu=True)
        got = lowest_in_use._from_bits(lowest_within.kernel(logits, counted, needed))
        lines.append(row(name, rows, times, float(np.max(np.asarray(got != expected))), 0.0))
    return lines


# --- whole steps ------------------------------------------------------------------------------------------------------


def compare_steps() -> list[list[Any]]:
    """Steps of the engine's program `decode`, with all kernels in use, and with the candidates in their places."""
    setup = programs.Setup(CONFIG, DTYPE.dtype.name, None)
    leaves, tree = jax.tree.flatten(abstract_params(CONFIG))
    leaves = [(numbers(i, *leaf.shape) / leaf.shape[0] ** 0.5).astype(DTYPE) for i, leaf in enumerate(leaves)]
    weights = programs.weights_of(setup, jax.tree.unflatten(tree, leaves))
    cases = ((1, "plain"),) if ON_CPU else ((1, "plain"), (32, "plain"), (128, "plain"), (128, "full"))
    lines = []
    for rows, level in cases:
        results = [_steps(setup, weights, rows, level, candidates) for candidates in (False, True)]
        times, tokens = zip(*results, strict=True)
        # Random weights make many tokens almost equally likely, and rounding then decides: no share of them is wrong.
        lines.append(row(f"a step, {level}", rows, list(times), float(np.mean(tokens[0] != tokens[1])), 1.0))
    return lines


def _steps(setup, weights, rows: int, level: Any, candidates: bool) -> tuple[float, np.ndarray]:
    """The time of a step, and the tokens of the first."""
    most, start, steps = (2, 20, 2) if ON_CPU else (12, 576, 8)
    settings = [MIXED[i % len(MIXED)] if level == "full" else MIXED[0] for i in range(rows)]
    table = np.zeros((rows, -(-CONFIG.sequence_len // PAGE)), np.int32)
    table[:, :most] = np.random.default_rng(0).permutation(rows * most).reshape(rows, most)
    fill = functools.partial(np.full, rows, dtype=np.int32)
    lanes = programs.packed(programs.Lanes(
        np.arange(rows, dtype=np.int32), fill(0), fill(0), fill(0), fill(1 << 20), fill(-1),
        np.full((rows, programs.STOPS), -1, np.int32), table,
        programs.without_biases(sampling.settings_of(settings), level),
    ))  # fmt: skip
    pages, carried, _ = programs.new_cache(setup, rows * most, rows, DTYPE)
    carried = carried._replace(
        token=jnp.arange(rows, dtype=jnp.int32), position=jnp.asarray(fill(start)), status=jnp.asarray(fill(0))
    )
    seen = jnp.zeros((rows, CONFIG.padded_vocab_size), jnp.int32) if level == "full" else None

    def run(carry, weights):
        pages, carried, seen, _ = carry
        return programs.decode.__wrapped__(setup, level, steps, weights, pages, carried, seen, lanes)

    replaced: list[tuple[Any, str, Any]] = []
    if candidates:
        replaced.append((in_use, "attend", attention.attend))
        replaced.append((lowest_in_use, "_kernel", lowest_within.kernel))
        if rows <= relay.MOST_ROWS:
            replaced.append((generation, "between_attentions", Relay(CONFIG.depth - 1)))
    kept = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        tokens = np.asarray(jax.jit(run)((pages, carried, seen, None), weights)[3])
        return microseconds(run, (pages, carried, seen, jnp.zeros_like(tokens)), weights, steps), tokens[0]
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


if __name__ == "__main__":
    sys.exit(main())
