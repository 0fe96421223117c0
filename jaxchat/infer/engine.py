"""Batched generation with a KV cache, including tool calls.

A batch of prompts goes through the model once (`_prefill`). After that each dispatch (`_decode`) generates
`DECODE_STEPS` tokens for every row, and the host reads what the rows wrote. Within a dispatch nothing waits for the
host, because the device itself decides what a row does next: it runs, pauses after <|python_end|>, or is done. The host
runs the tools of paused rows, and the next dispatch forces the tokens of their answers in before such a row samples
again. Rows that are paused or done, and rows that only fill the batch, recompute their last token in place, which
changes nothing.

Lengths and batch sizes are rounded up to a few sizes. Each combination compiles once in a process; parameters are
arguments, so that other parameters do not compile again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxchat.devices.mesh import BATCH_SPEC, put_whole
from jaxchat.errors import check
from jaxchat.infer.sampling import sample
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, cached_hidden, init_cache, logits
from jaxchat.stopping import raise_if_asked
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.tools.calculator import calculate

DECODE_STEPS = 8
FORCED = 64  # the longest tool answer in tokens: the calculator's 54 characters and two special tokens fit
SHORTEST_PROMPT, SHORTEST_CACHE = 16, 64

RUNNING, PAUSED, DONE = range(3)
Chunk = list[tuple[int, int, bool]]


@dataclass(frozen=True)
class Completion:
    """What a row wrote after its prompt.

    Attributes:
      tokens: without the token that stopped the row.
      sampled: False for each token that was forced in as a tool's answer.
      stop: the token that stopped the row; None if it reached `max_new_tokens` or the end of the context.
    """

    tokens: list[int]
    sampled: list[bool]
    stop: int | None

    @property
    def finished(self) -> bool:
        """Whether the row ended with a stop token."""
        return self.stop is not None


class _Rows(NamedTuple):
    """The state of a batch on the device, with one entry per row."""

    cache: list[dict[str, Array]]
    token: Array  # the newest token, not yet in the cache
    position: Array  # its place in the sequence
    count: Array  # tokens written after the prompt
    limit: Array  # of `count`
    key: Array
    queue: Array  # [B, FORCED]: its last `queued` tokens are still to be forced in
    queued: Array
    status: Array


class _Drawing(NamedTuple):
    """How the next token is chosen; traced, so that other values do not compile again."""

    temperature: Any
    stops: Array | np.ndarray
    pause: Array | np.integer  # the id of <|python_end|>, or -1 without tools


@dataclass(frozen=True)
class _Program:
    """What a compiled program depends on, apart from shapes."""

    config: GPTConfig
    dtype: str
    greedy: bool
    top_k: int | None
    rows: NamedSharding | None
    everywhere: NamedSharding | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    program: _Program,
    cache_len: int,
    params: Params,
    prompts: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    limits: Int[Array, " B"],
    numbers: Int[Array, " B"],
    seed: Array,
    drawing: _Drawing,
) -> tuple[_Rows, Array]:
    """Reads the prompts (right-padded) and draws each row's first token. Rows with limit 0 only fill the batch."""
    batch, longest = prompts.shape
    rows = jnp.arange(batch)
    # Attention in here is over the prompt's slots only; the others are added after it.
    cache = init_cache(program.config, batch, longest, program.dtype)
    start = jnp.zeros(batch, jnp.int32)
    hidden, cache = cached_hidden(program.config, params, prompts, start, cache, program.dtype)
    grow = ((0, 0), (0, cache_len - longest), (0, 0), (0, 0))
    state = _Rows(
        cache=jax.tree.map(lambda slots: jnp.pad(slots, grow), cache),
        token=prompts[rows, lengths - 1],
        position=lengths - 1,
        count=start,
        limit=limits,
        key=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers),
        queue=jnp.zeros((batch, FORCED), jnp.int32),
        queued=start,
        status=jnp.where(limits > 0, RUNNING, DONE),
    )
    if program.rows is not None:
        state = jax.lax.with_sharding_constraint(state, program.rows)
    state, written = _write(program, params, hidden[rows, lengths - 1], state, drawing)
    return state, _for_host(program, written[None])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    program: _Program, params: Params, state: _Rows, answers: Int[Array, "B _"], drawing: _Drawing
) -> tuple[_Rows, Array]:
    """Generates `DECODE_STEPS` tokens for every row that runs.

    `answers[b]` starts with -1 if row b has no answer. Otherwise it is the number of tokens to force in, followed by a
    queue that ends with them, and the row runs again.
    """
    answered = answers[:, 0] >= 0
    state = state._replace(
        queue=jnp.where(answered[:, None], answers[:, 1:], state.queue),
        queued=jnp.where(answered, answers[:, 0], state.queued),
        status=jnp.where(answered, RUNNING, state.status),
    )

    def step(state, _):
        hidden, cache = cached_hidden(
            program.config, params, state.token[:, None], state.position, state.cache, program.dtype
        )
        return _write(program, params, hidden[:, 0], state._replace(cache=cache), drawing)

    state, written = jax.lax.scan(step, state, length=DECODE_STEPS)
    return state, _for_host(program, written)


