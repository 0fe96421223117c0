"""Reinforcement learning on questions with checkable answers, in the same loop as all training.

`reinforce` is on-policy: each sampled token's log-probability is weighted by r - mean(r of its question's samples),
summed and divided by the number of sampled tokens: GRPO (arXiv:2402.03300) without a trust region and without the
division by the standard deviation, at the token level as in DAPO (arXiv:2503.14476). `best_of_n` fine-tunes on each
question's best sample where the samples differ. What a tool answered is in the context but is never trained on.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxchat.config import RLConfig
from jaxchat.devices.mesh import data_shards, put_whole
from jaxchat.errors import check
from jaxchat.eval.chat import prompts_of
from jaxchat.infer.engine import Completion, Engine
from jaxchat.stages.training import MICRO_BATCH_SPEC, Training, prompts_of_chats
from jaxchat.stages.workspace import Workspace
from jaxchat.tasks import Conversation, Task
from jaxchat.tasks.base import spread
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.train.loop import Evaluator, Source
from jaxchat.train.step import Batch

Question = tuple[Task, Conversation]
SAMPLES = 3
EVALUATION_SEED = 0


def run(workspace: Workspace) -> None:
    """Trains the parent's parameters on the rewards of their own samples; skipped where the data has none of the tasks.

    Raises:
      UserError: no question fits the context.
    """
    experiment, tokenizer = workspace.experiment, workspace.tokenizer()
    config, model = experiment.rl, workspace.model_config(tokenizer)
    tasks = workspace.load_tasks("rl", config.tasks, "train")
    if not tasks:
        workspace.say(f"rl        skipped: none of its tasks ({', '.join(config.tasks)}) is in the data folder")
        workspace.finish("rl", parent=None, steps=0, tokens=0, seconds=0.0, skipped=True)
        return
    questions = questions_of(tasks, tokenizer, model.sequence_len)
    check(bool(questions), f"rl: no question of its tasks fits into model.sequence-len {model.sequence_len}")
    tests = workspace.load_tasks("rl", config.tasks, "test", quiet=True)
    held_out = questions_of(tests, tokenizer, model.sequence_len)
    if not held_out:
        workspace.say("rl        its tasks have no test questions: reward_eval is of questions that are trained on")
        held_out = questions
    parent = workspace.parent_of("rl")
    params, step = workspace.load_params(parent, model)
    steps = config.num_iterations or max(1, len(questions) // config.questions_per_step)
    training = Training(workspace, "rl", config, model, tokenizer, steps, parent={"stage": parent, "step": step})
    source = Rollouts(workspace, config, questions, training.engine(params))
    asked = spread(held_out, config.eval_questions)

    def evaluate(step, params):
        engine = training.engine(params)
        prompts = [tokenizer.render_for_completion(conversation) for _, conversation in asked]
        completions = engine.generate(prompts, **sampling(config), seed=EVALUATION_SEED)
        yield "reward_eval", float(np.mean(score(asked, completions, tokenizer)))

    samples = prompts_of_chats(tokenizer, [conversation for _, conversation in spread(held_out, SAMPLES)])
    training.train(
        lambda: params,
        source,
        lambda metrics: (Evaluator(config.eval_every, evaluate), training.sampler(metrics, samples)),
        method=config.method,
    )


def questions_of(tasks: list[Task], tokenizer: BaseTokenizer, sequence_len: int) -> list[Question]:
    """All questions that leave room for an answer, each with the task that scores it."""
    return [
        (task, conversation)
        for task in tasks
        for conversation, prompt in zip(task, prompts_of(task, list(task), tokenizer), strict=True)
        if len(prompt) < sequence_len
    ]


def score(questions: list[Question], completions: list[Completion], tokenizer: BaseTokenizer) -> list[float]:
    """The reward of each completion of the question at its place."""
    return [
        task.score(conversation, tokenizer.decode(completion.tokens))
        for (task, conversation), completion in zip(questions, completions, strict=True)
    ]


def sampling(config: RLConfig) -> dict:
    """The engine's arguments for a rollout."""
    names = ("max_new_tokens", "temperature", "top_k")
    return {name: getattr(config, name) for name in names}


