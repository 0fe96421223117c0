"""What every stage that trains shares: batch arithmetic, optimizer, state on the mesh, the loop, and its record."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxchat.config import TrainConfig
from jaxchat.data.positions import join_positions, totals
from jaxchat.devices.mesh import BATCH_SPEC, batch_share, data_shards, put_batch
from jaxchat.devices.processes import exchange
from jaxchat.errors import UserError, check
from jaxchat.infer.engine import Engine
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, init_params
from jaxchat.model.parameters import shardings
from jaxchat.ops.compute import for_training
from jaxchat.optim.optimizer import learning_rates, make_optimizer
from jaxchat.optim.schedules import multiplier
from jaxchat.runs.metrics import Metrics
from jaxchat.runs.report import describe_data
from jaxchat.stages.workspace import Workspace
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.tokenizer.conversation import checked_messages
from jaxchat.train.budget import BatchPlan, batch_plan, flops_per_token
from jaxchat.train.loop import Evaluator, Loop, Source
from jaxchat.train.memory import CompiledStep, MakeStep, TrainStep, plan_step, usable_memory
from jaxchat.train.step import Batch, State, init_state

MICRO_BATCH_SPEC = PartitionSpec(None, *BATCH_SPEC)  # [accumulation, rows, T]
SAMPLE_TOKENS = 96
PROMPT_TOKENS = 12
StepFunction = Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
Prompt = tuple[str, list[int]]  # as it is shown, and as the model gets it


def plan_batch(workspace: Workspace, stage: str, config: TrainConfig) -> BatchPlan:
    """How the optimizer step's tokens are spread over devices and micro-batches."""
    parallel = data_shards(workspace.mesh)
    return batch_plan(config.batch_tokens, config.device_rows, workspace.experiment.model.sequence_len, parallel)


def abstract_batch(mesh: Mesh, plan: BatchPlan, sequence_len: int) -> Batch:
    """A supervised step's batch as ShapeDtypeStructs with their places on the mesh."""
    rows = jax.ShapeDtypeStruct(
        (plan.accumulation, plan.rows, sequence_len), np.int32, sharding=NamedSharding(mesh, MICRO_BATCH_SPEC)
    )
    return {"inputs": rows, "targets": rows}


class Batches(Source):
    """A loader's batches on the mesh, as `[accumulation, rows, T]`."""

    def __init__(self, workspace: Workspace, plan: BatchPlan, iterator: Iterator[dict[str, np.ndarray]]):
        self.workspace, self.plan, self.iterator = workspace, plan, iterator

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        rows = next(self.iterator)
        return {name: self._put(array) for name, array in rows.items()}, {}

    def _put(self, array: np.ndarray) -> jax.Array:
        # Rows that follow one another go to different micro-batches: so each micro-batch is the same whatever number of
        # processes has read a part of it.
        parts = array.reshape(-1, self.plan.accumulation, array.shape[-1]).swapaxes(0, 1)
        return put_batch(self.workspace.mesh, parts, MICRO_BATCH_SPEC)

    def abstract(self) -> Batch:
        """What `next_batch` gives, as ShapeDtypeStructs."""
        return abstract_batch(self.workspace.mesh, self.plan, self.workspace.experiment.model.sequence_len)

    def get_state(self) -> dict:
        return self.iterator.get_state()

    def set_state(self, state: dict) -> None:
        self.iterator.set_state(state)

    def whole_state(self, state: dict) -> dict:
        return join_positions([json.loads(own) for own in exchange(json.dumps(state))])


