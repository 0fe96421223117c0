"""Several processes that train as one: how they come together, agree, and stop. A single process does none of this.

The processes share the run directory. Process 0 alone writes to it what is not a checkpoint, and decides from what is
there: `agreed` hands its answer to the others, so that they need not see the same files at the same moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib.util
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.devices.launchers import LOST, Cluster
from jaxchat.errors import UserError, check

START_SECONDS = 300  # for all processes to come together
BEAT_SECONDS = 2.0
LOST_SECONDS = 30.0  # without a beat: then a process is lost
LEAVE_SECONDS = 5.0  # that a process has to end in its own way, and write what it still has, when another one leaves
# After which JAX itself ends the processes that are left, with a trace. It hears from each only every half of that, and
# so may find one lost after half of it: later than we do even then.
BACKUP_SECONDS = 100
PATIENCE = 5.0  # seconds from SIGTERM to the end of a wait for a batch
GO_ON = "the same command goes on from the last checkpoint"
FOREVER_MS = 7 * 24 * 3600 * 1000


_watch: _Watch | None = None


def start(cluster: Cluster | None) -> None:
    """Connects the processes of the cluster; to be called before JAX is used. Without one, only on a TPU host.

    Raises:
      UserError: the coordinator's port is taken.
    Where not all come together in time, a line says so and the process ends with code 2 (JAX would abort).
    """
    if cluster is None:
        if _on_tpu():
            jax.config.update("jax_enable_preemption_service", False)
            jax.distributed.initialize(heartbeat_timeout_seconds=BACKUP_SECONDS)  # JAX asks the machine's metadata
            _begin_watch()
        return
    host, port = cluster.coordinator.rsplit(":", 1)
    if cluster.process_id == 0:
        _check_free(int(port))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is for `Preemption`
    timer = threading.Timer(START_SECONDS, _give_up, (cluster, host.strip("[]"), int(port)))
    timer.daemon = True
    timer.start()
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=START_SECONDS + 60,
        heartbeat_timeout_seconds=BACKUP_SECONDS,
        shutdown_timeout_seconds=BACKUP_SECONDS,
    )
    timer.cancel()
    _begin_watch()


def _on_tpu() -> bool:
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    return bool(chips) and "tpu" in platforms and importlib.util.find_spec("libtpu") is not None


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(f"the coordinator cannot use port {port} ({error.strerror}); choose another one") from None


def _give_up(cluster: Cluster, host: str, port: int) -> NoReturn:
    reason = f"not all of the {cluster.num_processes} processes came"
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        reason = f"the coordinator {cluster.coordinator} cannot be reached ({error.strerror or error})"
    _end(2, f"error: process {cluster.process_id} has waited for {START_SECONDS:.0f} s: {reason}")


def finish() -> None:
    """Waits until all processes are here, and leaves."""
    global _watch
    if _watch is not None:
        exchange("")
        _watch.stop()
        _watch = None
        jax.distributed.shutdown()


def active() -> bool:
    """Whether `start` has connected this process with others."""
    return _watch is not None


def leave(code: int, message: str) -> NoReturn:
    """Ends this process with a line and an exit code, and with it the others, who may wait for it, by the same code."""
    here = jax.process_index()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"jaxchat/left/{here}", json.dumps([code, message]), allow_overwrite=True)
        time.sleep(0 if here else 2 * BEAT_SECONDS)  # with process 0 ends what the others read
    _end(code, f"process {here}: {message}" if here else message)


def await_verdict() -> None:
    """After an error that the loss of a process may have caused: if so, this one ends here, with a line about it."""
    time.sleep(LOST_SECONDS + 3 * BEAT_SECONDS)


def _end(code: int, message: str) -> NoReturn:
    # Not sys.exit: at the interpreter's end JAX would wait for the others.
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


def _begin_watch() -> None:
    global _watch
    if jax.process_count() > 1:
        _libc.signal(signal.SIGABRT, _on_abort)
        _watch = _Watch(daemon=True)
        _watch.start()


_libc = ctypes.CDLL(None)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """JAX aborts when process 0, the coordinator, is lost, at once, or another one, late. A handler of Python's own
    would never run, since the thread that aborts is none of Python's. Any other abort goes on when this returns."""
    if _watch is None:
        return
    if _watch.verdict is not None:
        _end(*_watch.verdict)
    here, (process, silence) = jax.process_index(), _watch.most_silent()
    if silence > 5 * BEAT_SECONDS:
        _end(LOST, _lost(here, process, silence))
    host, port = distributed.global_state.coordinator_address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        _end(LOST, f"error: process {here} stops: process 0 is lost; {GO_ON}")


def _lost(here: int, process: int, silence: float) -> str:
    return f"error: process {here} stops: process {process} is lost, silent for {silence:.0f} s; {GO_ON}"


