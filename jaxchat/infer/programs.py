"""What the engine runs on its devices: five programs, each compiled for a few sizes.

`read` puts the tokens of prompts into the cache, `begin` draws the tokens that follow them, `decode` draws those after
these, `copy_pages` copies pages, and `set_seen` writes what a row has seen. Everything that the host decides (which
rows decode, their settings, pages and limits) comes as arrays with each call. Everything that the devices decide stays
there: see `Carried`. So a call can be made before the last one's result is read.

On a mesh each shard of the data and fsdp axes has rows and pages of its own, numbered from 0, and runs the program for
them by itself; a call gathers the parameters that fsdp splits, once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxchat.devices.mesh import BATCH_SPEC
from jaxchat.infer.request import MOST_ALTERNATIVES, Sampling
from jaxchat.infer.sampling import Seen, add_seen, draw, logprob, logprobs
from jaxchat.infer.settings import Level, Settings, settings_of
from jaxchat.model.config import GPTConfig
from jaxchat.model.generation import init_pages, join_qkv, paged_hidden, reads_previous
from jaxchat.model.gpt import Params, logits
from jaxchat.ops.cross_entropy import NEVER
from jaxchat.ops.pages import PAGE, Pages, Place, copied_pages

STOPS = 4  # stop tokens of a row that the device knows; the host knows all
SCORED = 256  # positions whose logits are held at once where a prompt's log-probabilities are wanted
RUNNING, PAUSED, DONE = range(3)


class Carried(NamedTuple):
    """What a row carries from one decoding to the next beside its pages; each has an entry for every slot of a row.

    This is the place for what a model needs of a row's past besides its keys and values: a field here, a value for it
    in `Lanes` where the host sets it (a row that begins to decode, or goes on after a tool), and its next value in
    `_drawn`. `read` needs no state: the host knows all tokens before a chunk, and sends what it needs of them.
    """

    token: Int[Array, " S"]  # the newest token, not yet in the cache
    position: Int[Array, " S"]  # its place in the sequence
    count: Int[Array, " S"]  # tokens of the answer
    status: Int[Array, " S"]
    before: Int[Array, " S"] | None  # the token before the newest; None if the model does not read it


# For every slot, the final hidden state of the last token that its row has read.
States = Float[Array, "S D"]


class Lanes(NamedTuple):
    """The rows that draw tokens, and what the host knows about them.

    Attributes:
      slot: of the shard; one beyond the last for a lane that no row uses.
      source, position, count: for `begin`: the slot whose state the row's next token is drawn from, the place of its
        last token, and the tokens of its answer. Later they are carried.
      last: for `begin`: the last token that was read; None if the model does not read the token before another.
      limit: of `count`.
      pause: the token that the row waits at for a tool; -1 for none.
      stops: tokens that end the row; -1 where there are fewer.
      table: the row's pages, for `decode`.
    """

    slot: Int[Array | np.ndarray, " B"]
    source: Int[Array | np.ndarray, " B"]
    position: Int[Array | np.ndarray, " B"]
    count: Int[Array | np.ndarray, " B"]
    last: Int[Array | np.ndarray, " B"] | None
    limit: Int[Array | np.ndarray, " B"]
    pause: Int[Array | np.ndarray, " B"]
    stops: Int[Array | np.ndarray, "B STOPS"]
    table: Any  # [B, T]
    settings: Settings


def packed(lanes: Lanes) -> Int[np.ndarray, "B W"]:
    """All lanes' values as the bits of one array: the host puts one on a device in far less time than many."""
    columns = [values.reshape(len(values), -1) for values in jax.tree.leaves(lanes)]
    return np.concatenate([column.view(np.int32) for column in columns], axis=1)


