"""The training loop with a single number as its state, which shows the order of events."""

import jax.numpy as jnp

from jaxchat.checkpoint import Checkpoints
from jaxchat.runs.metrics import Metrics, read_metrics
from jaxchat.train.loop import Loop, Source


class Counting(Source):
    """Batches that hold their own number."""

    def __init__(self, events=None, stop=None):
        self.events, self.stop, self.position = events, stop, 0

    def next_batch(self, step, params):
        if self.stop == step:
            raise KeyboardInterrupt
        if self.events is not None:
            self.events.append(f"batch {step}")
        self.position += 1
        return {"inputs": jnp.full((1, 2, 4), self.position, jnp.int32)}, {"extra": float(step)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def step_fn(state, batch):
    """Depends on the order: a batch left out or repeated changes all later values."""
    x = 0.9 * state["params"]["x"] + batch["inputs"][0, 0, 0]
    return {"params": {"x": x}, "step": state["step"] + 1}, {"loss": x / 7, "grad_norm": x}


def begin():
    return {"params": {"x": jnp.zeros(())}, "step": jnp.zeros((), jnp.int32)}


def loop(directory, *, num_steps=7, source=None, step_fn=step_fn, log=None, **settings):
    metrics = Metrics(directory, "pretrain", live=False)
    if log is not None:
        metrics.log = log
    return Loop(
        step_fn=step_fn,
        source=source or Counting(),
        num_steps=num_steps,
        metrics=metrics,
        checkpoints=Checkpoints(directory / "pretrain" / "checkpoints"),
        schedule_values=lambda step: {"lr": 1.0 - step / num_steps},
        flops_per_token=lambda step: 1.0,
        **settings,
    )


def table(directory):
    lines = read_metrics(directory)
    return [(line["step"], line["loss"], line["tokens"], line["extra"]) for line in lines if "loss" in line]
