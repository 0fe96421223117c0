"""What every stage that trains shares: batch arithmetic, optimizer, state on the mesh, the loop, and its record."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxchat.config import ModelConfig, TrainConfig
from jaxchat.infer.engine import Engine
from jaxchat.mesh import BATCH_SPEC, put_batch, shardings
from jaxchat.metrics import Metrics
from jaxchat.model.gpt import Params, abstract_params, init_params
from jaxchat.optim.optimizer import learning_rates, make_optimizer
from jaxchat.optim.schedules import multiplier
from jaxchat.scaling import BatchPlan, batch_plan, flops_per_token
from jaxchat.stages.run import Run
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.train.loop import Evaluator, Loop, Source
from jaxchat.train.step import Batch, State, init_state, make_train_step

MICRO_BATCH_SPEC = PartitionSpec(None, *BATCH_SPEC)  # [accumulation, rows, T]
SAMPLE_TOKENS = 96
PROMPT_TOKENS = 12
StepFunction = Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
Prompt = tuple[str, list[int]]  # as it is shown, and as the model gets it


def plan_batch(run: Run, stage: str, config: TrainConfig) -> BatchPlan:
    """How the optimizer step's tokens are spread over devices and micro-batches."""
    parallel = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    return batch_plan(config.batch_tokens, config.device_rows, run.experiment.model.sequence_len, parallel)


class Batches(Source):
    """A loader's batches on the mesh, as `[accumulation, rows, T]`."""

    def __init__(self, run: Run, plan: BatchPlan, iterator: Iterator[dict[str, np.ndarray]]):
        self.run, self.plan, self.iterator = run, plan, iterator

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        rows = next(self.iterator)
        return {name: self._put(array) for name, array in rows.items()}, {}

    def _put(self, array: np.ndarray) -> jax.Array:
        parts = array.reshape(self.plan.accumulation, -1, array.shape[-1])
        return put_batch(self.run.mesh, parts, MICRO_BATCH_SPEC)

    def get_state(self) -> dict:
        return self.iterator.get_state()

    def set_state(self, state: dict) -> None:
        self.iterator.set_state(state)


@dataclass
class Training:
    """One stage's training: `start` makes or loads the parameters, `train` runs the loop and records the stage."""

    run: Run
    stage: str
    config: TrainConfig
    model: ModelConfig
    tokenizer: BaseTokenizer
    num_steps: int
    parent: dict | None = None

    def __post_init__(self):
        run = self.run
        self.schedule = multiplier(self.config.schedule, self.num_steps)
        self.optimizer = make_optimizer(
            run.experiment.optimizer,
            self.model,
            self.schedule,
            lr_fraction=self.config.lr_fraction,
            mesh=run.mesh,
            newton_schulz_dtype=run.dtype,
        )

    def engine(self, params) -> Engine:
        return Engine(self.model, params, self.tokenizer, dtype=self.run.dtype)

    def sampler(self, metrics: Metrics, prompts: list[Prompt]) -> Evaluator:
        """Writes what the model makes of a few prompts, greedily, every `sample_every` steps and at the end.

        A prompt that fills the context is left out: there is no room for an answer.
        """
        prompts = [(text, ids) for text, ids in prompts if len(ids) < self.model.sequence_len]

        def run(step: int, params):
            completions = self.engine(params).generate(
                [ids for _, ids in prompts], max_new_tokens=SAMPLE_TOKENS, temperature=0.0
            )
            for (text, _), completion in zip(prompts, completions, strict=True):
                metrics.sample(step, text, self.tokenizer.decode(completion.tokens))
            return ()

        return Evaluator(self.config.sample_every, run, at_start=False)

    def prepare(self, start: Callable[[], Any]) -> tuple[State, StepFunction]:
        """The state of step 0 where it belongs on the mesh, and the jitted step that trains it."""
        abstract = jax.eval_shape(lambda params: init_state(params, self.optimizer), jax.eval_shape(start))
        placed = shardings(self.run.mesh, abstract)
        state = jax.jit(lambda params: init_state(params, self.optimizer), out_shardings=placed)(start())
        step = make_train_step(
            self.model, self.optimizer, mesh=self.run.mesh, state_shardings=placed, dtype=self.run.dtype
        )
        return state, step

    def train(
        self,
        start: Callable[[], Any],
        source: Source,
        evaluators: Callable[[Metrics], tuple[Evaluator, ...]],
        **facts,
    ) -> None:
        """Runs the loop to its end and writes stage.json; `start` gives the parameters of step 0."""
        run, began = self.run, time.time()
        state, step_fn = self.prepare(start)
        rates = learning_rates(run.experiment.optimizer, self.model, self.schedule, lr_fraction=self.config.lr_fraction)
        with run.metrics(self.stage, self.num_steps) as metrics:
            loop = Loop(
                step_fn=step_fn,
                source=source,
                num_steps=self.num_steps,
                metrics=metrics,
                checkpoints=run.checkpoints(self.stage),
                schedule_values=lambda step: {name: float(rate) for name, rate in rates(step).items()},
                flops_per_token=flops_per_token(self.model),
                save_every=self.config.save_every,
                evaluators=evaluators(metrics),
                meta={"stage": self.stage, "parent": self.parent, "config": dataclasses.asdict(run.experiment)},
            )
            loop.train(state)
            loop.checkpoints.close()
        run.finish(
            self.stage,
            parent=self.parent,
            steps=self.num_steps,
            tokens=loop.tokens,
            seconds=loop.seconds,
            train_seconds=loop.train_seconds,
            started=began,
            **facts,
        )


def fresh_params(run: Run, model: ModelConfig) -> Params:
    """New parameters by the experiment's seed, made where they belong on the mesh."""
    init = jax.jit(init_params, static_argnums=0, out_shardings=shardings(run.mesh, abstract_params(model)))
    return init(model, jax.random.key(run.experiment.seed))


def random_batches(run: Run, model: ModelConfig) -> Batches:
    """Pretraining's batches, but of tokens drawn evenly: for measuring, where no text is wanted."""
    plan, draw = plan_batch(run, "pretrain", run.experiment.pretrain), np.random.default_rng(run.experiment.seed)
    shape = (plan.rows * plan.accumulation // jax.process_count(), model.sequence_len + 1)

    def rows():
        while True:
            tokens = draw.integers(0, model.vocab_size, shape, np.int32)
            yield {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    return Batches(run, plan, rows())


def take(iterator: Iterator[dict[str, np.ndarray]], count: int) -> list[dict[str, np.ndarray]]:
    """The first `count` batches, kept on the host: the same ones for every evaluation."""
    return list(itertools.islice(iterator, count))


def prompts_of_texts(tokenizer: BaseTokenizer, texts: list[str]) -> list[Prompt]:
    """The beginnings of a few documents, as prompts for a base model."""
    beginnings = [tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]
    return [(tokenizer.decode(ids), [tokenizer.bos_token_id, *ids]) for ids in beginnings]


def prompts_of_chats(tokenizer: BaseTokenizer, conversations: list[dict]) -> list[Prompt]:
    """The first questions of a few conversations."""
    prompts = []
    for messages in (conversation["messages"] for conversation in conversations):
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        opening = {"messages": messages[: first + 1]}
        prompts.append((str(messages[first]["content"]), tokenizer.render_for_completion(opening)))
    return prompts
