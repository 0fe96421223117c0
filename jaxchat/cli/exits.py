"""How a command ends: its exit code, a line on stderr about what stopped it, and other processes that stop with it.

| code | |
| ---: | --- |
| 0 | the command has done its work |
| 1 | a bug in jaxchat: the traceback says where |
| 2 | bad input, or a disk or storage that failed |
| 75 | SIGTERM or SIGHUP (a closed terminal) |
| 76 | another process of the same training was lost (`jaxchat.devices.processes` ends this one) |
| 130 | Ctrl-C |
| 141 | whatever read the output has gone |

What a training has reached is saved before it ends with 75, 130 or 141, and with 2 if there is no room for its output.
A second Ctrl-C ends it at once. A message that stderr cannot take is lost, and stops nothing. How signals and failed
output end a command, at any moment of it, is in `jaxchat.stopping`; the rest is here.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

from jaxchat import stopping
from jaxchat.errors import UserError
from jaxchat.stopping import Cause, Interrupted

BUG, BAD_INPUT = 1, 2
DISK = (
    *(*stopping.NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG),
)
LONGEST = 1500  # characters of a line for the user, who may have given a name as long as that


def run_command(command: Callable[[], int], *, resumes: bool = False) -> int:
    """Runs a command and returns its exit code; what stops it becomes one line on stderr.

    An exception that is nobody's fault but the program's is raised. Of several processes, one that ends otherwise than
    with 0 ends the others with it.

    Args:
      resumes: started again, the command resumes where it stopped, and the line says so.
    """
    with stopping.resuming(resumes):
        try:
            code = command()
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where it is known whether the command can resume
            return code
        except (Exception, KeyboardInterrupt) as error:
            stopped = _explain(error, resumes)
            if stopped is None:
                if not several_processes():
                    raise
                processes().await_verdict()
                traceback.print_exc()
                stopped = BUG, f"error: {type(error).__name__}: {error}"
            code, line = stopped
            if several_processes():
                processes().leave(code, line)
            if line:
                from jaxchat.verbatim import one_line  # slow to import

                line = one_line(line)
                stopping.explain(line if len(line) <= LONGEST else f"{line[:LONGEST]}…")
            return code


def _explain(error: BaseException, resumes: bool) -> tuple[int, str] | None:
    """The exit code and the line for the user; None for a bug."""
    retry = f"{stopping.same_command()} resumes from here" if resumes else "try again"
    if isinstance(error, UserError):
        from jaxchat.verbatim import one_line  # not before Ctrl-C is seen to

        return BAD_INPUT, f"error: {one_line(str(error))}"
    if isinstance(error, KeyboardInterrupt):
        interrupted = error if isinstance(error, Interrupted) else Interrupted(Cause.CTRL_C)
        return interrupted.cause.code, interrupted.line(resumes)
    if isinstance(error, OSError) and error.errno in DISK:
        remedy = "make room" if error.errno in stopping.NO_ROOM else "correct that"
        return BAD_INPUT, f"error: {error.filename or 'a file'}: {error.strerror}; {remedy}, and {retry}"
    from jaxchat.storage import first_line, of_the_cloud  # slow to import

    if of_the_cloud(error):
        return BAD_INPUT, f"error: the storage failed ({first_line(error)}); {retry}"
    if isinstance(error, BrokenPipeError):
        # The interpreter flushes stdout at exit, and would complain too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Cause.CLOSED_PIPE.code, ""
    return None


def processes() -> ModuleType:
    """`jaxchat.devices.processes`, which imports JAX: a command that ends early need not wait for it."""
    return importlib.import_module("jaxchat.devices.processes")


def several_processes() -> bool:
    """Whether this process is connected with others."""
    return "jaxchat.devices.processes" in sys.modules and processes().active()


def leave(code: int) -> NoReturn:
    """Ends this process, without waiting for threads, and without Python's own end.

    The threads of a failed save would wait for ten minutes. A signal during Python's end gives tracebacks.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)
