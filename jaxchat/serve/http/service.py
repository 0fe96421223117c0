"""The thread that owns the device, and how requests reach it from the event loop and come back.

One thread runs the engine. The event loop hands it jobs through a queue, which it looks through between two steps of
the engine; what a step returns goes back to the loop in one piece. Nothing waits for a client: outputs that a slow one
has not taken yet are kept for it, and those are no more than the model's context has tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import queue
import sys
import threading
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jaxchat.errors import UserError
from jaxchat.infer.request import Output, Request
from jaxchat.serve.http.errors import ApiError
from jaxchat.serve.http.metrics import Metrics, Watch

if TYPE_CHECKING:
    from jaxchat.infer.engine import Engine  # imports JAX, which a run can be watched without

MOST_WAITING = 256  # requests for which the engine has no row yet
IDLE_SECONDS = 0.2  # between two looks for a request to stop
RETRY_SECONDS = 2

State = Literal["loading", "ready", "draining", "failed", "stopped"]
Result = TypeVar("Result")
# Requests by their place in a call, and what each has got.
Batch = list[tuple[int, Output]]


class _Call:
    """The requests of one client's call: what has come for them and was not taken yet. Used in its loop only."""

    def __init__(self, requests: Sequence[Request]):
        self.loop = asyncio.get_running_loop()
        self.requests = requests
        self.open = len(requests)  # how many have not ended
        self.ready: Batch = []
        self.error: Exception | None = None
        self.wake = asyncio.Event()

    def give(self, batch: Batch) -> None:
        self.ready.extend(batch)
        self.open -= sum(output.finish is not None for _, output in batch)
        self.wake.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.wake.set()


