"""A model from elsewhere on its way into a run directory, where everything else of jaxchat works with it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import Experiment, ModelConfig, TokenizerConfig, head_count, model_width
from jaxchat.devices.machine import machine_info
from jaxchat.devices.processes import on_process_zero
from jaxchat.errors import UserError, check
from jaxchat.export.names import Form, params_of, weights
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.progress import LiveLine
from jaxchat.storage import written_whole
from jaxchat.tokenizer import BaseTokenizer

_SHOWN_AFTER = 2.0  # seconds
NAME = "finetune"  # the experiment that an imported run belongs to, so that its next stages can be trained


@dataclass(frozen=True)
class Incoming:
    """A model whose names and shapes have been checked.

    Attributes:
      stage: where the model stands in a run.
      step: optimizer steps that it was trained for in that stage, as far as known; else 0.
      form: whose names the weights have.
      read: gives a weight by its name.
      source: where it comes from, for its record.
      remarks: lines for the user.
    """

    config: GPTConfig
    tokenizer: BaseTokenizer
    stage: str
    step: int
    form: Form
    read: Callable[[str], np.ndarray]
    source: dict[str, Any]
    remarks: tuple[str, ...] = ()

    def experiment(self) -> Experiment:
        """The settings of the run."""
        fields = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(ModelConfig)}
        return Experiment(
            name=NAME,
            stages=(self.stage,),
            model=ModelConfig(**fields),
            tokenizer=TokenizerConfig(vocab_size=self.config.vocab_size),
        )


def model_config(
    where: str, *, depth: int, width: int, heads: int, kv_heads: int, vocab_size: int, **settings: Any
) -> GPTConfig:
    """The model of these sizes.

    Args:
      where: the file that they are from, for messages.
      settings: other fields of `GPTConfig`.

    Raises:
      UserError: jaxchat has no such model.
    """
    wanted = {"width": (width, model_width(depth)), "number of heads": (heads, head_count(depth))}
    for name, (there, here) in wanted.items():
        check(
            there == here,
            f"{where}: the {name} is {there} at {depth} layers; jaxchat and nanochat have {here} there, and no others",
        )
    try:
        settings["num_kv_heads"] = None if kv_heads == heads else kv_heads
        return GPTConfig(depth=depth, vocab_size=vocab_size, **settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def check_tokenizer(where: str, tokenizer: BaseTokenizer, vocab_size: int) -> None:
    """Raises UserError unless the tokenizer has as many ids as the model."""
    check(
        tokenizer.vocab_size == vocab_size,
        f"the tokenizer in {where} has {tokenizer.vocab_size:,} ids, with the special tokens of conversations, and the "
        f"model {vocab_size:,}: it is that of another model; give the one that the model was trained with",
    )


def write_run(incoming: Incoming, directory: Path, say: Callable[[str], None] = print) -> None:
    """Makes a run directory of the model, which is there with everything in it, or not at all.

    Args:
      directory: does not exist yet, or is empty.

    Raises:
      UserError: a weight is damaged or not finite; the disk fails.
    """
    with written_whole(directory) as part:
        run, experiment = RunDirectory(part), incoming.experiment()
        run.open(experiment)
        params = _params(incoming, say)
        tokenizer, source = incoming.tokenizer, incoming.source
        place_model(run, experiment, incoming.stage, tokenizer, params, step=incoming.step, source=source)


def _params(incoming: Incoming, say: Callable[[str], None]) -> Params:
    live, began, total, done = LiveLine("import", None), time.time(), len(weights(incoming.config, incoming.form)), 0

    def read(name: str) -> np.ndarray:
        nonlocal done
        if time.time() - began > _SHOWN_AFTER:
            live.show_progress("weights", done, total)
        weight, done = incoming.read(name), done + 1
        check(bool(np.isfinite(weight.astype(np.float32)).all()), f"{name} is not finite; get the whole file again")
        return weight

    params = _to_device(params_of(incoming.config, incoming.form, read))
    live.close()
    say(f"import    {total} weights read in {time.time() - began:.0f} s")
    return params


def _to_device(tree: Params) -> Params:
    """The tree itself, in which arrays of JAX have replaced those of NumPy one by one: the model is in memory once."""
    for name, node in tree.items():
        tree[name] = _to_device(node) if isinstance(node, dict) else jnp.asarray(node)
    return tree


def place_model(
    run: RunDirectory,
    experiment: Experiment,
    stage: str,
    tokenizer: BaseTokenizer,
    params: Params,
    *,
    step: int,
    source: dict[str, Any],
    mesh: Mesh | None = None,
) -> None:
    """Leaves a tokenizer and parameters in a run, as finished stages that later ones start from.

    All processes must call it.

    Args:
      stage: the stage that the parameters are the end of.
      params: taken over, and deleted once they are saved.
      step: the steps after which they are.
      source: where the model comes from, for the stages' records.
      mesh: where the parameters are, if not on one device.

    Raises:
      UserError: the disk fails.
    """
    on_process_zero(lambda: _place_tokenizer(run, experiment, tokenizer, source))
    on_process_zero(lambda: run.begin(stage, experiment, ["tokenizer"]))
    count = np.asarray(step, np.int32)  # a checkpoint has more than parameters
    counted = jnp.asarray(count) if mesh is None else jax.device_put(count, NamedSharding(mesh, PartitionSpec()))
    meta = {"stage": stage, "parent": None, "config": dataclasses.asdict(experiment), "num_steps": step}
    meta |= {"tokens": 0, "seconds": 0.0, "train_seconds": 0.0, "divergences": [], "recent_losses": []}
    checkpoints = Checkpoints(run.checkpoints(stage))
    checkpoints.save(step, {"params": params, "step": counted}, data={}, meta=meta, is_copy=True)
    checkpoints.close()
    facts = {"steps": step, "imported": source}
    on_process_zero(lambda: run.write_record(stage, {**_record(stage, run.id_of(stage)), **facts}))


def _place_tokenizer(
    run: RunDirectory, experiment: Experiment, tokenizer: BaseTokenizer, source: dict[str, Any]
) -> None:
    run.begin("tokenizer", experiment)
    tokenizer.save(run.tokenizer)
    facts = {"metrics": {"vocab_size": tokenizer.vocab_size}, "imported": source}
    run.write_record("tokenizer", {**_record("tokenizer", run.new_id("tokenizer")), **facts})


def _record(stage: str, identity: str | None) -> dict[str, Any]:
    facts = {"stage": stage, "parent": None, "seconds": 0.0, "finished": time.time(), "machine": machine_info()}
    return {**facts, "id": identity} if identity else facts
