"""How commands end: one line on stderr, the exit code, and the same of both programs."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from jaxchat.cli import launch, main
from jaxchat.cli.exits import run_command, sigterm_raises
from jaxchat.devices.launchers import PREEMPTED, Preempted
from jaxchat.errors import UserError
from tests.tiny import ROOT

# Real processes whose output nobody reads, whose SIGTERM and failures are real.
FAILING = """
import os, sys, threading, time
from jaxchat.cli.exits import leave, run_command, sigterm_raises
def command():
    with sigterm_raises():
        {body}
    return 0
{before}
leave(run_command(command, resumes=True))
"""


def end(body, before="", **options):
    program = [sys.executable, "-c", FAILING.format(body=body, before=before)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize(
    "error, code, line, retry",
    [
        (UserError("bad; do this"), 2, "error: bad; do this", ""),
        (Preempted("stopped; resume"), PREEMPTED, "stopped; resume", ""),
        (
            OSError(errno.EROFS, "Read-only file system", "x"),
            2,
            "error: x: Read-only file system; correct that, and",
            "y",
        ),
        (OSError(errno.EFBIG, "File too large"), 2, "error: File too large; correct that, and", "y"),
    ],
)
def test_what_stops_a_command_is_a_line(capsys, resumes, error, code, line, retry):
    def command():
        raise error

    assert run_command(command, resumes=resumes) == code
    out, err = capsys.readouterr()
    retry = retry and (" the same command resumes from here" if resumes else " try again")
    assert (out, err) == ("", f"{line}{retry}\n")


def test_ctrl_c(capsys):
    def command():
        signal.raise_signal(signal.SIGINT)

    assert run_command(command) == 130 and capsys.readouterr().err == "stopped\n"
    assert run_command(command, resumes=True) == 130
    assert capsys.readouterr().err == "stopped; the same command resumes from here\n"


def test_a_bug_is_raised_and_a_result_returned():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
    with pytest.raises(FileNotFoundError):  # nobody's disk is at fault
        run_command(lambda: open("no such file"))
    assert run_command(lambda: 0) == 0


def test_sigterm_ends_a_process_with_75():
    done = end("os.kill(os.getpid(), 15); time.sleep(30)")
    assert (done.returncode, done.stderr) == (75, "stopped by SIGTERM; the same command resumes from here\n")
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_raises():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_process_that_failed_does_not_wait_for_threads():
    """Those of a save that failed wait for ten minutes."""
    thread = "threading.Thread(target=time.sleep, args=(100,)).start()"
    done = end("print('out'); open('/dev/full', 'w', buffering=1).write('x\\n')", before=thread)
    assert done.returncode == 2 and done.stdout == "out\n"
    assert done.stderr == "error: No space left on device; correct that, and the same command resumes from here\n"


@pytest.mark.parametrize("program", [["launch.py", "--list"], ["-m", "jaxchat.cli.main", "data", "list"]])
def test_output_that_nobody_reads(program):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-u", *program], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("program", [launch, main])
def test_both_programs_end_in_the_same_way(program, capsys, monkeypatch):
    def fail(*_):
        raise UserError("bad")

    monkeypatch.setattr(program, "_run", fail)
    assert program.main([]) == 2 and capsys.readouterr().err == "error: bad\n"
