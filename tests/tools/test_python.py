"""Programs run in a process with limits, which stops endless and greedy ones."""

import time
from pathlib import Path

from jaxchat.tools.python import run_program


def test_endless_programs_are_stopped_with_what_they_started(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nwhile True:\n    pass\n"
    start = time.monotonic()
    assert not run_program(program, timeout=0.5)
    assert time.monotonic() - start < 30
    time.sleep(2)
    assert not mark.exists()


def test_memory_and_files_are_bounded(tmp_path):
    assert not run_program("x = bytearray(3 << 30)\n", timeout=20)
    assert run_program("x = bytearray(3 << 20)\n", timeout=20)
    assert not run_program("open('big', 'wb').write(bytes(50 << 20))\n", timeout=20)


def test_programs_run_elsewhere_with_an_empty_environment(monkeypatch):
    monkeypatch.setenv("JAXCHAT_SECRET", "secret")
    here = str(Path.cwd())
    assert run_program(
        f"import os\nassert 'JAXCHAT_SECRET' not in os.environ\nassert os.getcwd() != {here!r}\n", timeout=20
    )
    assert not run_program("assert False\n", timeout=20)