def _write(
    program: _Program, params: Params, hidden: Float[Array, "B D"], state: _Rows, drawing: _Drawing
) -> tuple[_Rows, Int[Array, " B"]]:
    """Gives each running row its next token; returns 2 · token + (1 if sampled), or -1 for a row that does not run."""
    scores = logits(program.config, params, hidden)
    keys = jax.vmap(jax.random.fold_in)(state.key, state.count)
    drawn = sample(scores, keys, 0 if program.greedy else drawing.temperature, program.top_k)
    forced = state.queued > 0
    first = FORCED - jnp.maximum(state.queued, 1)
    token = jnp.where(forced, jnp.take_along_axis(state.queue, first[:, None], axis=1)[:, 0], drawn)

    running = state.status == RUNNING
    count = state.count + running
    done = (~forced & jnp.isin(token, drawing.stops)) | (count >= state.limit)
    status = jnp.where(done, DONE, jnp.where(~forced & (token == drawing.pause), PAUSED, RUNNING))
    state = state._replace(
        token=jnp.where(running, token, state.token),
        position=state.position + running,
        count=count,
        queued=state.queued - (running & forced),
        status=jnp.where(running, status, state.status),
    )
    return state, jnp.where(running, 2 * token + ~forced, -1)


def _for_host(program: _Program, written: Array) -> Array:
    """Replicates the result, so that each of several processes can read all rows."""
    return written if program.everywhere is None else jax.lax.with_sharding_constraint(written, program.everywhere)


@functools.partial(jax.jit, static_argnums=1)
def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def bucket(length: int, smallest: int) -> int:
    """`length` rounded up to a power of two that is at least `smallest`."""
    return max(smallest, 1 << (length - 1).bit_length())