@dataclass
class Training:
    """One stage's training: `start` makes or loads the parameters, `train` runs the loop and records the stage."""

    workspace: Workspace
    stage: str
    config: TrainConfig
    model: GPTConfig
    tokenizer: BaseTokenizer
    num_steps: int
    parent: dict | None = None

    def __post_init__(self):
        workspace = self.workspace
        self.schedule = multiplier(self.config.schedule, self.num_steps)
        self.optimizer = make_optimizer(
            workspace.experiment.optimizer,
            self.model,
            self.schedule,
            lr_fraction=self.config.lr_fraction,
            mesh=workspace.mesh,
            newton_schulz_dtype=workspace.dtype,
        )
        self.compute = for_training(workspace.experiment, workspace.mesh)
        self.startup: dict[str, float] = {}  # seconds of tracing and compiling the step

    def engine(self, params) -> Engine:
        return Engine(self.model, params, self.tokenizer, dtype=self.workspace.dtype)

    def sampler(self, metrics: Metrics, prompts: list[Prompt]) -> Evaluator:
        """Writes what the model makes of a few prompts, greedily, every `sample_every` steps and at the end.

        A prompt that fills the context is left out: there is no room for an answer.
        """
        prompts = [(text, ids) for text, ids in prompts if len(ids) < self.model.sequence_len]

        def write_samples(step: int, params):
            completions = self.engine(params).generate(
                [ids for _, ids in prompts], max_new_tokens=SAMPLE_TOKENS, temperature=0.0
            )
            for (text, _), completion in zip(prompts, completions, strict=True):
                metrics.sample(step, text, self.tokenizer.decode(completion.tokens))
            return ()

        return Evaluator(self.config.sample_every, write_samples, at_start=False)

    def prepare(self, start: Callable[[], Any]) -> tuple[State, StepFunction]:
        """The state of step 0 where it belongs on the mesh, and the jitted step that trains it; nothing is recomputed
        where that is left to `compiled`."""
        abstract, make_step = self._planned(start)
        remat = self.workspace.experiment.remat
        return self._begin(start, abstract), make_step("none" if remat == "auto" else remat)

    def compiled(self, start: Callable[[], Any], source: Source) -> tuple[State, TrainStep]:
        """The state of step 0, and the step that fits into memory; compiled before anything is there to take memory,
        where the source knows its batches beforehand.

        Raises:
          UserError: none fits.
        """
        abstract, make_step = self._planned(start)
        step = TrainStep(make_step, self.workspace.experiment.remat, usable_memory(), self._accept)
        if isinstance(source, Batches):
            step.compile(abstract, source.abstract())
        return self._begin(start, abstract), step

    def _planned(self, start: Callable[[], Any]) -> tuple[State, MakeStep]:
        params = jax.eval_shape(start)
        return plan_step(
            self.model, self.optimizer, params, self.compute
        )

    def _begin(self, start: Callable[[], Any], abstract: State) -> State:
        # What `start` gives is taken over, not copied: else a stage would hold its parent's parameters to its end.
        placed = jax.tree.map(lambda x: x.sharding, abstract)
        return jax.jit(lambda params: init_state(params, self.optimizer), out_shardings=placed, donate_argnums=0)(
            start()
        )

    def _accept(self, step: CompiledStep) -> None:
        """Says what was chosen, where there was a choice; an explicit setting is obeyed, whether it fits or not."""
        for name, spent in step.seconds.items():
            self.startup[name] = self.startup.get(name, 0.0) + spent
        if self.workspace.experiment.remat != "auto" or step.limit is None:
            return
        check(step.fits, step.too_large(self.stage, self.config.device_rows))
        self.workspace.say(f"{self.stage:<9} {step}")

    def train(
        self,
        start: Callable[[], Any],
        source: Source,
        evaluators: Callable[[Metrics], tuple[Evaluator, ...]],
        **facts,
    ) -> None:
        """Runs the loop to its end and writes stage.json; `start` gives the parameters of step 0."""
        workspace, began, clock = self.workspace, time.time(), time.perf_counter()
        state, step_fn = self.compiled(start, source)
        rates = learning_rates(
            workspace.experiment.optimizer, self.model, self.schedule, lr_fraction=self.config.lr_fraction
        )
        with workspace.metrics(self.stage, self.num_steps) as metrics:
            loop = Loop(
                step_fn=step_fn,
                source=source,
                num_steps=self.num_steps,
                metrics=metrics,
                checkpoints=workspace.checkpoints(self.stage),
                schedule_values=lambda step: {name: float(rate) for name, rate in rates(step).items()},
                flops_per_token=flops_per_token(self.model),
                save_every=self.config.save_every,
                evaluators=evaluators(metrics),
                on_nan=workspace.experiment.on_nan,
                startup=self.startup,
                began=clock,
                meta={"stage": self.stage, "parent": self.parent, "config": dataclasses.asdict(workspace.experiment)},
            )
            loop.train(state)
            loop.checkpoints.close()
        facts |= self._data_facts(source.whole_state(source.get_state()))
        if line := describe_data(facts):
            workspace.say(f"{self.stage:<9} {line}")
        workspace.finish(
            self.stage,
            parent=self.parent,
            steps=self.num_steps,
            tokens=loop.tokens,
            seconds=loop.seconds,
            train_seconds=loop.train_seconds,
            started=began,
            divergences=loop.divergences,
            **facts,
        )

    def _data_facts(self, state: dict) -> dict[str, Any]:
        """How full the rows were, and what was left out of the text, by the loader's state."""
        counts = totals(state)
        packed = counts["packed"]
        facts: dict[str, Any] = {"left_out": counts["left_out"]} if counts["left_out"] else {}
        if packed.get("rows"):
            facts["packing"] = {**packed, "utilisation": packed["targets"] / packed["rows"] / self.model.sequence_len}
        return facts


def fresh_params(workspace: Workspace, model: GPTConfig) -> Params:
    """New parameters by the experiment's seed, where they belong on the mesh."""
    params = init_params(model, jax.random.key(workspace.experiment.seed))
    return jax.device_put(params, shardings(workspace.mesh, params))


def random_batches(workspace: Workspace, model: GPTConfig) -> Batches:
    """Pretraining's batches, but of tokens drawn evenly: for measuring, where no text is wanted."""
    plan, draw = (
        plan_batch(workspace, "pretrain", workspace.experiment.pretrain),
        np.random.default_rng(workspace.experiment.seed),
    )
    shape = (plan.rows * plan.accumulation // batch_share(workspace.mesh)[1], model.sequence_len + 1)

    def rows():
        while True:
            tokens = draw.integers(0, model.vocab_size, shape, np.int32)
            yield {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    return Batches(workspace, plan, rows())


def take(iterator: Iterator[dict[str, np.ndarray]], count: int) -> list[dict[str, np.ndarray]]:
    """The first `count` batches, kept on the host: the same ones for every evaluation."""
    return list(itertools.islice(iterator, count))


def prompts_of_texts(tokenizer: BaseTokenizer, texts: list[str]) -> list[Prompt]:
    """The beginnings of a few documents, as prompts for a base model."""
    beginnings = [tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]
    return [(tokenizer.decode(ids), [tokenizer.bos_token_id, *ids]) for ids in beginnings]


def prompts_of_chats(tokenizer: BaseTokenizer, conversations: list[dict]) -> list[Prompt]:
    """The first questions of a few conversations.

    Raises:
      UserError: one that is malformed.
    """
    prompts = []
    for conversation in conversations:
        try:
            checked_messages(conversation)
        except ValueError as error:
            raise UserError(f"a conversation cannot be used: {error}") from None
        messages = conversation["messages"]
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        opening = {"messages": messages[: first + 1]}
        prompts.append((messages[first]["content"], tokenizer.render_for_completion(opening)))
    return prompts
