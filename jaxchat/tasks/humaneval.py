"""HumanEval: write a Python function that passes its tests (Chen et al. 2021, arXiv:2107.03374).

Scoring runs what the model wrote. It runs in a process of its own with limits on time, memory and file size, in a
folder of its own, with an empty environment: this stops accidents. It is no sandbox against hostile code.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxchat.errors import MissingData
from jaxchat.tasks.base import Conversation, ListTask, Split, conversation, read_items, visible_answer

TIMEOUT_SECONDS = 5.0
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
_PASSED = 87  # the exit status behind the tests; a program that ends early leaves with another

# The limits are set inside the child: a function between fork and exec can deadlock in a parent with many threads.
_RUNNER = f"""
import os, resource, sys
def limit(kind, value):
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        pass  # macOS knows no limit of the address space
limit(resource.RLIMIT_AS, {MEMORY_BYTES})
limit(resource.RLIMIT_FSIZE, {FILE_BYTES})
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_CPU, int(sys.argv[1]) + 1)
with open("program.py") as file:
    source = file.read()
exec(compile(source, "program.py", "exec"), {{"__name__": "program"}})
os._exit({_PASSED})
"""


class HumanEval(ListTask):
    """Items of `task_id`, `prompt`, `entry_point`, `canonical_solution` and `test`."""

    def item(self, index: int) -> Conversation:
        item = self.items[index]
        question = (
            f"Complete this Python function. Answer with the whole function.\n```python\n{item['prompt'].strip()}\n```"
        )
        answer = f"```python\n{item['prompt'].strip()}\n{item['canonical_solution'].rstrip()}\n```"
        extra = {key: item[key] for key in ("prompt", "entry_point", "test")}
        return conversation(question, answer, source=self.name, **extra)

    def score(self, conversation: Conversation, completion: str) -> float:
        """1 if the code in the completion passes the tests."""
        program = build_program(
            extract_code(visible_answer(completion)),
            conversation["prompt"],
            conversation["entry_point"],
            conversation["test"],
        )
        return float(run_program(program))


def extract_code(text: str) -> str:
    """The inside of the first ```python fence, else of the first fence; an unclosed one goes to the end; else all."""
    flags = re.DOTALL | re.MULTILINE | re.IGNORECASE
    for opening in (r"(?:python|py)[ \t]*\n", r"[^`\n]*\n"):
        found = re.search(rf"^[ \t]*```{opening}(.*?)(?:^[ \t]*```|\Z)", text, flags)
        if found:
            return found[1]
    return text


def build_program(code: str, prompt: str, entry_point: str, test: str) -> str:
    """The prompt (for its imports and helpers), the code, and the call of the tests.

    Code that defines the function anew replaces the prompt's; other code is the body that the prompt leaves open.
    """
    if re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", code, re.MULTILINE):
        solution = f"{prompt}\n    pass\n\n{code}"
    else:
        solution = f"{prompt}{code}"
    return f"{solution}\n\n{test}\n\ncheck({entry_point})\n"


def run_program(program: str, timeout: float = TIMEOUT_SECONDS) -> bool:
    """Whether `program` runs to its end within `timeout` seconds. Its output is thrown away."""
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
            return process.wait(timeout) == _PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:  # also what the program itself has started
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
            process.wait()


def load_humaneval(split: Split, data_dir: Path, limit: int | None) -> HumanEval:
    """`eval/humaneval.jsonl`, a test set only."""
    if split != "test":
        raise MissingData(f"humaneval has no {split} split; it is a test set ({data_dir / 'eval' / 'humaneval.jsonl'})")
    keys = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    return HumanEval("humaneval", read_items(data_dir / "eval" / "humaneval.jsonl", keys, "humaneval"), limit)
