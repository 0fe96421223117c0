"""The sizes with which a run starts: those of the experiment, or what its text and its time suggest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxchat.config import STAGES, Experiment, Impossible
from jaxchat.devices.processes import on_process_zero
from jaxchat.errors import UserError
from jaxchat.planning.known_text import find_amount
from jaxchat.planning.lines import length_lines, proposal_lines
from jaxchat.planning.proposal import Proposal, propose
from jaxchat.runs.directory import RunDirectory

# The sizes that a proposal decides, by the names of its fields.
SIZES = {
    "vocab_size": "tokenizer.vocab_size",
    "depth": "model.depth",
    "sequence_len": "model.sequence_len",
    "batch_tokens": "pretrain.batch_tokens",
    "steps": "pretrain.num_iterations",
}
LENGTHS = ("pretrain.num_iterations", "pretrain.target_flops", "pretrain.tokens_per_param")
# What follows from them; all together are what a run that has begun keeps to.
FOLLOWING = (
    "pretrain.eval_every", "pretrain.eval_tokens", "pretrain.sample_every", "pretrain.save_every",
    "midtrain.batch_tokens", "sft.batch_tokens",
)  # fmt: skip
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
    if not taken.isdisjoint(LENGTHS):
        taken.update(LENGTHS)
    names = [name for name in (*SIZES.values(), *FOLLOWING) if name not in taken]
    return replace_fields(experiment, {name: _value(before, name) for name in names})


def settle(
    experiment: Experiment,
    begun: RunDirectory | None,
    *,
    given: Collection[str] = (),
    flops: float | None = None,
    shards: int = 1,
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
      say: takes lines for the user.

    Raises:
      UserError: the text cannot be read; the sizes that are set do not go together with those that follow.
    """
    changes = on_process_zero(lambda: _changes(experiment, begun, given, flops, shards, say))
    return replace_fields(experiment, changes)


def _changes(
    experiment: Experiment,
    begun: RunDirectory | None,
    given: Collection[str],
    flops: float | None,
    shards: int,
    say: Say,
) -> dict[str, Any]:
    finished = [stage for stage in STAGES if begun is not None and begun.finished(stage)]
    unfinished = [stage for stage in ("tokenizer", "pretrain") if stage in experiment.stages and stage not in finished]
    amount = find_amount(experiment, begun, say) if unfinished else None
    if amount is None:
        return {}
    if experiment.sizes == "fixed" or begun is not None:
        for line in length_lines(experiment, amount) if "pretrain" in unfinished else ():
            say(f"data      {line}")
        return {}
    fixed = {name: _value(experiment, field) for name, field in SIZES.items() if field in given}
    if experiment.tokenizer.path is not None:
        fixed["vocab_size"] = experiment.tokenizer.vocab_size
    proposal = propose(amount, flops, fixed=fixed, shards=shards, tensor=experiment.mesh.tensor)
    changes = changes_of(proposal, experiment, given, shards)
    try:
        settled = replace_fields(experiment, changes)
    except Impossible as error:
        raise UserError(f"{error}; or leave the other sizes out, and they follow from this one") from None
    for line in proposal_lines(settled, proposal, amount, flops):
        say(f"sizes     {line}")
    return changes


def changes_of(
    proposal: Proposal, experiment: Experiment, given: Collection[str] = (), shards: int = 1
) -> dict[str, Any]:
    """The fields of `experiment` that a proposal replaces, with their values."""
    fields: dict[str, Any] = {field: getattr(proposal, name) for name, field in SIZES.items()}
    if not set(LENGTHS).isdisjoint(given):
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
