"""The stages that train, and their evaluation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxchat.config.optimizer import RATE, ScheduleConfig
from jaxchat.config.phases import PhasesConfig, check_batches
from jaxchat.config.ranges import Range, Section, UserPath, shown
from jaxchat.errors import closest

TRAINED = ("pretrain", "midtrain", "sft", "rl")  # the stages that leave parameters, in order
# The fields that say how long a stage is: each counts only where those before it are None.
LENGTHS = {
    "pretrain": ("num_iterations", "target_flops", "tokens_per_param"),
    "midtrain": ("num_iterations", "epochs"),
    "sft": ("num_iterations", "epochs"),
    "rl": ("num_iterations",),
}
MOST_ANSWERS = 1 << 20
BY_SIGNAL = "signal"  # in place of weights
_RUNS_PROGRAMS = re.compile(r"((nanochat_)?humaneval|(unseen_)?programs_\d)(:.*)?")
COUNT, EVERY = Range(at_least=1), Range(at_least=0)
STEPS = Range(at_least=1, at_most=10**9)
AT_ONCE = Range(at_least=1, at_most=1 << 16)
LENGTH = Range(at_least=1, at_most=1 << 20)


@dataclass(frozen=True)
class TrainConfig(Section):
    """What all training stages have: length, learning rate, and how often to evaluate, sample and save."""

    device_rows: Annotated[int | Literal["auto"], AT_ONCE] = "auto"
    """Rows that a device computes at once; more of a step's rows are accumulated one after another. auto: as many as
    fit into its memory with little recomputed."""
    num_iterations: Annotated[int | None, STEPS] = None
    """Optimizer steps. None: as many as the stage needs for its data."""
    lr_fraction: Annotated[float, RATE] = 1.0
    """Factor on the learning rates of the optimizer section in this stage."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval_every: Annotated[int, EVERY] = 250
    """Steps between evaluations. 0: only before the first and after the last step."""
    sample_every: Annotated[int, EVERY] = 0
    """Steps between samples of the model's output. 0: only after the last step."""
    save_every: Annotated[int, EVERY] = 1000
    """Steps between checkpoints. 0: only after the last step, or when the run is stopped."""


@dataclass(frozen=True)
class SupervisedConfig(TrainConfig):
    """Training on given tokens: pretraining, midtraining and SFT."""

    batch_tokens: Annotated[int, Range(at_least=1, at_most=1 << 30)] = 524_288
    """Tokens of an optimizer step, on all devices together."""

    @property
    def unit_tokens(self) -> int:
        """Tokens of which each step has a whole multiple."""
        return self.batch_tokens


