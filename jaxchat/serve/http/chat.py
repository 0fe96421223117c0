"""POST /v1/chat/completions."""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Any

from starlette.requests import Request as HttpRequest

from jaxchat.infer.request import Output, Request
from jaxchat.infer.text import TextStream
from jaxchat.serve.http.errors import ApiError, JsonResponse, expect
from jaxchat.serve.http.fields import CHAT_ONLY, Fields, read_json, refuse_unsupported
from jaxchat.serve.http.generation import (
    EventStream,
    Frames,
    Settings,
    Usage,
    fit,
    read_alternatives,
    read_settings,
    unless_left,
)
from jaxchat.serve.http.messages import prompt_of
from jaxchat.serve.http.service import Service
from jaxchat.serve.http.serving import Served, ready
from jaxchat.serve.http.spelling import Spelling, finite

# As `jaxchat chat` has them: for requests that name no setting of the distribution.
DEFAULTS = {"temperature": 0.6, "top_k": 50}


async def chat_completions(request: HttpRequest) -> JsonResponse | EventStream:
    """Answers a conversation, at once or as a stream."""
    service, served = ready(request)
    fields = await read_json(request)
    if served.base:
        raise ApiError(
            400,
            f"{served.name} is a base model, which continues text and knows no conversations; use /v1/completions, or "
            "serve the model of a later stage with --stage",
            code="not_a_chat_model",
        )
    refuse_unsupported(fields, CHAT_ONLY)
    settings = read_settings(fields, served, DEFAULTS)
    expect(settings.max_tokens != 0, "max_tokens is 0; it must be at least 1", "max_tokens")
    alternatives = _alternatives(fields)
    prompt = await prompt_of(fields, served)
    tool = None if fields.get("tool_choice") == "none" else served.tool
    asked = Request(
        prompt,
        fit(len(prompt), settings.max_tokens, served.context, "messages"),
        settings.sampling,
        stop=settings.stop,
        stop_tokens=settings.stop_tokens,
        logprobs=alternatives,
        tool=tool,
    )
    call = _Call(service, served, settings, asked)
    request.state.usage = call.usage
    if settings.stream:
        return await EventStream.begin(request, call.frames())
    return JsonResponse(await unless_left(request, call.whole()))


def _alternatives(fields: Fields) -> int | None:
    wanted, alternatives = fields.flag("logprobs"), read_alternatives(fields, "top_logprobs")
    expect(wanted or not alternatives, "top_logprobs needs logprobs: true", "top_logprobs")
    return (alternatives or 0) if wanted else None


class _Call:
    """The answers to one conversation."""

    def __init__(self, service: Service, served: Served, settings: Settings, asked: Request):
        self.service, self.settings = service, settings
        self.requests = [
            dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, number=number))
            for number in range(settings.n)
        ]
        self.answers = [Answer(served.spelling, settings.stop, asked.logprobs is not None) for _ in self.requests]
        self.usage = Usage(len(asked.prompt))
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "", "created": int(time.time())}
        self.head["model"] = served.name

    async def whole(self) -> dict[str, Any]:
        """The response of a call that is not streamed."""
        parts: list[list[Part]] = [[] for _ in self.answers]
        async for batch in self.service.outputs(self.requests):
            for index, output in batch:
                self.usage.completion += len(output.tokens)
                parts[index].append(self.answers[index].add(output))
        choices = []
        for index, (answer, pieces) in enumerate(zip(self.answers, parts, strict=True)):
            runs = [run for part in pieces for run in part.runs]
            message = {"role": "assistant", "content": "".join(part.text for part in pieces), "refusal": None}
            logprobs = None
            if self.requests[index].logprobs is not None:
                logprobs = {"content": [entry for part in pieces for entry in part.logprobs]}
            choices.append(
                {
                    "index": index,
                    "message": message | ({"tool_runs": runs} if runs else {}),
                    "logprobs": logprobs,
                    "finish_reason": answer.finish,
                }
            )
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage.content()}

    async def frames(self) -> Frames:
        """The frames of a stream, one for each answer and step of the engine."""
        begun = False
        async for batch in self.service.outputs(self.requests):
            frames = []
            if not begun:
                frames = [self._frame(i, {"role": "assistant", "content": ""}) for i in range(len(self.answers))]
                begun = True
            parts: dict[int, Part] = {}
            for index, output in batch:
                self.usage.completion += len(output.tokens)
                part = self.answers[index].add(output)
                parts[index] = parts[index] + part if index in parts else part
            for index, part in parts.items():
                delta: dict[str, Any] = {"content": part.text} if part.text or part.logprobs else {}
                if part.runs:
                    delta["tool_runs"] = part.runs
                if delta:
                    frames.append(self._frame(index, delta, part.logprobs))
                if self.answers[index].finish is not None:
                    frames.append(self._frame(index, {}, finish=self.answers[index].finish))
            if frames:
                yield frames
        if self.settings.usage_frame:
            yield [{**self._chunk([]), "usage": self.usage.content()}]

    def _frame(self, index: int, delta: dict[str, Any], logprobs: list[Any] | None = None, finish: str | None = None):
        content = {"content": logprobs} if logprobs else None
        return self._chunk([{"index": index, "delta": delta, "logprobs": content, "finish_reason": finish}])

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        frame = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        return frame | ({"usage": None} if self.settings.usage_frame else {})


