"""What follows from the user's own conversations: that they are there to train on, and what they do not teach.

Nothing here needs JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from jaxchat.config import Experiment
from jaxchat.errors import check
from jaxchat.stages.task_source import GENERATED, has_chats
from jaxchat.storage import to_path
from jaxchat.tasks import WITHOUT_DATA, is_file, parse_mixture
from jaxchat.tasks.conversations import find_chats


def check_conversations(experiment: Experiment) -> None:
    """Checks that there are conversations of the user's: generated ones would be about another model's world.

    Raises:
      UserError: a stage trains on `chat`, and the data folder has none.
    """
    folder = experiment.data.folder
    for stage in ("midtrain", "sft"):
        names = [name for name, _ in parse_mixture(getattr(experiment, stage).mixture)]
        if stage not in experiment.stages or "chat" not in names or experiment.data.download:
            continue
        instead = f"or name a file of conversations with --{stage}.mixture=FILE.jsonl"
        if experiment.data.identity is not None:
            instead += f", or train on the identity alone with --{stage}.mixture=identity"
        check(
            folder is not None,
            f"{experiment.name} trains on your conversations: give a folder with --data=DIR, {instead}",
        )
        there = to_path(folder or "") / "chat"
        has_some = there.is_dir() and bool(find_chats(there).train)
        check(has_some, f"{folder} has no conversations of yours: put them into {there / 'train.jsonl'}, {instead}")


def names_files_alone(experiment: Experiment) -> bool:
    """Whether it trains on its identity, generated problems and files that it names alone, and needs no data folder."""
    stages = [stage for stage in ("midtrain", "sft") if stage in experiment.stages]
    if any(experiment.reads_text(stage) for stage in stages):
        return False
    entries = [entry for stage in stages for entry in parse_mixture(getattr(experiment, stage).mixture)]
    return bool(entries) and all(is_file(name) or name in ("identity", *WITHOUT_DATA) for name, _ in entries)


def ask_what_is_taught(experiment: Experiment, given: Collection[str]) -> Experiment:
    """`experiment` without the generated questions that a model of the user's own conversations never learns to answer.

    Those that the user names, has in the data folder, or trains on stay.

    Args:
      given: the fields that the user has set, such as `evaluate.tasks`.
    """
    if "evaluate.tasks" in given or not has_chats(experiment.data):
        return experiment
    fields = {"midtrain": experiment.midtrain.mixture, "sft": experiment.sft.mixture, "rl": experiment.rl.tasks}
    entries = [entry for stage, field in fields.items() if stage in experiment.stages for entry in field]
    taught, own = set(map(_name, entries)), to_path(experiment.data.folder or "") / "eval"

    def is_taught(name: str) -> bool:
        return name not in GENERATED or name in taught or (own / name).exists()

    tasks = tuple(entry for entry in experiment.evaluate.tasks if is_taught(_name(entry)))
    return dataclasses.replace(experiment, evaluate=dataclasses.replace(experiment.evaluate, tasks=tasks))


def _name(entry: str) -> str:
    return entry.partition(":")[0]
