"""What the page's inside view is drawn from: how likely each token was, what may come next, and who attends to whom.

POST /api/inside/tokens       per token its probability and rank, and the likeliest alternatives
POST /api/inside/next         the distribution after the last token, and what settings make of it
POST /api/inside/attention    attention maps of all heads of a layer

Each takes `tokens` (ids), or `text` (after <|bos|>; names of special tokens stand for these tokens), or `messages` as
/v1/chat/completions takes them. A conversation that ends with the user goes on to the start of the answer.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxchat.analysis import attention, prediction
from jaxchat.analysis.computation import Computation
from jaxchat.config import Range
from jaxchat.infer.engine import Engine
from jaxchat.serve.http.errors import ApiError, JsonResponse, expect
from jaxchat.serve.http.fields import Fields, is_whole, read_json
from jaxchat.serve.http.generation import too_long
from jaxchat.serve.http.messages import tokens_of
from jaxchat.serve.http.service import Service
from jaxchat.serve.http.serving import Served, ready
from jaxchat.serve.http.spelling import Spelling

Result = TypeVar("Result")
ALTERNATIVES = 10  # of each token
SHOWN = 20  # of the next token's distribution
MOST_WAITING = 16  # requests; one is computed at a time
RETRY_SECONDS = 1


@dataclasses.dataclass(frozen=True)
class _Looking:
    """A request: what it asks about, and of which model. `compute` runs a computation between steps of the engine."""

    fields: Fields
    tokens: list[int]
    engine: Engine
    spelling: Spelling
    compute: Callable[[Computation[Any]], Awaitable[Any]]


def routes(service: Service) -> list[Route]:
    """The routes of the inside view, into the model that a service runs."""
    turn, waiting = asyncio.Lock(), 0

    async def compute(computation: Computation[Result]) -> Result:
        nonlocal waiting
        if waiting >= MOST_WAITING:
            message = f"{waiting} requests to look inside the model wait; try again"
            raise ApiError(429, message, code="queue_full", retry_after=RETRY_SECONDS)
        waiting += 1
        try:
            async with turn:
                await run_in_threadpool(computation.compile)
                return await service.call(computation)
        finally:
            waiting -= 1

    def answering(look: Callable[[_Looking], Awaitable[dict[str, Any]]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            _, served = ready(request)
            engine, fields = service.engine, await read_json(request)
            assert engine is not None
            tokens = await _tokens(fields, served)
            looking = _Looking(fields, tokens, engine, served.spelling, compute)
            return await run_in_threadpool(JsonResponse, await look(looking))

        return answer

    looks = {"tokens": _look_at_tokens, "next": _look_ahead, "attention": _look_at_attention}
    return [Route(f"/api/inside/{name}", answering(look), methods=["POST"]) for name, look in looks.items()]


async def _tokens(fields: Fields, served: Served) -> list[int]:
    """The ids that a request is about.

    Raises:
      ApiError: there are none, too many, or not of this vocabulary.
    """
    given = [name for name in ("tokens", "text", "messages") if fields.has(name)]
    expect(len(given) == 1, "give one of tokens, text and messages")
    (name,) = given
    if name == "tokens":
        tokens = fields.array("tokens") or []
        if not tokens or not all(is_whole(token) and 0 <= token < served.vocabulary for token in tokens):
            fields.refuse("tokens", f"an array of ids from 0 to {served.vocabulary - 1:,}, at least one")
    elif name == "text":
        text = fields.text("text") or ""
        if len(text) > served.context * served.spelling.longest:
            raise too_long(
                f"this model's context is {served.context:,} tokens, and text has {len(text):,} characters", name
            )
        tokens = await run_in_threadpool(served.spelling.encode, text, bos=not text.startswith("<|bos|>"))
    else:
        expect(not served.base, f"{served.name} is a base model, which knows no conversations; give it text", name)
        tokens = await tokens_of(fields, served)
        if len(tokens) == served.context + 1 and tokens[-1] in served.stops:
            tokens.pop()  # an answer that filled the context did not come to its end
    if len(tokens) > served.context:
        message = f"this model's context is {served.context:,} tokens, and {name} has {len(tokens):,} tokens"
        raise too_long(message, name)
    return tokens


async def _look_at_tokens(looking: _Looking) -> dict[str, Any]:
    engine, tokens, spelling = looking.engine, looking.tokens, looking.spelling
    found: prediction.Predictions = await looking.compute(
        prediction.predictions(engine.model_config, engine.params, tokens, k=ALTERNATIVES, dtype=engine.dtype)
    )
    entries: list[dict[str, Any]] = [_spelt(spelling, token) for token in tokens]
    columns = zip(entries[1:], *map(np.ndarray.tolist, found), strict=True)
    for entry, probability, rank, entropy, ids, probabilities in columns:
        entry |= {"probability": probability, "rank": rank, "entropy": entropy}
        entry["alternatives"] = [
            {"id": id, "text": spelling.string(id), "probability": likely}
            for id, likely in zip(ids, probabilities, strict=True)
        ]
    return {"tokens": entries, "vocabulary": engine.model_config.vocab_size}


async def _look_ahead(looking: _Looking) -> dict[str, Any]:
    fields, engine = looking.fields, looking.engine
    top_k = fields.whole("top_k", Range(at_least=-1))
    settings = {
        "temperature": fields.number("temperature", Range(at_least=0, at_most=100)),
        "top_k": None if top_k in (0, -1) else top_k,
        "top_p": fields.number("top_p", Range(above=0, at_most=1)),
        "min_p": fields.number("min_p", Range(at_least=0, at_most=1)),
    }
    scores = await looking.compute(
        prediction.next_logits(engine.model_config, engine.params, looking.tokens, engine.dtype)
    )
    before = prediction.after_settings(scores)
    after = prediction.after_settings(scores, **{name: value for name, value in settings.items() if value is not None})
    top = np.argsort(-before, kind="stable")[:SHOWN]
    return {
        "entropy": prediction.entropy(before),
        "entropy_after": prediction.entropy(after),
        "can_be_drawn": int(np.count_nonzero(after)),
        "vocabulary": len(scores),
        "top": [
            {**_spelt(looking.spelling, int(token)), "probability": float(before[token]), "after": float(after[token])}
            for token in top
        ],
    }


async def _look_at_attention(looking: _Looking) -> dict[str, Any]:
    """`maps` has a head's weights a string: base64 of `side` x `side` bytes, row by row; weight = (byte / 255)²."""
    fields, tokens, config = looking.fields, looking.tokens, looking.engine.model_config
    layer = fields.whole("layer", Range(at_least=0, at_most=config.depth - 1)) or 0
    start = fields.whole("start", Range(at_least=0, at_most=len(tokens) - 1))
    start = max(0, len(tokens) - attention.MOST) if start is None else start
    maps = await looking.compute(
        attention.attention_maps(config, looking.engine.params, tokens, layer, start=start, dtype=looking.engine.dtype)
    )
    # Of the square root, since most weights are small: the least that shows is 1/65,025 instead of 1/255.
    coarse = np.round(255 * np.sqrt(maps)).astype(np.uint8)
    shown = tokens[start : start + maps.shape[1]]
    return {
        "layer": layer,
        "windows": config.windows,
        "start": start,
        "length": len(tokens),
        "side": len(shown),
        "most": attention.MOST,
        "tokens": [_spelt(looking.spelling, token) for token in shown],
        "maps": [base64.b64encode(one.tobytes()).decode() for one in coarse],
    }


def _spelt(spelling: Spelling, token: int) -> dict[str, Any]:
    special = token in spelling.tokenizer.special_tokens.values()
    return {"id": token, "text": spelling.string(token), "bytes": list(spelling.bytes[token]), "special": special}
