"""A user's own reward: a Python function that is called in processes of its own, several at once, with a deadline.

Whatever the function does (raise, hang, return text, end its process), the training goes on: the answer has no reward.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxchat import stopping
from jaxchat.errors import check

SECONDS = 10.0  # that a call may take
MOST_PROCESSES = 8
_IMPORT_SECONDS = 120.0  # that a process may take to start and to import the function
_POLL = 0.1  # seconds between two looks at deadlines, and for a request to end
_SHOWN = 3  # different causes that are told; messages may hold parts of the answer, and so differ each time
_ROOT = Path(__file__).parents[2]
# The function's own folders come first, but only once all that the process itself needs is there.
_START = """
import json, sys
root, *folders = json.loads(sys.argv.pop(1))
sys.path.insert(0, root)
from jaxchat.rl.reward_process import main
sys.path[:0] = folders
main()
"""

Call = tuple[str, str, dict[str, Any]]  # question, answer, conversation


def check_reward(where: str) -> None:
    """Checks that the function can be imported and called, in a process of its own.

    Args:
      where: `module:function` or `file.py:function`.

    Raises:
      UserError: it cannot.
    """
    process = _Process(where)
    try:
        with stopping.before_end(process.end), selectors.DefaultSelector() as selector:
            selector.register(process.output, selectors.EVENT_READ)
            while not process.ready:
                if selector.select(_POLL):
                    process.read()
                process.check_start()
    finally:
        process.end()


@contextlib.contextmanager
def own_reward(where: str | None, note: Callable[[str], None]) -> Iterator[OwnReward | None]:
    """The user's function for the time of a training, None if there is none; its processes end with the context.

    Args:
      where, note: as for `OwnReward`.
    """
    if where is None:
        yield None
        return
    own = OwnReward(where, note)
    try:
        with stopping.before_end(own.end):
            yield own
    finally:
        own.end()


class OwnReward:
    """A user's function that scores answers. Its processes start with the first of them.

    Attributes:
      note: is given a line for the user about answers that get no reward.
      progress: is given the number of scored answers and of all, again and again, where scoring takes seconds.
    """

    def __init__(
        self, where: str, note: Callable[[str], None], *, seconds: float = SECONDS, processes: int | None = None
    ):
        self.where, self.note, self.seconds = where, note, seconds
        self.number = processes or min(MOST_PROCESSES, os.cpu_count() or 1)
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self._processes: list[_Process] = []
        self._told: set[str] = set()

    def score(self, calls: Sequence[Call]) -> list[float]:
        """The rewards of the answers in their order, NaN for those that get none.

        Raises:
          UserError: the function can no longer be imported.
          Interrupted: the work was asked to end.
        """
        rewards, waiting, done = [math.nan] * len(calls), deque(range(len(calls))), 0
        slow = time.monotonic() + 2
        try:
            while len(self._processes) < min(self.number, len(calls)):
                self._processes.append(_Process(self.where))
            while done < len(calls):
                stopping.raise_if_asked()
                self._ask(calls, waiting)
                for process in self._answered():
                    done += 1
                    assert process.call is not None
                    rewards[process.call] = process.answer.get("reward", math.nan)
                    self._tell(process.answer.get("problem"))
                    process.call = None
                if time.monotonic() > slow:
                    self.progress(done, len(calls))
        except BaseException:
            self.end()  # or a call that is still running would be taken for one of the next
            raise
        return rewards

    def _ask(self, calls: Sequence[Call], waiting: deque[int]) -> None:
        """Gives the next calls to the processes that have none."""
        for i, process in enumerate(self._processes):
            if waiting and process.ready and process.call is None:
                if process.ask(waiting[0], calls[waiting[0]], self.seconds):
                    waiting.popleft()
                else:  # it has ended by itself since
                    self._replace(i)

    def _answered(self) -> Iterator[_Process]:
        """The processes whose calls have ended by now, one way or another; those that ended with them are replaced."""
        with selectors.DefaultSelector() as selector:
            for i, process in enumerate(self._processes):
                selector.register(process.output, selectors.EVENT_READ, i)
            readable = {key.data for key, _ in selector.select(_POLL)}
        for i, process in enumerate(self._processes):
            if i in readable:
                process.read()
            if not process.ready:
                process.check_start()
                continue
            late = process.call is not None and not process.answer and time.monotonic() > process.deadline
            if late:
                process.answer = {"problem": f"it took longer than {self.seconds:g} s"}
            elif process.ended and not process.answer:
                process.answer = {"problem": f"it ended its process ({process.status()})"}
            if late or process.ended:
                self._replace(i)
            if process.call is not None and process.answer:
                yield process

    def _replace(self, i: int) -> None:
        self._processes[i].end()
        self._processes[i] = _Process(self.where)

    def _tell(self, problem: str | None) -> None:
        if problem is not None and problem not in self._told and len(self._told) < _SHOWN:
            self._told.add(problem)
            last = "; further causes are not shown" if len(self._told) == _SHOWN else ""
            self.note(f"{self.where} gives an answer no reward, which is left out: {problem}{last}")

    def end(self) -> None:
        """Ends the processes, and what they have started; the next answer starts new ones."""
        while self._processes:
            self._processes.pop().end()


class _Process:
    """A process of `rl.reward_process`, in a session of its own.

    Attributes:
      ready: it has imported the function.
      call: the number of the call that it is given, None if it has none.
      answer: to the call; empty as long as there is none.
      deadline: by the clock of `time.monotonic`, of the import or of the call.
      ended: nothing more comes from it.
    """

    def __init__(self, where: str):
        _check(os.name == "posix", "a reward of your own needs Linux or macOS; on Windows, use WSL")
        self.where, self.ready, self.ended = where, False, False
        self.call: int | None = None
        self.answer: dict[str, Any] = {}
        self.deadline = time.monotonic() + _IMPORT_SECONDS
        self._text = b""
        # Not the accelerator, should the function use JAX: this process has it. One thread each, as there are several.
        alone = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        place = where.rpartition(":")[0]
        beside = [os.path.dirname(os.path.abspath(place))] if place.endswith(".py") else []
        paths = json.dumps([str(_ROOT), *beside, os.getcwd()])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, paths, str(os.getpid()), where],
            env=os.environ | alone,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self.output = self._process.stdin, self._process.stdout

    def ask(self, number: int, call: Call, seconds: float) -> bool:
        """Gives it a call; False if it has ended."""
        try:
            self._input.write(json.dumps(call).encode() + b"\n")
            self._input.flush()
        except BrokenPipeError:
            return False
        self.call, self.answer, self.deadline = number, {}, time.monotonic() + seconds
        return True

    def read(self) -> None:
        """Takes what has come from it."""
        part = os.read(self.output.fileno(), 1 << 16)
        self.ended = not part
        *lines, self._text = (self._text + part).split(b"\n")
        for line in lines:
            message = json.loads(line)
            _check("refused" not in message, message.get("refused", ""))
            if "ready" in message:
                self.ready = True
            else:
                self.answer = message

    def check_start(self) -> None:
        """Raises UserError if it will not become ready any more."""
        if self.ready:
            return
        place = self.where.rpartition(":")[0]
        _check(not self.ended, f"{place} ends the process that imports it ({self.status()}); correct that first")
        late = time.monotonic() > self.deadline
        _check(not late, f"{place} takes longer than {_IMPORT_SECONDS:g} s to import; do less at its top level")

    def status(self) -> str:
        """How it has ended, in words."""
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        return f"by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def end(self) -> None:
        """Ends it, and what it has started in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._input, self.output):
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()


def _check(condition: bool, message: str) -> None:
    check(condition, f"rl.reward: {message}")
