"""Runs Python that a model has written: the one place for it, which all callers use.

A program runs in a process of its own, contained as well as the machine allows (`tools.sandbox`). `run_program` has it
judged by another process, which has the tests (`tools.checker`); `run_code` returns what it prints
(`tools.interpreter`). `docs/programs.md` says what that keeps off, and what it does not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import IO

from jaxchat import stopping
from jaxchat.errors import check

TIMEOUT_SECONDS = 5.0
LONGEST_OUTPUT = 1000  # characters that `run_code` returns: some 300 tokens
_WAITING = 3  # times as long by the clock: a busy machine shares its processors, and a program may sleep
_STARTING_SECONDS = 60  # for two interpreters to start, when the machine is very busy
_LONGEST_READ = 1 << 20  # bytes of output after which a program is stopped
_TAIL = 300  # characters of a long output's end, where its result or its error stands
_POLL = 0.1  # seconds between two looks whether nobody waits for the output any more
_AT_ONCE = threading.BoundedSemaphore(min(4, os.cpu_count() or 1))  # programs of `run_code`, with 1 GiB each
# Whether nobody waits for the output of `run_code` any more, as its caller's caller knows it.
given_up: ContextVar[Callable[[], bool]] = ContextVar("given_up", default=lambda: False)
_ROOT = Path(__file__).parents[2]
# An interpreter without site-packages starts faster, and runs no code of theirs. They are only added to its path.
_START = """
import sys
root, _, _, _, *packages = sys.argv[1:]
sys.path.insert(0, root)
from jaxchat.tools.{module} import main
sys.path.remove(root)
sys.path += packages
main()
"""
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # without which some interpreters do not start
_REMOVALS = 5


def run_program(
    program: str, timeout: float = TIMEOUT_SECONDS, *, context: str = "", entry_point: str = "", tests: str = ""
) -> bool:
    """Whether `program` runs to its end without an error, and then passes the tests.

    It has no input, its output is discarded, and it gets none of this process's environment. With tests the verdict
    cannot be forged: they run in another process, which asks the program only for results. Without, it can: a program
    can always say that it has reached its end.

    Args:
      program: Python of a model.
      timeout: seconds of processor time, rounded up; and three times as long by the clock.
      context: trusted code that both the program and the tests find executed before them, such as imports and helpers.
      entry_point: the function of the program that is tested.
      tests: trusted code that defines `check(candidate)`, which raises an exception unless it is satisfied. Arguments
        and results go by value, as plain data (see `tools.plain`).

    Raises:
      UserError: on Windows, where programs cannot be contained.
    """
    request = json.dumps({"program": program, "context": context, "entry_point": entry_point, "tests": tests}).encode()
    seconds = max(1, math.ceil(timeout))
    try:
        with _process("checker", seconds, subprocess.PIPE) as process:
            # The checker keeps the time; this limit is for a checker that cannot.
            verdict, _ = process.communicate(request, timeout=_WAITING * seconds + _STARTING_SECONDS)
            return verdict == b"passed"
    except subprocess.TimeoutExpired:
        return False


def run_code(code: str, timeout: float = TIMEOUT_SECONDS, *, cancelled: Callable[[], bool] = lambda: False) -> str:
    """What `code` prints, and the value of a last line that is an expression, as at Python's prompt.

    An error adds a line such as `ZeroDivisionError: division by zero`, and so does what stops the program: its time is
    over, or it has printed more than 1 MiB. Output of more than `LONGEST_OUTPUT` characters loses its middle. Each call
    starts afresh; there is no input, and standard error is discarded. Of calls from several threads, a few run at once,
    and the others wait.

    Args:
      code: Python of a model.
      timeout: seconds of processor time, rounded up; and three times as long by the clock.
      cancelled: asked again and again, as `given_up` is; once either is true the program is stopped.

    Raises:
      UserError: on Windows, where programs cannot be contained.
    """
    seconds, gone = max(1, math.ceil(timeout)), given_up.get()

    def over() -> bool:
        return cancelled() or gone()

    while not _AT_ONCE.acquire(timeout=_POLL):
        if over():
            return ""
    try:
        # A file, since a pipe would block on long code until the process reads it.
        with tempfile.TemporaryFile() as source:
            source.write(code.encode(errors="replace"))
            source.seek(0)
            with _process("interpreter", seconds, source) as process:
                output, remark = _read(process, seconds, over)
    finally:
        _AT_ONCE.release()
    lines = [output.removesuffix("\n"), remark]
    return shortened("\n".join(filter(None, lines)), LONGEST_OUTPUT)


def _read(process: subprocess.Popen[bytes], seconds: int, cancelled: Callable[[], bool]) -> tuple[str, str]:
    """What a process of `tools.interpreter` prints until it ends or is to be ended, and a remark on its end."""
    assert process.stdout is not None
    data, started = bytearray(), False
    deadline = time.monotonic() + _STARTING_SECONDS
    remark = f"TimeoutError: more than {_WAITING * seconds} s"
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline and not cancelled():
            if not selector.select(_POLL):
                continue
            part = os.read(process.stdout.fileno(), 1 << 16)
            if part and not started:  # the first byte says that the program begins
                started, part, deadline = True, part[1:], time.monotonic() + _WAITING * seconds
            elif not part:
                remark = _end_of(process, seconds, max(0.0, deadline - time.monotonic())) or remark
                break
            data += part
            if len(data) > _LONGEST_READ:
                remark = f"OSError: more than {_LONGEST_READ >> 20} MiB of output"
                break
    return data[:_LONGEST_READ].decode(errors="replace"), remark.strip()


def _end_of(process: subprocess.Popen[bytes], seconds: int, left: float) -> str:
    """A remark on how the process ends, blank if there is nothing to say; none if it does not end in `left` seconds."""
    try:
        status = process.wait(left)
    except subprocess.TimeoutExpired:  # it has closed its output
        return ""
    if -status in (signal.SIGKILL, signal.SIGXCPU):
        return f"TimeoutError: more than {seconds} s of processor time"
    return f"OSError: ended by {signal.Signals(-status).name}" if status < 0 else " "


def shortened(text: str, longest: int) -> str:
    """`text` without its middle if it has more than `longest` characters, which are then the most that it has."""
    if len(text) <= longest:
        return text
    mark = "\n[{:,} characters left out]\n"
    kept = longest - len(mark.format(len(text)))
    tail = min(_TAIL, kept // 2)
    return text[: kept - tail] + mark.format(len(text) - kept) + text[len(text) - tail :]


@contextlib.contextmanager
def _process(module: str, seconds: int, stdin: int | IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs the `main` of a module of `tools`, in an empty folder. Nothing is left of it at the end."""
    check(os.name == "posix", "programs of a model need Linux or macOS to run in; on Windows, use WSL")
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    numbers = map(str, (os.getpid(), seconds, _WAITING * seconds))
    command = [sys.executable, "-I", "-S", "-c", _START.format(module=module), str(_ROOT), *numbers, *packages]
    folder = tempfile.mkdtemp(prefix="jaxchat-")
    process = None

    def clean_up() -> None:
        if process is not None:
            _end(process)
        remove_folder(folder)

    try:
        with stopping.before_end(clean_up):
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
                | {name: os.environ[name] for name in _KEPT if name in os.environ},
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            yield process
    finally:
        clean_up()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and what it has started in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # all have ended
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                pass  # what was not yet written to a process that has ended
    process.wait()


