"""HTTP as it reaches a server: old, broken, in pieces, or none at all. The next client notices nothing."""

import asyncio
import json

import pytest

from benchmarks.serving.http1 import fault_of_error, request_bytes
from tests.serve.clients.conftest import CHAT, COMPLETIONS, GREETING, HELLO, SUM, refused

pytestmark = pytest.mark.usefixtures("still_well")


def over_the_wire(server, data, seconds=10):
    """Everything that the server sends for some bytes, until it closes or has nothing more to say."""

    async def talk():
        async with await server.address.connect() as connection:
            await connection.send(data)
            received = b""
            try:
                async with asyncio.timeout(seconds):
                    while piece := await connection.reader.read(1 << 16):
                        received += piece
            except TimeoutError:
                pass
            return received

    return asyncio.run(talk())


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b'"text"', b'{"messages": NaN}', b"{}{}", b"\0", "{}".encode("utf-16"),
     b"[" * 100_000, b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}", b'{"n": ' + b"9" * 5_000 + b"}"],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_broken_json(ask, path, body):
    refused(ask("POST", path, body))


def test_a_body_that_is_too_large(ask):
    error = refused(ask("POST", CHAT, json.dumps({"messages": HELLO, "user": "x" * 9_000_000}).encode()), 413)
    assert "bytes" in error["message"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_wrong_methods(ask, method):
    reply = ask(method, CHAT)
    assert reply.status == 405 and "POST" in reply.headers["allow"] and fault_of_error(reply) is None


def test_head(ask):
    whole, head = ask("GET", "/v1/models"), ask("HEAD", "/v1/models")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", whole.headers["content-length"])


@pytest.mark.parametrize(
    "path",
    [
        "/v1",
        "/v1/",
        "/v1/nothing",
        "/v1/models/../x",
        "/page/../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/api/x",
        "/%c3%a4",
    ],
)  # noqa: E501
def test_unknown_paths(ask, path):
    refused(ask("GET", path), 404)


def test_an_impossible_range_of_a_file_is_left_alone(ask):
    whole = ask("GET", "/")
    assert ask("GET", "/", None, {"Range": "bytes=5-2"}).body == whole.body and whole.status == 200


def test_no_cors_unless_asked(ask):
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    for reply in (ask("GET", "/v1/models", None, asked), ask("OPTIONS", CHAT, None, asked)):
        assert not any(name.startswith("access-control") for name in reply.headers)


def test_http_1_0(server):
    """A stream to a client of 1997 comes without chunks, and ends with the connection."""
    body = json.dumps({"messages": HELLO, "temperature": 0, "stream": True}).encode()
    data = request_bytes("POST", CHAT, body).replace(b"HTTP/1.1", b"HTTP/1.0")
    head, _, rest = over_the_wire(server, data).partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0] and b"chunked" not in head.lower()
    frames = [line.removeprefix("data: ") for line in rest.decode().split("\n\n")]
    assert frames[-2:] == ["[DONE]", ""]
    assert "".join(json.loads(f)["choices"][0]["delta"].get("content", "") for f in frames[:-2]) == GREETING


def test_pipelined_requests_are_answered_in_order(server):
    def chat(messages):
        return request_bytes("POST", CHAT, json.dumps({"messages": messages, "temperature": 0}).encode())

    async def talk():
        async with await server.address.connect() as connection:
            await connection.send(chat(SUM) + chat(HELLO) + request_bytes("GET", "/health") + chat(SUM))
            return [await connection.reply() for _ in range(4)]

    first, second, third, fourth = asyncio.run(talk())
    texts = [reply.json["choices"][0]["message"]["content"] for reply in (first, second, fourth)]
    assert texts == ["It is 92.", GREETING, "It is 92."] and third.status == 200


def test_a_body_in_chunks(server):
    body = json.dumps({"messages": HELLO, "temperature": 0}).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
    )
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7))
    assert GREETING.encode() in over_the_wire(server, head + pieces + b"0\r\n\r\n")


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Much: " + b"x" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}{}{}",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"hello\r\n\r\n",
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_is_no_request(server, data):
    """It is refused, or the connection closed; the server does not wait for more."""
    try:
        received = over_the_wire(server, data)
    except ConnectionError:
        return
    assert received == b"" or received.split()[1] in (b"400", b"403", b"413", b"414", b"431"), received[:100]
    assert "Traceback" not in server.log
