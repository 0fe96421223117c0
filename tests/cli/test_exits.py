"""How commands end: one line on stderr, the exit code, and the same of both programs."""

import errno
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

from jaxchat import stopping
from jaxchat.cli import launch, main
from jaxchat.cli.exits import run_command
from jaxchat.errors import UserError
from jaxchat.stopping import Cause, Interrupted
from tests.tiny import ROOT

# Real processes, whose signals and failures are real.
ENDING = """
import os, signal, subprocess, sys, threading, time
from jaxchat import stopping
stopping.begin()
from jaxchat.cli.exits import leave, run_command
from jaxchat.stopping import deferred, raise_if_asked
def me(*names):
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))
def command():
    {body}
    return 0
leave(run_command(command, resumes=True))
"""
RESUMES = "the same command resumes from here\n"


def end(body, command=(), **options):
    program = [*command, sys.executable, "-c", ENDING.format(body=body)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(program, cwd=ROOT, text=True, timeout=60, **options)


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize(
    "error, code, line, retry",
    [
        (UserError("bad; do this"), 2, "error: bad; do this", ""),
        (
            OSError(errno.EROFS, "Read-only file system", "x"),
            2,
            "error: x: Read-only file system; correct that, and",
            "y",
        ),
        (OSError(errno.EFBIG, "File too large"), 2, "error: a file: File too large; make room, and", "y"),
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


def test_what_an_option_has_done_is_not_done_again_by_whoever_resumes(capsys):
    def command():
        stopping.done_once("--redo")
        stopping.done_once("--redo")
        signal.raise_signal(signal.SIGINT)

    assert run_command(command, resumes=True) == 130
    assert capsys.readouterr().err == "stopped; the same command without --redo resumes from here\n"
    stopping.done_once("--redo")  # by a program that is no command
    assert stopping.same_command() == "the same command"
    test_ctrl_c(capsys)  # the next command has done nothing yet


def test_a_bug_is_raised_and_a_result_returned():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
    with pytest.raises(FileNotFoundError):  # nobody's disk is at fault
        run_command(lambda: open("no such file"))
    assert run_command(lambda: 0) == 0


@pytest.mark.parametrize(
    "signals, code, line",
    [
        (["SIGINT"], 130, "stopped"),
        (["SIGTERM"], 75, "stopped by SIGTERM"),
        (["SIGHUP"], 75, "stopped by SIGHUP"),
        (["SIGINT", "SIGINT"], 130, "stopped"),
    ],
)
@pytest.mark.parametrize(
    "busy",
    [
        "time.sleep(30)",
        "threading.Event().wait()",
        "while True: pass",
        "subprocess.run(['sleep', '30'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)",
    ],
)
def test_a_signal_ends_a_process_at_once(signals, code, line, busy):
    """Whatever it does, and without an exception: one would be lost in some of these places."""
    body = f"print('out'); threading.Timer(0.2, me, {signals}).start(); {busy}"
    body = body if ":" not in busy else body.replace("; while", "\n    while")
    done = end(body)
    assert (done.returncode, done.stderr, done.stdout) == (code, f"{line}; {RESUMES}", "out\n")


def test_both_signals_at_once():
    done = end("me('SIGTERM', 'SIGINT', 'SIGHUP'); time.sleep(30)")
    assert done.returncode in (75, 130) and done.stderr.count("\n") == 1


def test_a_signal_in_a_callback_is_not_swallowed():
    """An exception of the handler would be, with `Exception ignored in` on stderr, and the program would go on."""
    done = end("""
    class Callback:
        def __del__(self):
            me("SIGINT")
            for _ in range(100): time.sleep(0.1)
    Callback()""")
    assert (done.returncode, done.stderr) == (130, f"stopped; {RESUMES}")


def test_a_signal_while_modules_are_imported(tmp_path):
    """A library may catch what an import of it raises."""
    (tmp_path / "broken.py").write_text("try:\n    me('SIGINT'); time.sleep(30)\nexcept BaseException:\n    pass")
    done = end(f"exec(open({str(tmp_path / 'broken.py')!r}).read(), globals())")
    assert (done.returncode, done.stderr) == (130, f"stopped; {RESUMES}")


def test_signals_that_were_ignored_stay_ignored():
    done = end("me('SIGHUP'); time.sleep(0.3)", command=["nohup"], stdin=subprocess.DEVNULL)
    assert done.returncode == 0


def test_signals_at_the_end():
    """While Python would shut down."""
    for name, code in (("SIGINT", 130), ("SIGTERM", 75)):
        done = end(f"import atexit; atexit.register(me, {name!r})")
        assert (done.returncode, done.stderr) == (0, "")
        done = end(f"threading.Thread(target=time.sleep, args=(0.2,)).start(); me({name!r})")
        assert done.returncode == code


def test_work_that_has_something_to_save():
    work = """
    with deferred():
        me({signals})
        for _ in range(50):
            time.sleep(0.01)
        open("/dev/null").close()
        print("saved")
    print("not here")"""
    told = "stopping as soon as the work so far is saved; Ctrl-C again stops at once\n"
    for signals, code in (("'SIGINT'", 130), ("'SIGTERM'", 75), ("'SIGHUP', 'SIGTERM'", 75)):
        done = end(work.format(signals=signals))
        assert (done.returncode, done.stdout) == (code, "saved\n"), done
        assert done.stderr.startswith(told) and done.stderr.count("\n") == 2 and done.stderr.endswith(RESUMES)
    done = end(work.format(signals="'SIGINT'); time.sleep(0.4); me('SIGINT'"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{told}stopped; {RESUMES}")


def test_one_ctrl_c_that_arrives_twice():
    """`timeout -s INT` signals the process, and then its group."""
    done = end("""
    with deferred():
        me("SIGINT", "SIGINT"); time.sleep(0.5)
        print("saved")""")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (130, "saved\n", 2)


def test_work_with_nothing_to_save_yet():
    """Before its first step has been done, a training ends at once."""
    for name, code in (("SIGINT", 130), ("SIGTERM", 75)):
        done = end(f"\n    with deferred(unsaved=False):\n        me({name!r}); time.sleep(30)")
        assert done.returncode == code and done.stderr.count("\n") == 1 and done.stderr.endswith(RESUMES)


@pytest.mark.parametrize(
    "body, code",
    [
        ("from jaxchat.errors import UserError; raise UserError('bad')", 2),
        ("raise stopping.Interrupted(stopping.Cause.SIGTERM, 'step 3 saved')", 75),
        ("raise stopping.Interrupted(stopping.Cause.CTRL_C)", 130),
    ],
)
def test_a_reason_that_nobody_reads_is_still_the_reason(body, code):
    """As with `2>&1 | tee log`, where Ctrl-C ends tee first."""
    read, write = os.pipe()
    os.close(read)
    done = end(body, stdout=write, stderr=write)
    os.close(write)
    assert done.returncode == code


@pytest.mark.parametrize("saves", [False, True])
def test_a_terminal_that_closes(saves):
    """The process gets SIGHUP, and can neither read nor write any more."""
    body = "print('begun'); time.sleep(30)"
    if saves:
        body = """
    with deferred() as asked:
        print("begun")
        while asked.cause is None: time.sleep(0.01)
        print("saved"); print("saved", file=sys.stderr)"""
    terminal, own = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ENDING.format(body=body)],
        **dict.fromkeys(("stdin", "stdout", "stderr"), own),
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(own)
    seen = b""
    while b"begun" not in seen:
        seen += os.read(terminal, 1024)
    os.close(terminal)
    assert process.wait(60) == 75


def test_a_process_that_is_suspended_for_a_while():
    done = end("""
    with deferred() as asked:
        subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -CONT {os.getpid()}"])
        me("SIGTSTP")
        print("goes on", asked.cause)""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on None\n", "")


def test_what_must_not_outlive_the_process(tmp_path):
    file = tmp_path / "there"
    file.touch()
    done = end(f"""
    with stopping.before_end(lambda: os.remove({str(file)!r})):
        try:
            me("SIGTERM"); time.sleep(30)
        finally:
            pass
    print("not here")""")
    assert (done.returncode, done.stdout, file.exists()) == (75, "", False)


def test_a_program_of_a_model_does_not_outlive_the_process(tmp_path):
    done = end("""
    from jaxchat.tools.python import run_program
    threading.Timer(1.0, me, ["SIGTERM"]).start()
    print(run_program("while True: pass", timeout=100))""", env={**os.environ, "TMPDIR": str(tmp_path)})  # fmt: skip
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (75, "", [])


def test_a_process_that_failed_does_not_wait_for_threads():
    """Those of a save that failed wait for ten minutes."""
    thread = "threading.Thread(target=time.sleep, args=(100,)).start(); "
    done = end(f"{thread}print('out'); open('/dev/full', 'w', buffering=1).write('x\\n')")
    assert done.returncode == 2 and done.stdout == "out\n"
    assert done.stderr == f"error: a file: No space left on device; make room, and {RESUMES}"


FULL = "error: there is no room for what is printed; make room, and"


@pytest.mark.parametrize("write", ["print('x')", "print('x', end='')", "sys.stdout.buffer.write(b'x')"])
def test_output_for_which_there_is_no_room(write):
    with open("/dev/full", "w") as full:
        done = end(write, stdout=full)
        assert (done.returncode, done.stderr) == (2, f"{FULL} {RESUMES}")
        done = end(f"\n    with deferred():\n        {write}; sys.stdout.flush(); me('SIGTERM'); print(9)", stdout=full)
        assert done.returncode == 2 and done.stderr.endswith(f"{FULL} {RESUMES}")
        done = end("print('x', file=sys.stderr); raise stopping.Interrupted(stopping.Cause.SIGTERM)", stderr=full)
        assert (done.returncode, done.stdout) == (75, "")


@pytest.mark.parametrize("streams", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams(streams, tmp_path):
    """A file must not get the number of standard error, and with it what libraries print."""
    shell = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in streams)
    body = f"""
    with open({str(tmp_path / "file")!r}, "w") as file:
        assert file.fileno() > 2
        print("out"); print("err", file=sys.stderr); os.system("echo child; echo child >&2")
    assert sys.stdout.isatty() in (True, False)"""
    done = end(body, command=["sh", "-c", f'exec "$@" {shell}', "-"])
    assert done.returncode == 0 and (tmp_path / "file").read_text() == ""
    assert done.stdout == ("" if 1 in streams else "out\nchild\n")
    assert done.stderr == ("" if 2 in streams else "err\nchild\n")


@pytest.mark.parametrize("missing", ["SIGHUP", "pthread_kill", "SIGTERM"])
def test_a_system_without_some_signals(missing):
    program = f"""
import signal
del signal.{missing}
from jaxchat import stopping
stopping.begin()
from jaxchat.cli.exits import leave, run_command
def command():
    with stopping.deferred() as deferral:
        signal.raise_signal(signal.SIGINT)
        while deferral.cause is None: pass
leave(run_command(command))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and "Traceback" not in done.stderr


COMMANDS = [["launch.py", "--list"], ["-m", "jaxchat", "data", "list"], ["-m", "jaxchat.cli.main", "--help"]]


@pytest.mark.parametrize("program", COMMANDS)
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


@pytest.mark.parametrize("program", COMMANDS)
@pytest.mark.parametrize("streams, code", [(">/dev/full", 2), (">&-", 0), ("<&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0)])
def test_streams_of_commands(program, streams, code):
    shell = ["sh", "-c", f'exec "$@" {streams}', "-", sys.executable, *program]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stderr.count("\n") == (code == 2)


def test_what_is_imported_before_ctrl_c_is_seen_to():
    """It takes about as long as Python's own start."""
    program = "import sys; import jaxchat.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert {"numpy", "jax", "rich", "argparse", "etils"}.isdisjoint(done.stdout.split())


def test_lines_for_the_user():
    lines = {cause: (Interrupted(cause).line(False), Interrupted(cause, "step 3 saved").line(True)) for cause in Cause}
    there = "; the same command resumes from there"
    assert lines == {
        Cause.CTRL_C: ("stopped", f"stopped, step 3 saved{there}"),
        Cause.SIGTERM: ("stopped by SIGTERM", f"stopped by SIGTERM, step 3 saved{there}"),
        Cause.SIGHUP: ("stopped by SIGHUP", f"stopped by SIGHUP, step 3 saved{there}"),
        Cause.CLOSED_PIPE: ("", f"stopped by a closed pipe, step 3 saved{there}"),
        Cause.FULL_DISK: (
            f"{FULL} try again",
            f"error: there is no room for what is printed, step 3 saved; make room, and {there[2:]}",
        ),
    }


def test_a_name_with_control_codes_leaves_the_error_one_harmless_line(capfd):
    def refuse():
        raise UserError("there is no run no\x1b[31m\nrun [b] :smile:")

    assert run_command(refuse) == 2
    assert capfd.readouterr().err == "error: there is no run no\\x1b[31m\\nrun [b] :smile:\n"


def test_a_signal_just_before_the_wait_at_a_prompt_is_seen():
    # Another thread receives the signal, so that it does not interrupt the main thread's wait: as one that comes
    # between Python's last look for signals and the wait.
    read, write = os.pipe()
    missed = []

    def receive():
        time.sleep(0.3)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        time.sleep(5)
        missed.append("the wait went on until a key was pressed")
        os.write(write, b"\n")

    with pytest.raises(Interrupted) as stopped, stopping.signals_raise():
        threading.Thread(target=receive, daemon=True).start()
        os.read(read, 1)
    assert stopped.value.cause is Cause.SIGTERM and not missed
