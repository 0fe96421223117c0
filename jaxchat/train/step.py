"""The train step: gradients of one whole batch, accumulated over micro-batches inside one jitted function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from jaxchat.devices.mesh import BATCH_SPEC
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states
from jaxchat.ops.compute import FP32, Compute
from jaxchat.train.loss import (
    TOKENS_AHEAD,
    LossConfig,
    Objective,
    cross_entropy_sum,
    measures,
    objective_sum,
    targets_ahead,
)

State = dict[str, Any]  # {"params", "opt_state", "step"}
AbstractBatch = dict[str, Any]  # a batch before there is one: ShapeDtypeStructs, and a "reach"
# {"inputs", "targets"} and, with an objective, "shares" and what it needs of the targets: each [accumulation, rows, T];
# "documents" of that shape, where several share a row; scalars "rate", where the rates of the optimizer come with the
# batch, those of `MOVING`, and "micro_batches", where only the first so many are computed; "ahead", the weights of the
# losses of tokens after the next one; "reach", a `Reach`
Batch = dict[str, Any]
MOVING = ("muon_momentum", "muon_decay")  # what the optimizer takes from a batch that has it
MICRO_BATCH_SPEC = PartitionSpec(None, *BATCH_SPEC)  # how a batch is laid out on the mesh


@jax.tree_util.register_static
@dataclass(frozen=True)
class Reach:
    """How far back layers see in a step, as a share of their windows. No array: each is a program of its own."""

    share: float


def abstract_batch(mesh: Mesh, shape: tuple[int, int, int], tokens: Iterable[str] = ()) -> AbstractBatch:
    """A batch of `shape` [accumulation, rows, T] as ShapeDtypeStructs with shardings; `tokens` for an objective."""
    place = NamedSharding(mesh, MICRO_BATCH_SPEC)
    dtypes = {"inputs": np.int32, "targets": np.int32, **dict.fromkeys(tokens, np.float32)}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}


def init_state(params, optimizer: optax.GradientTransformation) -> State:
    """A training state at step 0."""
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def make_train_step(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    compute: Compute = FP32,
    *,
    objective: Objective | None = None,
    state_shardings: Any = None,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """The jitted step `(state, batch) -> (state, metrics)`; the state's buffers are donated.

    `state_shardings` (a tree like the state's) pins where the new state is placed; otherwise the compiler may move it,
    and the second step would compile again.

    Without an objective the loss is the cross-entropy: Σ nll over the batch's real targets (those not negative) divided
    by their count in the whole batch, over all micro-batches and devices: never a mean of means. Without targets, loss
    and gradient are 0. With an objective it is Σ share · loss: the batch says what each target's loss is divided by.

    A batch's "rate", if it has one, multiplies the optimizer's learning rates. With "micro_batches" the others have no
    targets. With "documents" (their numbers in each row, from 1 on) a token attends to its own document only.

    With "ahead", weights w, what is minimised is Σ nll of the next token + w₁ Σ nll of the token after that + w₂ …, of
    one prediction, divided by the count of the next tokens. With a "reach" layers have that share of their windows.

    A batch with an objective whose gradient is zero changes nothing, as in RL when all samples of each question earn
    the same reward. The optimizer would otherwise keep moving along earlier gradients, and Muon by a full step.

    Metrics, still on the device: `loss` (in nats a target, for cross-entropy), `grad_norm` (before clipping), `targets`
    (their count), what the objective measures, as means over all targets, and of tokens ahead what they add to the
    loss, `loss_ahead`.
    """
    loss_config = LossConfig.of(config, compute.mesh)

    def micro_loss(params, batch, scale, model=config, ahead=None):
        batch = dict(batch)
        documents = batch.get("documents")
        hidden = hidden_states(model, params, batch.pop("inputs"), compute, documents)
        head, targets = params["head"]["kernel"], batch.pop("targets")
        if documents is not None:
            batch["documents"] = documents.astype(jnp.float32)  # as everything that an objective knows of the targets
        if objective is not None:
            return objective_sum(hidden, head, targets, batch, objective, loss_config)
        if ahead is not None:
            several = targets_ahead(targets, ahead.size)
            shares = scale * jnp.broadcast_to(jnp.concatenate([jnp.ones(1), ahead]), several.shape)
            return objective_sum(hidden, head, several, {"shares": shares}, TOKENS_AHEAD, loss_config)
        weights = jnp.ones(targets.shape, jnp.float32)
        return scale * cross_entropy_sum(hidden, head, targets, weights, loss_config), {}

    def step(state: State, batch: Batch):
        batch = dict(batch)
        params, rate, computed = state["params"], batch.pop("rate", None), batch.pop("micro_batches", None)
        ahead, reach = batch.pop("ahead", None), batch.pop("reach", None)
        model = config if reach is None else replace(config, reach=reach.share)
        moving = {name: batch.pop(name) for name in MOVING if name in batch}
        count = jnp.sum(batch["targets"] >= 0)
        scale = 1.0 / jnp.maximum(count, 1).astype(jnp.float32)
        loss_and_grad = jax.value_and_grad(partial(micro_loss, model=model, ahead=ahead), has_aux=True)
        if batch["inputs"].shape[0] == 1:
            (loss, sums), grads = loss_and_grad(params, jax.tree.map(lambda x: x[0], batch), scale)
        else:

            def accumulate(total, micro):
                return jax.tree.map(jnp.add, total, loss_and_grad(params, micro, scale)), None

            measuring = objective if ahead is None else TOKENS_AHEAD
            names = [] if measuring is None else measures(measuring, batch.keys() - {"inputs", "targets"})
            nothing = (jnp.zeros(()), {name: jnp.zeros(()) for name in names})
            start = (nothing, jax.tree.map(jnp.zeros_like, params))
            if computed is None:
                ((loss, sums), grads), _ = jax.lax.scan(accumulate, start, batch)
            else:
                (loss, sums), grads = jax.lax.fori_loop(
                    0, computed, lambda i, total: accumulate(total, micro_batch(batch, i))[0], start
                )
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            take_step = optax.with_extra_args_support(optimizer).update
            updates, opt_state = take_step(grads, state["opt_state"], params, **moving)
            if rate is not None:
                updates = jax.tree.map(lambda update: (rate * update).astype(update.dtype), updates)
            new = optax.apply_updates(params, updates), opt_state
            if objective is not None:
                new = jax.tree.map(partial(_unless, grad_norm == 0), new, (params, state["opt_state"]))
            params, opt_state = new
        means = {name: total * scale for name, total in sums.items()}
        if ahead is not None:
            whole, loss = loss, means.pop("next")
            means["loss_ahead"] = whole - loss
        metrics = {**means, "loss": loss, "grad_norm": grad_norm, "targets": count}
        new_state = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        return new_state, metrics

    out_shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def micro_batch(batch: Batch, number: Int[Array, ""]) -> Batch:
    """One of the micro-batches, traced, of a batch without scalars."""
    return {name: jax.lax.dynamic_index_in_dim(array, number, keepdims=False) for name, array in batch.items()}


def _unless(nothing: Bool[Array, ""], new: Array, old: Array) -> Array:
    """The new values, or the old ones if there was nothing to learn; the optimizer still counts the step."""
    return jnp.where(nothing, old, new) if jnp.issubdtype(new.dtype, jnp.floating) else new
