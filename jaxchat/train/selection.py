"""Which checkpoint is a stage's result: that of its last step or, where validation turned, of its best evaluation.

What is read many times is learned by heart: from some step on the bits per byte of held-out data rise, while the
training loss still falls. Of the checkpoints that have been evaluated the best is kept; where the data is being read
again, each new best is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxchat.checkpoint import Checkpoints
from jaxchat.devices.processes import on_process_zero

# The metrics of an evaluation that rate a checkpoint, with the sign that makes higher better.
SCORE_SIGNS = {"bpb": -1.0, "reward_eval": 1.0}
# By how much the best evaluation must be better than the last, as a share. Both are of the same tokens; on few of them
# (30,000) the difference between two checkpoints of one training has a standard error of about 0.04 %.
NOISE = 0.002


class Turn(NamedTuple):
    """Where validation turned: the step of the best evaluation, and the bits per byte there and at the end."""

    step: int
    bpb: float
    bpb_at_end: float


def find_turn(checkpoints: Checkpoints, last: int) -> Turn | None:
    """Where the validation of a training of `last` steps turned, among its checkpoints; None if it did not.

    The scores of the checkpoints must be bits per byte, with the sign changed.
    """
    best, scores = checkpoints.best_step(), checkpoints.scores()
    if best is None or last not in scores:
        return None
    turn = Turn(best, -scores[best], -scores[last])
    return turn if turn.bpb_at_end > turn.bpb * (1 + NOISE) else None


def score_of(values: Mapping[str, Any]) -> float | None:
    """How good the parameters are by the metrics of an evaluation, higher is better; None if they do not tell."""
    found = (sign * float(values[name]) for name, sign in SCORE_SIGNS.items() if name in values)
    return next((score for score in found if math.isfinite(score)), None)


def rate(
    checkpoints: Checkpoints,
    step: int,
    score: float | None,
    *,
    saved: bool = True,
    rereads: Callable[[], bool] = lambda: False,
) -> bool:
    """Records how good the state of a step is, if it has a checkpoint; returns whether it is to get one now.

    Args:
      saved: it has a checkpoint.
      rereads: whether the data is being read again, so that no later state may be as good.
    """
    if score is None:
        return False
    better = all(score > other for other in checkpoints.scores().values())
    save = not saved and better and on_process_zero(rereads)
    if saved or save:
        checkpoints.record_score(step, score)
    return save


def forget_scores(checkpoints: Checkpoints, step: int, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Forgets what a training that resumes after `step` steps cannot compare with: later scores, or of other data.

    Args:
      before, now: the checkpoints' `meta`, as the training has written it, and as it writes it now.
    """
    sizes = [
        {name: value for name, value in _settings(meta).items() if name in ("eval_tokens", "eval_questions", "pass_k")}
        for meta in (before, now)
    ]
    checkpoints.forget_scores(after=step if sizes[0] == sizes[1] else 0)


def _settings(meta: dict[str, Any]) -> dict[str, Any]:
    """Those of the stage."""
    return meta.get("config", {}).get(meta.get("stage"), {})
