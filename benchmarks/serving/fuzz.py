"""Sends the server requests that hypothesis makes up, right and wrong ones, and checks every response.

    python -m benchmarks.serving.fuzz --run runs/quickstart                 # ten minutes
    python -m benchmarks.serving.fuzz --run runs/quickstart --seconds 60 --json fuzz.json

All routes get requests, one to four at once. Each response must come within 30 seconds and be no 5xx; a refusal must
have the form of OpenAI's errors; what succeeds must be strict JSON (or events of it that end with [DONE]) in the form
that the route promises, with as many choices and tokens as were asked for. A failure is shrunk to a small request,
printed as Python, and then passed over, so that the time goes to finding others. The exit code is 1 if there was one.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from benchmarks.serving.http1 import Address, Head, Reply, fault_of_error
from benchmarks.serving.schemas import CHAT, COMPLETIONS, ROUTES, Call, calls
from benchmarks.serving.server import Server, serving
from benchmarks.timing import machine, say

PATIENCE = 30.0  # seconds until a response counts as lost
SETTINGS = settings(  # of the examples with one seed; large and slow ones are wanted
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=(HealthCheck.data_too_large, HealthCheck.too_slow, HealthCheck.large_base_example),
    report_multiple_bugs=False,
)
GROWTH = 64.0  # MiB that the server's memory may grow after the first tenth of the time


class Wrong(AssertionError):
    """A response that no server should give."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="the run to serve")
    add("--seconds", type=float, default=600, metavar="S", help="how long to go on (default 600)")
    add("--seed", type=int, default=0, metavar="N", help="of the requests (default 0)")
    add("--json", metavar="FILE", help="write the counts to a file")
    options = parser.parse_args(arguments)
    try:
        with serving(options.run) as server:
            figures = fuzz(server, options.seconds, options.seed)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))
    for failure in figures["failures"]:
        print(f"\n{failure['what']}\n    {failure['calls']}", file=sys.stderr)
    return 1 if figures["failures"] else 0


