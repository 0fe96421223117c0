"""What is measured of a variant of decoding: a program, its operands, and how right its results are.

A variant says which constants, or functions, are others than those in use. Each measure is a program that repeats its
part, so that starting it does not count.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from candidates.variants import Variant

from jaxchat.infer import programs
from jaxchat.infer.request import Sampling
from jaxchat.infer.settings import settings_of
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params
from jaxchat.ops import decode, few_rows
from jaxchat.ops.decode import Splits
from jaxchat.ops.pages import PAGE, Place
from jaxchat.ops.rope import rope_tables

ON_CPU = jax.default_backend() == "cpu"
DTYPE = jnp.dtype(jnp.float32 if ON_CPU else jnp.bfloat16)
# Layers are as many as keep the GPU's cache from helping.
CONFIG = (
    GPTConfig(depth=2, sequence_len=256, vocab_size=640)
    if ON_CPU else GPTConfig(depth=20, sequence_len=2048, vocab_size=65_536)
)  # fmt: skip
REPEATS, STEPS = (1, 2) if ON_CPU else (16, 8)
SPLITS = 16  # of attention
FIRST, MOST_PAGES = (20, 2) if ON_CPU else (544, 12)  # the rows' first position, and the pages that all calls fill


def place(name: str) -> tuple[Any, str]:
    """The module of a setting, and its name there."""
    module, constant = name.rsplit(".", 1)
    return importlib.import_module(f"jaxchat.{module}"), constant


@contextlib.contextmanager
def applied(variant: Variant) -> Iterator[None]:
    """Within it, programs are traced with the settings of this variant."""
    with contextlib.ExitStack() as stack:
        for name, value in variant.settings.items():
            stack.enter_context(mock.patch.object(*place(name), value))
        jax.clear_caches()  # of functions that are traced once
        yield
    jax.clear_caches()


def difference(got: Any, expected: Any) -> float:
    """The largest difference of two trees, as a share of the largest number of each array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    wide = [(np.asarray(one, np.float64), np.asarray(other, np.float64)) for one, other in pairs]
    return max(float(np.max(np.abs(one - other)) / np.max(np.abs(other))) for one, other in wide)


def share_of_others(got: Any, expected: Any) -> float:
    """The share of numbers that differ."""
    return float(np.mean(np.asarray(got) != np.asarray(expected)))


@dataclass(frozen=True)
class Measure:
    """A program and its operands.

    Attributes:
      run: run(carry, beside) returns the next carry.
      carry, beside: make the operands; what is beside other variants can use again.
      work: parts of the program, whose time is wanted.
      results: what of the first result is compared with that of the variant in use, or with `expected`.
      compare: compares them.
      expected: what the results should be, if another program tells.
    """

    run: Callable[[Any, Any], Any]
    carry: Callable[[], Any]
    beside: Callable[[], Any]
    work: int
    results: Callable[[Any], Any]
    expected: Callable[[], Any] | None = None
    compare: Callable[[Any, Any], float] = difference


def numbers(seed: int, *shape: int, dtype: Any = DTYPE):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


# --- products ---------------------------------------------------------------------------------------------------------


def _weights() -> list[tuple[Any, ...]]:
    """o, up, down and joint of all layers."""
    width = CONFIG.width
    shapes = (width, width), (width, 4 * width), (4 * width, width), (width, 3 * width)
    made = jax.jit(
        lambda keys: [(jax.random.normal(k, s) / s[0] ** 0.5).astype(DTYPE) for k, s in zip(keys, shapes, strict=True)]
    )
    return [tuple(made(jax.random.split(jax.random.key(layer), len(shapes)))) for layer in range(CONFIG.depth)]


def _through(x: Any, mixed: Any, weights: list[tuple[Any, ...]]) -> list[tuple[Any, Any]]:
    """What comes after each of the layers: the residual stream, and queries, keys and values."""
    counters, results = few_rows.new_counters(len(weights), x, *weights[0][:2]), []
    for layer, of_layer in enumerate(weights):
        x, heads, counters = few_rows.between_attentions(x, mixed, *of_layer, counters, layer)
        results.append((x, heads))
    return results


def _products(rows: int) -> Measure:
    """The products between two attentions, of all layers in turn, with nothing between them."""

    def run(carry, weights: Any):
        def step(carry, _):
            (x, mixed), _ = carry
            x, heads = _through(x, mixed, weights)[-1]
            return ((x, mixed), heads), None

        return jax.lax.scan(step, carry, length=REPEATS)[0]

    def carry():
        return _inputs(rows), jnp.zeros((rows, 3 * CONFIG.width), DTYPE)

    return Measure(run, carry, _weights, REPEATS * CONFIG.depth, lambda carry: carry)


