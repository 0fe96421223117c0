"""A candidate for `between_attentions` of one row: a relay of words, as relay.py has it, in equal shares.

What differs: each program has a share of the same size of o, up and down, so that it knows from the start what it will
need, and asks for the weights of a product before it waits for the words of the one before. All three are split over
their inner dimension too; who reads a result adds up its parts. That goes for up because the norm's factor is applied
later: relu(f·s)² = f²·relu(s)². So nobody but the last product has to see the whole residual stream, and a thread looks
at few words.

With a width of 1,280: 20 tiles of 64 columns (256 of up) and 5 parts are 100 programs; the last product has 120 of 32
columns. A share has 32, 131, 131 and 82 KB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int32

from jaxchat.devices.gpu import multiprocessors
from jaxchat.ops import triton as kernels
from jaxchat.ops.norm import NORM_EPS
from jaxchat.ops.triton import launch, load, store

MOST_PARTS = 8  # of the inner dimension of o, up and down
WIDE, LAST_WIDE = 64, 32  # columns of a share of o and down, and of the last product
WARPS = 16
UP_BY_ROWS = True  # whether a share of up is read in blocks of all its columns: fewer sums, more words per thread
DOWN_AHEAD = 1  # of down's blocks, how many are asked for before the operand of up is there
JOINT_AHEAD = 2  # of the last product's, before that of down is there

Mailbox = Int32[Array, " W"]


class _Plan(NamedTuple):
    """Sizes: of the parts of o, up and down, of their tiles, and of what a tile of up has."""

    width: int
    hidden: int
    heads: int
    tiles: int
    parts: int

    @property
    def places(self) -> int:
        """What a part has of the residual stream."""
        return self.width // self.parts

    @property
    def blocks(self) -> int:
        """How many blocks, each as large as a share of o, a share of up or down has."""
        return self.hidden // self.width

    @property
    def units(self) -> int:
        return self.tiles * self.parts


def _plan(o: Array, up: Array, joint: Array) -> _Plan:
    """How the products are shared.

    Raises:
      ValueError: they cannot be, in parts whose sizes are powers of 2.
    """
    width, hidden, heads = up.shape[0], up.shape[1], joint.shape[1]
    tiles = width // WIDE
    for parts in range(MOST_PARTS, 0, -1):
        plan = _Plan(width, hidden, heads, tiles, parts)
        places, last = width // parts, heads // LAST_WIDE
        powers = width % (parts * WIDE) == 0 and places & (places - 1) == 0
        fits = plan.units <= last <= multiprocessors_here() and hidden % width == heads % LAST_WIDE == 0
        if o.shape == (width, width) and powers and fits:
            return plan
    raise ValueError(f"a width of {width}, {hidden} hidden and {heads} columns of heads are not shared")


def multiprocessors_here() -> int:
    return 132 if kernels.INTERPRET else multiprocessors()


def mailbox(o: Array, up: Array, down: Array, joint: Array) -> Mailbox:
    """An empty mailbox for `shared` with these weights."""
    plan = _plan(o, up, joint)
    return jnp.zeros(plan.parts * (2 * plan.width + plan.hidden), jnp.int32)


@jax.jit  # traced once for all layers
def shared(
    x: Float[Array, "1 D"],
    mixed: Float[Array, "1 D"],
    o: Float[Array, "D D"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
    joint: Float[Array, "D J"],
    mail: Mailbox,
    tag: Int32[Array, ""],
) -> tuple[Float[Array, "1 D"], Float[Array, "1 J"], Mailbox]:
    """What `between_attentions` computes; `tag`, 1 to 255, is another one than the mailbox has been used with last."""
    plan = _plan(o, up, joint)
    out = [jax.ShapeDtypeStruct(shape, x.dtype) for shape in ((plan.heads,), (plan.width,))]
    out.append(jax.ShapeDtypeStruct(mail.shape, mail.dtype))
    operands = [array.reshape(-1) for array in (x, mixed, o, up, down, joint)]
    programs = plan.heads // LAST_WIDE
    heads = after = None
    # An interpreter runs one program after the other: then all of a product, before the next.
    for phases in [[0], [1], [2], [3]] if kernels.INTERPRET else [range(4)]:
        kernel = functools.partial(_kernel, plan, x.dtype, phases)
        call = launch(kernel, (programs,), out, warps=WARPS, aliases={len(operands) + 1: 2})
        heads, after, mail = call(*operands, tag.reshape(1), mail)
    assert heads is not None and after is not None
    return after.reshape(x.shape), heads[None], mail


def _kernel(plan: _Plan, dtype, phases, x_ref, mixed_ref, o, up, down, joint, tag_ref, _, *results) -> None:
    heads_ref, after_ref, mail_ref = results
    program, places, count = pl.program_id(0), plan.places, plan.parts
    tag = triton.load(tag_ref.at[program * 0])
    at_o, at_up, at_down = 0, count * plan.width, count * (plan.width + plan.hidden)
    tile, part = jax.lax.rem(program, plan.tiles), jax.lax.div(program, plan.tiles)

    def block(ref, row, columns, column, wide, tall=places):
        """A part of a weight: `tall` rows from `row` on, `wide` columns from `column` on, of `columns`."""
        return triton.load(ref.at[(row + jnp.arange(tall))[:, None] * columns + column + jnp.arange(wide)])

    def received(starts: Sequence[Array], size: int) -> list[Array]:
        """The `size` numbers from each of these places of the mailbox on, once all of them are there."""

        def look(_=None):
            return [triton.load(mail_ref.at[start + jnp.arange(size)], volatile=True) for start in starts]

        def missing(words):
            return jnp.max(functools.reduce(jnp.bitwise_or, [word ^ tag for word in words]) & 0xFF) != 0

        words = jax.lax.while_loop(missing, look, look())
        return [jax.lax.bitcast_convert_type(word & -256, jnp.float32) for word in words]

    def sums_of(area: int, columns: int, starts: Sequence[Array], size: int = places) -> list[Array]:
        """The sums of all parts of a result, for `size` places from each of `starts` on."""
        words = received([area + number * columns + start for start in starts for number in range(count)], size)
        return [functools.reduce(jnp.add, words[i : i + count]) for i in range(0, len(words), count)]

    def send(area: int, columns: int, column, wide: int, value: Array) -> None:
        bits = (jax.lax.bitcast_convert_type(value, jnp.int32) & -256) | tag
        triton.store(mail_ref.at[area + part * columns + column + jnp.arange(wide)], bits)

    def product(values: Sequence[Array], blocks: Sequence[Array]) -> Array:
        pairs = [matrix.astype(jnp.float32) * value[:, None] for value, matrix in zip(values, blocks, strict=True)]
        return jnp.sum(functools.reduce(jnp.add, pairs), axis=0)

    def stream(starts: Sequence[Array], size: int = places) -> list[Array]:
        """The residual stream after attention."""
        before = [load(x_ref, start + jnp.arange(size)) for start in starts]
        sums = sums_of(at_o, plan.width, starts, size)
        return [rounded(one + two) for one, two in zip(before, sums, strict=True)]

    def rounded(value):
        return value.astype(dtype).astype(jnp.float32)

    def squared_factor(values: Sequence[Array]) -> Array:
        """That of a norm, squared."""
        total = functools.reduce(jnp.add, [value * value for value in values])
        return 1.0 / (jnp.sum(total) / plan.width + NORM_EPS)

    chunks = [program * 0 + places * number for number in range(count)]  # of the whole stream

    def of_joint(number: int) -> Array:
        return block(joint, chunks[number], plan.heads, program * LAST_WIDE, LAST_WIDE)

    def finish(ahead: Sequence[Array]) -> None:
        """The last product, of which the first blocks have been asked for."""
        before = stream(chunks)
        factor = squared_factor(before)
        blocks = [*ahead, *map(of_joint, range(len(ahead), count))]
        sums = sums_of(at_down, plan.width, chunks)
        after = [rounded(one + two * factor) for one, two in zip(before, sums, strict=True)]
        result = product(after, blocks) * jnp.sqrt(squared_factor(after))
        store(heads_ref, program * LAST_WIDE + jnp.arange(LAST_WIDE), result)

        @pl.when(program == 0)
        def _():
            for start, value in zip(chunks, after, strict=True):
                store(after_ref, start + jnp.arange(places), value)

    def all_products() -> None:
        row = part * places
        own_o = block(o, row, plan.width, tile * WIDE, WIDE)
        wide, tall = plan.blocks * WIDE, places // plan.blocks
        columns = [tile * wide + number * WIDE for number in range(plan.blocks)]
        rows = [row + number * tall for number in range(plan.blocks)]
        if UP_BY_ROWS:
            own_up = [block(up, at, plan.hidden, tile * wide, wide, tall) for at in rows]
        else:
            own_up = [block(up, row, plan.hidden, column, WIDE) for column in columns]
        hidden = [(part * plan.blocks + number) * places for number in range(plan.blocks)]
        own_down: list[Callable[[], Array]] = [
            functools.partial(block, down, start, plan.width, tile * WIDE, WIDE) for start in hidden
        ]
        if 0 in phases:
            mixed = load(mixed_ref, row + jnp.arange(places))
            send(at_o, plan.width, tile * WIDE, WIDE, product([mixed], [own_o]))
        down_ahead = [ask() for ask in own_down[:DOWN_AHEAD]]
        if 1 in phases and UP_BY_ROWS:
            send(at_up, plan.hidden, tile * wide, wide, product(stream(rows, tall), own_up))
        elif 1 in phases:
            (values,) = stream([row])
            for column, matrix in zip(columns, own_up, strict=True):
                send(at_up, plan.hidden, column, WIDE, product([values], [matrix]))
        down_blocks = [*down_ahead, *(ask() for ask in own_down[DOWN_AHEAD:])]
        joint_ahead = [of_joint(number) for number in range(JOINT_AHEAD)]
        if 2 in phases:
            values = [jnp.square(jnp.maximum(total, 0.0)) for total in sums_of(at_up, plan.hidden, hidden)]
            send(at_down, plan.width, tile * WIDE, WIDE, product(values, down_blocks))
        if 3 in phases:
            finish(joint_ahead)

    @pl.when(program < plan.units)
    def _():
        all_products()

    if 3 in phases:

        @pl.when(program >= plan.units)
        def _():
            finish([*map(of_joint, range(count))])