def fuzz(server: Server, seconds: float, first_seed: int) -> dict[str, Any]:
    """Sends requests for `seconds`; returns counts and failures."""
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    failures: dict[str, dict[str, str]] = {}  # by signature: what was wrong, and the requests
    memory = []
    with asyncio.Runner() as runner:
        model = runner.run(server.address.ask("GET", "/v1/models")).json["data"][0]
        strategy = st.lists(calls(model["id"], model["max_model_len"]), min_size=1, max_size=4)
        started, number = time.monotonic(), first_seed
        last: list[Call] = []

        def check(several: list[Call]) -> None:
            last[:] = several
            if time.monotonic() - started > seconds:
                return
            try:
                runner.run(_check_all(server.address, several, counts))
            except Wrong as wrong:
                if _signature(str(wrong)) not in failures:
                    raise

        while time.monotonic() - started < seconds:

            @seed(number)
            @SETTINGS
            @given(strategy)
            def examples(several: list[Call]) -> None:
                check(several)

            try:
                examples()
            except (
                Wrong,
                Flaky,
            ) as wrong:  # raised for the smallest example, which came last, or if it does not repeat
                failures[_signature(str(wrong))] = {"what": str(wrong), "calls": repr(last)}
                say(f"\nfailure: {wrong}")
            memory.append(server.memory())
            number += 1
            say(f"\r{sum(counts.values()):,} requests, {len(failures)} failures, {memory[-1]:,.0f} MiB", end="")
        say("")
        if not runner.run(server.idle()):
            failures["idle"] = {"what": "requests are running or waiting at the end", "calls": ""}
        if runner.run(server.address.ask("GET", "/health")).status != 200:
            failures["health"] = {"what": "/health is not 200 at the end", "calls": ""}
    grown = memory[-1] - memory[len(memory) // 10]
    if grown > GROWTH:
        failures["memory"] = {"what": f"the server's memory has grown by {grown:.0f} MiB", "calls": ""}
    by_path: dict[str, dict[str, int]] = collections.defaultdict(dict)
    for (path, status), count in sorted(counts.items()):
        by_path[path][str(status)] = count
    return {
        "machine": machine("hypothesis", "starlette", "uvicorn"),
        "seconds": time.monotonic() - started,
        "requests": sum(counts.values()),
        "by path and status": by_path,
        "memory, MiB": {"first": memory[0], "most": max(memory), "last": memory[-1]},
        "failures": list(failures.values()),
    }


def table(figures: dict[str, Any]) -> str:
    """The counts as Markdown."""
    statuses = sorted({status for counts in figures["by path and status"].values() for status in counts})
    lines = ["| route | " + " | ".join(statuses) + " |", "| --- |" + " ---: |" * len(statuses)]
    for path, counts in figures["by path and status"].items():
        lines.append(f"| {path} | " + " | ".join(f"{counts.get(status, 0):,}" for status in statuses) + " |")
    memory = figures["memory, MiB"]
    lines += [
        "",
        f"{figures['requests']:,} requests in {figures['seconds']:.0f} s, {len(figures['failures'])} failures; memory "
        f"{memory['first']:,.0f} MiB at first, {memory['most']:,.0f} at most, {memory['last']:,.0f} at last.",
    ]
    return "\n".join(lines)


def _signature(wrong: str) -> str:
    """What two failures of one cause have in common: the message without numbers and quoted values."""
    return re.sub(r"b?'(?:[^'\\]|\\.)*'|b?\"(?:[^\"\\]|\\.)*\"|\d+", "_", wrong)[:60]


# --- checks -----------------------------------------------------------------------------------------------------------


async def _check_all(address: Address, several: list[Call], counts: collections.Counter[tuple[str, int]]) -> None:
    results = await asyncio.gather(*(_send(address, call) for call in several), return_exceptions=True)
    for call, result in zip(several, results, strict=True):
        path = call.path.partition("?")[0]
        if isinstance(result, Wrong):
            raise result
        if isinstance(result, BaseException):
            raise Wrong(f"{call.method} {path}: {type(result).__name__}: {result}")
        counts[path if path in ROUTES else "others", result.status] += 1
        if fault := fault_of(call, result):
            raise Wrong(f"{call.method} {path}: {fault}")


async def _send(address: Address, call: Call) -> Reply:
    try:
        async with asyncio.timeout(PATIENCE), await address.connect() as connection:
            await connection.request(call.method, call.path, call.body, dict(call.headers))
            head = await connection.head()
            while head.status == 100:
                head = await connection.head()
            if call.method == "HEAD":
                return Reply(*head, b"")
            if head.headers.get("content-type", "").startswith("text/event-stream"):
                return Reply(*head, await _events(connection, head))
            return Reply(*head, b"".join([piece async for piece in connection.pieces(head)]))
    except TimeoutError:
        raise Wrong(f"{call.method} {call.path.partition('?')[0]}: no response within {PATIENCE:.0f} s") from None


async def _events(connection: Any, head: Head) -> bytes:
    """The frames of a stream as one JSON list."""
    events = [event async for event in connection.events(head)]
    if not events or events[-1] != "[DONE]":
        raise Wrong(f"a stream ends with {events[-1:]}")
    return f"[{','.join(events[:-1])}]".encode()


def fault_of(call: Call, reply: Reply) -> str | None:
    """What is wrong with a response; None if nothing is."""
    if reply.status >= 500:
        return f"{reply.status}: {reply.body[:300]!r}"
    if call.method == "HEAD" or reply.status in (204, 304) or 300 <= reply.status < 400:
        return None
    if reply.status == 405 and "allow" not in reply.headers:
        return "405 without Allow"
    if reply.status >= 400:
        # The HTTP library itself answers what is no HTTP.
        return None if reply.body == b"Invalid HTTP request received." else fault_of_error(reply)
    kind = reply.headers.get("content-type", "")
    if not kind.startswith(("application/json", "text/event-stream")):
        return None
    try:
        value = json.loads(reply.body, parse_constant=_no_constant)
    except ValueError as error:
        return f"{reply.status} without strict JSON: {error}: {reply.body[:200]!r}"
    path = call.path.partition("?")[0]
    if call.method != "POST" or path not in SHAPES or not isinstance(call.sent, dict):
        return None
    try:
        return SHAPES[path](call.sent, value)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        return f"a response of another form: {error!r}: {reply.body[:300]!r}"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _generated(sent: dict[str, Any], value: Any) -> str | None:
    """The common part of chats and completions, streamed or not."""
    chat = "messages" in sent
    frames = value if isinstance(value, list) else [value]
    samples: dict[int, dict[str, Any]] = collections.defaultdict(lambda: {"finish": None, "logprobs": []})
    usage = None
    for frame in frames:
        if "error" in frame:
            return f"error in the stream: {frame}"
        usage = frame.get("usage") or usage
        for choice in frame["choices"]:
            sample = samples[choice["index"]]
            if sample["finish"] is not None:
                return f"sample {choice['index']} goes on after its end"
            sample["finish"] = choice["finish_reason"]
            sample["logprobs"].append(choice.get("logprobs"))
            text = (
                choice["text"] if not chat else choice["delta" if isinstance(value, list) else "message"].get("content")
            )
            if not isinstance(text, str | None):
                return f"text is {text!r}"
    prompt = sent.get("prompt")
    prompts = len(prompt) if not chat and isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    if sorted(samples) != list(range(prompts * (sent.get("n") or 1))):
        return f"choices have the indices {sorted(samples)}, but n is {sent.get('n')} and there are {prompts} prompts"
    if any(sample["finish"] not in ("stop", "length") for sample in samples.values()):
        return f"finish reasons are {[sample['finish'] for sample in samples.values()]}"
    if not isinstance(value, list):
        if usage is None or usage["total_tokens"] != usage["prompt_tokens"] + usage["completion_tokens"]:
            return f"usage is {usage}"
        most = sent.get("max_completion_tokens") or sent.get("max_tokens")
        if most and usage["completion_tokens"] > most * len(samples):
            return f"{usage['completion_tokens']} tokens, but max_tokens is {most}"
    return _logprobs_fault(sent, chat, samples)


def _logprobs_fault(sent: dict[str, Any], chat: bool, samples: dict[int, dict[str, Any]]) -> str | None:
    wanted = sent.get("logprobs")
    for sample in samples.values():
        given = [part for part in sample["logprobs"] if part]
        if (wanted is None or wanted is False) and given:
            return f"log-probabilities that were not asked for: {given[:1]}"
        for part in given:
            if chat:
                if any(len(entry["top_logprobs"]) != (sent.get("top_logprobs") or 0) for entry in part["content"]):
                    return f"not as many alternatives as top_logprobs: {part}"
                continue
            sizes = {name: len(part[name]) for name in ("tokens", "token_logprobs", "text_offset")}
            if len(set(sizes.values())) != 1 or (part["top_logprobs"] and len(part["top_logprobs"]) != sizes["tokens"]):
                return f"lists of different length: {sizes}"
    return None


def _tokenized(sent: dict[str, Any], value: Any) -> str | None:
    right = value["count"] == len(value["tokens"]) and all(isinstance(one, int) for one in value["tokens"])
    return None if right and isinstance(value["max_model_len"], int) else f"tokenize gives {value}"


def _detokenized(sent: dict[str, Any], value: Any) -> str | None:
    return None if isinstance(value["prompt"], str) else f"detokenize gives {value}"


SHAPES = {CHAT: _generated, COMPLETIONS: _generated, "/tokenize": _tokenized, "/detokenize": _detokenized}


if __name__ == "__main__":
    sys.exit(main())
