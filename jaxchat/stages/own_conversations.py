"""Whether the user's own conversations are there, for runs that train on nothing else.

Nothing here needs JAX.
"""

from __future__ import annotations

from jaxchat.config import Experiment
from jaxchat.errors import check
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
    entries = [entry for stage in stages for entry in parse_mixture(getattr(experiment, stage).mixture)]
    return bool(entries) and all(is_file(name) or name in ("identity", *WITHOUT_DATA) for name, _ in entries)