def _unpacked(setup: Setup, bits: Int[Array, "B W"], level: Level) -> Lanes:
    """What `packed` was given; the table takes the width that nothing else has."""
    one = np.zeros(1, np.int32)
    settings = without_biases(settings_of([Sampling()]), level)
    last = one if reads_previous(setup.config) else None
    lanes = Lanes(one, one, one, one, last, one, one, np.zeros((1, STOPS), np.int32), one[:0], settings)
    width = bits.shape[1] - sum(values.size for values in jax.tree.leaves(lanes))
    leaves, tree = jax.tree.flatten(lanes._replace(table=np.zeros((1, width), np.int32)))
    columns = jnp.split(bits, np.cumsum([leaf.size for leaf in leaves])[:-1].tolist(), axis=1)
    values = [
        jax.lax.bitcast_convert_type(column, leaf.dtype).reshape(len(bits), *leaf.shape[1:])
        for column, leaf in zip(columns, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, values)


def without_biases(settings: Settings, level: Level) -> Settings:
    """Settings without the biases unless at level "full", which alone reads them."""
    if level == "full":
        return settings
    return settings._replace(bias_ids=settings.bias_ids[:, :0], bias_values=settings.bias_values[:, :0])


@dataclass(frozen=True)
class Setup:
    """What all programs of an engine depend on, apart from shapes."""

    config: GPTConfig
    dtype: str
    mesh: Mesh | None
    drawn: int | None = None  # how many of the vocabulary's ids can be drawn: the first; None: all

    @property
    def shards(self) -> int:
        """How many parts the rows and pages are in."""
        return 1 if self.mesh is None else int(np.prod([self.mesh.shape[axis] for axis in BATCH_SPEC[0]]))

    def sharding(self, *spec: Any) -> NamedSharding | None:
        """The sharding of an array whose first dimension is that of the rows or pages."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(*BATCH_SPEC, *spec))

    @property
    def pages_sharding(self) -> NamedSharding | None:
        """The sharding of pages: their heads are split over the tensor axis if it divides them."""
        if self.mesh is None:
            return None
        return self.sharding("tensor") if self.config.kv_heads % self.mesh.shape["tensor"] == 0 else self.sharding()


class Weights(NamedTuple):
    """What `decode` reads: the parameters, and some of them once more, as `join_qkv` arranges them."""

    params: Params
    joint: list[Any] | None


def weights_of(setup: Setup, params: Params) -> Weights:
    """The weights that `decode` takes for `params`."""
    split = setup.mesh is not None and setup.mesh.shape["tensor"] > 1  # by columns, of each matrix for itself
    return Weights(params, None if split else _join(params))


_join = jax.jit(join_qkv)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def new_cache(setup: Setup, pages: int, slots: int, dtype: Any) -> tuple[list[Pages], Carried, States]:
    """Empty pages and rows: so many for each shard."""
    whole, rows = init_pages(setup.config, pages * setup.shards, dtype), slots * setup.shards
    carried = Carried(*(jnp.zeros(rows, jnp.int32) for _ in Carried._fields))
    if not reads_previous(setup.config):
        carried = carried._replace(before=None)
    states = jnp.zeros((rows, setup.config.width), setup.dtype)
    return _constrain(setup.pages_sharding, whole), *_constrain(setup.sharding(), (carried, states))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def begin(
    setup: Setup,
    level: Level,
    params: Params,
    carried: Carried,
    seen: Seen | None,
    states: States,
    lanes: Int[Array, "L W"],
) -> tuple[Carried, Seen | None, Int[Array, "1 lanes ..."]]:
    """Draws a token for each of the `packed` lanes from the state of its source; returns it as `decode` does."""

    def run(params, carried, seen, states, bits):
        lanes = _unpacked(setup, bits, level)
        idle = lanes.slot >= len(carried.status)
        status = jnp.where(idle, DONE, RUNNING)
        nothing = jnp.zeros_like(lanes.slot)
        token, before = (nothing, None) if lanes.last is None else (jnp.asarray(lanes.last), nothing)
        rows = Carried(token, jnp.asarray(lanes.position), jnp.asarray(lanes.count), status, before)
        hidden = states.at[lanes.source].get(mode="clip")
        row_seen = None if seen is None else seen.at[lanes.slot].get(mode="clip")
        rows, row_seen, written = _drawn(setup, level, params, lanes, rows, row_seen, hidden)
        return *_kept(lanes, carried, rows, seen, row_seen), written[None]

    split = P(*BATCH_SPEC)
    carried, seen, written = _on_shards(
        setup, run, (P(), split, split, split, split), (split, split, P(None, *BATCH_SPEC))
    )(params, carried, seen, states, lanes)
    return *_constrain(setup.sharding(), (carried, seen)), _everywhere(setup, written)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5, 6))
def decode(
    setup: Setup,
    level: Level,
    steps: int,
    weights: Weights,
    pages: list[Pages],
    carried: Carried,
    seen: Seen | None,
    lanes: Int[Array, "L W"],
) -> tuple[list[Pages], Carried, Seen | None, Int[Array, "steps lanes ..."]]:
    """Draws up to `steps` tokens for each of the `packed` lanes.

    Returns the tokens, with -1 where a lane has stopped. At level "full" what follows each token are its
    log-probability, the `MOST_ALTERNATIVES` likeliest ids and their log-probabilities, the latter as bits of fp32. At
    level "scored" it is its log-probability alone.
    """

    def run(weights, pages, carried, seen, bits):
        lanes: Any = _unpacked(setup, bits, level)
        idle = lanes.slot >= len(carried.status)
        rows = jax.tree.map(lambda values: values.at[lanes.slot].get(mode="clip"), carried)
        rows = rows._replace(status=jnp.where(idle, DONE, rows.status))
        row_seen = None if seen is None else seen.at[lanes.slot].get(mode="clip")

        def step(state, _):
            return _decode_step(setup, level, weights, lanes, state)

        (pages, rows, row_seen), written = jax.lax.scan(step, (pages, rows, row_seen), length=steps)
        return pages, *_kept(lanes, carried, rows, seen, row_seen), written

    split = P(*BATCH_SPEC)
    pages, carried, seen, written = _on_shards(
        setup, run, (P(), split, split, split, split), (split, split, split, P(None, *BATCH_SPEC))
    )(weights, pages, carried, seen, lanes)
    pages = _constrain(setup.pages_sharding, pages)
    return pages, *_constrain(setup.sharding(), (carried, seen)), _everywhere(setup, written)


def _kept(lanes: Lanes, carried: Carried, rows: Carried, seen: Seen | None, row_seen: Any):
    """What all slots carry, and have seen, after the lanes' rows have drawn."""
    slots: Any = lanes.slot
    carried = jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), carried, rows)
    return carried, None if seen is None else seen.at[slots].set(row_seen, mode="drop")