class Service:
    """Runs an engine in one thread for clients in an event loop.

    Args:
      engine: the engine, or None if `run` gets it later.
      most_waiting: how many requests may wait for a row; more are refused with status 429.

    Attributes:
      state: "loading" before the engine runs, then "ready"; "draining" once it is to stop, "failed" after an exception
        in the engine.
    """

    def __init__(self, engine: Engine | None = None, *, most_waiting: int = MOST_WAITING):
        self.engine, self.most_waiting = engine, most_waiting
        self.state: State = "loading"
        self.metrics = Metrics()
        self._in_flight = 0  # requests, counted in the loop
        # Not a SimpleQueue: in CPython 3.11 its `get` waits without end if a signal's handler outlasts the timeout.
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        self._calls: dict[int, tuple[_Call, int]] = {}  # by the engine's number; used in the thread only
        self._thread: threading.Thread | None = None
        self._asked = threading.Event()

    # --- in the event loop ----------------------------------------------------------------------------------------

    async def stream(self, request: Request) -> AsyncIterator[Output]:
        """What `request` gets, as it comes; leaving the loop, or cancelling its task, cancels the request.

        Raises:
          ApiError: the server is loading, stopping or full, or the engine refuses the request or fails.
        """
        async with contextlib.aclosing(self.outputs([request])) as batches:
            async for batch in batches:
                for _, output in batch:
                    yield output

    async def outputs(self, requests: Sequence[Request]) -> AsyncGenerator[Batch, None]:
        """What several requests get, together with their places in `requests`: all that has come since the last time.

        Raises: as `stream`.
        """
        self.check_ready()
        room = (self.engine.rows if self.engine else 0) + self.most_waiting
        if self._in_flight and self._in_flight + len(requests) > room:
            message = f"{self._in_flight:,} requests are being answered or wait; try again"
            raise ApiError(429, message, code="queue_full", retry_after=RETRY_SECONDS)
        call, watch = _Call(requests), Watch(self.metrics, requests)
        self._in_flight += len(requests)
        self._jobs.put(functools.partial(self._submit, call))
        try:
            while call.open or call.ready:
                await call.wake.wait()
                call.wake.clear()
                batch, call.ready = call.ready, []
                if batch:
                    watch.see(batch)
                    yield batch
                if call.error is not None:
                    raise call.error
        finally:
            self._in_flight -= len(requests)
            watch.close()
            if call.open and call.error is None:
                self._jobs.put(functools.partial(self._cancel, call))

    async def call(self, function: Callable[[], Result]) -> Result:
        """The result of `function`, which the thread that owns the device calls between two steps.

        Raises:
          ApiError: the server is loading or stopping, or the engine has failed; and whatever `function` raises.
        """
        self.check_ready()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def job() -> None:
            result, error = None, None
            try:
                self._check_runs()
                result = function()
            except Exception as raised:
                error = raised
            _in_loop(loop, settle, result, error)

        self._jobs.put(job)
        return await future

    def check_ready(self) -> None:
        """Raises an `ApiError` with status 503 unless requests can be taken."""
        if self.state == "loading":
            raise ApiError(503, "the model is still being loaded; try again", code="loading", retry_after=RETRY_SECONDS)
        if self.state == "failed":
            raise _failed(503)
        if self.state != "ready":
            raise _stopping()

    # --- in the thread that owns the device -----------------------------------------------------------------------

    def run(self, asked: Callable[[], bool], drain_seconds: float) -> None:
        """Answers requests in this thread until `asked()` is true; then ends what is in flight.

        An exception of the engine ends the requests in flight, and later ones are refused; this method goes on.

        Args:
          drain_seconds: how long requests in flight may still take once `asked()` is true.
        """
        self.state, deadline = "ready", math.inf
        while True:
            if asked():
                deadline = min(deadline, time.monotonic() + drain_seconds)
                if self.state == "ready":
                    self.state = "draining"
                if not self._calls or time.monotonic() >= deadline:
                    break
            try:
                self._turn()
            except Exception:
                print(f"error: the engine has failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                self.state = "failed"
                self._end(_failed())
        self.state = "stopped"
        self._end(_stopping())
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()()

    def _turn(self) -> None:
        """Does the jobs that wait, and one step of the engine; without any, waits a moment for a job."""
        assert self.engine is not None
        with contextlib.suppress(queue.Empty):
            idle = self.state == "failed" or not self.engine.busy
            job = self._jobs.get(block=idle, timeout=IDLE_SECONDS)
            while True:
                job()
                job = self._jobs.get_nowait()
        if self.state != "failed" and self.engine.busy:
            self._deliver(self.engine.step())

    def _deliver(self, outputs: Sequence[Output]) -> None:
        batches: dict[_Call, Batch] = {}
        for output in outputs:
            call, index = self._calls.get(output.request, (None, 0))
            if call is None:
                continue  # it was cancelled
            batches.setdefault(call, []).append((index, output))
            if output.finish is not None:
                del self._calls[output.request]
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Call, Batch]]] = {}
        for call, batch in batches.items():
            by_loop.setdefault(call.loop, []).append((call, batch))
        for loop, given in by_loop.items():
            _in_loop(loop, _give_all, given)

    def _submit(self, call: _Call) -> None:
        assert self.engine is not None
        numbers: list[int] = []
        try:
            self._check_runs()
            for index, request in enumerate(call.requests):
                numbers.append(self.engine.submit(request))
                self._calls[numbers[-1]] = call, index
        except (ApiError, UserError) as error:
            for number in numbers:
                del self._calls[number]
                self.engine.cancel(number)
            wrong = error if isinstance(error, ApiError) else ApiError(400, str(error))
            _in_loop(call.loop, call.fail, wrong)
        except Exception:
            _in_loop(call.loop, call.fail, _failed())
            raise

    def _cancel(self, call: _Call) -> None:
        assert self.engine is not None
        for number in [number for number, (of, _) in self._calls.items() if of is call]:
            del self._calls[number]
            self.engine.cancel(number)

    def _check_runs(self) -> None:
        """Raises an `ApiError` once the engine has failed, or this thread no longer runs it."""
        if self.state == "failed":
            raise _failed()
        if self.state == "stopped":
            raise _stopping()

    def _end(self, error: ApiError) -> None:
        """Ends all calls with an error."""
        calls = {call for call, _ in self._calls.values()}
        self._calls.clear()
        for call in calls:
            _in_loop(call.loop, call.fail, error)

    # --- a thread of its own --------------------------------------------------------------------------------------

    def __enter__(self) -> Service:
        """Runs the engine in a thread of its own, until the context is left."""
        self._thread = threading.Thread(target=self.run, args=(self._asked.is_set, 0.0), daemon=True)
        self._thread.start()
        while self.state == "loading":
            time.sleep(0.001)
        return self

    def __exit__(self, *_: object) -> None:
        self._asked.set()
        if self._thread is not None:
            self._thread.join()


def _give_all(given: list[tuple[_Call, Batch]]) -> None:
    for call, batch in given:
        call.give(batch)


def _in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(function, *arguments)


def _failed(status: int = 500) -> ApiError:
    message = "the engine has failed; the server's log says why, and it must be started again"
    return ApiError(status, message, code="engine_failed", headers={"x-should-retry": "false"})


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", retry_after=RETRY_SECONDS)
