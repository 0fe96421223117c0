"""Clients that go or wait, and the start and the end of a server."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from benchmarks.serving.http1 import request_bytes
from benchmarks.serving.server import ROOT, free_port, total
from tests.serve.clients.conftest import CHAT, GREETING, HELLO, answer, served

pytestmark = pytest.mark.usefixtures("still_well")
LONG = {"messages": HELLO, "temperature": 2, "max_tokens": 100, "stream": True}


@pytest.mark.parametrize("after", [0.0, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("reset", [False, True])
def test_clients_that_leave(server, after, reset):
    async def leave():
        connection = await server.address.connect()
        await connection.request("POST", CHAT, json.dumps(LONG).encode())
        await asyncio.sleep(after)
        if reset:
            connection.reset()
        else:
            connection.writer.close()

    async def all_leave():
        await asyncio.gather(*(leave() for _ in range(24)))

    asyncio.run(all_leave())


def test_a_client_that_is_killed(server):
    program = (
        "import socket, sys, time\n"
        "connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "connection.sendall(sys.stdin.buffer.read())\n"
        "print(connection.recv(100)[:15], flush=True)\n"
        "time.sleep(60)\n"
    )
    body = json.dumps(LONG | {"n": 4}).encode()
    client = subprocess.Popen([sys.executable, "-c", program, *map(str, server.address)], stdin=-1, stdout=-1)
    client.stdin.write(request_bytes("POST", CHAT, body))
    client.stdin.close()
    assert b"200" in client.stdout.readline()
    client.kill()
    client.wait()


def test_a_reader_that_is_slow_gets_everything(server):
    async def read_slowly():
        async with await server.address.connect(receive_buffer=1024) as connection:
            body = {"messages": HELLO, "temperature": 0, "stream": True}
            await connection.request("POST", CHAT, json.dumps(body).encode())
            head, events = await connection.head(), []
            async for event in connection.events(head):
                events.append(event)
                await asyncio.sleep(0.05)
            return events

    *frames, last = asyncio.run(read_slowly())
    assert last == "[DONE]"
    assert "".join(json.loads(frame)["choices"][0]["delta"].get("content", "") for frame in frames) == GREETING


def test_many_idle_connections(server):
    """Others are served although hundreds of connections say nothing, and they cost nothing once closed."""
    before = server.open_files()
    idle = [socket.create_connection(tuple(server.address)) for _ in range(400)]
    try:
        assert answer(server) == GREETING
    finally:
        for connection in idle:
            connection.close()
    until = time.monotonic() + 10
    while server.open_files() > before + 5 and time.monotonic() < until:
        time.sleep(0.1)
    assert server.open_files() <= before + 5


def test_sigterm_lets_streams_end(run_dir):
    """What is being answered is answered to its end; nothing new is taken."""

    async def talk(server):
        async def one():
            async with await server.address.connect() as connection:
                body = {"messages": HELLO, "temperature": 0, "stream": True}
                await connection.request("POST", CHAT, json.dumps(body).encode())
                head = await connection.head()
                started.release()
                return [event async for event in connection.events(head)]

        started = asyncio.Semaphore(0)
        streams = [asyncio.create_task(one()) for _ in range(64)]
        for _ in streams:
            await started.acquire()
        server.process.send_signal(signal.SIGTERM)
        return await asyncio.gather(*streams)

    with served(run_dir) as server:
        for events in asyncio.run(talk(server)):
            assert events[-1] == "[DONE]"
            contents = [json.loads(e)["choices"][0]["delta"].get("content", "") for e in events[:-1]]
            assert "".join(contents) == GREETING
        assert server.process.wait(30) == 75, server.log


def start(*options):
    command = [sys.executable, "-m", "jaxchat", "serve", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_starts_that_cannot_be(run_dir, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options, words in [
            (["--run", tmp_path / "none", "--port", free_port()], "none"),
            (["--run", run_dir, "--port", port], str(port)),
            (["--run", run_dir, "--port", 70000], "70000"),
            (["--run", run_dir, "--port", "http"], "port"),
            (["--run", run_dir, "--host", "203.0.113.7", "--no-api-key", "--port", free_port()], "203.0.113.7"),
            (["--run", run_dir, "--host", "0.0.0.0", "--port", free_port()], "key"),
            (
                ["--run", run_dir, "--host", "no.such.host.invalid", "--no-api-key", "--port", free_port()],
                "no.such.host.invalid",
            ),
            (["--run", run_dir, "--stage", "sftt", "--port", free_port()], "sft"),
        ]:
            done = start(*options)
            lines = done.stderr.splitlines()
            assert done.returncode == 2, (options, done.stderr)
            assert lines[-1].startswith("error: ") and words in lines[-1], (options, done.stderr)
            assert "Traceback" not in done.stderr


def test_metrics_count_what_was_answered(server):
    before = asyncio.run(server.metrics())
    for _ in range(3):
        answer(server)
    after = asyncio.run(server.metrics())
    assert total(after, "vllm:request_success_total") - total(before, "vllm:request_success_total") == 3
