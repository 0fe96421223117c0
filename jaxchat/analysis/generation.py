"""How fast an engine generates, and how near that is to the limit that memory sets.

A step of decoding reads every weight once, of the embedding a row for each token, and each row's keys and values up to
its position (up to the window, in layers with one). At the speed at which the device copies, this gives the most tokens
a second that any engine could reach there: nothing else is counted, neither arithmetic nor launches nor what is
written. Everything is timed on the host, from `Engine.submit` to the step that returns the token, so that scheduling
and transfers are in it; compilation is not.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.infer.engine import Engine
from jaxchat.infer.request import Request, Sampling
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, init_params
from jaxchat.runs.progress import format_number
from jaxchat.stopping import raise_if_asked
from jaxchat.tokenizer import Tokenizer
from jaxchat.tokenizer.base import SPECIAL_TOKENS

GREEDY = Sampling(temperature=0.0)
COPIES = 8  # timed together, so that starting them hides behind the copying
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What is measured: `rows` requests at a time, each with a prompt of `context` tokens and `new` tokens to write."""

    rows: int
    context: int
    new: int


# --- the limit --------------------------------------------------------------------------------------------------------


def step_bytes(config: GPTConfig, params: Params, work: Work, cache_itemsize: int) -> float:
    """The bytes that a step of decoding must read, in the mean over the steps of `work`."""
    matrices = jax.tree.leaves((params["blocks"], params["head"]))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in matrices)
    tables = [params["embed"]["embedding"]]
    if config.value_embeddings:
        tables.append(params["value_embeddings"]["embedding"])
    token = sum(table.size // config.padded_vocab_size * table.dtype.itemsize for table in tables)
    if config.bigrams:
        token += config.width * params["bigrams"]["embedding"].dtype.itemsize
    # The first token comes from the prompt; the step that makes the next one attends to the prompt and that token.
    lengths = work.context + np.arange(1, max(2, work.new))
    seen = sum(np.mean(lengths if window is None else np.minimum(lengths, window + 1)) for window in config.windows)
    cache = 2 * config.kv_heads * config.head_dim * cache_itemsize * float(seen)
    return weights + work.rows * (token + cache)


def copy_speed() -> float:
    """Bytes a second that the device reads and writes when it copies an array far larger than its caches."""
    size = (1 << 26) if jax.default_backend() == "cpu" else (1 << 31)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = copy(jnp.zeros(size // 4, jnp.int32))
    seconds = []
    for _ in range(5):
        jax.block_until_ready(x)
        began = time.perf_counter()
        for _ in range(COPIES):
            x = copy(x)
        jax.block_until_ready(x)
        seconds.append(time.perf_counter() - began)
    return 2 * size * COPIES / statistics.median(seconds)


# --- what is generated ------------------------------------------------------------------------------------------------


def random_model(config: GPTConfig, seed: int = 0) -> tuple[Params, Tokenizer]:
    """Parameters as they are initialised, with random numbers in place of the zeros, and a tokenizer of the size.

    The zeros would make all logits alike; and a GPU's power draw, which limits its speed, depends on the numbers.
    """
    keys = (jax.random.fold_in(jax.random.key(seed), i) for i in itertools.count())

    def fill(leaf):
        key, size = next(keys), leaf.shape[0] if leaf.ndim else 1
        return leaf if bool(jnp.any(leaf)) else jax.random.normal(key, leaf.shape, leaf.dtype) / size**0.5

    strings = (map(bytes, itertools.product(range(256), repeat=length)) for length in (1, 2, 3))
    tokens = itertools.islice(itertools.chain.from_iterable(strings), config.vocab_size - len(SPECIAL_TOKENS))
    return jax.tree.map(fill, init_params(config, jax.random.key(seed))), Tokenizer(list(tokens))


class Requests:
    """Makes requests whose prompts share nothing, and which no stop token ends."""

    def __init__(self, vocab_size: int, seed: int = 0):
        self._vocab_size, self._draw = vocab_size, np.random.default_rng(seed)

    def prompt(self, length: int) -> list[int]:
        return self._draw.integers(0, self._vocab_size, length).tolist()

    def uniform(self, work: Work) -> list[Request]:
        """A prompt of its own for each row."""
        return [self._request(self.prompt(work.context), work.new, GREEDY) for _ in range(work.rows)]

    def samples(self, work: Work) -> list[Request]:
        """Samples of one prompt at temperature 1, one a row."""
        prompt, seed = tuple(self.prompt(work.context)), int(self._draw.integers(1 << 31))
        return [self._request(prompt, work.new, Sampling(seed=seed, number=row)) for row in range(work.rows)]

    def mixed(self, work: Work, sequence_len: int, *, settings: bool) -> Iterator[Request]:
        """Without end: lengths between 1 and twice those of `work`, which are their means, as far as that fits.

        With `settings`, a request in three is greedy, and the others have one setting or several of all kinds.
        """
        room = (sequence_len - work.context - work.new) / (work.context + work.new)
        spread = min(1.0, room)
        while True:
            context, new = (self._around(length, spread) for length in (work.context, work.new))
            sampling, more = GREEDY, {}
            if settings:
                kind, seed = int(self._draw.integers(12)), int(self._draw.integers(1 << 31))
                sampling = GREEDY if kind < 4 else Sampling(seed=seed, **SETTINGS[kind - 4])
                more = {"stop": ("never written\n",)} if kind == 5 else {"logprobs": 5} if kind == 6 else {}
            yield self._request(self.prompt(context), new, sampling, **more)

    def _around(self, mean: int, spread: float) -> int:
        width = int((mean - 1) * spread)
        return int(self._draw.integers(mean - width, mean + width + 1))

    def _request(self, prompt: Sequence[int], new: int, sampling: Sampling, **more: Any) -> Request:
        return Request(prompt, new, sampling, stop_tokens=(), **more)


SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 0.6, "top_k": 10},
    {"top_p": 0.95},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 100},
    {"min_p": 0.05},
    {"temperature": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    {"repetition_penalty": 1.1, "logit_bias": {11: -5.0, 12: 2.0}},
)


# --- measurements -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Of requests that were submitted together, in seconds.

    Attributes:
      first_token: until each had its first token.
      decoding, decoded: from then until the first of them ended, and the tokens of that time: all rows were decoding.
        Both 0 if the first ended before the last began.
      total, tokens: until the last had ended, and the tokens of all.
    """

    first_token: float
    decoding: float
    decoded: int
    total: float
    tokens: int


def timed(engine: Engine, requests: Sequence[Request]) -> Timing:
    """Runs requests to their end."""
    began = time.perf_counter()
    waiting = {engine.submit(request) for request in requests}
    first = ended = None
    now, after_first, until_ended, tokens = 0.0, 0, 0, 0
    while engine.busy:
        raise_if_asked()
        outputs = engine.step()
        now = time.perf_counter() - began
        tokens += sum(len(output.tokens) for output in outputs)
        waiting -= {output.request for output in outputs if output.tokens}
        if first is None and not waiting:
            first, after_first = now, tokens
        if ended is None and any(output.finish for output in outputs):
            ended, until_ended = now, tokens
    assert first is not None and ended is not None, "every request gets a token and an end"
    if ended <= first:
        return Timing(first, 0.0, 0, now, tokens)
    return Timing(first, ended - first, until_ended - after_first, now, tokens)


def describe(work: Work) -> str:
    return f"{format_number(work.rows, 'row')}, prompts of {work.context:,} tokens, {work.new:,} new"


def measure(
    engine: Engine, work: Work, make: Callable[[Work], list[Request]], repeats: int, say: Say
) -> dict[str, Any]:
    """Medians over `repeats` runs, after one that is not timed: `make(work)` gives each its requests."""
    say(f"{describe(work)}: not timed")
    timed(engine, make(work))  # of the same length, so that it needs, and compiles, what the others do
    timings = []
    for repeat in range(repeats):
        say(f"{describe(work)}: run {repeat + 1} of {repeats}")
        timings.append(timed(engine, make(work)))
    decoding = [timing.decoded / timing.decoding for timing in timings if timing.decoding]
    return {
        "first_token_seconds": statistics.median(timing.first_token for timing in timings),
        "tokens_per_second": statistics.median(decoding) if decoding else None,
        "tokens_per_second_with_prompts": statistics.median(timing.tokens / timing.total for timing in timings),
    }


def queue(engine: Engine, requests: Iterator[Request], rows: int, seconds: float) -> dict[str, Any]:
    """Speed with a queue that never runs empty: measured for `seconds`, after as many requests as rows have ended."""
    running: set[int] = set()
    ended, tokens, took = 0, 0, 0.0
    began: float | None = None
    while True:
        raise_if_asked()
        while len(running) < 2 * rows:
            running.add(engine.submit(next(requests)))
        outputs = engine.step()
        now = time.perf_counter()
        finished = {output.request for output in outputs if output.finish}
        running -= finished
        ended += len(finished)
        if began is None:
            if ended >= rows:
                began, ended = now, 0
            continue
        tokens += sum(len(output.tokens) for output in outputs)
        took = now - began
        if took >= seconds:
            break
    for number in running:
        engine.cancel(number)
    while engine.busy:
        engine.step()
    return {"seconds": took, "requests": ended, "tokens": tokens, "tokens_per_second": tokens / took}


def bench(
    engine: Engine,
    works: Sequence[Work],
    *,
    repeats: int,
    queue_seconds: float,
    cache_itemsize: int,
    say: Say,
) -> dict[str, Any]:
    """All measurements, as JSON: see `docs/engine.md`. The mixed queues need an engine that has compiled everything.

    Args:
      works: what to measure; the mixed queues are of the last of them.
      queue_seconds: how long each of the two queues is measured; 0 leaves them out.
      cache_itemsize: bytes of a number in the KV cache.
    """
    config = engine.model_config
    requests = Requests(config.vocab_size)
    say("the speed of memory")
    speed = copy_speed()
    measured = []
    for work in works:
        size = step_bytes(config, engine.params, work, cache_itemsize)
        own = measure(engine, work, requests.uniform, repeats, say)
        limit = work.rows * speed / size
        rate = own["tokens_per_second"]
        measured.append({
            "rows": work.rows, "context": work.context, "new": work.new, **own,
            "step_bytes": size, "limit_tokens_per_second": limit, "bandwidth_share": rate and rate / limit,
            "samples_of_one_prompt": measure(engine, work, requests.samples, repeats, say),
        })  # fmt: skip
    queues = {}
    work, uniform = works[-1], measured[-1]["tokens_per_second_with_prompts"]
    for name, settings in (("lengths", False), ("lengths_and_settings", True)) if queue_seconds else ():
        say(f"an endless queue for {work.rows} rows, mixed {name.replace('_', ' ')}: {queue_seconds:g} s")
        mixed = requests.mixed(work, config.sequence_len, settings=settings)
        queues[name] = queue(engine, mixed, work.rows, queue_seconds)
        queues[name]["share_of_uniform"] = queues[name]["tokens_per_second"] / uniform
    return {"copy_bytes_per_second": speed, "repeats": repeats, "measured": measured, "mixed_queue": queues}


# --- as text ----------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    """What `jaxchat bench infer` writes as JSON, as Markdown."""
    head = ["rows", "prompt", "new", "first token, ms", "tokens/s", "limit", "of the limit", "with prompts",
            "samples of one prompt: first token, ms", "tokens/s"]  # fmt: skip
    model = result["model"]
    lines = [
        f"d{model['depth']}, {model['parameters'] / 1e6:,.1f} M parameters; weights {result['weights']}, cache "
        f"{result['kv_cache']}; {result['machine']['device_kind']}, JAX {result['machine']['jax']}",
        "",
        f"Memory: {result['copy_bytes_per_second'] / 1e12:.3g} TB/s, measured: bytes read and written by a copy.",
        "Limit: at this speed each step reads all weights once, and each row's keys and values.",
        "First token: of all rows. Tokens/s: while all rows decode; with prompts: from the start to the end.",
        f"Medians of {format_number(result['repeats'], 'run')}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' ---: |' * len(head)}",
    ]
    for one in result["measured"]:
        samples = one["samples_of_one_prompt"]
        share = "?" if one["bandwidth_share"] is None else f"{one['bandwidth_share']:.0%}"
        cells = [
            f"{one['rows']:,}", f"{one['context']:,}", f"{one['new']:,}", _milliseconds(one),
            _rate(one["tokens_per_second"]), _rate(one["limit_tokens_per_second"]), share,
            _rate(one["tokens_per_second_with_prompts"]), _milliseconds(samples), _rate(samples["tokens_per_second"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if result["mixed_queue"]:
        lines += ["", "| endless queue, mixed | tokens/s | requests/s | of the same rows with prompts |"]
        lines += ["| --- | ---: | ---: | ---: |"]
    for name, queue in result["mixed_queue"].items():
        requests = queue["requests"] / queue["seconds"]
        rate, share = _rate(queue["tokens_per_second"]), queue["share_of_uniform"]
        lines.append(f"| {name.replace('_', ' ')} | {rate} | {requests:,.1f} | {share:.0%} |")
    if result["bits_per_byte"] is not None:
        (_, tokens), (own, base), *others = result["bits_per_byte"].items()
        figures = [f"{base:.4f} {own.replace('_', ' ')}"]
        figures += [f"{value:.4f} {name.replace('_', ' ')} ({value / base - 1:+.2%})" for name, value in others]
        lines += ["", f"Bits per byte of {tokens:,} tokens of validation text: {', '.join(figures)}"]
    return "\n".join(lines)


def _milliseconds(one: dict[str, Any]) -> str:
    return f"{1000 * one['first_token_seconds']:,.1f}"


def _rate(tokens: float | None) -> str:
    return "?" if tokens is None else f"{tokens:,.0f}"