@dataclasses.dataclass
class Part:
    """What an answer has got in a step: text, tool calls that are complete, and log-probabilities of the text."""

    text: str
    runs: list[dict[str, Any]]
    logprobs: list[dict[str, Any]]

    def __add__(self, other: Part) -> Part:
        return Part(self.text + other.text, self.runs + other.runs, self.logprobs + other.logprobs)


class Answer:
    """Splits what a model writes into text and tool calls.

    A call is the tokens between <|python_start|> and <|python_end|>, and its output those between <|output_start|> and
    <|output_end|> after it. One that does not come to its end is left out. Other special tokens are part of the text.

    Args:
      stop: stop strings, for which the engine ends the answer; they are not part of the text.

    Attributes:
      finish: why the answer has ended; None as long as it goes on.
    """

    def __init__(self, spelling: Spelling, stop: tuple[str, ...], logprobs: bool):
        self.spelling, self.stop, self.wants_logprobs = spelling, stop, logprobs
        special = spelling.tokenizer.encode_special
        self._call_start, self._call_end = special("<|python_start|>"), special("<|python_end|>")
        self._output_start, self._output_end = special("<|output_start|>"), special("<|output_end|>")
        self.finish: str | None = None
        self._stream = TextStream(spelling.tokenizer, stop)
        self._length = 0  # characters of text so far
        self._call: list[int] | None = None  # tokens of a call, from its start until its output is complete
        self._output: list[int] | None = None  # tokens of its output
        self._called = False  # whether the call has ended, and only its output is missing

    def add(self, output: Output) -> Part:
        """What an output adds to the answer."""
        part = Part("", [], [])
        tokens = output.tokens
        if output.finish == "stop" and isinstance(output.stopped_by, int):
            tokens = tokens[:-1]
        for token in tokens:
            if self._is_text(token.id, part):
                part.text += self._stream.add(token.id)[0]
                if self.wants_logprobs:
                    part.logprobs.append(
                        self._entry(token.id, token.logprob)
                        | {"top_logprobs": [self._entry(*each) for each in token.alternatives]}
                    )
        if output.finish is not None:
            if output.finish == "cancelled":
                raise ApiError(503, "the answer was cancelled")
            self.finish = output.finish
            part.text += self._stream.flush()
        self._length += len(part.text)
        return part

    def _is_text(self, token: int, part: Part) -> bool:
        """Whether a token belongs to the text; keeps those of calls, and adds calls that are complete to `part`."""
        if self._call is None:
            if token != self._call_start:
                return True
            self._call, self._output, self._called = [], None, False
            part.text += self._stream.flush()
            self._stream = TextStream(self.spelling.tokenizer, self.stop)
        elif self._output is not None:
            if token != self._output_end:
                self._output.append(token)
            else:
                self._add_run(part)
        elif self._called:
            if token == self._output_start:
                self._output = []
            else:  # without a tool, nothing answers
                self._add_run(part)
                return self._is_text(token, part)
        elif token == self._call_end:
            self._called = True
        elif token == self._call_start:  # the tool gets what comes after the last one
            self._call = []
        else:
            self._call.append(token)
        return False

    def _add_run(self, part: Part) -> None:
        decode = self.spelling.tokenizer.decode
        at = self._length + len(part.text)
        part.runs.append({"call": decode(self._call or []), "output": decode(self._output or []), "at": at})
        self._call = self._output = None

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        value = None if logprob is None else finite(logprob)
        return {"token": self.spelling.string(token), "logprob": value, "bytes": list(self.spelling.bytes[token])}