class Rollouts(Source):
    """Batches that the current parameters write themselves: n samples of each of a step's questions, with rewards."""

    samples = True

    def __init__(self, workspace: Workspace, config: RLConfig, questions: list[Question], engine: Engine):
        self.workspace, self.config, self.questions, self.engine = workspace, config, questions, engine
        self.tokenizer = engine.tokenizer
        parallel = data_shards(workspace.mesh)
        rollouts = config.questions_per_step * config.samples_per_question
        self.micro_rows = min(config.device_rows, math.ceil(rollouts / parallel)) * parallel
        self.taken = 0  # batches: their questions and random numbers follow from this number alone

    def get_state(self) -> dict:
        return {"taken": self.taken}

    def set_state(self, state: dict) -> None:
        self.taken = state["taken"]

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        config = self.config
        picked = [self.questions[i] for i in self._pick(self.taken)]
        asked = [question for question in picked for _ in range(config.samples_per_question)]
        prompts = [self.tokenizer.render_for_completion(conversation) for _, conversation in asked]
        engine = dataclasses.replace(self.engine, params=params)
        seed = self.workspace.experiment.seed * 1_000_003 + self.taken + 1
        completions = engine.generate(prompts, **sampling(config), seed=seed)
        rewards = np.array(score(asked, completions, self.tokenizer)).reshape(-1, config.samples_per_question)
        weights = WEIGHTS[config.method](rewards).reshape(-1)
        batch = self._batch(prompts, completions, weights)
        extra = {
            "reward": float(rewards.mean()),
            "completion_tokens": float(np.mean([len(c.tokens) for c in completions])),
        }
        self.taken += 1
        return {name: put_whole(self.workspace.mesh, array, MICRO_BATCH_SPEC) for name, array in batch.items()}, extra

    def _pick(self, number: int) -> np.ndarray:
        """A batch's questions: each epoch is a fresh permutation of all."""
        places = number * self.config.questions_per_step + np.arange(self.config.questions_per_step)
        seed, size = self.workspace.experiment.seed, len(self.questions)
        order = {epoch: np.random.default_rng((seed, epoch)).permutation(size) for epoch in set(places // size)}
        return np.array([order[place // size][place % size] for place in places])

    def _batch(self, prompts: list[list[int]], completions: list[Completion], weights: np.ndarray) -> dict:
        """Prompt + completion as rows `[accumulation, rows, T]`; only sampled tokens are targets."""
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            # The stop token is the model's own decision too.
            stop = [completion.stop] if completion.finished else []
            tokens = prompt + completion.tokens + stop
            rows.append((tokens, [False] * len(prompt) + completion.sampled + [True] * len(stop)))
        longest = max(len(tokens) for tokens, _ in rows) - 1
        # Few lengths, few compilations: the next power of two, within the context.
        length = min(self.workspace.experiment.model.sequence_len, 1 << (longest - 1).bit_length())
        count = math.ceil(len(rows) / self.micro_rows) * self.micro_rows
        inputs = np.zeros((count, length), np.int32)
        targets = np.full((count, length), -1, np.int32)
        scale = np.zeros((count, length), np.float32)
        for i, (tokens, sampled) in enumerate(rows):
            tokens, sampled = np.array(tokens[: length + 1]), np.array(sampled[: length + 1])
            inputs[i, : len(tokens) - 1] = tokens[:-1]
            if not np.isnan(weights[i]):
                targets[i, : len(tokens) - 1] = np.where(sampled[1:], tokens[1:], -1)
                scale[i] = weights[i]
        shape = (count // self.micro_rows, self.micro_rows, length)
        return {"inputs": inputs.reshape(shape), "targets": targets.reshape(shape), "weights": scale.reshape(shape)}


def reinforce_weights(rewards: np.ndarray) -> np.ndarray:
    """r - mean over each question's samples; `[questions, samples]` both."""
    return rewards - rewards.mean(axis=1, keepdims=True)


def best_of_n_weights(rewards: np.ndarray) -> np.ndarray:
    """1 for each question's first best sample, NaN (not trained on) for the rest and where all samples are equal."""
    weights = np.full(rewards.shape, np.nan)
    told_apart = rewards.max(axis=1) > rewards.min(axis=1)
    weights[told_apart, rewards.argmax(axis=1)[told_apart]] = 1.0
    return weights


WEIGHTS = {"reinforce": reinforce_weights, "best_of_n": best_of_n_weights}