@dataclass(frozen=True)
class PretrainConfig(SupervisedConfig):
    """Pretraining on plain text."""

    section = "pretrain"

    num_iterations: Annotated[int | None, STEPS] = None
    """Optimizer steps. None: as many as target-flops or, without it, tokens-per-param gives."""
    target_flops: Annotated[float | None, Range(above=0)] = None
    """Training compute in FLOPs, such as 1e19. None: tokens-per-param decides."""
    tokens_per_param: Annotated[float, Range(above=0, at_most=1_000_000)] = 20.0
    """Training tokens for each parameter; 20 is about compute-optimal."""
    tokens_per_matrix_param: Annotated[float, Range(above=0, at_most=1_000_000)] = 12.0
    """With --rules: training tokens for each parameter of the blocks' matrices and the head, in place of
    tokens-per-param."""
    eval_tokens: Annotated[int, COUNT] = 10_485_760
    """Validation tokens of an evaluation."""
    sample_every: Annotated[int, EVERY] = 2000
    core_every: Annotated[int, EVERY] = 0
    """Steps between measurements of CORE on a sample of its tasks, which the data folder has; also after the last step.
    0: never."""
    core_per_task: Annotated[int, Range(at_least=11)] = 500
    """Items of each task of CORE in that sample, at most. A prompt has up to 10 others as examples."""
    phases: PhasesConfig = field(default_factory=PhasesConfig)

    def __post_init__(self):
        super().__post_init__()
        check_batches(self.phases, self.batch_tokens)

    @property
    def unit_tokens(self) -> int:
        return math.gcd(self.batch_tokens, *self.phases.batch_tokens)

    @property
    def mean_batch_tokens(self) -> float:
        """A run takes as many steps as its tokens divided by this."""
        if not self.phases.batch_tokens:
            return self.batch_tokens
        sizes = (*self.phases.batch_tokens, self.batch_tokens)
        return 1 / sum(share / size for share, size in zip(self.phases.shares, sizes, strict=True))


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig):
    """Fine-tuning on conversations: midtraining and SFT."""

    of_a_stage = True

    num_iterations: Annotated[int | None, STEPS] = None
    """Optimizer steps. None: as many as the epochs take."""
    mixture: Annotated[tuple[str, ...], UserPath()] = ("chat",)
    """Tasks to train on: NAME or NAME:EXAMPLES, or the path of a .jsonl file with conversations."""
    epochs: Annotated[float, Range(above=0, at_most=10_000)] = 1.0
    """Passes over the mixture, unless num-iterations is set."""
    targets: Literal["assistant", "all"] = "assistant"
    """Which tokens of the conversations are trained on: those that the assistant writes (assistant), or also the
    users', the tools' and what separates them, as of text (all). Validation is on what the assistant writes."""
    text_fraction: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Share of each step's rows that are text of pretraining, read on from where the stage before stopped; the others
    are conversations."""
    eval_tokens: Annotated[int, COUNT] = 1_048_576
    """Validation tokens of an evaluation."""
    tasks: Annotated[tuple[str, ...], UserPath()] = ()
    """Tasks to score on a sample of their questions while training, NAME or NAME:EXAMPLES; the mixture decides what is
    trained on."""
    tasks_every: Annotated[int, EVERY] = 0
    """Steps between these scores. 0: only before the first and after the last step."""
    task_questions: Annotated[int, COUNT] = 200
    """Questions of each of these tasks, at most."""

    def __post_init__(self):
        super().__post_init__()
        self.check(len(self.mixture) > 0, "mixture is empty; name at least one task, such as chat")
        names = [re.sub(r":\d+$", "", entry) for entry in self.tasks]
        for name in names:
            self.check(names.count(name) == 1, f"tasks names {shown(name)} more than once; a score is made once")

    def text_rows(self, rows: int, lanes: int) -> int:
        """How many of a step's `rows` are text: as near to `text_fraction` of them as `lanes` divides."""
        return round(self.text_fraction * rows / lanes) * lanes


