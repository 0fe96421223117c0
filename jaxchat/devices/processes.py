"""Several processes that train or evaluate as one: how they connect, agree, and stop. A single one does none of this.

The processes share the run directory. Process 0 alone writes everything in it but checkpoints, and reads what decisions
depend on: `on_process_zero` hands its answer to the others, which need not see the same files at the same moment.
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
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat import stopping
from jaxchat.devices.launchers import LOST, Cluster
from jaxchat.errors import UserError, check
from jaxchat.stopping import Cause

START_SECONDS = 300  # within which all processes must connect
HEARTBEAT_SECONDS = 2.0
LOST_SECONDS = 30.0  # a process without a heartbeat for so long is lost
LEAVE_SECONDS = (
    5.0  # when another process leaves, the time to end in the usual way and write what is still to be written
)
# JAX's own timeout, after which it ends the remaining processes with a stack trace: the last resort. JAX may take a
# process for lost after half of it, which must still be later than LOST_SECONDS.
JAX_TIMEOUT_SECONDS = 100
RESUME = "the same command resumes from what is saved"
FOREVER_MS = 7 * 24 * 3600 * 1000


_watch: _Watch | None = None


def start(cluster: Cluster | None) -> None:
    """Connects the processes of the cluster, before JAX is used. Without one it does nothing, except on a TPU host.

    Where not all connect in time, the process prints an error and ends with code 2 (JAX would abort).

    Raises:
      UserError: the coordinator's port is taken.
    """
    if cluster is None:
        if _on_tpu():
            jax.config.update("jax_enable_preemption_service", False)
            jax.distributed.initialize(heartbeat_timeout_seconds=JAX_TIMEOUT_SECONDS)  # finds the others by itself
            _begin_watch()
        return
    host, port = cluster.coordinator.rsplit(":", 1)
    if cluster.process_id == 0:
        _check_free(int(port))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # `jaxchat.stopping` handles SIGTERM
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
        heartbeat_timeout_seconds=JAX_TIMEOUT_SECONDS,
        shutdown_timeout_seconds=JAX_TIMEOUT_SECONDS,
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
            raise UserError(f"the coordinator cannot use port {port} ({error.strerror}); choose another port") from None


def _give_up(cluster: Cluster, host: str, port: int) -> NoReturn:
    reason = f"not all of the {cluster.num_processes} processes have connected"
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        reason = f"the coordinator {cluster.coordinator} cannot be reached ({error.strerror or error})"
    _end(2, f"error: process {cluster.process_id} gives up after {START_SECONDS:.0f} s: {reason}")


def finish() -> None:
    """Waits until all processes have come here, and disconnects."""
    global _watch
    if _watch is not None:
        exchange("")
        stopping.leave_others = None
        _watch.stop()
        _watch = None
        jax.distributed.shutdown()


def active() -> bool:
    """Whether this process is connected with others."""
    return _watch is not None


def leave(code: int, message: str) -> NoReturn:
    """Ends this process with a message and an exit code, and the others, which may be waiting for it, with the same."""
    here = jax.process_index()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"jaxchat/left/{here}", json.dumps([code, message]), allow_overwrite=True)
        time.sleep(0 if here else 2 * HEARTBEAT_SECONDS)  # process 0 serves the message: the others must have read it
    _end(code, f"process {here}: {message}" if here else message)


def await_verdict() -> None:
    """Waits, after an error, for as long as it takes to detect a lost process; if one is lost, this one ends here."""
    time.sleep(LOST_SECONDS + 3 * HEARTBEAT_SECONDS)


def _end(code: int, message: str) -> NoReturn:
    # Not sys.exit: JAX would wait for the others when Python shuts down.
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


def _begin_watch() -> None:
    global _watch
    if jax.process_count() > 1:
        _libc.signal(signal.SIGABRT, _on_abort)
        _watch = _Watch(daemon=True)
        _watch.start()
        stopping.leave_others = leave


_libc = ctypes.CDLL(None)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """Ends the process with a message if JAX aborts because another one is lost; any other abort proceeds.

    JAX aborts at once when process 0, the coordinator, is lost, and late for the others. The handler is set through C:
    one set in Python would never run, since the aborting thread is not Python's.
    """
    if _watch is None:
        return
    if _watch.verdict is not None:
        _end(*_watch.verdict)
    here, (process, silence) = jax.process_index(), _watch.most_silent()
    if silence > 5 * HEARTBEAT_SECONDS:
        _end(LOST, _lost(here, process, silence))
    host, port = distributed.global_state.coordinator_address.rsplit(":", 1)  # pyright: ignore[reportOptionalMemberAccess]
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        _end(LOST, f"error: process {here} stops: process 0 is lost; {RESUME}")


def _lost(here: int, process: int, silence: float) -> str:
    return f"error: process {here} stops: process {process} is lost, silent for {silence:.0f} s; {RESUME}"


class _Watch(threading.Thread):
    """A thread that ends this process when another one is lost or has left: the main thread might wait forever."""

    def __init__(self, **options):
        super().__init__(**options)
        self._stopped = threading.Event()
        self.verdict: tuple[int, str] | None = None  # code and message with which another process has left
        others = set(range(jax.process_count())) - {jax.process_index()}
        self._heard = {process: (time.monotonic(), "") for process in others}  # when the last heartbeat came, and which

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def most_silent(self) -> tuple[int, float]:
        """The process that has been silent for longest, and for how many seconds."""
        process, (heard, _) = min(self._heard.items(), key=lambda item: item[1][0])
        return process, time.monotonic() - heard

    def run(self) -> None:
        client, here = _client(), jax.process_index()
        for beat in itertools.count():
            if self._stopped.wait(HEARTBEAT_SECONDS):
                return
            beats, left = {}, {}
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(f"jaxchat/heartbeat/{here}", str(beat), allow_overwrite=True)
                beats, left = _read(client, "jaxchat/heartbeat/"), _read(client, "jaxchat/left/")
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


# --- agreement ----------------------------------------------------------------------------------------------------

_turns = itertools.count()


def _client() -> Any:
    """JAX's client of the coordinator: a small key-value store, and barriers. JAX has no public name for it yet."""
    return distributed.global_state.client


