"""Questions that have one right answer, however busy the server is."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.serving.http1 import Address, Json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NEW = 48  # tokens of an answer
NEAR = 1e-3  # how far apart two log-probabilities of one token may be, in nats: sums in another order


class Sample(NamedTuple):
    """One choice of an answer. Log-probabilities are given by token, if they were asked for."""

    text: str
    finish: str | None
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()


class Answer(NamedTuple):
    """All choices of an answer, by index."""

    samples: tuple[Sample, ...]

    @property
    def characters(self) -> int:
        return sum(len(sample.text) for sample in self.samples)


@dataclass
class Stream:
    """An answer as it came in: choices so far, and when their text came, in seconds from the request."""

    samples: dict[int, Sample] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=dict)
    whole: float = 0.0
    left: bool = False
    complaint: str | None = None

    @property
    def first(self) -> float | None:
        return min((times[0] for times in self.times.values()), default=None)

    @property
    def gaps(self) -> list[float]:
        return [b - a for times in self.times.values() for a, b in zip(times, times[1:], strict=False)]

    def fault(self, right: Answer) -> str | None:
        """What is wrong with the stream, whose whole answer should be `right`."""
        if self.complaint:
            return self.complaint
        for index, expected in enumerate(right.samples):
            got = self.samples.get(index, Sample("", None))
            if self.left and got.finish is None:
                expected = expected._replace(
                    text=expected.text[: len(got.text)], finish=None, tokens=expected.tokens[: len(got.tokens)],
                    logprobs=expected.logprobs[: len(got.logprobs)],
                )  # fmt: skip
            if got[:3] != expected[:3]:
                return f"sample {index} is {got[:3]!r}, alone {expected[:3]!r}"
            if any(abs(a - b) > NEAR for a, b in zip(got.logprobs, expected.logprobs, strict=True)):
                return f"sample {index} has log-probabilities {got.logprobs}, alone {expected.logprobs}"
        extra = set(self.samples) - set(range(len(right.samples)))
        return f"samples {sorted(extra)} were not asked for" if extra else None


@dataclass(frozen=True)
class Question:
    """A request. `body` is its JSON, `name` says what it is."""

    name: str
    path: str
    body: str

    async def alone(self, address: Address) -> Answer:
        """The answer, not streamed."""
        reply = await address.ask("POST", self.path, self.body.encode())
        if reply.status != 200:
            raise RuntimeError(f"{self.name} is answered by {reply.status}: {reply.body.decode()}")
        choices = sorted(reply.json["choices"], key=lambda choice: choice["index"])
        return Answer(tuple(_added(Sample("", None), choice) for choice in choices))

    async def streamed(self, address: Address, leave_after: int | None = None) -> Stream:
        """The answer, streamed; with `leave_after` the connection is closed after that many characters."""
        stream, started, last = Stream(), time.monotonic(), None
        body = json.dumps({**json.loads(self.body), "stream": True}).encode()
        names, received = set(), 0
        async with await address.connect() as connection:
            await connection.request("POST", self.path, body)
            head = await connection.head()
            if head.status != 200:
                text = b"".join([piece async for piece in connection.pieces(head)])
                stream.complaint = f"{head.status}: {text.decode()}"
                return stream
            async for last in connection.events(head):
                now = time.monotonic() - started
                if last == "[DONE]":
                    continue
                frame = json.loads(last)
                if "error" in frame:
                    stream.complaint = f"error in the stream: {frame['error']}"
                    return stream
                names.add(frame["id"])
                for choice in frame["choices"]:
                    index = choice["index"]
                    before = stream.samples.get(index, Sample("", None))
                    after = stream.samples[index] = _added(before, choice)
                    if before.finish is not None:
                        stream.complaint = f"sample {index} goes on after its end"
                    if len(after.text) > len(before.text):
                        stream.times.setdefault(index, []).append(now)
                        received += len(after.text) - len(before.text)
                if leave_after is not None and received >= leave_after:
                    stream.left = True
                    return stream
        stream.whole = time.monotonic() - started
        if last != "[DONE]":
            stream.complaint = f"the last event is {last!r}"
        elif len(names) != 1:
            stream.complaint = f"frames have the ids {sorted(names)}"
        return stream


def _added(sample: Sample, choice: Json) -> Sample:
    """`sample` with what a choice of a response, or of a frame, adds."""
    part = choice.get("delta", choice.get("message"))
    text = choice["text"] if part is None else part.get("content") or ""
    logprobs = choice.get("logprobs") or {}
    entries = logprobs.get("content") or []
    tokens = logprobs.get("tokens") or [entry["token"] for entry in entries]
    values = logprobs.get("token_logprobs") or [entry["logprob"] for entry in entries]
    return Sample(
        sample.text + text, choice["finish_reason"] or sample.finish, sample.tokens + tuple(tokens),
        sample.logprobs + tuple(values),
    )  # fmt: skip


def questions(model: str) -> list[Question]:
    """Questions of all kinds, no two of them alike."""
    found = []

    def add(name: str, path: str, **fields: Json) -> None:
        body = {"model": model, "max_tokens": NEW, "temperature": 0, **fields}
        found.append(Question(f"{name} {len(found)}", path, json.dumps(body)))

    def said(*texts: str) -> list[Json]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    for i in range(32):
        add("greedy", CHAT, messages=said(f"What is {17 + 3 * i} + {91 - 2 * i}?"))
    for i in range(16):
        word = ("strawberry", "anchor", "pepper", "garden")[i % 4]
        add("seeded", CHAT, messages=said(f"How many r's are in {word}?"), temperature=1.0, seed=1000 + i)
    for i in range(8):
        add("filtered", CHAT, messages=said(f"Tell me what {i} * 12 is."), temperature=1.5, top_p=0.9, seed=i)
    for i in range(8):
        add("two samples", CHAT, messages=said(f"Please calculate {50 + i} - {i}."), temperature=1.0, seed=7, n=2)
    for i in range(8):
        add("second turn", CHAT, messages=said(f"What is {i} + 1?", f"It is {i + 1}.", "Thank you!"))
    for i in range(8):
        add("logprobs", CHAT, messages=said(f"Which pet lives with {'ABCDEFGH'[i]}ira?"), logprobs=True, top_logprobs=2)
    for i in range(8):
        add("completion", COMPLETIONS, prompt=f"Once upon a time, {i} men", logprobs=1)
    for i in range(8):
        add("stop", COMPLETIONS, prompt=f"The answer to {i}", stop=["e", "\n"], temperature=1.0, seed=i)
    return found
