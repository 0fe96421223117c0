"""A candidate for `between_attentions` of one or two rows: one kernel whose programs hand each other numbers.

The products of so few rows take as long as their weights come from memory and, between two of them, as the
multiprocessors take to tell each other the results. The kernel in use counts in memory what is there, and waits for
the counters. Here every number goes into a mailbox as one word that says by itself whether it is there: the upper 24
bits of its fp32 form, and in the lower 8 a tag that differs from that of the layer before. Who needs a number reads
its word until the tag is right, so that one way through memory is all that lies between two products; the weights of
the next product are on their way meanwhile.

All programs must run at the same time: there is at most one for each multiprocessor. Words are written by plain
stores and read by volatile loads of 32 bits, which is all that the Triton backend of Pallas has; no order between
words is assumed.

Compiled for sm_90 by Triton 3.6 (d20): 127 registers and no spills for one row; for two rows 400 bytes are spilled.
In its machine code all weights of a product are asked for before the first word is looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int32

from jaxchat.devices.gpu import multiprocessors
from jaxchat.ops import triton as kernels
from jaxchat.ops.dispatch import Level, highest_level, on_one_device
from jaxchat.ops.linear import Quantized
from jaxchat.ops.norm import NORM_EPS
from jaxchat.ops.triton import largest_divisor, launch, load, store

MOST_ROWS = 2  # whose sums fit into registers beside the weights
TAGS = 255  # 1 to 255: an empty mailbox has zeros
SMALLEST, AT_ONCE = 32, 16384  # rows, at least, and numbers of a weight that are multiplied at once
PARTS = 2  # of a long sum, for programs of their own: whoever reads it adds them up
WIDTHS = 32, 64, 128  # columns of a program's share, the first that fit
WARPS = 16
AHEAD = 81_920  # numbers of a weight that are on their way before its operand is there: as many as registers hold

Mailbox = Int32[Array, " W"]


@dataclass(frozen=True)
class _Product:
    """A product of `inner` x `columns`, shared among programs: `wide` columns and one of `parts` of the sum for each.

    `first` is the program with the first of them; the products begin with programs that have nothing to do yet.
    """

    inner: int
    columns: int
    parts: int
    wide: int
    first: int

    @property
    def units(self) -> int:
        return self.columns // self.wide * self.parts

    @property
    def at_once(self) -> int:
        return largest_divisor(self.inner // self.parts, AT_ONCE // self.wide)

    @property
    def steps(self) -> int:
        return self.inner // self.parts // self.at_once

    def ahead(self, rows: int) -> int:
        """How many steps' weights are on their way before the operand is there."""
        return AHEAD // rows // (self.at_once * self.wide)