def _decode_step(setup: Setup, level: Level, weights: Weights, lanes: Lanes, state):
    """Puts each running row's newest token into the cache, and draws the next."""
    (params, joint), (pages, rows, seen) = weights, state
    place = Place(lanes.table, rows.position, (rows.status == RUNNING).astype(jnp.int32))
    tokens = rows.token[:, None]
    hidden, pages = paged_hidden(setup.config, params, tokens, place, pages, setup.dtype, joint, before=rows.before)
    rows, seen, written = _drawn(setup, level, params, lanes, rows, seen, hidden[:, 0])
    return (pages, rows, seen), written


def _drawn(setup: Setup, level: Level, params: Params, lanes: Lanes, rows: Carried, seen, hidden: Float[Array, "B D"]):
    """The rows after each that runs has drawn a token, what they have seen, and the tokens as `decode` returns them."""
    running = rows.status == RUNNING
    scores = logits(setup.config, params, hidden)
    if setup.drawn is not None:
        scores = jnp.where(jnp.arange(scores.shape[1]) < setup.drawn, scores, NEVER)
    token = draw(scores, lanes.settings, rows.count, seen, level=level)
    count = rows.count + running
    # Stop by stop: a reduction would be a kernel of its own, as would what depends on it.
    done = functools.reduce(jnp.logical_or, (token == stop for stop in lanes.stops.T), count >= lanes.limit)
    status = jnp.where(done, DONE, jnp.where(token == lanes.pause, PAUSED, RUNNING))
    rows = Carried(
        token=jnp.where(running, token, rows.token),
        position=rows.position + running,
        count=count,
        status=jnp.where(running, status, rows.status),
        before=None if rows.before is None else jnp.where(running, rows.token, rows.before),
    )
    written = jnp.where(running, token, -1)
    if level in ("scored", "full"):
        scores = scores / lanes.settings.logprob_temperature[:, None]
    if level == "scored":
        own = jax.lax.bitcast_convert_type(logprob(scores, token), jnp.int32)
        written = jnp.stack([written, own], axis=1)
    elif level == "full":
        written = _with_logprobs(written, *logprobs(scores, token, MOST_ALTERNATIVES))
    if seen is not None:
        seen = add_seen(seen, token, running)
    return rows, seen, written


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def read(
    setup: Setup,
    scored: bool,
    params: Params,
    pages: list[Pages],
    states: States,
    chunks: Int[Array, "N W"],
) -> tuple[list[Pages], States, Int[Array, "N Q _"] | None]:
    """Reads chunks of prompts into the pages, and keeps the states of last tokens.

    A row of `chunks` has the place of a chunk (its table, start and count), the slot of the state after its last token
    (one beyond the last slot if more of the row's tokens follow), the token before it if the model reads that (-1 for
    none), its tokens and, if `scored`, the token that comes after each of them. For the latter it returns then what
    `decode` returns at level "full".
    """
    width = -(-setup.config.sequence_len // PAGE)

    def run(params, pages, states, chunks):
        place, slot = Place(chunks[:, :width], chunks[:, width], chunks[:, width + 1]), chunks[:, width + 2]
        before, first = None, width + 3
        if reads_previous(setup.config):
            before, first = chunks[:, first], first + 1
        tokens, *following = jnp.split(chunks[:, first:], 2 if scored else 1, axis=1)
        hidden, pages = paged_hidden(
            setup.config, params, tokens, place, pages, setup.dtype, before=before, last=not scored
        )
        last = hidden[:, 0]
        if scored:
            last = hidden[jnp.arange(len(hidden)), jnp.maximum(place.count - 1, 0)]
        states = states.at[slot].set(last, mode="drop")
        if not scored:
            return pages, states, None
        # The logits of some positions at a time: those of all would take far more memory than the rest.
        at_once = min(SCORED, tokens.size)
        batches = hidden.reshape(-1, at_once, hidden.shape[-1])

        def score(batch: tuple[Float[Array, "S D"], Int[Array, " S"]]) -> Int[Array, "S _"]:
            hidden, ids = batch
            return _with_logprobs(ids, *logprobs(logits(setup.config, params, hidden), ids, MOST_ALTERNATIVES))

        scores = jax.lax.map(score, (batches, following[0].reshape(-1, at_once)))
        return pages, states, scores.reshape(*tokens.shape, -1)

    split = P(*BATCH_SPEC)
    pages, states, scores = _on_shards(setup, run, (P(), split, split, split), (split, split, split))(
        params, pages, states, chunks
    )
    return _constrain(setup.pages_sharding, pages), _constrain(setup.sharding(), states), _everywhere(setup, scores)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def copy_pages(setup: Setup, pages: list[Pages], source: Int[Array, " C"], target: Int[Array, " C"]) -> list[Pages]:
    """Copies pages within each shard; a target beyond the last page is no copy."""

    def run(pages, source, target):
        return [copied_pages(of_layer, source, target) for of_layer in pages]

    split = P(*BATCH_SPEC)
    return _constrain(setup.pages_sharding, _on_shards(setup, run, (split,) * 3, split)(pages, source, target))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def set_seen(setup: Setup, seen: Seen, row: Int[Array, ""], values: Int[Array, " V"]) -> Seen:
    """`seen` with the values of a row, which is numbered over all shards."""
    return _constrain(setup.sharding(), seen.at[row].set(values))


def _with_logprobs(
    ids: Int[Array, " B"], own: Float[Array, " B"], best: Int[Array, "B K"], values: Float[Array, "B K"]
) -> Int[Array, "B 2+2*K"]:
    """All in one array of integers, so that the host reads one."""
    floats = jax.lax.bitcast_convert_type(jnp.concatenate([own[:, None], values], axis=1), jnp.int32)
    return jnp.concatenate([ids[:, None], floats[:, :1], best, floats[:, 1:]], axis=1)


def _on_shards(setup: Setup, run, in_specs, out_specs):
    """`run` for each shard's own rows and pages."""
    if setup.mesh is None:
        return run
    mesh, axes = setup.mesh, set(BATCH_SPEC[0])
    if all(mesh.shape[axis] == 1 for axis in mesh.axis_names if axis not in axes):
        axes = set(mesh.axis_names)  # where nothing else is split, nothing is left to the compiler
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def _constrain(sharding: NamedSharding | None, tree: Any) -> Any:
    return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)


def _everywhere(setup: Setup, tree: Any) -> Any:
    """Replicates a result, so that each of several processes can read all rows."""
    return tree if setup.mesh is None else _constrain(NamedSharding(setup.mesh, P()), tree)