@dataclass(frozen=True)
class RLConfig(TrainConfig):
    """Reinforcement learning on questions whose answers can be checked."""

    section = "rl"

    num_iterations: Annotated[int | None, STEPS] = None
    """Optimizer steps. None: one pass over the questions."""
    method: Literal["reinforce", "clipped", "cispo", "gspo", "best_of_n"] = "reinforce"
    """The loss of a sampled token, given its answer's advantage. reinforce: the advantage times -log p. clipped: minus
    the advantage times the ratio of p to that of sampling, within limits (PPO, DAPO). cispo: reinforce times that
    ratio, up to ratio-cap. gspo: clipped, with the answer's mean ratio. best_of_n: -log p of each question's best
    sample alone."""
    advantage: Literal["centred", "leave_one_out", "standardised", "maximum_likelihood"] = "centred"
    """From rewards to advantages: the reward minus the mean of the question's samples (centred) or of the others
    (leave_one_out); centred, and divided by the standard deviation (standardised, as GRPO) or by the mean
    (maximum_likelihood, which learns most from what rarely succeeds)."""
    average: Literal["tokens", "answers", "length"] = "tokens"
    """The loss is a mean over all tokens (as DAPO), over each answer's tokens and then over answers (as GRPO), or a sum
    over each answer's tokens, divided by max-new-tokens, and then a mean over answers (as Dr. GRPO)."""
    updates_per_batch: Annotated[int, Range(at_least=1, at_most=1024)] = 1
    """Optimizer steps on each batch of answers. More than one needs clipped, cispo or gspo, or best_of_n."""
    clip_low: Annotated[float | None, Range(above=0, below=1)] = None
    """How far below 1 the ratio of clipped and gspo may go. None: 0.2, and 0.0003 for gspo."""
    clip_high: Annotated[float | None, Range(above=0, at_most=1000)] = None
    """How far above 1 the ratio of clipped and gspo may go. None: 0.28, and 0.0004 for gspo."""
    ratio_cap: Annotated[float, Range(above=0, at_most=1000)] = 5.0
    """The largest ratio that counts with cispo."""
    kl: Annotated[float, Range(at_least=0, at_most=1000)] = 0.0
    """Weight of the KL divergence from the model that the stage begins with, which is then kept in memory."""
    entropy: Annotated[float, Range(at_least=0, at_most=1000)] = 0.0
    """Weight of the entropy of the tokens' distributions, in nats, which keeps answers varied."""
    tasks: Annotated[tuple[str, ...], UserPath()] = ("gsm8k",)
    """Tasks that ask and reward: NAME or NAME:EXAMPLES."""
    task_weights: tuple[str, ...] = ()
    """How many of the questions are each task's, in proportion: NAME:WEIGHT, 1 for tasks that are not named. signal
    alone: as many as the share of its last questions that taught something. (): as many as the task has questions."""
    reward: Annotated[str | None, UserPath()] = None
    """A Python function of your own that rewards the answers: module:function or file.py:function. None: the tasks'."""
    humaneval: bool = False
    """Reward programs, by running them, contained: those of programs_1 to programs_5 where tasks name them; otherwise
    humaneval, of problems of your own, joins the tasks."""
    uncontained: bool = False
    """With humaneval: run programs even where this machine cannot contain them."""
    questions_per_step: Annotated[int, AT_ONCE] = 16
    """Questions of an optimizer step."""
    refill: Annotated[int, Range(at_least=1, at_most=1024)] = 1
    """Where some questions have nothing to teach since all their answers earn the same, others are asked in their
    place: up to refill times questions-per-step in all. 1: none are, and the step has fewer."""
    retire: Annotated[float | Literal["auto"] | None, Range(above=0)] = "auto"
    """A question is no longer asked once its answers earn this much on average, 1 being right. auto: 0.9; with a reward
    of your own, None. None: all questions are always asked."""
    samples_per_question: Annotated[int, Range(at_least=2, at_most=1 << 16)] = 16
    """Answers that are sampled for each question."""
    max_new_tokens: Annotated[int, LENGTH] = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, Range(at_least=0.01, at_most=100)] = 1.0
    """Sampling temperature; lower is less varied."""
    top_k: Annotated[int | None, COUNT] = None
    """Sample from the k likeliest tokens. None: from all, as everything but reinforce and best_of_n needs it."""
    lr_fraction: Annotated[float, RATE] = 0.05
    eval_questions: Annotated[int, COUNT] = 400
    """Questions of an evaluation, at most, of the validation split: as many of each task."""
    pass_k: Annotated[int, Range(at_least=1, at_most=1024)] = 8
    """Answers that are sampled to each of them, beside a greedy one: pass@1 and pass@k, of this k, follow from them."""
    eval_every: Annotated[int, EVERY] = 60
    save_every: Annotated[int, EVERY] = 60

    def __post_init__(self):
        super().__post_init__()
        _add_humaneval(self)
        ratios = self.method in ("clipped", "cispo", "gspo")
        self.check(
            self.updates_per_batch == 1 or ratios or self.method == "best_of_n",
            f"updates-per-batch is {self.updates_per_batch}, but after one update the model would answer otherwise, "
            f"which {self.method} does not allow for; set method to clipped, cispo or gspo, or updates-per-batch to 1",
        )
        self.check(
            self.top_k is None or not (ratios or self.kl),
            f"top-k is {self.top_k}, but {f'{self.method} needs' if ratios else 'kl needs'} the probabilities at which "
            "tokens were sampled to be those of the whole vocabulary; leave top-k out, or set it to None",
        )
        self.check(len(self.tasks) > 0, "tasks is empty; name at least one task, such as gsm8k")
        answers = self.questions_per_step * self.samples_per_question * self.refill
        refilled = f", with refill {self.refill}" if self.refill > 1 else ""
        self.check(
            answers <= MOST_ANSWERS,
            f"questions-per-step is {self.questions_per_step} and samples-per-question is {self.samples_per_question}"
            f"{refilled}; a step can sample at most {MOST_ANSWERS:,} answers, not {answers:,}",
        )
        self.check(
            self.retire in (None, "auto") or self.reward is not None or self.retire <= 1,
            f"retire is {self.retire}, but no answer to a task earns more than 1; set it to 0.9, for example",
        )
        _check_weights(self)

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the tasks that `task_weights` names."""
        pairs = (entry.rpartition(":") for entry in self.task_weights if entry != BY_SIGNAL)
        return {name: float(weight) for name, _, weight in pairs}


def _check_weights(section: RLConfig) -> None:
    """Raises `Impossible` unless each of `task_weights` is a task's, with a number above 0; or `BY_SIGNAL` is alone."""
    if section.task_weights == (BY_SIGNAL,):
        return
    names = [re.sub(r":\d+$", "", entry) for entry in section.tasks]
    seen: set[str] = set()
    for entry in section.task_weights:
        name, _, weight = entry.rpartition(":")
        where = f"task-weights has {shown(entry)}"
        section.check(entry != BY_SIGNAL, f"{where} beside others; write it alone, or a weight for each task")
        section.check(bool(name), f"{where}; write NAME:WEIGHT, such as {entry if entry in names else names[0]}:2")
        section.check(name in names, f"{where}, which rl.tasks does not name{closest(name, names)}")
        section.check(name not in seen, f"{where}, a second weight of the task; leave one out")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        section.check(
            0.001 <= value <= 1000,
            f"{where}; a weight is a number from 0.001 to 1,000; a task that is not to be asked is left out of tasks",
        )
        seen.add(name)


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """The tasks that the finished stages are compared on."""

    section = "evaluate"

    tasks: Annotated[tuple[str, ...], UserPath()] = ("arc_easy", "arc_challenge", "mmlu", "gsm8k")
    """Tasks to score: NAME or NAME:EXAMPLES."""
    humaneval: bool = False
    """Score programs, by running what the model writes, contained: those of programs_1 to programs_5 where tasks name
    them; otherwise humaneval joins the tasks."""
    uncontained: bool = False
    """With humaneval: run programs even where this machine cannot contain them."""
    of: tuple[str, ...] = ("midtrain", "sft", "rl")
    """Stages whose models are scored."""
    limit: Annotated[int | None, COUNT] = None
    """Questions of each task, at most. None: all."""
    batch_rows: Annotated[int | Literal["auto"], AT_ONCE] = "auto"
    """Questions that the model answers at once. auto: as many as fit into memory, up to those that make it faster."""
    max_new_tokens: Annotated[int, LENGTH] = 512
    """Longest answer, in tokens."""
    core: tuple[str, ...] = ("pretrain",)
    """Stages whose models are measured by CORE, where the data folder has its bundle."""
    core_per_task: Annotated[int | None, Range(at_least=11)] = None
    """Items of each task of CORE, at most. A prompt has up to 10 others as examples. None: all."""

    def __post_init__(self):
        super().__post_init__()
        _add_humaneval(self)
        for name in ("of", "core"):
            for stage in getattr(self, name):
                self.check(
                    stage in TRAINED,
                    f"{name} names {shown(stage)}{closest(stage, TRAINED)} The stages with a model are "
                    f"{', '.join(TRAINED)}",
                )
        tasks = [re.sub(r":\d+$", "", entry) for entry in self.tasks]
        for name, entries in (("of", list(self.of)), ("tasks", tasks), ("core", list(self.core))):
            for entry in entries:
                self.check(
                    entries.count(entry) == 1, f"{name} names {shown(entry)} more than once; a score is made once"
                )


def _add_humaneval(section: RLConfig | EvaluateConfig) -> None:
    """Puts humaneval among the tasks where it is asked for, unless one is there that runs programs.

    None is among them by default.
    """
    if section.humaneval and not any(_RUNS_PROGRAMS.fullmatch(entry) for entry in section.tasks):
        object.__setattr__(section, "tasks", (*section.tasks, "humaneval"))
