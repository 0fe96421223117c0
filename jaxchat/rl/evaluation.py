"""Evaluation during reinforcement learning, on questions that are held out from training: the test stays unseen.

Each question is answered greedily, and `pass_k` times as in training. All answers are kept, `STEP.jsonl` for each
evaluation, and those of step 0 are what later ones are compared with, question by question.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from jaxchat.config import RLConfig
from jaxchat.devices.processes import on_process_zero
from jaxchat.eval.statistics import mean_interval, paired_z, pass_at_k, wilson_interval
from jaxchat.infer.answers import Completion
from jaxchat.infer.engine import Engine
from jaxchat.rl.record import question_of, right_answer
from jaxchat.rl.reward import OwnReward
from jaxchat.rl.rollouts import MOST_ROWS, Question, sampling, score
from jaxchat.runs.files import Object, read_lines, write_bytes
from jaxchat.runs.tables import interval
from jaxchat.tasks.base import calculations_of
from jaxchat.tasks.items import hold_out, spread
from jaxchat.tokenizer import BaseTokenizer

SEED = 0  # the same random numbers each time: what differs is the model
Progress = Callable[[int, int], None]
Answer = dict[str, Any]  # a line of a file
_LINE = Object(
    {"task": str, "question": str, "score": float, "samples": [Object({"score": float})]}, {"calculations": int}
)


# --- which questions --------------------------------------------------------------------------------------------------


def hold_out_questions(
    training: Sequence[Question], validation: Sequence[Question]
) -> tuple[list[Question], list[Question]]:
    """The questions to train on and those to validate with, no text of which is trained on.

    A task without any for validation gives every 20th of those for training, which is then not trained on.

    Args:
      training, validation: of the tasks' splits.
    """
    with_own = {task.name for task, _ in validation}
    texts: dict[str, dict[str, Question]] = {}  # of the tasks without
    for question in training:
        if question[0].name not in with_own:
            texts.setdefault(question[0].name, {}).setdefault(_text(question), question)
    given = {task: hold_out(list(own), "val") for task, own in texts.items()}
    held_out = [*validation, *(texts[task][text] for task, own in given.items() for text in own)]
    kept = [question for question in training if _text(question) not in given.get(question[0].name, ())]
    trained = set(map(_text, kept))
    return kept, [question for question in held_out if _text(question) not in trained]


def spread_over_tasks(questions: Sequence[Question], most: int) -> list[Question]:
    """At most `most` questions, of each task as many if it has them, and evenly spread over it."""
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question[0].name, []).append(question)
    taken, left = {}, most
    for number, name in enumerate(sorted(by_task, key=lambda name: len(by_task[name]))):  # what one lacks, others give
        taken[name] = min(len(by_task[name]), left // (len(by_task) - number))
        left -= taken[name]
    return [question for name, own in by_task.items() for question in spread(own, taken[name])]


def _text(question: Question) -> str:
    return str(question[1]["messages"][:-1])


# --- asking -----------------------------------------------------------------------------------------------------------


class Validation:
    """Asks the same questions whenever it is called.

    Args:
      questions: none of which is trained on.
      folder: for the answers; only process 0 reads and writes there.
      own: rewards the answers too.
    """

    def __init__(
        self,
        config: RLConfig,
        questions: Sequence[Question],
        tokenizer: BaseTokenizer,
        folder: epath.Path,
        own: OwnReward | None = None,
    ):
        self.config, self.questions, self.tokenizer, self.folder, self.own = config, questions, tokenizer, folder, own
        self.prompts = [tokenizer.render_for_completion(conversation) for _, conversation in questions]

    def measure(self, step: int, engine: Engine, progress: Progress = lambda done, total: None) -> dict[str, float]:
        """What the answers after `step` steps are worth, as `measures` names it; `reward_eval`, the samples' mean
        reward, if any has one; and if that is by the user's own reward, `score_eval`, the same by the tasks' scores.

        Args:
          engine: with the parameters.
          progress: called with the number of answers that are written and of all, and then of those that are scored.

        Raises:
          UserError: the answers cannot be kept.
        """
        each, options = self.config.pass_k, sampling(self.config)
        longest = max(map(len, self.prompts)) + options["max_new_tokens"]
        # One cache for both lists, which differ in length: their programs are compiled once.
        engine.reserve(min(MOST_ROWS, each * len(self.prompts)), min(longest, engine.model_config.sequence_len))
        several, total = [prompt for prompt in self.prompts for _ in range(each)], (1 + each) * len(self.prompts)
        sampled = engine.generate(several, **options, seed=SEED, progress=lambda done: progress(done, total))
        greedy = engine.generate(
            self.prompts,
            max_new_tokens=options["max_new_tokens"],
            temperature=0.0,
            progress=lambda done: progress(len(several) + done, total),
        )
        # Scored once for all processes: where a clock decides, each could find another score.
        return on_process_zero(lambda: self._results(step, greedy, sampled, progress))

    def _results(
        self, step: int, greedy: list[Completion], sampled: list[Completion], progress: Progress
    ) -> dict[str, float]:
        each = self.config.pass_k
        several = [question for question in self.questions for _ in range(each)]
        scores = score(several, sampled, self.tokenizer, progress=progress)
        rewards = scores if self.own is None else score(several, sampled, self.tokenizer, self.own)
        samples = [
            {**self._answer(completion, value), **({} if self.own is None else {"reward": _finite(reward)})}
            for completion, value, reward in zip(sampled, scores, rewards, strict=True)
        ]
        first = score(self.questions, greedy, self.tokenizer)
        answers: list[Answer] = [
            {
                "task": task.name,
                "question": question_of(conversation),
                "right": right_answer(conversation),
                "calculations": calculations_of(conversation),
                **self._answer(greedy[i], first[i]),
                "samples": samples[i * each : (i + 1) * each],
            }
            for i, (task, conversation) in enumerate(self.questions)
        ]
        lines = [json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n" for answer in answers]
        write_bytes(self._file(step), "".join(lines).encode("utf-8", "replace"))
        before = read_lines(self._file(0), _LINE, "delete it: no change is measured")[0] if step > 0 else []
        known = [reward for reward in rewards if math.isfinite(reward)]
        return {
            **({"reward_eval": sum(known) / len(known)} if known else {}),
            **({} if self.own is None else {"score_eval": sum(scores) / len(scores)}),
            **measures(answers, before),
        }

    def _file(self, step: int) -> epath.Path:
        return self.folder / f"{step}.jsonl"

    def _answer(self, completion: Completion, score: float) -> Answer:
        text = self.tokenizer.decode(completion.tokens)
        return {"answer": text, "score": float(score), "cut": not completion.finished}


def _finite(reward: float) -> float | None:
    return float(reward) if math.isfinite(reward) else None


# --- what the answers say ---------------------------------------------------------------------------------------------


def measures(answers: Sequence[Answer], before: Sequence[Answer] = ()) -> dict[str, float]:
    """The measures of answers to some questions, with 95 % intervals, and how they have changed.

    They are, for all questions and, with `/TASK` after the name, for those of each task, and with `/TASK/N` for those
    whose right answers have N calculations, if these numbers differ:

    - `asked`: questions.
    - `greedy`: their mean score when they are answered greedily; of 0 and 1, the share answered right.
    - `pass_K`, for K = 1 and the number of samples: the chance that one of K samples is right, without bias.
    - `greedy_low`, `greedy_high`, `pass_K_low`, `pass_K_high`: the ends of the intervals.
    - `greedy_gained`, `greedy_lost`: greedy answers that have become right, and wrong, since `before`.
    - `greedy_z`, `pass_K_z`: by how many standard errors they have changed (`statistics.paired_z`).

    Args:
      answers: lines of a file, all with as many samples.
      before: those of another step. Only questions in both are compared.
    """
    earlier = {(answer["task"], answer["question"]): answer for answer in before}
    values: dict[str, float] = {}
    for part, own in _parts(answers).items():
        pairs = [
            (old, answer) for answer in own if (old := earlier.get((answer["task"], answer["question"]))) is not None
        ]
        scores = [answer["score"] for answer in own]
        mean = sum(scores) / len(scores)
        values |= {f"asked{part}": len(own), **_with_ends("greedy", part, mean, wilson_interval(mean, len(own)))}
        if pairs:
            changes = [_is_right(new) - _is_right(old) for old, new in pairs]
            values |= {f"greedy_gained{part}": changes.count(1), f"greedy_lost{part}": changes.count(-1)}
            values[f"greedy_z{part}"] = paired_z(changes)
        samples = min(len(answer["samples"]) for answer in own)
        for k in sorted({1, samples}) if samples else ():
            estimates = [_pass_at(answer, k) for answer in own]
            mean = sum(estimates) / len(estimates)
            values |= _with_ends(f"pass_{k}", part, mean, mean_interval(estimates, samples))
            compared = [(old, new) for old, new in pairs if len(old["samples"]) >= k]
            if compared:
                changes = [_pass_at(new, k) - _pass_at(old, k) for old, new in compared]
                values[f"pass_{k}_z{part}"] = paired_z(changes)
    return values


def describe(values: Mapping[str, float]) -> str:
    """The measures of all questions in a line.

    Such as `greedy 90.3% (84.6 to 94.1) of 155, pass@1 ..., pass@4 ...; since step 0 21 wrong to right, 2 right to
    wrong, z 4.0`.
    """
    ks = sorted(int(name.removeprefix("pass_")) for name in values if re.fullmatch(r"pass_\d+", name))
    shown = [_shown("greedy", "greedy", values) + f" of {values['asked']:,}"]
    text = ", ".join([*shown, *(_shown(f"pass_{k}", f"pass@{k}", values) for k in ks)])
    if "greedy_z" not in values:
        return text
    change = f"{values['greedy_gained']:,} wrong to right, {values['greedy_lost']:,} right to wrong"
    return f"{text}; since step 0 {change}, z {values['greedy_z']:.1f}"


def _shown(measure: str, name: str, values: Mapping[str, float]) -> str:
    ends = interval(values[f"{measure}_low"], values[f"{measure}_high"])
    return f"{name} {values[measure]:.1%} ({ends})"


def _parts(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """The answers that belong together, by what the names of their measures end with."""
    parts: dict[str, list[Answer]] = {"": list(answers)}
    for answer in answers:
        parts.setdefault(f"/{answer['task']}", []).append(answer)
    for name, own in list(parts.items())[1:]:
        numbers = sorted({answer.get("calculations", 0) for answer in own})
        for number in numbers if len(numbers) > 1 else ():
            parts[f"{name}/{number}"] = [answer for answer in own if answer.get("calculations", 0) == number]
    return parts


def _with_ends(name: str, part: str, mean: float, ends: Iterable[float]) -> dict[str, float]:
    low, high = ends
    return {f"{name}{part}": mean, f"{name}_low{part}": low, f"{name}_high{part}": high}


def _is_right(answer: Answer) -> bool:
    return answer["score"] == 1


def _pass_at(answer: Answer, k: int) -> float:
    samples = answer["samples"]
    return pass_at_k(len(samples), sum(map(_is_right, samples)), k)