def _read(client: Any, folder: str) -> dict[int, str]:
    return {int(key.rsplit("/", 1)[1]): value for key, value in client.key_value_dir_get(folder)}


def exchange(text: str) -> list[str]:
    """The texts that all processes pass, in their order; each must call it equally often, and waits for the others."""
    if not active():
        return [text]
    client, turn = _client(), next(_turns)
    client.key_value_set(f"jaxchat/turn/{turn}/{jax.process_index()}", text)
    client.wait_at_barrier(f"jaxchat/turn/{turn}", FOREVER_MS)
    if jax.process_index() == 0 and turn > 0:
        client.key_value_delete(f"jaxchat/turn/{turn - 1}/")  # all have read that one
    texts = _read(client, f"jaxchat/turn/{turn}/")
    return [texts[process] for process in range(jax.process_count())]


def on_process_zero(work: Callable[[], Any]) -> Any:
    """Runs `work` on process 0 and returns its result (JSON) on all processes; a UserError is raised on all.

    All processes must call it; the others wait.
    """
    if not active():
        return work()
    result = ""
    if jax.process_index() == 0:
        try:
            result = json.dumps({"value": work()})
        except UserError as error:
            result = json.dumps({"error": str(error)})
    result = json.loads(exchange(result)[0])
    check("error" not in result, result.get("error", ""))
    return result["value"]


class StopFlag:
    """How several processes agree on the step after which all stop: else their checkpoint would be of two steps.

    Each brings its flag to every step, and the highest is read with the step's metrics, one step late, so that nothing
    waits for it.
    """

    def __init__(self):
        self._flags: dict[int, jax.Array] = {}

    def __call__(self, cause: Cause | None) -> int | jax.Array:
        """A number for `cause_of`, the same on all processes; all must call it at the same steps.

        Args:
          cause: why this process is to stop; None if it is not.
        """
        number = 0 if cause is None else 1 + list(Cause).index(cause)
        if not active():
            return number
        mesh = Mesh(np.array(jax.devices()), ("all",))
        if not self._flags:
            self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        if number not in self._flags:
            part = np.full((jax.local_device_count(),), number, np.int32)
            self._flags[number] = jax.make_array_from_process_local_data(NamedSharding(mesh, P("all")), part)
        return self._highest(self._flags[number])


def cause_of(number: float) -> Cause | None:
    """Why a process is to stop, from what `StopFlag` has returned; None if none is."""
    return list(Cause)[int(number) - 1] if number else None
