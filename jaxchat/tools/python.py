"""Runs Python that a model has written, in a limited process.

The process has limits on time, memory and file size, a temporary folder as its working directory, and an empty
environment. This prevents accidents. It is not a sandbox against hostile code.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT_SECONDS = 5.0
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
_FINISHED = 87  # the exit status after the program's last line; one that ends early exits with another

# The limits are set inside the child: a function between fork and exec can deadlock if the parent has many threads.
_RUNNER = f"""
import os, resource, sys
def limit(kind, value):
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        pass  # macOS has no limit of the address space
limit(resource.RLIMIT_AS, {MEMORY_BYTES})
limit(resource.RLIMIT_FSIZE, {FILE_BYTES})
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_CPU, int(sys.argv[1]) + 1)
with open("program.py") as file:
    source = file.read()
exec(compile(source, "program.py", "exec"), {{"__name__": "program"}})
os._exit({_FINISHED})
"""


def run_program(program: str, timeout: float = TIMEOUT_SECONDS) -> bool:
    """Whether `program` runs to its end, without an error, within `timeout` seconds. Its output is discarded."""
    with tempfile.TemporaryDirectory(prefix="jaxchat-") as folder:
        (Path(folder) / "program.py").write_text(program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER, str(max(1, round(timeout)))],
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(timeout) == _FINISHED
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # the program and all that it has started
            except (ProcessLookupError, PermissionError):
                pass
            process.wait()