def remove_folder(folder: str) -> bool:
    """Removes a folder with all that it contains, whatever its depth and permissions; it raises no OSError.

    A process that still writes makes it try again. What stays after that is named on standard error.
    """
    for attempt in range(_REMOVALS):
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            return True
        except OSError:
            # By the system's programs, which go thousands of folders deep: `shutil.rmtree` reaches its recursion limit.
            for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                subprocess.run([*command, "--", folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if not os.path.lexists(folder):
            return True
        time.sleep(0.1 * attempt)
    print(f"jaxchat: {folder}, where a model's program ran, cannot be removed; remove it by hand", file=sys.stderr)
    return False


# What a program must not be able to do, and how it would. `{...}` is filled in.
_ATTEMPTS = {
    "read your files": "open({file!r}).read()",
    "write files": "open('mark', 'w').write('mark')",
    "use the network": "import socket\nsocket.socket().close()",
    "start processes": "import os\nif os.fork() == 0:\n    os._exit(0)",
    "signal other processes": "import os\nos.kill({process}, 0)",
    "take more than 1 GiB of memory": "x = bytearray(2 << 30)",
}


@functools.cache
def possible() -> tuple[str, ...]:
    """What programs can do on this machine though they should not, in words; it is tried, with harmless programs.

    Raises:
      UserError: programs do not run here at all.
    """
    check(run_program(""), "an empty program does not run: this machine lets no process of a model's program start")
    with tempfile.NamedTemporaryFile(prefix="jaxchat-") as file:
        filled = {deed: code.format(file=file.name, process=os.getpid()) for deed, code in _ATTEMPTS.items()}
        return tuple(deed for deed, code in filled.items() if run_program(code))


def containment() -> str:
    """What programs cannot do on this machine, and what they can, in words.

    Raises:
      UserError: programs do not run here at all.
    """
    prevented = [deed for deed in _ATTEMPTS if deed not in possible()]
    cannot = f"they cannot {listed(prevented, 'or')}" if prevented else "nothing contains them"
    return cannot + (f"; on this machine they CAN {listed(possible(), 'and')}" if possible() else "")


def listed(words: Sequence[str], last: str) -> str:
    """Words with commas between them, and `last` before the last one."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))
