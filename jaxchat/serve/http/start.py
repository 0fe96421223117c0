"""Starting and ending a server: its socket, its threads, and what it says meanwhile.

The main thread owns the device: it loads the model, compiles, and runs the engine. The HTTP server runs in a thread of
its own from the beginning, so that /health can be asked while the model is loaded.
"""

from __future__ import annotations

import errno
import gc
import ipaddress
import os
import re
import socket
import sys
import threading
import time
import webbrowser
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from jaxchat import stopping
from jaxchat.errors import UserError, check
from jaxchat.serve.http.app import build_app
from jaxchat.serve.http.connections import IDLE_SECONDS, Connection, allow_many_connections
from jaxchat.serve.http.service import Service
from jaxchat.serve.http.serving import Served, Server
from jaxchat.tools.choice import choose_tool

if TYPE_CHECKING:
    from jaxchat.infer.quantized import KVCache, Weights

DRAIN_SECONDS = 25.0  # Kubernetes kills 30 seconds after SIGTERM
PROGRESS_SECONDS = 10.0  # between two lines of progress that is not on a terminal
NOTICE = "finishing the answers under way; Ctrl-C again stops at once"
# What browsers send as the Origin of a page; "null" is that of a page in a file.
_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://([^\s/?#@:\[\]]+|\[[0-9a-f:.]+\])(:\d+)?")
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Options:
    """How `jaxchat serve` was started; the names are those of its options."""

    run: str
    stage: str | None
    step: str | None
    name: str | None
    host: str
    port: int
    api_key: str | None
    no_api_key: bool
    allow_origin: tuple[str, ...]
    rows: int
    max_waiting: int
    weights: Weights
    kv_cache: KVCache
    tools: str
    uncontained: bool
    watch: bool
    open: bool


def serve(options: Options) -> int:
    """Serves a run's model, or only shows the run, until the process is asked to end. Returns the exit code.

    Raises:
      UserError: an address or origin that cannot be used; no such run, stage or step.
      Interrupted: asked to end, once the answers under way are finished.
    """
    origins = tuple(_origin(given) for given in options.allow_origin)
    allow_many_connections()
    listener = listen(options.host, options.port)
    local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    key = _key(options, local)
    server = Server(
        None if options.watch else Service(most_waiting=options.max_waiting),
        run_dir=options.run,
        key=key,
        hosts=LOCAL | {options.host.lower()} if local else None,
        origins=origins,
    )
    web = Web(build_app(server), listener)
    try:
        if server.service is None:
            _ready(options, web, f"watching {options.run}")
            web.wait()
        else:
            _answer(options, server, server.service, web)
    finally:
        web.stop()
    raise RuntimeError("the HTTP server has ended by itself")


def _origin(given: str) -> str:
    """An origin as browsers send it, or `*` for all."""
    origin = given.rstrip("/").lower()
    check(
        origin == "*" or _ORIGIN.fullmatch(origin) is not None,
        f"--allow-origin is '{given}'; give scheme://host[:port], such as https://chat.example.com, or * for all sites",
    )
    return origin


