"""How a command is stopped from outside: by Ctrl-C, SIGTERM, SIGHUP, or output that can no longer be written.

A program that has called `begin` ends at once, wherever it is, with its exit code and a line on stderr: what a run
keeps on disk survives the end of its process at any moment. No exception is raised for it. One that comes out of
nowhere is swallowed by callbacks of libraries, breaks their imports off half-way, and leaves their threads waiting.

Work that has something to save asks for time with `deferred`, and ends where it likes. The second Ctrl-C is final,
unless it comes together with the first: `timeout -s INT` and others signal the process and its group.

A thread receives the signals, since Python runs handlers in the main thread alone, and there only between two calls of
C: not while XLA compiles. This module is what a program imports first, and so imports little itself.
"""

from __future__ import annotations

import sys

try:
    import contextlib
    import enum
    import errno
    import io
    import math
    import os
    import select
    import signal
    import threading
    import time
    from collections.abc import Callable, Iterator
except KeyboardInterrupt:  # Python's own answer to Ctrl-C, until `begin` has replaced it
    sys.exit(130)

TYPE_CHECKING = False  # typing's own would take longer than all the rest
if TYPE_CHECKING:
    from typing import Any, NoReturn

TICK = 0.25  # seconds between two looks for signals at a prompt
PATIENCE = 5.0  # seconds from the request to stop until a wait for something that may never come is interrupted
TOGETHER = 0.3  # seconds within which two signals are one Ctrl-C
NOTICE = "stopping as soon as the work so far is saved; Ctrl-C again stops at once"
STDOUT, STDERR = 1, 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Cause(enum.Enum):
    """What stops a command: the exit code, and what the user is told."""

    CTRL_C = 130, "stopped"
    SIGTERM = 75, "stopped by SIGTERM"
    SIGHUP = 75, "stopped by SIGHUP"
    CLOSED_PIPE = 141, "stopped by a closed pipe"
    FULL_DISK = 2, "error: there is no room for what is printed"

    @property
    def code(self) -> int:
        """The exit code."""
        return self.value[0]


# Not all systems have all of them.
_CAUSES = {
    getattr(signal, name): cause
    for name, cause in (("SIGINT", Cause.CTRL_C), ("SIGTERM", Cause.SIGTERM), ("SIGHUP", Cause.SIGHUP))
    if hasattr(signal, name)
}


class Interrupted(KeyboardInterrupt):
    """The command was asked to end, and has kept what is worth keeping: `kept`, such as `step 137 saved`."""

    def __init__(self, cause: Cause, kept: str = ""):
        self.cause, self.kept = cause, kept
        super().__init__(", ".join(filter(None, (cause.value[1], kept))))

    def line(self, resumes: bool) -> str:
        """The line for the user; empty if there is nobody to read it and nothing to tell.

        Args:
          resumes: started again, the command resumes where it stopped.
        """
        if self.cause is Cause.CLOSED_PIPE and not self.kept:
            return ""
        again = f"{same_command()} resumes from {'there' if self.kept else 'here'}" if resumes else ""
        if self.cause is Cause.FULL_DISK:
            again = f"make room, and {again or 'try again'}"
        return "; ".join(filter(None, (str(self), again)))


class Deferral:
    """A stretch of work that is told when it is to end, and ends by itself.

    Attributes:
      cause: why it is to end; None as long as it is not.
      alone: whether `raise_if_asked` may end it anywhere; several processes must agree where all of them stop.
      unsaved: whether there is something to save; as long as there is not, a request ends the process at once.
      waiting: within `interruptible`.
      notice: what the user is told at the request.
      heard: all requests so far.
    """

    def __init__(self, alone: bool, unsaved: bool, notice: str):
        self.cause: Cause | None = None
        self.alone, self.unsaved, self.notice, self.waiting = alone, unsaved, notice, False
        self.heard: set[Cause] = set()
        self._pressed, self._overdue = math.inf, False

    def grant(self, cause: Cause) -> bool:
        """Takes note of a request to end; False if it is final: the second Ctrl-C, or any while nothing is unsaved."""
        second = cause is Cause.CTRL_C and time.monotonic() > self._pressed + TOGETHER
        if second or not self.unsaved:
            return False
        if self.cause is None:
            self.cause = cause
            _tell(self.notice)
            if self.alone and hasattr(signal, "pthread_kill"):
                threading.Thread(target=self._end_wait, daemon=True).start()
        if cause is Cause.CTRL_C and math.isinf(self._pressed):
            self._pressed = time.monotonic()  # after the notice, which may take a second to be told
        self.heard.add(cause)
        return True

    def _end_wait(self) -> None:
        while _deferral is self:
            time.sleep(PATIENCE)
            self._overdue = True
            # A handler that raises reaches the main thread in whatever it waits for. Again and again, since the
            # exception may be swallowed there.
            if self.waiting and signal.getsignal(signal.SIGTERM) is _on_signal:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def end_wait(self) -> None:
        """Raises `Interrupted` if the main thread has been waiting for too long; called in it."""
        if self.cause is not None and self.waiting and self._overdue:
            raise Interrupted(self.cause)


