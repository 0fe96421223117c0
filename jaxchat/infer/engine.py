"""The engine: answers to many requests at once, each with its own prompt, length, settings and seed.

    engine = Engine(model_config, params, tokenizer, dtype="bfloat16")
    number = engine.submit(Request(prompt, max_new_tokens=100))
    while engine.busy:
        for output in engine.step(): ...

Requests join and leave while others run: in each turn some prompts are read, and the rows that have read theirs write a
few tokens. What decides that is in `scheduler.py`, what the devices do in `programs.py` and `runner.py`, and this file
turns tokens into answers: it ends them, runs tools, and forms the text. `generate` and `stream` are for a fixed list of
prompts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from jaxchat.devices.mesh import put_whole
from jaxchat.errors import check
from jaxchat.infer.answers import Answer, Completion
from jaxchat.infer.capacity import bucket, pages_of
from jaxchat.infer.pages import PagePool
from jaxchat.infer.programs import Setup
from jaxchat.infer.quantized import KVCache, Weights, cache_dtype, stored
from jaxchat.infer.request import MOST_ALTERNATIVES, NewToken, Output, Request, Sampling
from jaxchat.infer.runner import STEPS, Runner
from jaxchat.infer.sampling import LEVELS, check_sampling, level_of, needs_seen
from jaxchat.infer.scheduler import Budget, Chunk, Row, Scheduler
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params
from jaxchat.ops.pages import PAGE
from jaxchat.stopping import raise_if_asked
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.tools.calculator import calculate

SHORTEST_PROMPT = 16
TURNS = 8  # at most in a step that has nothing to tell yet
TOOL_WAIT = 0.02  # seconds that a step waits for a tool, if there is nothing else to do

_ON_CPU = Budget(chunk=32, idle=64, busy=16, scored=16)
_ON_ACCELERATOR = Budget(chunk=64, idle=256, busy=64, scored=16)

Written = list[tuple[int, int, bool]]


class _Call(NamedTuple):
    """A program's result that the host has not read: of `decode` with lanes, else of `read`."""

    result: Array
    lanes: list[list[Row]]
    steps: int
    chunks: list[Chunk]


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
    ):
        check(rows >= 1, f"rows is {rows}; it must be at least 1")
        check(cache_tokens is None or cache_tokens >= 1, f"cache_tokens is {cache_tokens}; it must be at least 1")
        self.model_config, self.tokenizer, self.dtype = model_config, tokenizer, jnp.dtype(dtype).name
        self.rows, self.cache_tokens = rows, cache_tokens
        self.weights: Weights = weights
        self.kv_cache: KVCache = kv_cache
        self._runner: Runner | None = None
        self._scheduler: Scheduler | None = None
        self._numbers = 0
        self._answers: dict[int, Answer] = {}  # in flight
        self._changed: dict[int, Answer] = {}  # with something to give back
        self._ready: list[Output] = []
        self._calls: deque[_Call] = deque()
        self._tools: dict[Future, Answer] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._counted = [0, 0]  # prefix queries and hits of caches that are gone
        self.params = params
        # The host of a GPU prepares the next call while this one runs; on a CPU both would want the same cores.
        self._lookahead = 0 if self._devices[0].platform == "cpu" else 1

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
        if self._runner is not None and self._scheduler is not None:
            self._runner.use(params)
            self._scheduler.forget_cached()

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a row."""
        return tuple(map(self.tokenizer.encode_special, ("<|assistant_end|>", "<|bos|>")))

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the parameters are on; None if they are on a single device."""
        sharding = jax.tree.leaves(self.params)[0].sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        return mesh if isinstance(mesh, Mesh) else None

    @property
    def _devices(self) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
        return sorted(jax.tree.leaves(self.params)[0].devices(), key=lambda device: device.id)

    @property
    def busy(self) -> bool:
        """Whether a request is in flight, or an output has not been given back."""
        return bool(self._answers or self._changed or self._ready)

    @property
    def running(self) -> int:
        """Requests that are worked on."""
        return self._scheduler.running if self._scheduler else 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._answers) - self.running

    @property
    def cache_usage(self) -> float:
        """The share of the cache that running requests have taken, 0 to 1."""
        return self._scheduler.usage if self._scheduler else 0.0

    @property
    def prefix_queries(self) -> int:
        """Tokens of prompts so far."""
        return self._counted[0] + (self._scheduler.queries if self._scheduler else 0)

    @property
    def prefix_hits(self) -> int:
        """Those of them that were cached."""
        return self._counted[1] + (self._scheduler.hits if self._scheduler else 0)

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
        answer = self._answers.get(number)
        if answer is not None:
            answer.end("cancelled")
            self._leave(answer)

    def step(self) -> list[Output]:
        """Works until something is known that was not, or for `TURNS` turns.

        The list is empty only if nothing is in flight, if a long prompt is being read, or if only tools are at work.
        """
        for _ in range(TURNS):
            if self._changed or self._ready or not self._answers:
                break
            if not self._turn():
                break
        outputs = [*self._ready, *(answer.take() for answer in self._changed.values())]
        self._ready.clear()
        self._changed.clear()
        return outputs

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Makes the cache, and compiles every program that requests can need; afterwards nothing is compiled.

        `progress` is called with the number of programs that are compiled, and the number of all.
        """
        self._opened()[0].warm_up(progress)

    def release(self) -> None:
        """Frees the cache. The next request makes another one.

        Raises:
          UserError: a request is in flight.
        """
        check(not self._answers, "the engine's cache can be freed only when no request is in flight")
        if self._scheduler is not None:
            self._counted = [self.prefix_queries, self.prefix_hits]
        self._runner = self._scheduler = None
        self._calls.clear()

    # --- a fixed list of prompts --------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], **options) -> list[Completion]:
        """The completions of `prompts`, in their order. Options and errors are those of `stream`."""
        tokens: list[list[int]] = [[] for _ in prompts]
        sampled: list[list[bool]] = [[] for _ in prompts]
        for written in self.stream(prompts, **options):
            for row, token, own in written:
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
    ) -> Iterator[Written]:
        """Yields tokens as they are generated, as lists of (row, token, sampled); the tokens of a row come in order.

        A row ends with a stop token (<|assistant_end|> or <|bos|>, yielded as its last), after `max_new_tokens`, or
        when the context of `sequence_len` tokens is full.

        With `tools`, the calculator answers an expression between <|python_start|> and <|python_end|>:
        <|output_start|>, the value and <|output_end|> follow with sampled False, and count as new tokens like all
        others. If the calculator refuses the expression, the output is empty, so that the model does not invent one. A
        <|python_end|> without a start is ignored.

        At temperature 0 the most likely token is taken. The random numbers of row r depend only on seed, r and how many
        tokens the row has written: not on other rows, nor on `max_batch`, the most rows that are worked on at once.
        Prompts that begin alike share the cache of their beginning.

        Raises:
          UserError: a prompt is empty or fills the context, or an option is out of range.
        """
        check(max_batch >= 1, f"max_batch is {max_batch}; it must be at least 1")
        sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
        tool = calculate if tools else None
        requests = [
            Request(prompt, max_new_tokens, dataclasses.replace(sampling, number=row), tool=tool)
            for row, prompt in enumerate(prompts)
        ]
        for row, request in enumerate(requests):
            self._check(request, f"prompt {row}")
        own_cache = self._scheduler is None and self.cache_tokens is None
        if own_cache and requests:
            self._open(min(len(requests), max_batch), max(map(self._tokens_of, requests)))
        rows = {self._submit(request, with_text=False): row for row, request in enumerate(requests)}
        most = 0
        if self._scheduler is not None:
            most, self._scheduler.most_rows = self._scheduler.most_rows, min(max_batch, self._scheduler.most_rows)
        try:
            while any(number in self._answers or number in self._changed for number in rows):
                raise_if_asked()
                outputs = self.step()
                self._ready.extend(output for output in outputs if output.request not in rows)
                yield [
                    (rows[output.request], token.id, token.sampled)
                    for output in outputs
                    if output.request in rows
                    for token in output.tokens
                ]
        finally:
            for number in rows:
                self.cancel(number)
                self._changed.pop(number, None)
            if self._scheduler is not None:
                self._scheduler.most_rows = most
            if own_cache:
                self.release()

    def batch_size(self, rows: int) -> int:
        """`rows` rounded up to a power of two, and then to a multiple of the devices that share them."""
        shards = self._setup.shards
        return -(-bucket(rows, 1) // shards) * shards

    def put(self, array: np.ndarray) -> Array:
        """Puts `array` on the engine's devices, split by rows."""
        return jax.device_put(array) if self.mesh is None else put_whole(self.mesh, array)

    # --- the cache ----------------------------------------------------------------------------------------------------

    @property
    def _setup(self) -> Setup:
        return Setup(self.model_config, self.dtype, self.mesh)

    def _opened(self) -> tuple[Runner, Scheduler]:
        if self._runner is None or self._scheduler is None:
            return self._open(self.rows, self.model_config.sequence_len, self.cache_tokens)
        return self._runner, self._scheduler

    def _open(self, rows: int, tokens: int, cache_tokens: int | None = None) -> tuple[Runner, Scheduler]:
        """Makes a cache for `rows` rows of `tokens` tokens, or of `cache_tokens` in all."""
        setup = self._setup
        slots = self.batch_size(rows) // setup.shards
        dtype = jnp.dtype(cache_dtype(self.dtype, self.kv_cache))
        if cache_tokens is None:
            pages = pages_of(setup, slots, tokens, dtype, self._devices[0])
        else:
            pages = -(-cache_tokens // (PAGE * setup.shards))
        budget = _ON_CPU if self._devices[0].platform == "cpu" else _ON_ACCELERATOR
        self._runner = Runner(setup, self.params, pages=pages, slots=slots, cache_dtype=dtype, budget=budget)
        self._scheduler = Scheduler([PagePool(pages, PAGE) for _ in range(setup.shards)], slots, budget, rows)
        return self._runner, self._scheduler

    def _tokens_of(self, request: Request) -> int:
        """The most tokens that a request puts into the cache: all but the last of the longest answer."""
        return len(request.prompt) + self._limit(request) - 1

    def _limit(self, request: Request) -> int:
        return min(request.max_new_tokens, self.model_config.sequence_len - len(request.prompt))

    # --- requests and answers -----------------------------------------------------------------------------------------

    def _check(self, request: Request, name: str) -> None:
        context, vocab_size, count = self.model_config.sequence_len, self.model_config.vocab_size, len(request.prompt)
        check(
            1 <= count < context,
            f"{name} has {count} tokens; it must have at least 1, and fewer than the model's context of {context}",
        )
        check(
            0 <= min(request.prompt) and max(request.prompt) < vocab_size,
            f"{name} has token ids from {min(request.prompt)} to {max(request.prompt)}; this vocabulary has ids 0 to "
            f"{vocab_size - 1}",
        )
        check(request.max_new_tokens >= 1, f"max_new_tokens is {request.max_new_tokens}; it must be at least 1")
        check(
            request.logprobs is None or 0 <= request.logprobs <= MOST_ALTERNATIVES,
            f"logprobs is {request.logprobs}; it must be 0 to {MOST_ALTERNATIVES}, or None",
        )
        check_sampling(request.sampling, vocab_size)

    def _submit(self, request: Request, *, with_text: bool) -> int:
        scheduler, limit = self._opened()[1], self._limit(request)
        row = Row(list(request.prompt), len(request.prompt), limit, scored=request.prompt_logprobs)
        pages, most = scheduler.pages_for(row), scheduler.pools[0].count
        check(
            pages <= most,
            f"a prompt of {row.prompt} tokens and an answer of {limit} take {pages} pages of the cache, which has "
            f"{most} of {PAGE} tokens; ask for a shorter answer, or give the engine more cache_tokens",
        )
        with_logs = request.logprobs is not None or request.prompt_logprobs
        row.owner = answer = Answer(
            self._numbers,
            request,
            row,
            self.tokenizer,
            level="full" if with_logs else level_of([request.sampling]),
            stops=self.stops if request.stop_tokens is None else request.stop_tokens,
            with_text=with_text,
        )
        self._numbers += 1
        self._answers[answer.number] = answer
        scheduler.add(row)
        return answer.number

    def _turn(self) -> bool:
        """One turn; returns False if there was nothing to do but to wait for tools."""
        runner, scheduler = self._opened()
        self._collect_tools()
        plan = scheduler.plan()
        for row in plan.joined:
            runner.join(row, row.owner.request.sampling, row.owner.stops, row.owner.pause)
        if plan.chunks:
            scores = runner.read(plan.chunks, plan.scored)
            if scores is not None:
                self._calls.append(_Call(scores, [], 0, plan.chunks))
        if plan.copies:
            runner.copy(plan.copies)
        rows = [row for rows in plan.lanes for row in rows]
        if rows:
            self._decode(runner, plan.lanes, rows)
        if self._calls and (len(self._calls) > self._lookahead or not rows):
            self._take(runner, self._calls.popleft())
        elif not (rows or plan.chunks or plan.copies) and self._tools:
            wait(self._tools, TOOL_WAIT, FIRST_COMPLETED)
            return self._collect_tools()
        return True

    def _decode(self, runner: Runner, lanes: list[list[Row]], rows: list[Row]) -> None:
        for row in rows:
            if row.fresh and needs_seen(row.owner.request.sampling):
                runner.set_seen(row)
        level = max((row.owner.level for row in rows), key=LEVELS.index)
        longest = max(row.limit - row.written - row.ahead for row in rows)
        # An engine that was warmed up gives the first token of an answer at once.
        first = runner.warm and any(row.written + row.ahead == 0 for row in rows)
        steps = 1 if first or longest == 1 else STEPS
        self._calls.append(_Call(runner.decode(lanes, level, steps), lanes, steps, []))

    def _take(self, runner: Runner, call: _Call) -> None:
        """Reads a result, and gives every request its tokens."""
        result = np.asarray(call.result)
        for chunk, scores in runner.chunk_rows(call.chunks, result) if call.chunks else ():
            answer: Answer = chunk.row.owner
            if chunk.row.scored and answer.finish is None:
                wanted = answer.request.logprobs or 0
                answer.scores += [_token(details, wanted, sampled=False) for details in scores]
                self._changed[answer.number] = answer
        for row, written in runner.lane_rows(call.lanes, result) if call.lanes else ():
            row.ahead -= call.steps
            answer = row.owner
            for details in written[written[:, 0] >= 0]:
                if answer.finish is not None:
                    break
                self._wrote(answer, _token(details, answer.request.logprobs))

    def _wrote(self, answer: Answer, token: NewToken) -> None:
        """Gives a row a token that it has drawn, and decides what follows."""
        scheduler, tool = self._opened()[1], answer.request.tool
        scheduler.wrote(answer.row, token.id)
        self._changed[answer.number] = answer
        answer.add(token)
        if answer.finish is not None:
            self._leave(answer)
        elif tool is not None:
            call = answer.call(token.id)
            if token.id == answer.pause:  # here the device has paused the row
                scheduler.pause(answer.row)
                if call is None:
                    scheduler.resume(answer.row, [])
                # The calculator is fast, and several processes have to go on with its answer at the same point.
                elif tool is calculate or jax.process_count() > 1:
                    self._resume(answer, tool(call))
                else:
                    self._threads = self._threads or ThreadPoolExecutor(self.rows, "tool")
                    self._tools[self._threads.submit(tool, call)] = answer

    def _collect_tools(self) -> bool:
        """Takes the results of tools that have ended; returns whether there were any."""
        done = [future for future in self._tools if future.done()]
        for future in done:
            answer = self._tools.pop(future)
            if answer.finish is None:
                self._resume(answer, future.result())
        return bool(done)

    def _resume(self, answer: Answer, value: str | None) -> None:
        """Forces in what a tool has answered."""
        tokens = answer.tool_tokens(value)
        self._opened()[1].resume(answer.row, tokens)
        self._changed[answer.number] = answer
        for token in tokens:
            if answer.finish is None:
                answer.add(NewToken(token, sampled=False))
        if answer.finish is not None:
            self._leave(answer)

    def _leave(self, answer: Answer) -> None:
        """Takes out a request whose answer has ended."""
        self._opened()[1].leave(answer.row)
        del self._answers[answer.number]
        self._changed[answer.number] = answer


def _token(details: np.ndarray, alternatives: int | None, sampled: bool = True) -> NewToken:
    """A token as the programs give it: its id and, if `alternatives` are wanted, what follows it."""
    if alternatives is None:
        return NewToken(int(details[0]), sampled)
    ids, floats = details[2 : 2 + alternatives].tolist(), details.view(np.float32)
    values = floats[2 + MOST_ALTERNATIVES :][:alternatives].tolist()
    return NewToken(int(details[0]), sampled, float(floats[1]), tuple(zip(ids, values, strict=True)))