def _plan(weights: Sequence[Array], programs: int) -> list[_Product] | None:
    """How the four products are shared; None if they cannot be."""
    products, first = [], 0
    for number, weight in enumerate(weights):
        inner, columns = weight.shape
        parts = PARTS if number in (0, 2) else 1  # the others' results are not sums: ReLU² follows, or attention
        fits = [wide for wide in WIDTHS if columns % wide == 0 and columns // wide * parts <= programs]
        if not fits or largest_divisor(inner, AT_ONCE) < SMALLEST * parts:
            return None
        products.append(_Product(inner, columns, parts, fits[0], first))
        first = (first + products[-1].units) % programs
    return products


def mailbox(x: Float[Array, "R D"], *weights: Array | Quantized) -> Mailbox | None:
    """An empty mailbox for `relayed` with these operands (o, up, down, joint); None where it does not run."""
    plain = [weight for weight in weights if not isinstance(weight, Quantized) and weight.dtype == x.dtype]
    runs = kernels.INTERPRET or highest_level(x.dtype) >= Level.HOPPER
    if not runs or len(plain) < len(weights) or len(x) > MOST_ROWS or not on_one_device():
        return None
    products = _plan(plain, _programs())
    return None if products is None else jnp.zeros(_areas(products, len(x))[-1], jnp.int32)


def _programs() -> int:
    return 132 if kernels.INTERPRET else multiprocessors()


def _areas(products: Sequence[_Product], rows: int) -> list[int]:
    """Where in the mailbox the results of the first three products begin, and where it ends."""
    sizes = [product.parts * rows * product.columns for product in products[:3]]
    return [sum(sizes[:count]) for count in range(4)]


@jax.jit  # traced once for all layers and programs
def relayed(
    x: Float[Array, "R D"],
    mixed: Float[Array, "R A"],
    o: Float[Array, "A D"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
    joint: Float[Array, "D J"],
    mail: Mailbox,
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "R D"], Float[Array, "R J"], Mailbox]:
    """What `between_attentions` computes, by a mailbox, which is returned for the next layer.

    Args:
      mail: of `mailbox`, empty or used by other layers; the layer that used it last must have another number.
    """
    products = _plan((o, up, down, joint), _programs())
    assert products is not None, "`mailbox` says whether the kernel runs"
    rows = len(x)
    out = [jax.ShapeDtypeStruct((rows * joint.shape[1],), x.dtype), jax.ShapeDtypeStruct((x.size,), x.dtype)]
    out.append(jax.ShapeDtypeStruct(mail.shape, mail.dtype))
    operands = [array.reshape(-1) for array in (x, mixed, o, up, down, joint)]
    tag = (layer % TAGS + 1).reshape(1)
    heads = after = None
    # An interpreter runs one program after the other: then all of a product, before the next.
    for phases in [[0], [1], [2], [3]] if kernels.INTERPRET else [range(4)]:
        kernel = functools.partial(_kernel, products, rows, x.dtype, phases)
        call = launch(kernel, (_programs(),), out, warps=WARPS, aliases={len(operands) + 1: 2})
        heads, after, mail = call(*operands, tag, mail)
    assert heads is not None and after is not None
    return after.reshape(x.shape), heads.reshape(rows, -1), mail


def _kernel(products, rows, dtype, phases, x_ref, mixed_ref, *refs) -> None:
    *weights, tag_ref, _, heads_ref, after_ref, mail_ref = refs
    o, up, down, joint = products
    at_o, at_up, at_down, _ = _areas(products, rows)
    program, programs = pl.program_id(0), pl.num_programs(0)
    tag = triton.load(tag_ref.at[program * 0])

    def received(indices: list[Array]) -> list[Array]:
        """The numbers of these places of the mailbox, once all of them are there."""

        def look(_=None):
            return [triton.load(mail_ref.at[index], volatile=True) for index in indices]

        def missing(words):
            return jnp.max(functools.reduce(jnp.bitwise_or, [word ^ tag for word in words]) & 0xFF) != 0

        words = jax.lax.while_loop(missing, look, look())
        return [jax.lax.bitcast_convert_type(word & -256, jnp.float32) for word in words]

    def send(index: Array, value: Array) -> None:
        triton.store(mail_ref.at[index], (jax.lax.bitcast_convert_type(value, jnp.int32) & -256) | tag)

    def multiply(number: int, operand: Callable, finish: Callable) -> None:
        """Calls finish(row, tile's columns, part, sums) where this program has a share of a product.

        operand(places) has, for each row, the numbers at each of these places, and a factor.
        """
        if number not in phases:
            return
        product, weight = products[number], weights[number]
        unit = jax.lax.rem(program + programs - product.first, programs)

        @pl.when(unit < product.units)
        def _():
            tiles = product.columns // product.wide
            tile, part = jax.lax.rem(unit, tiles), jax.lax.div(unit, tiles)
            columns = tile * product.wide + jnp.arange(product.wide)
            begin = part * (product.inner // product.parts)
            places = [begin + step * product.at_once + jnp.arange(product.at_once) for step in range(product.steps)]

            def weights_at(place):
                return triton.load(weight.at[place[:, None] * product.columns + columns])

            ahead = [weights_at(place) for place in places[: product.ahead(rows)]]
            numbers = operand(places, unit)
            ahead += [weights_at(place) for place in places[product.ahead(rows) :]]
            for row, (values, factor) in enumerate(numbers):
                sums = jnp.zeros((product.at_once, product.wide), jnp.float32)
                for matrix, value in zip(ahead, values, strict=True):
                    sums += matrix.astype(jnp.float32) * value[:, None]
                finish(row, columns, part, jnp.sum(sums, axis=0) * factor)

    def after_o(places):
        """The residual stream after attention, in fp32, for each row and place."""
        before = [[load(x_ref, row * o.columns + at) for at in places] for row in range(rows)]
        sums = iter(received(parts_at(at_o, o, places)))
        return [[rounded(value + add(sums, o.parts)) for value in values] for values in before]

    def parts_at(area, product, places):
        """Where the parts of a result are, one after the other for each row and place."""
        starts = [area + part * rows * product.columns for part in range(product.parts)]
        return [start + row * product.columns + at for row in range(rows) for at in places for start in starts]

    def add(sums, parts):
        return functools.reduce(jnp.add, [next(sums) for _ in range(parts)])

    def rounded(value):
        return value.astype(dtype).astype(jnp.float32)

    def normed(values):
        """The values of a row, and the factor that their norm is."""
        squares = functools.reduce(jnp.add, [value * value for value in values])
        return values, jax.lax.rsqrt(jnp.sum(squares) / o.columns + NORM_EPS)

    def of_o(places, unit):
        return [([load(mixed_ref, row * o.inner + at) for at in places], 1.0) for row in range(rows)]

    def of_up(places, unit):
        return [normed(values) for values in after_o(places)]

    def of_down(places, unit):
        hidden = iter(received([at_up + row * up.columns + at for row in range(rows) for at in places]))
        return [([next(hidden) for _ in places], 1.0) for _ in range(rows)]

    def of_joint(places, unit):
        before = after_o(places)
        sums = iter(received(parts_at(at_down, down, places)))
        after = [[rounded(value + add(sums, down.parts)) for value in values] for values in before]

        @pl.when(unit == 0)
        def _():
            for row, values in enumerate(after):
                for at, value in zip(places, values, strict=True):
                    store(after_ref, row * o.columns + at, value)

        return [normed(values) for values in after]

    def sends(number: int, area: int, formula: Callable = lambda sums: sums):
        product = products[number]

        def finish(row, columns, part, sums):
            send(area + (part * rows + row) * product.columns + columns, formula(sums))

        return finish

    multiply(0, of_o, sends(0, at_o))
    multiply(1, of_up, sends(1, at_up, lambda sums: jnp.square(jnp.maximum(sums, 0.0))))
    multiply(2, of_down, sends(2, at_down))
    multiply(3, of_joint, lambda row, columns, part, sums: store(heads_ref, row * joint.columns + columns, sums))