# The state of this process.
_owner = 0  # the process that called `begin`: a fork of it has the handlers, but not the thread
_watched = False  # whether there is the thread that receives signals
_resumes = False
_done_once: list[str] = []  # options of the command that have done their work, and would do it again
_deferral: Deferral | None = None
_ending = threading.Lock()  # held by the thread that ends the process
_actions: list[Callable[[], None]] = []
_explained = False  # whether it is decided why the process ends
# How to end a process that others depend on, instead of at once; set by `jaxchat.devices.processes`.
leave_others: Callable[[int, str], None] | None = None


def begin() -> None:
    """Makes this process end in the way that this module describes; to be called once, before anything slow.

    Signals that are ignored already, as under nohup, stay ignored. The descriptor of a closed standard stream becomes
    the null device's: the next file would get it otherwise, and with it what libraries print.
    """
    global _owner, _watched
    _owner = os.getpid()
    _take_signals()
    for number in range(3):
        _open(number)  # before the pipe, which would take the number of a closed one
    if os.name != "nt":  # where a signal can wake a socket only
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(read,), daemon=True).start()
        _watched = True
    sys.stdout = _guarded(sys.stdout, STDOUT)
    sys.stderr = _guarded(sys.stderr, STDERR)


@contextlib.contextmanager
def resuming(resumes: bool) -> Iterator[None]:
    """Says whether the command that runs in this context can resume, as for `Interrupted.line`."""
    global _resumes
    before, _resumes = _resumes, resumes
    try:
        yield
    finally:
        _resumes = before
        _done_once.clear()


def done_once(option: str) -> None:
    """Says that `option` has done its work: to resume, the command must be repeated without it."""
    if _resumes and option not in _done_once:  # outside of a command nobody repeats one
        _done_once.append(option)


def same_command() -> str:
    """The command to resume with, in words."""
    return " ".join(["the same command", *(["without", " and ".join(_done_once)] if _done_once else [])])


@contextlib.contextmanager
def deferred(*, alone: bool = True, unsaved: bool = True, notice: str = NOTICE) -> Iterator[Deferral]:
    """A context in which a request to end is only noted, for work that has something to save.

    Without `begin` it takes the signals for its duration, in the main thread.

    Args:
      alone, unsaved, notice: as in `Deferral`.

    Raises:
      Interrupted: at its end, if the work was asked to end and has not done so.
    """
    global _deferral
    before = _take_signals() if threading.current_thread() is threading.main_thread() else {}
    _deferral = deferral = Deferral(alone, unsaved, notice)
    try:
        yield deferral
    finally:
        _deferral = None
        for number, handler in before.items():
            signal.signal(number, handler)
    if deferral.cause is not None:
        raise Interrupted(deferral.cause)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A context for a wait in the main thread that may never end.

    Raises:
      Interrupted: in the wait, `PATIENCE` seconds after the request to end.
    """
    deferral = _deferral
    if deferral is None:
        yield
        return
    deferral.waiting = True
    try:
        yield
    finally:
        deferral.waiting = False


def asked() -> bool:
    """Whether the work within `deferred` was asked to end."""
    return _deferral is not None and _deferral.cause is not None


def raise_if_asked() -> None:
    """Raises `Interrupted` if the work was asked to end; for loops that take long within `deferred`."""
    deferral = _deferral
    if deferral is not None and deferral.alone and deferral.cause is not None:
        raise Interrupted(deferral.cause)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """A context in which Ctrl-C raises KeyboardInterrupt, and other signals `Interrupted`: at a prompt.

    There the terminal is in a state of its own, which `input` restores when it is left by an exception.
    """
    global _watched
    # The thread would come too late to see whose handler it was.
    watched, wakeup = _watched, signal.set_wakeup_fd(-1)
    before = {number: signal.signal(number, _raise) for number in _taken()}
    _watched = False
    try:
        with _ticking():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        _watched = watched


@contextlib.contextmanager
def _ticking() -> Iterator[None]:
    """Interrupts the main thread's wait for input again and again, by a signal that does nothing.

    Python runs handlers before `input` begins to wait, and when a signal interrupts the wait. One that comes between
    the two would be seen with the next key only.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return
    handler = signal.signal(signal.SIGALRM, lambda number, frame: None)
    timer = signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


