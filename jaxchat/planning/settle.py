"""The sizes with which a run starts: those of the experiment, or what its text and its time suggest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxchat.config import LENGTHS, Experiment, Impossible
from jaxchat.devices.processes import on_process_zero
from jaxchat.errors import UserError
from jaxchat.planning.known_text import find_amount
from jaxchat.planning.lines import length_lines, proposal_lines
from jaxchat.planning.proposal import Proposal, propose
from jaxchat.planning.text_amount import TextAmount
from jaxchat.runs.directory import RunDirectory
from jaxchat.storage import size_of, to_path
from jaxchat.tasks.conversations import find_chats

# The sizes that a proposal decides, by the names of its fields.
SIZES = {
    "vocab_size": "tokenizer.vocab_size",
    "depth": "model.depth",
    "sequence_len": "model.sequence_len",
    "batch_tokens": "pretrain.batch_tokens",
    "steps": "pretrain.num_iterations",
}
OF_PRETRAINING = {f"pretrain.{name}" for name in LENGTHS["pretrain"]}
# What follows from them; all together are what a run that has begun keeps to.
FOLLOWING = (
    "pretrain.eval_every", "pretrain.eval_tokens", "pretrain.sample_every", "pretrain.save_every",
    "midtrain.batch_tokens", "midtrain.num_iterations", "sft.batch_tokens", "sft.num_iterations",
)  # fmt: skip
CPU_SECONDS = 15 * 60.0  # of pretraining, without a budget: a CPU would take days for what a long text deserves
# Tokens of the later stages to those of pretraining, as in the quickstart.
LATER = {"midtrain": 0.4, "sft": 0.3}
GENERATED_BYTES = 310  # of a generated conversation, as JSON
Say = Callable[[str], None]


def keep_sizes(experiment: Experiment, begun: RunDirectory, given: Collection[str]) -> Experiment:
    """`experiment` with the sizes that a run has begun with, which are not chosen anew.

    Args:
      given: the fields that the user has set, such as `model.depth`, which stay.

    Raises:
      UserError: as `RunDirectory.read_config`.
    """
    if not begun.config_file.exists():
        return experiment
    before, taken = begun.read_config(), set(given)
    if not taken.isdisjoint(OF_PRETRAINING):
        taken.update(OF_PRETRAINING)
    names = [name for name in (*SIZES.values(), *FOLLOWING) if name not in taken]
    return replace_fields(experiment, {name: _value(before, name) for name in names})


def settle(
    experiment: Experiment,
    begun: RunDirectory | None,
    *,
    given: Collection[str] = (),
    flops: float | None = None,
    shards: int = 1,
    amount: TextAmount | None = None,
    say: Say = print,
) -> Experiment:
    """Counts the text, and says how much there is and how often pretraining reads it.

    With `sizes` "auto" and a new run, the sizes that the user has not set are those of `propose`; the result is an
    experiment like any other. All processes must call it.

    Args:
      begun: the run that goes on, which has its sizes (see `keep_sizes`); None for a new one.
      given: the fields that the user has set, such as `model.depth`, which stay.
      flops: of pretraining, at most; None for as many as the text deserves.
      shards: devices that share the rows of a batch.
      amount: of the text, if it has been counted (on process 0).
      say: takes lines for the user.

    Raises:
      UserError: the text cannot be read; the sizes that are set do not go together with those that follow.
    """
    changes = on_process_zero(lambda: _changes(experiment, begun, given, flops, shards, amount, say))
    return replace_fields(experiment, changes)


def _changes(
    experiment: Experiment,
    begun: RunDirectory | None,
    given: Collection[str],
    flops: float | None,
    shards: int,
    amount: TextAmount | None,
    say: Say,
) -> dict[str, Any]:
    needed = [stage for stage in ("tokenizer", "pretrain") if stage in experiment.stages]
    unfinished = [stage for stage in needed if begun is None or not _finished(begun, stage)]
    decided = experiment.sizes == "fixed" or begun is not None
    try:
        amount = (amount or find_amount(experiment, begun, say)) if unfinished else None
    except UserError:
        if not decided:
            raise
        amount = None  # what is wrong with the text is said when it is checked
    if amount is None:
        return {}
    if decided:
        for line in length_lines(experiment, amount) if "pretrain" in unfinished else ():
            say(f"data      {line}")
        return {}
    fixed = {name: _value(experiment, field) for name, field in SIZES.items() if field in given}
    if experiment.tokenizer.path is not None:
        fixed["vocab_size"] = experiment.tokenizer.vocab_size
    speed, on_cpu = training_speed()
    if flops is None and on_cpu:
        flops = CPU_SECONDS * speed
    proposal = propose(amount, flops, fixed=fixed, shards=shards, tensor=experiment.mesh.tensor, on_cpu=on_cpu)
    changes = changes_of(proposal, experiment, given, shards)
    changes |= _shorter_stages(proposal, experiment, amount, given, changes, limited=on_cpu)
    try:
        replace_fields(experiment, changes)
    except Impossible as error:
        raise UserError(f"{error}; or leave the other sizes out, and they follow from this one") from None
    for line in proposal_lines(proposal, amount, flops, proposal.flops / speed):
        say(f"sizes     {line}")
    return changes


def _finished(run: RunDirectory, stage: str) -> bool:
    try:
        return run.finished(stage)
    except UserError:  # a damaged record, which --redo is about to set aside; else it is said later
        return False


def changes_of(
    proposal: Proposal, experiment: Experiment, given: Collection[str] = (), shards: int = 1
) -> dict[str, Any]:
    """The fields of `experiment` that a proposal replaces, with their values."""
    fields: dict[str, Any] = {field: getattr(proposal, name) for name, field in SIZES.items()}
    if not OF_PRETRAINING.isdisjoint(given):
        del fields["pretrain.num_iterations"]
    batch, steps = proposal.batch_tokens, proposal.steps
    # Ten evaluations of a fiftieth of the training each, forward only, cost about 7 % of its time.
    fields["pretrain.eval_every"] = max(1, min(250, steps // 10))
    fields["pretrain.eval_tokens"] = max(batch, min(experiment.pretrain.eval_tokens, steps * batch // 50))
    fields["pretrain.sample_every"] = max(1, min(2000, steps // 2))
    fields["pretrain.save_every"] = max(1, min(1000, steps // 4))
    row = proposal.sequence_len * shards
    fields["midtrain.batch_tokens"] = min(batch, _whole_rows(experiment.midtrain.batch_tokens, row))
    fields["sft.batch_tokens"] = min(batch, _whole_rows(experiment.sft.batch_tokens, row))
    return {name: value for name, value in fields.items() if name not in given}


def training_speed() -> tuple[float, bool]:
    """About how many FLOP/s training reaches on all devices here, and whether they are CPUs."""
    import jax
    import jax.numpy as jnp

    from jaxchat.devices.gpu import multiplies_bf16
    from jaxchat.devices.speed import SHARE, measure_products

    speed = measure_products(jnp.bfloat16 if multiplies_bf16() else jnp.float32)
    on_cpu = jax.default_backend() == "cpu"
    return SHARE * speed * (1 if on_cpu else jax.device_count()), on_cpu  # CPU devices share the cores


def _shorter_stages(
    proposal: Proposal,
    experiment: Experiment,
    amount: TextAmount,
    given: Collection[str],
    changes: Mapping[str, Any],
    *,
    limited: bool,
) -> dict[str, int]:
    """Steps of midtraining and SFT where all conversations would take too long, or are generated.

    Args:
      changes: what the proposal changes.
      limited: whether time is short, so that not all of the user's conversations are trained on either.
    """
    own, size = _conversation_bytes(experiment)
    if own and not limited:
        return {}
    each = size / amount.bytes_per_token_of(proposal.vocab_size)
    steps: dict[str, int] = {}
    for stage, share in LATER.items():
        names = {f"{stage}.num_iterations", f"{stage}.epochs"}
        if share * proposal.tokens < each and names.isdisjoint(given):
            batch = changes.get(f"{stage}.batch_tokens") or _value(experiment, f"{stage}.batch_tokens")
            steps[f"{stage}.num_iterations"] = max(1, round(share * proposal.tokens / batch))
    return steps


def _conversation_bytes(experiment: Experiment) -> tuple[bool, int]:
    """Whether the conversations are the user's, and about how many bytes they have."""
    folder = experiment.data.folder
    if folder is not None and (to_path(folder) / "chat").exists():
        files = find_chats(to_path(folder) / "chat").train
        return True, sum(size_of(path) for path in files)
    return False, GENERATED_BYTES * experiment.data.synthetic_conversations


def _whole_rows(tokens: int, row: int) -> int:
    return max(1, tokens // row) * row


def _value(experiment: Experiment, name: str) -> Any:
    section, _, field = name.rpartition(".")
    return getattr(getattr(experiment, section), field)


def replace_fields(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """`experiment` with fields such as `model.depth` replaced.

    Raises:
      Impossible: a value that its field cannot have.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section, {})[field] = value
    built = {name: dataclasses.replace(getattr(experiment, name), **values) for name, values in sections.items()}
    return dataclasses.replace(experiment, **built)