def _key(options: Options, local: bool) -> str | None:
    """The API key that clients must send."""
    if options.no_api_key:
        check(options.api_key is None, "--api-key and --no-api-key contradict each other; give one of them")
        return None
    key, source = options.api_key, "--api-key"
    if key is None:
        key, source = os.environ.get("JAXCHAT_API_KEY") or None, "JAXCHAT_API_KEY"
    check(key is None or (key.isascii() and key.isprintable() and " " not in key and key != ""),
          f"{source} must be printable ASCII without spaces, at least one character")  # fmt: skip
    check(
        key is not None or local,
        f"--host {options.host} can be reached by others: set a key with --api-key KEY or in JAXCHAT_API_KEY, or write "
        "--no-api-key to let everyone in",
    )
    return key


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one.

    Raises:
      UserError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(
            f"--host {host} is not known here; write --host 127.0.0.1, or 0.0.0.0 for all networks"
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name != "nt":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reasons = {
            errno.EADDRINUSE: f"port {port} of {host} is taken; choose another, such as --port {port % 65535 + 1}",
            errno.EADDRNOTAVAIL: f"this machine has no address {host}; write --host 127.0.0.1, or 0.0.0.0 for all",
            errno.EACCES: f"port {port} is not for ordinary users; choose one from 1024 on, such as --port 8000",
        }
        default = f"{host} port {port} cannot be used ({error.strerror}); choose another --host or --port"
        raise UserError(reasons.get(error.errno or 0, default)) from None
    return listener


class Web:
    """The HTTP server in a thread of its own."""

    def __init__(self, app: ASGIApp, listener: socket.socket):
        host, self.port = listener.getsockname()[:2]
        host = "localhost" if ipaddress.ip_address(host).is_unspecified else host  # 0.0.0.0 is no address to go to
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            http=Connection,
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=round(IDLE_SECONDS),
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)  # which leaves signals alone outside the main thread
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        """Waits for its end, which comes only if something is wrong with it."""
        self._thread.join()

    def stop(self) -> None:
        """Takes no more connections, and lets the open ones end for a few seconds."""
        self._server.should_exit = True
        self._thread.join(10)


def _answer(options: Options, server: Server, service: Service, web: Web) -> None:
    """Loads the model, and answers requests until the process is asked to end."""
    from jaxchat.devices.compile_cache import keep_compiled  # imports JAX
    from jaxchat.infer.trained import load_model
    from jaxchat.model.parameters import count_parameters
    from jaxchat.runs.directory import RunDirectory

    keep_compiled()

    def over() -> bool:
        return service.state in ("failed", "stopped")

    tool = choose_tool(options.tools, uncontained=options.uncontained, cancelled=over)
    if sys.stderr is not None and sys.stderr.isatty():
        _say(f"loading {options.run}")
    directory = RunDirectory(options.run)
    try:
        model = load_model(options.run, options.stage, options.step)
    except UserError as error:
        if directory.path.exists() and not directory.stages_with_model():
            raise UserError(f"{error}; add --watch to see how it trains") from None
        raise
    engine = model.engine(rows=options.rows, weights=options.weights, kv_cache=options.kv_cache)
    progress = Progress("compiling", time.monotonic())
    engine.warm_up(progress.show)
    progress.end()
    # Compiling leaves so many objects that the collector's look through them all takes up to a quarter of a second.
    gc.collect()
    gc.freeze()
    service.engine = engine
    server.served = served = Served.of(
        engine,
        name=options.name or PurePath(str(directory)).name or "jaxchat",
        stage=model.stage,
        stages=tuple(directory.stages_with_model()),
        created=(directory.read_record(model.stage) or {}).get("finished") or time.time(),
        parameters=count_parameters(model.model).total,
        tool=tool.answer,
        tool_name=options.tools,
    )
    if tool.says and not served.base:
        _say(tool.says)
    _ready(options, web, f"{served.name} ({served.stage}) answers")
    with stopping.deferred(alone=False, notice=NOTICE) as request:
        service.run(lambda: request.cause is not None or not web.alive, DRAIN_SECONDS)
        web.stop()


def _ready(options: Options, web: Web, what: str) -> None:
    print(f"{what} at {web.url}", flush=True)
    if options.open:
        threading.Thread(target=webbrowser.open, args=(web.url,), daemon=True).start()


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


class Progress:
    """A line of progress on stderr, redrawn in place on a terminal; elsewhere printed about every ten seconds."""

    def __init__(self, what: str, begun: float):
        self.what, self.last = what, begun
        self.redraws = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.shown = False

    def show(self, done: int, total: int) -> None:
        """Shows that `done` of `total` pieces are done."""
        line = f"{self.what} {done}/{total}"
        if self.redraws:
            sys.stderr.write(f"\r{line}")
            sys.stderr.flush()
            self.shown = True
        elif time.monotonic() - self.last >= PROGRESS_SECONDS:
            _say(line)
            self.last = time.monotonic()

    def end(self) -> None:
        """Leaves the last line on the screen."""
        if self.shown:
            _say("")
