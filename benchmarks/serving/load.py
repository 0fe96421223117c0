"""Many clients at once, some of which leave or misbehave: is any answer lost or mixed up, and what does it cost?

    python -m benchmarks.serving.load --run runs/quickstart
    python -m benchmarks.serving.load --run runs/quickstart --clients 8 --seconds 10 --json load.json

Starts `jaxchat serve` and asks each question alone, without streaming. Then every client asks one after the other, at
random, streaming, for `--seconds`; every third time it leaves halfway, and the first frames that it got still count.
Besides, `--rubbish` clients send what no server should get: broken JSON, wrong types, half requests, bytes that are no
HTTP, streams that they read slowly or drop. All questions have one right answer, the one that was given alone: at
temperature 0, with a seed, with several samples, with log-probabilities, in the second turn of a conversation.

Printed are latencies, throughput, and the server's memory. Time to first token is from the first byte sent to the first
text received; between tokens, from one frame with text to the next of the same sample. The exit code is 1 if an answer
differs, a stream breaks off, rubbish is answered otherwise than it should be, a request is still running at the end, or
memory has grown.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.serving.http1 import Address
from benchmarks.serving.questions import Answer, Question, Stream, questions
from benchmarks.serving.rubbish import KINDS
from benchmarks.serving.server import Server, serving, total
from benchmarks.timing import machine, say
from jaxchat.errors import UserError

LEAVES = 1 / 3  # the share of requests whose client leaves halfway
GROWTH = 32.0  # MiB that the server's memory may grow between the second quarter of the time and the last
PERCENTILES = (50, 95, 99)


@dataclasses.dataclass
class Tally:
    """What the clients saw."""

    streams: list[Stream] = dataclasses.field(default_factory=list)
    left: int = 0
    rubbish: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    memory: list[float] = dataclasses.field(default_factory=list)  # MiB, once a second
    files: list[int] = dataclasses.field(default_factory=list)  # open files of the server, once a second


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="the run to serve")
    add("--clients", type=int, default=64, metavar="N", help="clients that stream (default 64)")
    add("--rubbish", type=int, default=8, metavar="N", help="clients that misbehave (default 8)")
    add("--seconds", type=float, default=60, metavar="S", help="how long they ask (default 60)")
    add("--seed", type=int, default=0, metavar="N", help="of what the clients do (default 0)")
    add("--json", metavar="FILE", help="write the figures to a file")
    add(
        "--serve", nargs=argparse.REMAINDER, default=[], metavar="...", help="options for jaxchat serve; must come last"
    )
    options = parser.parse_args(arguments)
    try:
        with serving(options.run, *options.serve) as server:
            tally, figures = asyncio.run(
                measure(server, options.clients, options.rubbish, options.seconds, random.Random(options.seed))
            )
    except (UserError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))
    for fault in tally.faults[:20]:
        print(f"fault: {fault}", file=sys.stderr)
    if len(tally.faults) > 20:
        print(f"and {len(tally.faults) - 20} more", file=sys.stderr)
    return 1 if tally.faults else 0


async def measure(
    server: Server, clients: int, rubbish: int, seconds: float, chance: random.Random
) -> tuple[Tally, dict]:
    """Runs the load. Returns what the clients saw, and the figures."""
    asked = questions(await _model(server.address))
    say(f"asking {len(asked)} questions, each alone")
    right = {question: await question.alone(server.address) for question in asked}
    tally = Tally()
    before, started = await server.metrics(), time.monotonic()
    until = started + seconds
    work = [_client(server.address, right, tally, until, random.Random(chance.random())) for _ in range(clients)]
    work += [_misbehave(server.address, tally, until, random.Random(chance.random())) for _ in range(rubbish)]
    work += [_watch(server, tally, until)]
    await asyncio.gather(*work)
    elapsed = time.monotonic() - started
    if not await server.idle():
        tally.faults.append("requests are running or waiting after the last client has gone")
    after = await server.metrics()
    quarter = len(tally.memory) // 4
    grown = max(tally.memory[-quarter:], default=0) - max(tally.memory[quarter : 2 * quarter], default=0)
    if grown > GROWTH:
        tally.faults.append(f"the server's memory has grown by {grown:.0f} MiB")
    return tally, _figures(tally, clients, rubbish, elapsed, grown, before, after)


async def _model(address: Address) -> str:
    return (await address.ask("GET", "/v1/models")).json["data"][0]["id"]


async def _client(
    address: Address, right: dict[Question, Answer], tally: Tally, until: float, chance: random.Random
) -> None:
    """Asks one question after the other until the time is over."""
    everything = list(right)
    while time.monotonic() < until:
        question = chance.choice(everything)
        answer = right[question]
        leave_after = chance.randrange(max(1, answer.characters)) if chance.random() < LEAVES else None
        try:
            async with asyncio.timeout(60 + until - time.monotonic()):
                stream = await question.streamed(address, leave_after)
        except TimeoutError:
            tally.faults.append(f"{question.name}: no end after a minute")
            continue
        except (OSError, EOFError, ValueError) as error:
            tally.faults.append(f"{question.name}: {type(error).__name__}: {error}")
            continue
        if fault := stream.fault(answer):
            tally.faults.append(f"{question.name}: {fault}")
        if stream.left:
            tally.left += 1
        else:
            tally.streams.append(stream)


async def _misbehave(address: Address, tally: Tally, until: float, chance: random.Random) -> None:
    while time.monotonic() < until:
        kind = chance.choice(sorted(KINDS))
        try:
            async with asyncio.timeout(60):
                fault = await KINDS[kind](address, chance)
        except TimeoutError:
            fault = "no end after a minute"
        except (OSError, EOFError, ValueError) as error:
            fault = f"{type(error).__name__}: {error}"
        tally.rubbish[kind] += 1
        if fault:
            tally.faults.append(f"{kind}: {fault}")
        await asyncio.sleep(0.05)


async def _watch(server: Server, tally: Tally, until: float) -> None:
    while time.monotonic() < until:
        tally.memory.append(server.memory())
        tally.files.append(server.open_files())
        await asyncio.sleep(1)


def _figures(tally: Tally, clients: int, rubbish: int, elapsed: float, grown: float, before: dict, after: dict) -> dict:
    streams = tally.streams
    gaps = [gap for stream in streams for gap in stream.gaps]
    generated = total(after, "vllm:generation_tokens_total") - total(before, "vllm:generation_tokens_total")
    return {
        "machine": machine("jax", "starlette", "uvicorn") | {"usable cores": len(os.sched_getaffinity(0))},
        "clients": clients,
        "seconds": elapsed,
        "answers": len(streams),
        "left halfway": tally.left,
        "faults": len(tally.faults),
        "rubbish clients": rubbish,
        "rubbish": dict(sorted(tally.rubbish.items())),
        "answers a second": len(streams) / elapsed,
        "tokens a second": generated / elapsed,
        "milliseconds": {
            "to the first token": _percentiles([stream.first for stream in streams if stream.first is not None]),
            "between tokens": _percentiles(gaps),
            "whole answer": _percentiles([stream.whole for stream in streams]),
        },
        "memory, MiB": {
            "first": tally.memory[0],
            "most": max(tally.memory),
            "last": tally.memory[-1],
            "growth": grown,
            "each second": [round(value, 1) for value in tally.memory],
        },
        "open files": {"first": tally.files[0], "most": max(tally.files), "last": tally.files[-1]},
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds, by nearest rank."""
    ordered = sorted(seconds) or [float("nan")]
    ranks = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in PERCENTILES}
    return {name: round(1000 * value, 1) for name, value in (ranks | {"most": ordered[-1]}).items()}


def table(figures: dict) -> str:
    """The figures as Markdown."""
    lines = ["| milliseconds | p50 | p95 | p99 | most |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, values in figures["milliseconds"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:,.0f}" for value in values.values()) + " |")
    memory = figures["memory, MiB"]
    lines += [
        "",
        f"{figures['clients']} clients on {figures['machine']['usable cores']} cores for {figures['seconds']:.0f} s: "
        f"{figures['answers']:,} answers, {figures['left halfway']:,} left halfway, "
        f"{sum(figures['rubbish'].values()):,} times rubbish, {figures['faults']} faults; "
        f"{figures['answers a second']:.1f} answers and {figures['tokens a second']:,.0f} tokens a second; "
        f"memory {memory['first']:,.0f} MiB at first, {memory['most']:,.0f} at most, {memory['last']:,.0f} at last; "
        "open files {first}, {most}, {last}.".format(**figures["open files"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
