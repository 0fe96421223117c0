"""The scores that tasks give to sampled answers, several at once: that of a program may take seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from jaxchat.stopping import raise_if_asked
from jaxchat.tasks import Conversation, Task

AT_ONCE = min(16, os.cpu_count() or 1)  # programs take a processor core each, and up to 1 GiB
_POLL = 0.1  # seconds between two looks for a request to end
Answered = tuple[Task, Conversation, str, bool]  # an answer to a question of the task, and whether it was cut


def task_scores(
    answers: Sequence[Answered],
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    at_once: int = AT_ONCE,
    slow: float = 2.0,
) -> list[float]:
    """The score of each answer by its task; equal answers to one question are scored once.

    Each takes as long as its task allows; a program is stopped after a few seconds.

    Args:
      progress: called with the number of answers that are scored and of all, again and again after `slow` seconds.

    Raises:
      Interrupted: the work was asked to end.
    """
    started = time.monotonic()
    scores: dict[tuple[int, str, bool], Future[float]] = {}
    keys = [(id(conversation), answer, cut) for _, conversation, answer, cut in answers]
    pool = ThreadPoolExecutor(at_once)
    try:
        for key, (task, conversation, answer, cut) in zip(keys, answers, strict=True):
            if key not in scores:
                scores[key] = pool.submit(task.score, conversation, answer, cut=cut)
        while wait(scores.values(), timeout=_POLL).not_done:
            raise_if_asked()
            if time.monotonic() > started + slow:
                progress(sum(scores[key].done() for key in keys), len(keys))
        raise_if_asked()
    finally:
        pool.shutdown(cancel_futures=True)  # the programs that have not begun
    return [scores[key].result() for key in keys]
