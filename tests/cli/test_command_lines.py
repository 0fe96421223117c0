"""Command lines drawn at random: none ends with a traceback, and a refusal is one line."""

import subprocess
import sys

from tests.tiny import ROOT


def test_lines_drawn_at_random():
    program = [sys.executable, "benchmarks/robustness/command_lines.py", "--lines=60", "--seed=7"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
