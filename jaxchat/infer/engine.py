"""The engine: answers to many requests at once, each with its own prompt, length, settings and seed.

    engine = Engine(model_config, params, tokenizer, dtype="bfloat16")
    number = engine.submit(Request(prompt, max_new_tokens=100))
    while engine.busy:
        for output in engine.step(): ...

Requests join and leave while others run: in each turn some prompts are read, and the rows that have read theirs write a
few tokens. What decides that is in `scheduler.py`, what the devices do in `programs.py` and `runner.py`, and what
becomes of it in `turns.py`. `generate` and `stream` are for a fixed list of prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from jaxchat.devices.mesh import put_whole
from jaxchat.errors import UserError, check
from jaxchat.infer.answers import Answer, Completion
from jaxchat.infer.capacity import bucket, pages_of, rows_to_read
from jaxchat.infer.pages import PagePool
from jaxchat.infer.programs import Setup
from jaxchat.infer.quantized import KVCache, Weights, cache_dtype, stored
from jaxchat.infer.request import MOST_ALTERNATIVES, NewToken, Output, Request, Sampling, Tool
from jaxchat.infer.runner import Runner
from jaxchat.infer.scheduler import Budget, Row, Scheduler
from jaxchat.infer.settings import check_sampling, level_of
from jaxchat.infer.turns import Turns
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params
from jaxchat.ops.pages import PAGE
from jaxchat.stopping import raise_if_asked
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.tools.calculator import calculate

SHORTEST_PROMPT = 16
TURNS = 8  # at most in a step that has nothing to tell yet

_ON_CPU = Budget(chunk=32, idle=64, busy=16, scored=16, sizes=(1, 4, 16, 64))
_ON_ACCELERATOR = Budget(chunk=64, idle=256, busy=256, scored=16, sizes=(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256))


class Engine:
    """Answers requests. It is to be used in one thread.

    Args:
      model_config: the model.
      params: its parameters, which the engine keeps in `dtype`, so that no step casts them.
      tokenizer: for special tokens, tool calls and text.
      dtype: of the computation and the cache.
      rows: requests that are worked on at once; the others wait.
      cache_tokens: of all rows together, that the cache has room for; rounded up to pages. None: for all rows at the
        whole context, or as much as the devices' free memory allows.
      weights, kv_cache: in 8 bits if "int8" and "fp8"; see `quantized.py`.
      drawn: how many of the vocabulary's ids can be drawn: the first. The others have no part in log-probabilities of
        answers either. None: all.

    The cache is made for the first request that is submitted, and kept. Without it, and without `cache_tokens`,
    `generate` and `stream` make one that is as large as they need, and free it afterwards.

    On a mesh the rows and pages are split over the data and fsdp axes. Of several processes each must make the same
    calls, and gets all outputs.
    """

    def __init__(
        self,
        model_config: GPTConfig,
        params: Params,
        tokenizer: BaseTokenizer,
        *,
        dtype: Any,
        rows: int = 64,
        cache_tokens: int | None = None,
        weights: Weights = "auto",
        kv_cache: KVCache = "auto",
        drawn: int | None = None,
    ):
        check(rows >= 1, f"rows is {rows}; it must be at least 1")
        check(cache_tokens is None or cache_tokens >= 1, f"cache_tokens is {cache_tokens}; it must be at least 1")
        self.model_config, self.tokenizer, self.dtype = model_config, tokenizer, jnp.dtype(dtype).name
        self.rows, self.cache_tokens = rows, cache_tokens
        self.weights: Weights = weights
        self.kv_cache: KVCache = kv_cache
        self.drawn = drawn
        self._numbers = 0
        self._checked: tuple[int, ...] | None = None  # the last prompt whose ids were found to be in range
        self._turns: Turns | None = None  # while there is a cache
        self._ready: list[Output] = []
        self._streaming = False  # a list of prompts is being generated
        self._counted = [0, 0]  # prefix queries and hits of caches that are gone
        self.params = params

    # --- what it has --------------------------------------------------------------------------------------------------

    @property
    def params(self) -> Params:
        """The parameters. Others, of the same shapes, take their place in time for the next step: nothing is compiled
        again, and what is cached of texts is forgotten."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        if self.weights != "auto" or any(leaf.dtype != self.dtype for leaf in jax.tree.leaves(params)):
            params = stored(params, self.dtype, self.weights)
        self._params = params
        if self._turns is not None:
            self._turns.runner.use(params)
            self._turns.scheduler.forget_cached()

    @params.deleter
    def params(self) -> None:
        """Frees the engine's copy of them, if it has one: it needs others before its next request."""
        self.release()
        del self._params

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a row."""
        return tuple(map(self.tokenizer.encode_special, ("<|assistant_end|>", "<|bos|>")))

    def is_stop(self, token: NewToken) -> bool:
        """Whether a token ends its row: not where a tool wrote it."""
        return token.sampled and token.id in self.stops

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the parameters are on; None if they are on a single device."""
        sharding = jax.tree.leaves(self.params)[0].sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        return mesh if isinstance(mesh, Mesh) else None

    @property
    def busy(self) -> bool:
        """Whether a request is in flight, or an output has not been given back."""
        return bool(self._ready or (self._turns and (self._turns.answers or self._turns.changed)))

    @property
    def running(self) -> int:
        """Requests that are worked on."""
        return self._turns.scheduler.running if self._turns else 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._turns.scheduler.waiting) if self._turns else 0

    @property
    def cache_usage(self) -> float:
        """The share of the cache that running requests have taken, 0 to 1."""
        return self._turns.scheduler.usage if self._turns else 0.0

    @property
    def prefix_queries(self) -> int:
        """Tokens of prompts so far."""
        return self._counted[0] + (self._turns.scheduler.queries if self._turns else 0)

    @property
    def prefix_hits(self) -> int:
        """Those of them that were cached."""
        return self._counted[1] + (self._turns.scheduler.hits if self._turns else 0)

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Puts a request at the end of the queue, and returns its number.

        Raises:
          UserError: the prompt is empty, has unknown ids, or fills the context or the cache; a setting is out of range.
        """
        self._check(request, "the prompt")
        return self._submit(request, with_text=True)

    def cancel(self, number: int) -> None:
        """Ends a request; nothing happens if it has ended. Its last output comes with the next step."""
        answer = self._turns.answers.get(number) if self._turns else None
        if self._turns and answer is not None:
            answer.end("cancelled")
            self._turns.leave(answer)

    def step(self) -> list[Output]:
        """Works until something is known that was not, or for `TURNS` turns.

        The list is empty only if nothing is in flight, if a long prompt is being read, or if only tools are at work.
        """
        outputs, turns = self._ready, self._turns
        self._ready = []
        if turns is not None:
            for _ in range(TURNS):
                if outputs or turns.changed or not turns.answers or not turns.turn():
                    break
            outputs += [answer.take() for answer in turns.changed.values()]
            turns.changed.clear()
        return outputs

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Makes the cache, and compiles every program that requests can need; afterwards nothing is compiled.

        `progress` is called with the number of programs that are compiled, and the number of all.
        """
        self._opened().runner.warm_up(progress)

    def reserve(self, rows: int, tokens: int) -> None:
        """Makes the cache, unless it exists, for `rows` rows of up to `tokens` tokens or as much as there is room for.

        Lists of prompts that differ in number and length then run the same programs.
        """
        if self._turns is None:
            self._open(rows, tokens)

    def release(self) -> None:
        """Frees the cache. The next request makes another one.

        Raises:
          UserError: a request is in flight.
        """
        if self._turns is not None:
            check(not self._turns.answers, "the engine's cache can be freed only when no request is in flight")
            self._ready += [answer.take() for answer in self._turns.changed.values()]
            self._counted = [self.prefix_queries, self.prefix_hits]
            self._turns = None

    # --- a fixed list of prompts --------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
        **options,
    ) -> list[Completion]:
        """The completions of `prompts`, in their order. Options and errors are those of `stream`.

        `progress` is called with the number of those that have ended.
        """
        rows: list[list[NewToken]] = [[] for _ in prompts]
        room = [min(max_new_tokens, self.model_config.sequence_len - len(prompt)) for prompt in prompts]
        done = 0
        for written in self.stream(prompts, max_new_tokens=max_new_tokens, **options):
            for row, token in written:
                rows[row].append(token)
                done += self.is_stop(token) or len(rows[row]) == room[row]
            if progress is not None:
                progress(done)
        completions = []
        for row in rows:
            scores = [math.nan if token.logprob is None else token.logprob for token in row]
            stop = row.pop().id if self.is_stop(row[-1]) else None
            ids, own = [token.id for token in row], [token.sampled for token in row]
            completions.append(Completion(ids, own, stop, scores if options.get("logprobs") else []))
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
        tool: Tool = calculate,
        max_batch: int = 256,
        logprobs: bool = False,
    ) -> Iterator[list[tuple[int, NewToken]]]:
        """Yields tokens as they are generated, each with the number of its row; those of a row come in order.

        A row ends with a stop token (<|assistant_end|> or <|bos|>, yielded as its last), after `max_new_tokens`, or
        when the context of `sequence_len` tokens is full.

        With `tools`, the calculator, or another `tool` as fast, answers what is between <|python_start|> and
        <|python_end|>: <|output_start|>, the value and <|output_end|> follow with sampled False, and count as new
        tokens like all others. If the calculator refuses the expression, the output is empty, so that the model does
        not invent one. A <|python_end|> without a start is ignored.

        At temperature 0 the most likely token is taken. The random numbers of row r depend only on seed, r and how many
        tokens the row has written: not on other rows, nor on `max_batch`, the most rows that are worked on at once.
        Prompts that begin alike share the cache of their beginning.

        With `logprobs`, each sampled token comes with its log-probability at the temperature at which it was sampled,
        over the whole vocabulary; at temperature 0 it is that of the model.

        Raises:
          UserError: a prompt is empty, fills the context or does not fit into the cache, or an option is out of range;
            another list is being generated.
        """
        check(not self._streaming, "the engine is generating another list of prompts; let that end first")
        check(max_batch >= 1, f"max_batch is {max_batch}; it must be at least 1")
        sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
        request = Request((), max_new_tokens, sampling, tool=tool if tools else None, instant=True)
        if logprobs:
            sampling = dataclasses.replace(sampling, logprob_temperature=temperature or 1.0)
            request = dataclasses.replace(request, logprobs=0)
        requests = [
            dataclasses.replace(request, prompt=prompt, sampling=dataclasses.replace(sampling, number=row))
            for row, prompt in enumerate(prompts)
        ]
        for row, request in enumerate(requests):
            self._check(request, f"prompt {row}")
        if not requests:
            return
        own_cache = self._turns is None and self.cache_tokens is None
        if own_cache:
            turns = self._open(min(len(requests), max_batch), max(map(self._tokens_of, requests)))
        else:
            turns = self._opened()
        most = turns.scheduler.most_rows
        rows: dict[int, int] = {}
        others: list[Output] = []
        try:
            self._streaming, turns.scheduler.most_rows = True, min(max_batch, most)
            for row, request in enumerate(requests):
                rows[self._submit(request, with_text=False)] = row
            while any(number in turns.answers or number in turns.changed for number in rows):
                raise_if_asked()
                outputs = self.step()
                others += [output for output in outputs if output.request not in rows]
                yield [
                    (rows[output.request], token)
                    for output in outputs
                    if output.request in rows
                    for token in output.tokens
                ]
        finally:
            for number in rows:
                self.cancel(number)
                turns.changed.pop(number, None)
            self._streaming, turns.scheduler.most_rows = False, most
            self._ready += others
            if own_cache:
                self.release()

    def batch_size(self, rows: int) -> int:
        """`rows` rounded up to a power of two, and then to a multiple of the devices that share them."""
        shards = self._setup.shards
        return -(-bucket(rows, 1) // shards) * shards

    def rows_to_read(self, tokens: int) -> int:
        """How many rows of `tokens` tokens the engine's devices have room to read at once, without a cache."""
        width = bucket(tokens, SHORTEST_PROMPT)
        return self._setup.shards * rows_to_read(self.model_config, self.dtype, width, self._device)

    def put(self, array: np.ndarray) -> Array:
        """Puts `array` on the engine's devices, split by rows."""
        return jax.device_put(array) if self.mesh is None else put_whole(self.mesh, array)

    # --- the cache ----------------------------------------------------------------------------------------------------

    @property
    def _setup(self) -> Setup:
        return Setup(self.model_config, self.dtype, self.mesh, self.drawn)

    @property
    def _device(self) -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
        """One of those that hold the parameters."""
        return min(jax.tree.leaves(self.params)[0].devices(), key=lambda device: device.id)

    def _opened(self) -> Turns:
        if self._turns is None:
            return self._open(self.rows, self.model_config.sequence_len, self.cache_tokens)
        return self._turns

    def _open(self, rows: int, tokens: int, cache_tokens: int | None = None) -> Turns:
        """Makes a cache for `rows` rows of `tokens` tokens, or of `cache_tokens` in all."""
        setup = self._setup
        device = self._device
        slots = self.batch_size(rows) // setup.shards
        dtype = jnp.dtype(cache_dtype(self.dtype, self.kv_cache))
        if cache_tokens is None:
            pages = pages_of(setup, slots, tokens, dtype, device)
        else:
            pages = -(-cache_tokens // (PAGE * setup.shards))
        budget = _ON_CPU if device.platform == "cpu" else _ON_ACCELERATOR
        runner = Runner(setup, self.params, pages=pages, slots=slots, cache_dtype=dtype, budget=budget)
        scheduler = Scheduler([PagePool(pages, PAGE) for _ in range(setup.shards)], slots, budget, rows)
        self._turns = Turns(runner, scheduler)
        return self._turns

    def _tokens_of(self, request: Request) -> int:
        """The most tokens that a request puts into the cache: all but the last of the longest answer."""
        return len(request.prompt) + self._limit(request) - 1

    def _limit(self, request: Request) -> int:
        return min(request.max_new_tokens, self.model_config.sequence_len - len(request.prompt))

    # --- requests and answers -----------------------------------------------------------------------------------------

    def _check(self, request: Request, name: str) -> None:
        """Raises `UserError` for a request that cannot be answered; no message is made for one that can."""
        context, vocab_size, count = self.model_config.sequence_len, self.model_config.vocab_size, len(request.prompt)
        if not 1 <= count < context:
            raise UserError(
                f"{name} has {count} tokens; it must have at least 1, and fewer than the model's context of {context}"
            )
        if request.prompt is not self._checked:
            lowest, highest = min(request.prompt), max(request.prompt)
            if lowest < 0 or highest >= vocab_size:
                raise UserError(
                    f"{name} has token ids from {lowest} to {highest}; this vocabulary has ids 0 to {vocab_size - 1}"
                )
            # A tuple stays as it is: samples of one prompt are checked once.
            self._checked = request.prompt if isinstance(request.prompt, tuple) else None
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {request.max_new_tokens}; it must be at least 1")
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_ALTERNATIVES:
            raise UserError(f"logprobs is {request.logprobs}; it must be 0 to {MOST_ALTERNATIVES}, or None")
        check_sampling(request.sampling, vocab_size)

    def _submit(self, request: Request, *, with_text: bool) -> int:
        turns, limit = self._opened(), self._limit(request)
        row = Row(
            list(request.prompt),
            len(request.prompt),
            limit,
            scored=request.prompt_logprobs,
            pauses=request.tool is not None,
        )
        pages, most = turns.scheduler.pages_for(row), turns.scheduler.pools[0].count
        if pages > most:
            raise UserError(
                f"a prompt of {row.prompt} tokens and an answer of {limit} take {pages} pages of the cache, which has "
                f"{most} of {PAGE} tokens; ask for a shorter answer, or give the engine more cache_tokens"
            )
        level = level_of(request.sampling)
        if request.logprobs is not None or request.prompt_logprobs:
            alone = request.logprobs == 0 and not request.prompt_logprobs
            level = "scored" if alone and level in ("greedy", "plain") else "full"
        row.owner = answer = Answer(
            self._numbers,
            request,
            row,
            self.tokenizer,
            level=level,
            stops=self.stops if request.stop_tokens is None else request.stop_tokens,
            with_text=with_text,
        )
        self._numbers += 1
        turns.add(answer)
        return answer.number
