"""What the modules of POSIX do is done without where they are missing, as on Windows."""

import subprocess
import sys

import pytest

from tests.tiny import ROOT

HIDE = """
import signal, sys
for name in ("resource", "fcntl", "termios", "tty", "pwd", "grp"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGKILL", "pthread_sigmask", "sigwait"):
    vars(signal).pop(name, None)
from jaxchat.cli.{module} import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "module, arguments, code, words",
    [
        ("launch", "--list", 0, "quickstart"),
        ("launch", "--experiment=quickstart --dry-run --model.depth=1 --run-dir=/tmp/jaxchat-none", 0, "remat"),
        ("main", "data list", 0, "smoltalk"),
        ("main", "chat --run=/nowhere/run -p hi", 2, "/nowhere/run"),
    ],
)
def test_commands_start_without_the_modules_of_posix(module, arguments, code, words):
    command = [sys.executable, "-W", "ignore", "-c", HIDE.format(module=module), *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert words in done.stdout + done.stderr