@contextlib.contextmanager
def before_end(action: Callable[[], None]) -> Iterator[None]:
    """A context in which something must not outlive the process: before the process ends at once, `action` is done.

    It is done in another thread. The context is not left after that, lest somebody goes on with what `action` ended.
    """
    _actions.append(action)
    try:
        yield
    finally:
        if _ending.locked():
            time.sleep(60)
        _actions.remove(action)


def end(cause: Cause) -> NoReturn:
    """Ends this process at once; called more than once, by several threads, it waits for the end."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)
    for action in list(_actions):
        with contextlib.suppress(Exception):
            action()
    line = Interrupted(cause).line(_resumes)
    if leave_others is not None:
        leave_others(cause.code, line)
    _tell(line, last=True)
    os._exit(cause.code)


# --- signals ----------------------------------------------------------------------------------------------------------


def _taken() -> list[int]:
    """The signals that are not ignored, nor handled outside Python."""
    return [number for number in _CAUSES if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _take_signals() -> dict[int, Any]:
    return {number: signal.signal(number, _on_signal) for number in _taken()}


def _watch(read: int) -> None:
    """Receives the numbers of signals from the pipe that Python writes them to, and acts on those that are ours."""
    while True:
        for number in os.read(read, 64):
            # Whoever has set another handler sees to the signal.
            if number in _CAUSES and signal.getsignal(number) is _on_signal:
                _act(_CAUSES[number])


def _act(cause: Cause) -> None:
    deferral = _deferral
    if deferral is not None and deferral.grant(cause):
        return
    if _owner != os.getpid():
        raise Interrupted(cause)
    end(cause)


def _on_signal(number: int, frame: object) -> None:
    """Python's handler, in the main thread."""
    cause, deferral = _CAUSES[number], _deferral
    if not (_watched and _owner == os.getpid()):
        _act(cause)
    elif deferral is None:
        time.sleep(1.0)  # the other thread ends the process, unless Python's own end has stopped that thread
        end(cause)
    else:
        for _ in range(100):  # or the deferral might be over before the other thread tells it
            if cause in deferral.heard:
                break
            time.sleep(0.01)
    if deferral is not None:
        deferral.end_wait()


def _raise(number: int, frame: object) -> None:
    cause = _CAUSES[number]
    raise KeyboardInterrupt if cause is Cause.CTRL_C else Interrupted(cause)


# --- standard streams -------------------------------------------------------------------------------------------------


def explain(line: str) -> None:
    """Prints to stderr why this process is about to end; if nobody reads that, the exit code is the same."""
    global _explained
    _explained = True
    print(line, file=sys.stderr)


class _Output(io.FileIO):
    """Standard output or error, which raises no errors: output that nobody can take is a request to end."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.EPIPE:
                _open(self.fileno(), anew=True)  # what is written from now on, by whomever, is lost in silence
                if not (_explained and self.fileno() == STDERR):
                    _act(Cause.CLOSED_PIPE)
            elif error.errno in NO_ROOM and self.fileno() == STDOUT:
                _act(Cause.FULL_DISK)
            # Otherwise the terminal is gone, and SIGHUP comes by itself; or the messages on stderr are lost, which is
            # no reason to stop.
            return len(memoryview(data).cast("B"))


def _guarded(stream: Any, number: int) -> Any:
    """`stream` with the same encoding on top of an `_Output`; each line is written when it is complete."""
    encoding, errors = (stream.encoding, stream.errors) if stream is not None else ("utf-8", "replace")
    if stream is not None and "Windows" in type(getattr(stream.buffer, "raw", None)).__name__:
        return stream  # a console of Windows is no file
    raw = io.BufferedWriter(_Output(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=True)


def _open(number: int, *, anew: bool = False) -> None:
    """Opens the null device as this file descriptor if it is closed, or in place of what is there."""
    try:
        os.fstat(number)
    except OSError:
        anew = True
    if anew:
        null = os.open(os.devnull, os.O_RDWR)
        if null == number:
            os.set_inheritable(number, True)
        else:
            os.dup2(null, number)
            os.close(null)


def _tell(line: str, *, last: bool = False) -> None:
    """Writes a line to stderr, past Python's buffers and locks; whoever does not take it within a second misses it.

    Args:
      last: the process ends, and a live line must leave the terminal with a cursor.
    """
    if not line and not last:
        return
    text = f"{line}\n" if line else ""
    with contextlib.suppress(OSError):
        if os.isatty(STDERR) and "rich" in sys.modules and os.environ.get("TERM") != "dumb":
            erase, show_cursor = "\r\x1b[2K", "\x1b[?25h"
            text = erase + text + show_cursor * last
        if text and (os.name == "nt" or select.select([], [STDERR], [], 1.0)[1]):
            os.write(STDERR, text.encode())
