"""What is measured of a variant of decoding: a program, its operands, and how right its results are.

A variant says which candidates take part and with which constants; everything else is what is in use. Each measure is a
program that repeats its part, so that starting it does not count.
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
from candidates import attention, chain, relay, shares
from candidates.variants import Variant

from jaxchat.infer import programs
from jaxchat.infer.request import Sampling
from jaxchat.infer.sampling import settings_of
from jaxchat.model import generation
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params
from jaxchat.ops import few_rows
from jaxchat.ops.decode import attend_next
from jaxchat.ops.pages import PAGE, Place, new_pages
from jaxchat.ops.rope import rope_tables

ON_CPU = jax.default_backend() == "cpu"
DTYPE = jnp.dtype(jnp.float32 if ON_CPU else jnp.bfloat16)
# Layers are as many as keep the GPU's cache from helping.
CONFIG = (
    GPTConfig(depth=2, sequence_len=256, vocab_size=640)
    if ON_CPU else GPTConfig(depth=20, sequence_len=2048, vocab_size=65_536)
)  # fmt: skip
REPEATS, STEPS = (1, 2) if ON_CPU else (16, 8)
UNROLL = 1  # steps that a turn of the program's loop has
FIRST, MOST_PAGES = (20, 2) if ON_CPU else (576, 12)  # the rows' first position, and how many pages they fill


@contextlib.contextmanager
def applied(variant: Variant) -> Iterator[None]:
    """Within it, programs are traced with the constants of this variant."""
    with contextlib.ExitStack() as stack:
        for name, value in variant.settings.items():
            module, constant = name.split(".")
            place = few_rows if module == "few_rows" else importlib.import_module(f"candidates.{module}")
            assert hasattr(place, constant), name
            stack.enter_context(mock.patch.object(place, constant, value))
        jax.clear_caches()  # of functions that are traced once
        yield
    jax.clear_caches()


class Pieces:
    """The operations of a variant, for one trace of a step: they count the layers, and pass on what layers share."""

    def __init__(self, variant: Variant, blocks: list[Any], joint: list[Any]):
        """`blocks` has (o, up, down) of each layer, `joint` the matrices of `join_qkv`."""
        self._variant, self._blocks, self._joint = variant, blocks, joint
        self._attended = self._multiplied = 0
        self._arrivals = self._counters = self._mail = None

    def attend(self, heads, rope, pages, place, window, scale):
        """`attend_next`."""
        layer, self._attended = self._attended, (self._attended + 1) % len(self._blocks)
        if layer == 0:
            self._counters = None if ON_CPU else chain.new_counters(place.start)
            self._arrivals = attention.arrivals(len(heads), pages["k"].shape[1])
        if not self._variant.attention:
            return attend_next(heads, rope, pages, place, window, scale)
        coming = [*self._blocks[layer], *self._joint[layer + 1 : layer + 2]]
        assert self._arrivals is not None
        mixed, pages, self._arrivals = attention.attend(
            heads, rope, pages, place, window, scale, self._arrivals, coming
        )
        return mixed, pages

    def multiply(self, x, mixed, o, up, down, joint):
        """`between_attentions`."""
        operands, calls = (x, mixed, o, up, down, joint), len(self._blocks) - 1
        layer, self._multiplied = self._multiplied, (self._multiplied + 1) % calls
        if self._variant.products == "relay":
            if layer == 0:
                self._mail = relay.mailbox(x, o, up, down, joint)
            assert self._mail is not None, "this device does not run the kernel"
            x, heads, self._mail = relay.relayed(*operands, self._mail, jnp.int32(layer))
            return x, heads
        if self._variant.products == "shares":
            if layer == 0:
                self._mail = shares.mailbox(o, up, down, joint)
            x, heads, self._mail = shares.shared(*operands, self._mail, jnp.int32(layer % relay.TAGS + 1))
            return x, heads
        if self._variant.products == "chain" and not ON_CPU:
            if self._counters is None:
                self._counters = chain.new_counters((x[:, 0] != x[:, 0]).astype(jnp.int32))
            return chain.between_attentions(*operands, self._counters, layer, self._blocks[layer + 1])
        return few_rows.between_attentions(*operands)


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


def _products(variant: Variant, rows: int) -> Measure:
    """The products between two attentions, of all layers in turn, with nothing between them."""
    width = CONFIG.width

    def through(pieces, x, mixed, weights: Any):
        for of_layer in weights:
            x, heads = pieces.multiply(x, mixed, *of_layer)
            mixed = heads[:, :width]
        return x, mixed

    def run(carry, weights: Any):
        def step(carry, _):
            pieces = Pieces(variant, [w[:3] for w in [*weights, weights[0]]], [])
            x, mixed = carry
            return through(pieces, x, mixed, weights), None

        return jax.lax.scan(step, carry, length=REPEATS)[0]

    def carry():
        return numbers(100, rows, width), numbers(101, rows, width)

    return Measure(run, carry, _weights, REPEATS * CONFIG.depth, lambda carry: carry)


def _few_products(variant: Variant, rows: int) -> Measure:
    """The products of two layers, which the plain formula tells too."""
    whole = _products(variant, rows)

    def run(carry, weights):
        pieces = Pieces(variant, [w[:3] for w in [*weights, weights[0]]], [])
        results, (x, mixed) = [], carry
        for of_layer in weights:
            x, heads = pieces.multiply(x, mixed, *of_layer)
            mixed = heads[:, : CONFIG.width]
            results += [x, heads]
        return results

    def expected():
        results, (x, mixed) = [], whole.carry()
        for of_layer in _weights()[:2]:
            exact = jax.tree.map(lambda array: array.astype(jnp.float32), (x, mixed, *of_layer))
            x, heads = jax.jit(few_rows.between_attentions.formula)(*exact)
            x, mixed = x.astype(DTYPE), heads[:, : CONFIG.width].astype(DTYPE)
            results += [x, heads]
        return results

    return Measure(run, whole.carry, lambda: _weights()[:2], 0, lambda carry: carry, expected)


# --- attention --------------------------------------------------------------------------------------------------------


def _table(rows: int) -> np.ndarray:
    table = np.zeros((rows, -(-CONFIG.sequence_len // PAGE)), np.int32)
    table[:, :MOST_PAGES] = np.random.default_rng(0).permutation(rows * MOST_PAGES).reshape(rows, MOST_PAGES)
    return table


def _attention(variant: Variant, rows: int) -> Measure:
    """Attention of all layers in turn, each with pages of its own."""
    width, size = CONFIG.width, CONFIG.head_dim
    host: list[Any] = [_table(rows), np.full(rows, FIRST, np.int32), np.ones(rows, np.int32)]

    def run(carry, beside):
        weights, joint = beside
        place = Place(*map(jnp.asarray, host))
        rope = rope_tables(place.start[:, None], size, CONFIG.rope_base)

        def step(carry, _):
            pages, _ = carry
            pieces = Pieces(variant, [w[:3] for w in weights], [w[3] for w in weights])
            scale = CONFIG.attention_scale
            pairs = [pieces.attend(joint, rope, of_layer, place, None, scale) for of_layer in pages]
            return ([of_layer for _, of_layer in pairs], [mixed for mixed, _ in pairs]), None

        return jax.lax.scan(step, carry, length=REPEATS)[0]

    def carry():
        empty = new_pages(rows * MOST_PAGES, CONFIG.kv_heads, size, DTYPE)
        pages = [
            {name: numbers(2 * layer + number, *empty[name].shape) for number, name in enumerate("kv")}
            for layer in range(CONFIG.depth)
        ]
        return pages, [jnp.zeros((rows, width), DTYPE) for _ in pages]

    return Measure(
        run, carry, lambda: (_weights(), numbers(7, rows, 3 * width)), REPEATS * CONFIG.depth, lambda carry: carry[1]
    )


# --- whole steps ------------------------------------------------------------------------------------------------------


def _setup() -> programs.Setup:
    return programs.Setup(CONFIG, DTYPE.name, None)


def _model() -> programs.Weights:
    leaves, tree = jax.tree.flatten(abstract_params(CONFIG))
    leaves = [(numbers(i, *leaf.shape) / leaf.shape[0] ** 0.5).astype(DTYPE) for i, leaf in enumerate(leaves)]
    return programs.weights_of(_setup(), jax.tree.unflatten(tree, leaves))


def _step(variant: Variant, rows: int) -> Measure:
    """Steps of the engine's program `decode`."""
    fill = functools.partial(np.full, rows, dtype=np.int32)
    lanes = programs.packed(programs.Lanes(
        slot=np.arange(rows, dtype=np.int32), source=fill(0), position=fill(0), count=fill(0), last=None,
        limit=fill(1 << 20), pause=fill(-1), stops=np.full((rows, programs.STOPS), -1, np.int32), table=_table(rows),
        settings=programs.without_biases(settings_of([Sampling(temperature=0)] * rows), "plain"),
    ))  # fmt: skip

    scan = jax.lax.scan

    def unrolled(function, carry, *rest, length=None, **settings):
        more = {"unroll": UNROLL} if length == STEPS else {}
        return scan(function, carry, *rest, length=length, **settings, **more)

    def run(carry, beside):
        weights, bits = beside
        blocks = [
            (of_block["attn"]["o"]["kernel"], of_block["mlp"]["up"]["kernel"], of_block["mlp"]["down"]["kernel"])
            for of_block in (weights.params["blocks"][str(layer)] for layer in range(CONFIG.depth))
        ]
        pieces = Pieces(variant, blocks, weights.joint)
        with (
            mock.patch.object(generation, "between_attentions", pieces.multiply),
            mock.patch.object(generation, "attend_next", pieces.attend),
            mock.patch.object(jax.lax, "scan", unrolled),
        ):
            pages, carried, _ = carry
            pages, carried, _, tokens = programs.decode.__wrapped__(  # pyright: ignore[reportAttributeAccessIssue]
                _setup(), "plain", STEPS, weights, pages, carried, None, bits
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


MEASURES: dict[str, Callable[[Variant, int], Measure]] = {
    "products": _products, "check": _few_products, "attention": _attention, "step": _step
}  # fmt: skip
