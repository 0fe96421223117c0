"""Starts `jaxchat serve` as a process of its own, and looks at it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.serving.http1 import Address

ROOT = Path(__file__).parents[2]


class Server:
    """A running server. `log` is what it has written to stderr and stdout so far."""

    def __init__(self, process: subprocess.Popen[bytes], address: Address, log_file: Path):
        self.process, self.address, self._log = process, address, log_file

    @property
    def url(self) -> str:
        return f"http://{self.address.host}:{self.address.port}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def memory(self) -> float:
        """Resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def open_files(self) -> int:
        """How many files and sockets it holds open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def metrics(self) -> dict[str, float]:
        """The values of `/metrics`, by name with labels; `total` sums those of one name."""
        text = (await self.address.ask("GET", "/metrics")).body.decode()
        lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    async def idle(self, seconds: float = 10) -> bool:
        """Whether no request is running or waiting within `seconds`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            now = await self.metrics()
            if total(now, "vllm:num_requests_running") == total(now, "vllm:num_requests_waiting") == 0:
                return True
            await asyncio.sleep(0.1)
        return False


def total(metrics: dict[str, float], name: str) -> float:
    """The sum over the labels of a metric."""
    return sum(value for key, value in metrics.items() if re.split(r"[{ ]", key)[0] == name)


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(run_dir: Path | str, *options: str, seconds: float = 300, ends: int | None = 75) -> Iterator[Server]:
    """A server of `run_dir` that answers; at the end it gets SIGTERM, and must end within a minute.

    Args:
      seconds: how long it may take to be ready.
      ends: the exit code that it must end with, by default that of SIGTERM; None for any.

    Raises:
      RuntimeError: it ended, was not ready in time, or did not end as it should; the message has its output.
    """
    address = Address("127.0.0.1", free_port())
    command = [sys.executable, "-m", "jaxchat", "serve", "--run", str(run_dir), "--port", str(address.port), *options]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        with open(path, "wb") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        server = Server(process, address, path)
        try:
            _wait_until_ready(server, time.monotonic() + seconds)
            yield server
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(60)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"the server goes on a minute after SIGTERM:\n{server.log}") from None
            if ends is not None and code != ends:
                raise RuntimeError(f"the server ended with {code}, not with {ends}:\n{server.log}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait_until_ready(server: Server, until: float) -> None:
    while True:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.returncode}:\n{server.log}")
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if asyncio.run(server.address.ask("GET", "/health")).status == 200:
                return
        if time.monotonic() > until:
            raise RuntimeError(f"the server is not ready in time:\n{server.log}")
        time.sleep(0.1)