class _Watch(threading.Thread):
    """Ends this process when another one is lost or has left; the main thread may wait for that one for ever."""

    def __init__(self, **options):
        super().__init__(**options)
        self._stopped = threading.Event()
        self.verdict: tuple[int, str] | None = None  # by which another process has left
        others = set(range(jax.process_count())) - {jax.process_index()}
        self._heard = {process: (time.monotonic(), "") for process in others}  # when, and which beat

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def most_silent(self) -> tuple[int, float]:
        """The process that was silent for the longest time, and the seconds of it."""
        process, (heard, _) = min(self._heard.items(), key=lambda item: item[1][0])
        return process, time.monotonic() - heard

    def run(self) -> None:
        client, here = _client(), jax.process_index()
        for beat in itertools.count():
            if self._stopped.wait(BEAT_SECONDS):
                return
            beats, left = {}, {}
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(f"jaxchat/beat/{here}", str(beat), allow_overwrite=True)
                beats, left = _read(client, "jaxchat/beat/"), _read(client, "jaxchat/left/")
            now = time.monotonic()
            for process, (heard, beat_then) in self._heard.items():
                if process in left:
                    code, message = json.loads(left[process])
                    self.verdict = code, f"process {here} stops with process {process}: {message}"
                    self._stopped.wait(LEAVE_SECONDS)
                    _end(*self.verdict)
                if beats.get(process, beat_then) != beat_then:
                    self._heard[process] = now, beats[process]
                elif now - heard > LOST_SECONDS:
                    _end(LOST, _lost(here, process, now - heard))


# --- agreement ------------------------------------------------------------------------------------------------------

_turns = itertools.count()


def _client() -> Any:
    """JAX's client of the coordinator, with a small key-value store and barriers; it has no public name yet."""
    return distributed.global_state.client


def _read(client: Any, folder: str) -> dict[int, str]:
    return {int(key.rsplit("/", 1)[1]): value for key, value in client.key_value_dir_get(folder)}


def exchange(text: str) -> list[str]:
    """What each process says here, in their order. All must call it equally often; it waits for as long as it takes."""
    if not active():
        return [text]
    client, turn = _client(), next(_turns)
    client.key_value_set(f"jaxchat/turn/{turn}/{jax.process_index()}", text)
    client.wait_at_barrier(f"jaxchat/turn/{turn}", FOREVER_MS)
    if jax.process_index() == 0 and turn > 0:
        client.key_value_delete(f"jaxchat/turn/{turn - 1}/")  # whoever is here has read it
    said = _read(client, f"jaxchat/turn/{turn}/")
    return [said[process] for process in range(jax.process_count())]


def agreed(work: Callable[[], Any]) -> Any:
    """What `work` gives (JSON) in process 0, in all of them; the others wait for it. Its UserError is everybody's."""
    if not active():
        return work()
    said = ""
    if jax.process_index() == 0:
        try:
            said = json.dumps({"value": work()})
        except UserError as error:
            said = json.dumps({"error": str(error)})
    answer = json.loads(exchange(said)[0])
    check("error" not in answer, answer.get("error", ""))
    return answer["value"]


@contextlib.contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Ctrl-C interrupts the program where this ends, a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, pressed = signal.getsignal(signal.SIGINT), False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


class Preemption:
    """Notes SIGTERM, instead of what happens at it otherwise, while it is entered; what nobody heeded happens then.

    With several processes Ctrl-C in one of them is the same: they must agree on the step at which all stop, or their
    checkpoint would be of two steps. Each brings its flag to every step; the sum is read with the step's metrics, one
    step late, so that nothing waits for it.

    A single process that is `waiting`, perhaps for text that never comes, is not waited for: after `PATIENCE` seconds,
    or at a second SIGTERM, a KeyboardInterrupt ends the wait.
    """

    def __init__(self):
        self.waiting = False
        self._noted: int | None = None
        self._timer: threading.Timer | None = None
        self._signals = (signal.SIGTERM, signal.SIGINT) if active() else (signal.SIGTERM,)
        self._before: dict[signal.Signals, Any] = {}
        self._flags: dict[bool, jax.Array] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None and self._noted is not None:
            signal.raise_signal(self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self._noted = self._noted is not None, number
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C is one
        elif again and self.waiting:
            raise KeyboardInterrupt
        elif not again:
            self._timer = threading.Timer(PATIENCE, self._insist)
            self._timer.daemon = True
            self._timer.start()

    def _insist(self) -> None:
        if self.waiting:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    @property
    def noted(self) -> bool:
        """Whether to stop at this step: known at once by a single process, by several only from `flag`."""
        return self._noted is not None and not active()

    def flag(self) -> bool | jax.Array:
        """Above 0 if any process is to stop; the same in all of them, who must call it at the same steps."""
        noted = self._noted is not None
        if not active():
            return noted
        if not self._flags:
            mesh = Mesh(np.array(jax.devices()), ("all",))
            shape = (jax.local_device_count(),)
            for value in (False, True):
                part = np.full(shape, value, np.int32)
                self._flags[value] = jax.make_array_from_process_local_data(NamedSharding(mesh, P("all")), part)
            self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
        return self._sum(self._flags[noted])
