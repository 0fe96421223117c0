"""`rollouts.jsonl`: what was sampled in reinforcement learning, and how it was rewarded, for people to read.

One JSON object a line, a question with all answers that it got in a step. The lines are in the order of the steps:

    {"step": 40, "task": "sums", "question": "What is 3 + 4?", "right": "7", "used": true, "samples":
     [{"answer": "7", "reward": 1.0, "advantage": 0.75, "tokens": 1, "cut": false}, ...]}

After a resume at step s, the lines from s on are dropped, since their steps are done again: the file has what the
present parameters come from, each step once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float

from jaxchat.errors import UserError
from jaxchat.infer.answers import Completion
from jaxchat.runs.files import read_bytes
from jaxchat.stopping import NO_ROOM, same_command
from jaxchat.storage import append_bytes, is_remote, reason, storage_errors
from jaxchat.tasks import Conversation, Task
from jaxchat.tokenizer import BaseTokenizer

REMEDY = "move it aside: the run goes on without its rollouts so far"
_STEP = re.compile(rb'\s*\{\s*"step":\s*(\d+)')  # the first key of a line


class Record:
    """Writes a stage's rollouts to a file, which it takes up where the stage resumes.

    On this machine they are in the file when the call returns. An object store would write the whole file again each
    time: there `flush` and `close` write them.

    Args:
      path: of the file.
      enabled: False makes every method do nothing, as in all processes except process 0.
    """

    def __init__(self, path: epath.PathLike, tokenizer: BaseTokenizer, *, enabled: bool = True):
        self.path, self.tokenizer, self.enabled = epath.Path(path), tokenizer, enabled
        self._waiting = b""
        self._step = -1  # of the last line that this process has written

    def __call__(
        self,
        step: int,
        questions: Sequence[tuple[Task, Conversation]],
        completions: Sequence[Completion],
        rewards: Float[np.ndarray, "Q N"],
        advantages: Float[np.ndarray, "Q N"],
        used: Bool[np.ndarray, " Q"],
    ) -> None:
        """Adds the answers of one sampling; a step may have several.

        Args:
          step: that the training is at, as in `Source.next_batch`. A smaller one than before drops the lines from it
            on, as does the first after a resume.
          questions: Q of them, each with its task.
          completions: N answers to each question, one question's after another's.
          rewards: NaN where there is none.
          advantages: NaN where an answer is left out.
          used: whether a question's answers are trained on.

        Raises:
          UserError: the file cannot be written.
        """
        if not self.enabled:
            return
        if self._step < 0 or step < self._step:
            self._drop(step)
        self._step = step
        each = rewards.shape[1]
        for i, (task, conversation) in enumerate(questions):
            answers = completions[i * each : (i + 1) * each]
            line = {
                "step": step,
                "task": task.name,
                "question": question_of(conversation),
                "right": right_answer(conversation),
                "used": bool(used[i]),
                "samples": [
                    {
                        "answer": self.tokenizer.decode(completion.tokens),
                        "reward": _number(reward),
                        "advantage": _number(advantage),
                        "tokens": len(completion.tokens),
                        "cut": not completion.finished,
                    }
                    for completion, reward, advantage in zip(answers, rewards[i], advantages[i], strict=True)
                ],
            }
            self._waiting += json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        if not is_remote(self.path):
            self.flush()

    def _drop(self, step: int) -> None:
        """Drops the lines of this step and later ones, and a last line that was cut short."""
        self.flush()
        try:
            if is_remote(self.path):
                data = read_bytes(self.path, REMEDY) or b""
                if (end := _end(data.splitlines(keepends=True), step)) < len(data):
                    self.path.write_bytes(data[:end])
            elif self.path.exists():
                with open(self.path, "r+b") as file:
                    file.truncate(_end(file, step))
        except storage_errors() as error:
            raise self._unwritable(error) from error

    def flush(self) -> None:
        """Writes the lines that wait to be written together; if remote storage fails, they stay for the next time."""
        try:
            self._append()
        except storage_errors() as error:
            if not is_remote(self.path):
                raise self._unwritable(error) from error

    def close(self) -> None:
        """Writes the remaining lines.

        Raises:
          UserError: remote storage does not accept them.
        """
        try:
            self._append()
        except storage_errors() as error:
            raise self._unwritable(error) from error

    def _append(self) -> None:
        if self._waiting:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_bytes(self.path, self._waiting)
        self._waiting = b""

    def _unwritable(self, error: Exception) -> UserError:
        remedy = "make room, and " if isinstance(error, OSError) and error.errno in NO_ROOM else ""
        return UserError(
            f"{os.fspath(self.path)} cannot be written ({reason(error)}); {remedy}{same_command()} resumes from the "
            "last checkpoint"
        )


def question_of(conversation: Conversation) -> str:
    """The user's last message."""
    return next(m["content"] for m in reversed(conversation["messages"]) if m["role"] == "user")


def right_answer(conversation: Conversation) -> str:
    """The value that is right, or a right answer, if that is text; else nothing."""
    answer = conversation.get("answer", conversation["messages"][-1]["content"])
    return answer if isinstance(answer, str) else ""


def _number(value: Any) -> float | None:
    """A number as JSON has it, in as many digits as a person wants to read."""
    return None if np.isnan(value) else float(f"{value:.6g}")


def _end(lines: Iterable[bytes], step: int) -> int:
    """The bytes of the lines before the first of `step` or later; without a last line that was cut short.

    Lines that something has damaged stay: only a process that was killed leaves a line without an end.
    """
    end = 0
    for line in lines:
        found = _STEP.match(line)
        if not line.endswith(b"\n") or (found is not None and int(found[1]) >= step):
            break
        end += len(line)
    return end
