"""A process in a terminal of its own, for tests that type."""

import codecs
import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time

# The first terminal that the leader of a session opens becomes its controlling one, whose Ctrl-C it gets.
IN_TERMINAL = """
import os, sys
os.open(os.ttyname(0), os.O_RDWR)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """Python in a pseudo-terminal.

    Args:
      arguments: of Python.
      output: a file that standard output goes to.
    """

    def __init__(self, arguments, environment, output=None):
        self.master, slave = pty.openpty()
        stdout = slave if output is None else os.open(output, os.O_WRONLY | os.O_CREAT)
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *arguments],
            stdin=slave,
            stdout=stdout,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        for descriptor in {slave, stdout}:
            os.close(descriptor)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.seen = self.raw = ""  # what is still to be expected, without colours; and all that has come

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        os.close(self.master)

    def expect(self, text, seconds=150):
        """Reads until `text` has come, colours left out; returns everything up to its end."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready = select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"{text!r} did not come, but {self.seen!r}"
            try:
                data = self.decoder.decode(os.read(self.master, 4096))
            except OSError:  # the process has ended
                raise AssertionError(f"{text!r} did not come, but {self.seen!r}, and the end") from None
            self.seen, self.raw = self.seen + data, self.raw + data
            self.seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen)
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def expect_end(self):
        """The exit code, and what is left to read."""
        code, rest = self.process.wait(timeout=60), self.seen
        with contextlib.suppress(OSError):  # Linux says so at the end of a terminal
            while data := os.read(self.master, 4096):
                rest += self.decoder.decode(data)
        return code, rest

    def type(self, text):
        os.write(self.master, text.encode())
