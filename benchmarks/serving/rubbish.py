"""What no server should get. Each kind returns what is wrong with the answer, or None."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Awaitable, Callable

from benchmarks.serving.http1 import Address, Reply, fault_of_error, request_bytes

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = json.dumps({"prompt": "Once", "max_tokens": 100, "temperature": 1, "n": 4, "stream": True}).encode()
WRONG = [
    {"messages": "Hello"}, {"messages": []}, {"messages": [1]}, {"messages": [{"role": "user"}]}, {"prompt": 1.5}, [],
    {"messages": [{"role": "user", "content": "Hi"}], "temperature": "hot"}, None, 1, "text", {"prompt": [[]]},
    {"messages": [{"role": "king", "content": "Hi"}]}, {"prompt": "Hi", "max_tokens": -1}, {"prompt": [-1]},
]  # fmt: skip


def _refused(reply: Reply, *statuses: int) -> str | None:
    if reply.status not in statuses:
        return f"{reply.status} in place of {' or '.join(map(str, statuses))}: {reply.body[:200]!r}"
    return fault_of_error(reply)


async def broken_json(address: Address, chance: random.Random) -> str | None:
    text = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()
    return _refused(await address.ask("POST", CHAT, text[: chance.randrange(len(text))]), 400)


async def wrong_types(address: Address, chance: random.Random) -> str | None:
    body = json.dumps(chance.choice(WRONG)).encode()
    return _refused(await address.ask("POST", chance.choice([CHAT, COMPLETIONS]), body), 400)


async def unknown_path(address: Address, chance: random.Random) -> str | None:
    return _refused(await address.ask("POST", f"/v1/{chance.randrange(1 << 30)}", {}), 404)


async def wrong_method(address: Address, chance: random.Random) -> str | None:
    return _refused(await address.ask(chance.choice(["GET", "PUT", "DELETE", "PATCH"]), CHAT), 405)


async def half_a_head(address: Address, chance: random.Random) -> str | None:
    head = request_bytes("POST", CHAT, b"{}")
    async with await address.connect() as connection:
        await connection.send(head[: chance.randrange(1, len(head) - 6)])
        await asyncio.sleep(chance.random())
    return None


async def half_a_body(address: Address, chance: random.Random) -> str | None:
    async with await address.connect() as connection:
        await connection.request("POST", CHAT, b'{"messages": [', {"Content-Length": "1000"})
        await asyncio.sleep(chance.random())
    return None


async def silence(address: Address, chance: random.Random) -> str | None:
    async with await address.connect():
        await asyncio.sleep(5 * chance.random())
    return None


async def no_http(address: Address, chance: random.Random) -> str | None:
    """TLS's hello, or other bytes: the server says 400 or nothing, and closes."""
    junk = chance.choice([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", chance.randbytes(200), b"hello\r\n\r\n"])
    async with await address.connect() as connection:
        await connection.send(junk + b"\r\n\r\n")
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(10):
                answer = await connection.reader.read()
                return None if not answer or b" 400 " in answer.split(b"\r\n")[0] else f"answered by {answer[:80]!r}"
    return None


async def huge_head(address: Address, chance: random.Random) -> str | None:
    """A header of 200 kB: refused, or dropped."""
    async with await address.connect() as connection:
        with contextlib.suppress(ConnectionError, EOFError):
            await connection.request("GET", "/health", headers={"X-Much": "x" * 200_000})
            status = (await connection.head()).status
            return None if status in (400, 413, 431) else f"answered by {status}"
    return None


async def slow_reader(address: Address, chance: random.Random) -> str | None:
    """Takes a few bytes at a time, and goes before the end."""
    async with await address.connect(receive_buffer=2048) as connection:
        await connection.request("POST", COMPLETIONS, LONG)
        for _ in range(40):
            await connection.reader.read(16)
            await asyncio.sleep(0.05)
        connection.reset()
    return None


async def dropped(address: Address, chance: random.Random) -> str | None:
    """Resets the connection, sometimes before the first token."""
    connection = await address.connect()
    await connection.request("POST", COMPLETIONS, LONG)
    await asyncio.sleep(0.5 * chance.random() ** 2)
    connection.reset()
    return None


async def pipelined(address: Address, chance: random.Random) -> str | None:
    """Two requests at once on one connection: two answers, in their order."""
    async with await address.connect() as connection:
        await connection.send(request_bytes("GET", "/v1/models") + request_bytes("POST", COMPLETIONS, b"{"))
        first, second = await connection.reply(), await connection.reply()
    return f"{first.status}, {second.status}" if first.status != 200 else _refused(second, 400)


KINDS: dict[str, Callable[[Address, random.Random], Awaitable[str | None]]] = {
    kind.__name__.replace("_", " "): kind
    for kind in (
        broken_json, wrong_types, unknown_path, wrong_method, half_a_head, half_a_body, silence, no_http, huge_head,
        slow_reader, dropped, pipelined,
    )
}  # fmt: skip
