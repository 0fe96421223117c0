"""HTTP/1.1 on asyncio streams, as little as measuring a server needs, and as low as misbehaving needs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

Json = Any


class Head(NamedTuple):
    """The beginning of a response: its status, and its headers by name in lower case."""

    status: int
    headers: dict[str, str]


class Reply(NamedTuple):
    """A whole response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        return json.loads(self.body)


class Connection:
    """A TCP connection to the server. As a context manager it closes itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    def reset(self) -> None:
        """Drops the connection at once, as a process that is killed does: the server gets RST."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def request(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}) -> None:  # noqa: B006
        await self.send(request_bytes(method, path, body, headers))

    async def head(self) -> Head:
        """The status line and headers of the next response."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in lines[1:-2]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return Head(int(lines[0].split()[1]), headers)

    async def pieces(self, head: Head) -> AsyncIterator[bytes]:
        """The body after `head`, in the pieces that the server sent; until the end of the connection if it gives no
        length."""
        if head.headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readline(), 16):
                yield await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readline()
        elif "content-length" in head.headers:
            yield await self.reader.readexactly(int(head.headers["content-length"]))
        elif head.status not in (204, 304):
            while data := await self.reader.read(1 << 16):
                yield data

    async def reply(self, method: str = "POST") -> Reply:
        """The next response, that to a request with `method`."""
        head = await self.head()
        return Reply(*head, b"" if method == "HEAD" else b"".join([piece async for piece in self.pieces(head)]))

    async def events(self, head: Head) -> AsyncIterator[str]:
        """The data of the server-sent events of the body."""
        rest = b""
        async for piece in self.pieces(head):
            *whole, rest = (rest + piece).split(b"\n\n")
            for event in whole:
                if not event.startswith(b"data: "):
                    raise ValueError(f"not an event with data: {event[:80]!r}")
                yield event.removeprefix(b"data: ").decode()
        if rest:
            raise ValueError(f"half an event: {rest[:80]!r}")


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    async def connect(self, receive_buffer: int | None = None) -> Connection:
        """A new connection, whose kernel holds about `receive_buffer` bytes that were not read."""
        raw = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(raw, self)
        except BaseException:
            raw.close()
            raise
        limit = 1 << 16 if receive_buffer is None else receive_buffer
        return Connection(*await asyncio.open_connection(sock=raw, limit=limit))

    async def ask(
        self,
        method: str,
        path: str,
        body: Json | bytes = None,
        headers: Mapping[str, str] = {},  # noqa: B006
    ) -> Reply:
        """The whole response to one request on a connection of its own; a body that is not bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        async with await self.connect() as connection:
            await connection.request(method, path, data, headers)
            return await connection.reply(method)


def request_bytes(method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}) -> bytes:  # noqa: B006
    """A request as it goes over the wire."""
    fields = {"Host": "localhost"} | ({} if body is None else {"Content-Type": "application/json"})
    fields |= {} if body is None else {"Content-Length": str(len(body))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in {**fields, **headers}.items())]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + (body or b"")


def fault_of_error(reply: Reply) -> str | None:
    """What is wrong with a refusal: it must have the form of OpenAI's errors, with a message of one line."""
    try:
        body = reply.json
    except ValueError:
        return f"{reply.status} without JSON: {reply.body[:100]!r}"
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or set(error) < {"message", "type", "param", "code"}:
        return f"{reply.status} without an error of OpenAI's form: {reply.body[:200]!r}"
    if not isinstance(error["message"], str) or not error["message"] or "\n" in error["message"]:
        return f"{reply.status} with a message that is not one line of text: {error['message']!r}"
    if not isinstance(error["type"], str):
        return f"{reply.status} with a type that is no text: {error['type']!r}"
    if any(not isinstance(error[name], str | None) for name in ("param", "code")):
        return f"{reply.status} with a param or code that is neither text nor null: {error!r}"
    return None
