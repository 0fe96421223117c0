"""The train step: gradients of one whole batch, accumulated over micro-batches inside one jitted function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from jaxchat.devices.mesh import BATCH_SPEC
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states
from jaxchat.ops.compute import FP32, Compute
from jaxchat.train.loss import LossConfig, cross_entropy_sum

State = dict[str, Any]  # {"params", "opt_state", "step"}
AbstractBatch = dict[str, jax.ShapeDtypeStruct]  # a batch before there is one
Batch = dict[str, jax.Array]  # {"inputs", "targets"[, "weights"]}: each [accumulation, rows, T]
MICRO_BATCH_SPEC = PartitionSpec(None, *BATCH_SPEC)  # how a batch is laid out on the mesh


def init_state(params, optimizer: optax.GradientTransformation) -> State:
    """A training state at step 0."""
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def make_train_step(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    compute: Compute = FP32,
    *,
    state_shardings: Any = None,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """The jitted step `(state, batch) -> (state, metrics)`; the state's buffers are donated.

    `state_shardings` (a tree like the state's) pins where the new state is placed; otherwise the compiler may move it,
    and the second step would compile again.

    The loss is Σ weight · nll over the batch's real targets (those not negative) divided by their count in the whole
    batch, over all micro-batches and devices: never a mean of means. Without targets, loss and gradient are 0.

    A batch with weights whose gradient is zero changes nothing, as in RL when all samples of each question earn the
    same reward. The optimizer would otherwise keep moving along earlier gradients, and Muon by a full step.

    Metrics, still on the device: `loss` (nats a target), `grad_norm` (before clipping), `targets` (their count).
    """
    loss_config = LossConfig.of(config, compute.mesh)

    def micro_loss(params, batch, scale):
        hidden = hidden_states(config, params, batch["inputs"], compute)
        weights = batch.get("weights", jnp.ones(batch["targets"].shape, jnp.float32))
        return scale * cross_entropy_sum(hidden, params["head"]["kernel"], batch["targets"], weights, loss_config)

    def step(state: State, batch: Batch):
        params = state["params"]
        count = jnp.sum(batch["targets"] >= 0)
        scale = 1.0 / jnp.maximum(count, 1).astype(jnp.float32)
        loss_and_grad = jax.value_and_grad(micro_loss)
        if batch["inputs"].shape[0] == 1:
            loss, grads = loss_and_grad(params, jax.tree.map(lambda x: x[0], batch), scale)
        else:

            def accumulate(total, micro):
                return jax.tree.map(jnp.add, total, loss_and_grad(params, micro, scale)), None

            zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
            (loss, grads), _ = jax.lax.scan(accumulate, zeros, batch)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, state["opt_state"], params)
            new = optax.apply_updates(params, updates), opt_state
            if "weights" in batch:
                new = jax.tree.map(partial(_unless, grad_norm == 0), new, (params, state["opt_state"]))
            params, opt_state = new
        metrics = {"loss": loss, "grad_norm": grad_norm, "targets": count}
        new_state = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        return new_state, metrics

    out_shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def _unless(nothing: Bool[Array, ""], new: Array, old: Array) -> Array:
    """The new values, or the old ones if there was nothing to learn; the optimizer still counts the step."""
    return jnp.where(nothing, old, new) if jnp.issubdtype(new.dtype, jnp.floating) else new