@dataclass
class _Writing:
    """The state of a row on the host."""

    number: int
    limit: int
    count: int = 0
    status: int = RUNNING
    call: list[int] | None = None  # tokens since <|python_start|>, if a call is open
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Engine:
    """Generates for many prompts at once. `dataclasses.replace(engine, params=...)` compiles nothing again.

    Args:
      model_config: the model.
      params: its parameters, which the engine keeps in `dtype`, so that no step casts them.
      tokenizer: for special tokens, tool calls and their answers.
      dtype: of the computation and the cache.

    On a mesh the rows are split over the data and fsdp axes. Of several processes each must pass the same prompts, and
    gets all completions.
    """

    model_config: GPTConfig
    params: Params
    tokenizer: BaseTokenizer
    _: KW_ONLY
    dtype: Any

    def __post_init__(self):
        dtype = jnp.dtype(self.dtype).name
        object.__setattr__(self, "dtype", dtype)
        if any(leaf.dtype != dtype for leaf in jax.tree.leaves(self.params)):
            object.__setattr__(self, "params", _cast(self.params, dtype))

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a row."""
        return tuple(map(self.tokenizer.encode_special, ("<|assistant_end|>", "<|bos|>")))

    @functools.cached_property
    def _python_start(self) -> int:
        return self.tokenizer.encode_special("<|python_start|>")

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The mesh that the parameters are on; None if they are on a single device."""
        sharding = jax.tree.leaves(self.params)[0].sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        return mesh if isinstance(mesh, Mesh) else None

    def generate(self, prompts: Sequence[Sequence[int]], **options) -> list[Completion]:
        """The completions of `prompts`, in their order. Options and errors are those of `stream`."""
        tokens: list[list[int]] = [[] for _ in prompts]
        sampled: list[list[bool]] = [[] for _ in prompts]
        for chunk in self.stream(prompts, **options):
            for row, token, own in chunk:
                tokens[row].append(token)
                sampled[row].append(own)
        completions = []
        for ids, own in zip(tokens, sampled, strict=True):
            stop = ids[-1] if own[-1] and ids[-1] in self.stops else None
            end = len(ids) if stop is None else -1
            completions.append(Completion(ids[:end], own[:end], stop))
        return completions

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        tools: bool = True,
        max_batch: int = 256,
    ) -> Iterator[Chunk]:
        """Yields tokens as they are generated, as lists of (row, token, sampled); the tokens of a row come in order.

        A row ends with a stop token (<|assistant_end|> or <|bos|>, yielded as its last), after `max_new_tokens`, or
        when the context of `sequence_len` tokens is full.

        With `tools`, the calculator answers an expression between <|python_start|> and <|python_end|>:
        <|output_start|>, the value and <|output_end|> follow with sampled False, and count as new tokens like all
        others. If the calculator refuses the expression, the output is empty, so that the model does not invent one. A
        <|python_end|> without a start is ignored.

        At temperature 0 the most likely token is taken. The random numbers of row r depend only on seed, r and how many
        tokens the row has written: not on other rows, nor on `max_batch`, the most rows that go through the model at
        once.

        Raises:
          UserError: a prompt is empty or fills the context, or an option is out of range.
        """
        context, special = self.model_config.sequence_len, self.tokenizer.encode_special
        check(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        check(0 <= temperature < math.inf, f"temperature is {temperature}; it must be 0 (greedy) or more")
        check(top_k is None or top_k >= 1, f"top_k is {top_k}; it must be at least 1, or None for the whole vocabulary")
        check(max_batch >= 1, f"max_batch is {max_batch}; it must be at least 1")
        for number, prompt in enumerate(prompts):
            check(
                1 <= len(prompt) < context,
                f"prompt {number} has {len(prompt)} tokens; it must have at least 1, and fewer than the model's "
                f"context of {context}",
            )
        specs = {"rows": BATCH_SPEC, "everywhere": P()}
        placed = {} if self.mesh is None else {name: NamedSharding(self.mesh, spec) for name, spec in specs.items()}
        program = _Program(
            self.model_config,
            self.dtype,
            greedy=temperature == 0,
            top_k=None if temperature == 0 else top_k,
            rows=placed.get("rows"),
            everywhere=placed.get("everywhere"),
        )
        drawing = _Drawing(
            np.float32(min(temperature, np.finfo(np.float32).max)),
            np.array(self.stops, np.int32),
            np.int32(special("<|python_end|>") if tools else -1),
        )
        # Prompts of similar length go together, so that short ones are not padded to the length of long ones.
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        for start in range(0, len(order), max_batch):
            numbers = order[start : start + max_batch]
            limits = [min(max_new_tokens, context - len(prompts[number])) for number in numbers]
            rows = [_Writing(number, limit) for number, limit in zip(numbers, limits, strict=True)]
            yield from self._stream_batch(program, drawing, seed, rows, [prompts[number] for number in numbers])

    def _stream_batch(
        self, program: _Program, drawing: _Drawing, seed: int, rows: list[_Writing], prompts: list[Sequence[int]]
    ) -> Iterator[Chunk]:
        size, context = self.batch_size(len(rows)), self.model_config.sequence_len
        longest = max(len(prompt) for prompt in prompts)
        furthest = max(len(prompt) + row.limit for prompt, row in zip(prompts, rows, strict=True))
        padded = np.zeros((size, min(bucket(longest, SHORTEST_PROMPT), context)), np.int32)
        lengths, limits, numbers = np.ones(size, np.int32), np.zeros(size, np.int32), np.zeros(size, np.int32)
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            padded[i, : len(prompt)] = prompt
            lengths[i], limits[i], numbers[i] = len(prompt), row.limit, row.number

        cache_len = max(padded.shape[1], min(bucket(furthest, SHORTEST_CACHE), context))
        arrays = [self.put(array) for array in (padded, lengths, limits, numbers)]
        nothing = self.put(np.full((size, 1 + FORCED), -1, np.int32))
        state, written = _prefill(program, cache_len, self.params, *arrays, np.uint32(seed % 2**32), drawing)
        while True:
            raise_if_asked()
            chunk = [event for step in np.asarray(written) for event in self._read(step.tolist(), rows, drawing)]
            waiting = any(row.status == PAUSED for row in rows)
            answers = self.put(self._answers(rows, size)) if waiting else nothing
            running = any(row.status == RUNNING for row in rows)
            if running:  # the device works while the caller uses the chunk
                state, written = _decode(program, self.params, state, answers, drawing)
            yield chunk
            if not running:
                return

    def batch_size(self, rows: int) -> int:
        """`rows` rounded up to a power of two, and then to a multiple of the devices that share them."""
        shards = 1 if self.mesh is None else int(np.prod([self.mesh.shape[axis] for axis in BATCH_SPEC[0]]))
        return -(-bucket(rows, 1) // shards) * shards

    def put(self, array: np.ndarray) -> Array:
        """Puts `array` on the engine's devices, split by rows."""
        return jax.device_put(array) if self.mesh is None else put_whole(self.mesh, array)

    def _read(self, step: list[int], rows: list[_Writing], drawing: _Drawing) -> Iterator[tuple[int, int, bool]]:
        """The tokens of one step; the rows follow what the device has decided."""
        for code, row in zip(step, rows, strict=False):  # rows that only fill the batch come last
            if code < 0:
                continue
            token, sampled = code >> 1, bool(code & 1)
            row.count += 1
            yield row.number, token, sampled
            if (sampled and token in self.stops) or row.count >= row.limit:
                row.status = DONE
            elif sampled and token == drawing.pause:
                row.status, row.answer, row.call = PAUSED, self._answer(row.call), None
            elif sampled and token == self._python_start:
                row.call = []
            elif row.call is not None:
                row.call.append(token)

    def _answer(self, call: list[int] | None) -> list[int]:
        """The tokens to force in after the tool call `call`; none if no call was open."""
        if call is None:
            return []
        value = calculate(self.tokenizer.decode(call)) or ""
        return self.tokenizer.encode(value, "<|output_start|>", "<|output_end|>")

    def _answers(self, rows: list[_Writing], size: int) -> np.ndarray:
        """The answers for paused rows as `_decode` takes them; these rows run again."""
        answers = np.full((size, 1 + FORCED), -1, np.int32)
        for i, row in enumerate(rows):
            if row.status == PAUSED:
                row.status = RUNNING
                answers[i, 0] = len(row.answer)
                answers[i, 1 + FORCED - len(row.answer) :] = row.answer
        return answers