def _inputs(rows: int) -> tuple[Any, Any]:
    return numbers(100, rows, CONFIG.width), numbers(101, rows, CONFIG.width)


def _few_products(rows: int) -> Measure:
    """The products of two layers, which the plain formula tells too; attention's result comes in splits."""

    def run(carry, weights):
        x, mixed = carry
        shares = jax.random.uniform(jax.random.key(102), (SPLITS, *mixed.shape), minval=0.5)
        return _through(x, Splits(shares, shares * mixed), weights)

    def expected():
        results, (x, mixed) = [], _inputs(rows)
        for of_layer in _weights()[:2]:
            exact = jax.tree.map(lambda array: array.astype(jnp.float32), (x, mixed, *of_layer))
            counters = few_rows.new_counters(1, exact[0], *exact[2:4])
            x, heads, _ = jax.jit(few_rows.between_attentions.formula)(*exact, counters, 0)
            x = x.astype(DTYPE)
            results.append((x, heads))
        return results

    return Measure(run, lambda: _inputs(rows), lambda: _weights()[:2], 0, lambda carry: carry, expected)


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(rows: int) -> Measure:
    """Attention of a new token a row, over four layers in turn, each with pages of its own."""
    layers, rounds = 4, 3
    shape = rows * MOST_PAGES, CONFIG.kv_heads, PAGE, CONFIG.head_dim

    def run(carry, beside):
        (pages, joint), (rope, place) = carry, beside
        for layer in [*range(layers)] * rounds:
            mixed, pages[layer] = decode.attend_next(joint, rope, pages[layer], place, None, 1.44)
            joint = jnp.concatenate([decode.add_splits(mixed, DTYPE), joint[:, CONFIG.width :]], 1)
        return pages, joint

    def carry():
        pages = [{name: numbers(10 * layer + at, *shape) for at, name in enumerate("kv")} for layer in range(layers)]
        return pages, numbers(102, rows, 3 * CONFIG.width)

    def beside():
        place = Place(jnp.asarray(_table(rows)), jnp.full(rows, FIRST + PAGE), jnp.ones(rows, jnp.int32))
        return rope_tables(place.start[:, None], CONFIG.head_dim, CONFIG.rope_base), place

    return Measure(run, carry, beside, layers * rounds, lambda carry: carry[1])


# --- whole steps ------------------------------------------------------------------------------------------------------


def _table(rows: int) -> np.ndarray:
    table = np.zeros((rows, -(-CONFIG.sequence_len // PAGE)), np.int32)
    table[:, :MOST_PAGES] = np.random.default_rng(0).permutation(rows * MOST_PAGES).reshape(rows, MOST_PAGES)
    return table


def _setup() -> programs.Setup:
    return programs.Setup(CONFIG, DTYPE.name, None)


def _model() -> programs.Weights:
    leaves, tree = jax.tree.flatten(abstract_params(CONFIG))
    leaves = [(numbers(i, *leaf.shape) / leaf.shape[0] ** 0.5).astype(DTYPE) for i, leaf in enumerate(leaves)]
    return programs.weights_of(_setup(), jax.tree.unflatten(tree, leaves))


def _step(rows: int) -> Measure:
    """Steps of the engine's program `decode`."""
    fill = functools.partial(np.full, rows, dtype=np.int32)
    lanes = programs.packed(programs.Lanes(
        slot=np.arange(rows, dtype=np.int32), source=fill(0), position=fill(0), count=fill(0), last=None,
        limit=fill(1 << 20), pause=fill(-1), stops=np.full((rows, programs.STOPS), -1, np.int32), table=_table(rows),
        settings=programs.without_biases(settings_of([Sampling(temperature=0)] * rows), "greedy"),
    ))  # fmt: skip

    def run(carry, beside):
        (weights, bits), (pages, carried, _) = beside, carry
        pages, carried, _, tokens = programs.decode.__wrapped__(  # pyright: ignore[reportAttributeAccessIssue]
            _setup(), "greedy", STEPS, weights, pages, carried, None, bits
        )
        return pages, carried, tokens

    def carry():
        pages, carried, _ = programs.new_cache(_setup(), rows * MOST_PAGES, rows, DTYPE)
        carried = carried._replace(
            token=jnp.arange(rows, dtype=jnp.int32), position=jnp.full(rows, FIRST), status=jnp.zeros(rows, jnp.int32)
        )
        return pages, carried, jnp.zeros((STEPS, rows), jnp.int32)

    return Measure(
        run, carry, lambda: (_model(), jnp.asarray(lanes)), STEPS, lambda carry: carry[2][0], compare=share_of_others
    )


MEASURES: dict[str, Callable[[int], Measure]] = {
    "products": _products,
    "check": _few_products,
    "attention": _attention,
    "step": _step,
}
