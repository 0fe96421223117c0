"""Runs Python that a model has written: the one place for it, which all callers use.

A program runs in a process of its own, contained as well as the machine allows (`tools.sandbox`), and is judged by
another one, which has the tests (`tools.checker`). `docs/programs.md` says what that keeps off, and what it does not.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxchat import stopping
from jaxchat.errors import check

TIMEOUT_SECONDS = 5.0
_WAITING = 3  # times as long by the clock: a busy machine shares its processors, and a program may sleep
_STARTING_SECONDS = 60  # for two interpreters to start, when the machine is very busy
_ROOT = Path(__file__).parents[2]
# An interpreter without site-packages starts faster, and runs no code of theirs. They are only added to its path.
_START = """
import sys
root, _, _, _, *packages = sys.argv[1:]
sys.path.insert(0, root)
from jaxchat.tools.checker import main
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
    check(os.name == "posix", "programs of a model need Linux or macOS to run in; on Windows, use WSL")
    request = json.dumps({"program": program, "context": context, "entry_point": entry_point, "tests": tests}).encode()
    seconds = max(1, math.ceil(timeout))
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    numbers = map(str, (os.getpid(), seconds, _WAITING * seconds))
    command = [sys.executable, "-I", "-S", "-c", _START, str(_ROOT), *numbers, *packages]
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
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            # The checker keeps the time; this limit is for a checker that cannot.
            verdict, _ = process.communicate(request, timeout=_WAITING * seconds + _STARTING_SECONDS)
            return verdict == b"passed"
    except subprocess.TimeoutExpired:
        return False
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
def containment() -> str:
    """What programs cannot do on this machine, and what they can, in words; it is tried, with harmless programs.

    Raises:
      UserError: programs do not run here at all.
    """
    check(run_program(""), "an empty program does not run: this machine lets no process of a model's program start")
    with tempfile.NamedTemporaryFile(prefix="jaxchat-") as file:
        filled = {deed: code.format(file=file.name, process=os.getpid()) for deed, code in _ATTEMPTS.items()}
        possible = [deed for deed, code in filled.items() if run_program(code)]
    prevented = [deed for deed in _ATTEMPTS if deed not in possible]
    cannot = f"they cannot {_listed(prevented, 'or')}" if prevented else "nothing contains them"
    return cannot + (f"; on this machine they CAN {_listed(possible, 'and')}" if possible else "")


def _listed(words: list[str], last: str) -> str:
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))
