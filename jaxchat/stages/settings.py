"""Checks what a run would refuse although each setting by itself is possible: tasks, data sets, what is there already.

Nothing here needs JAX, so that a command with a mistake in it ends at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from jaxchat.config import STAGES, TRAINED, Experiment
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.errors import UserError, check
from jaxchat.rl.reward import check_reward
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.metrics import check_installed
from jaxchat.stages.own_conversations import names_files_alone
from jaxchat.stages.task_source import has_chats
from jaxchat.tasks import PROGRAMS, check_scorable, parse_mixture
from jaxchat.tools.python import containment, listed, possible


def check_settings(experiment: Experiment) -> None:
    """Checks what needs neither devices nor data.

    Raises:
      UserError: there is no stage to run, or no data; a task or data set is unknown; a stage has no task; a log needs a
        package that is not installed; a reward of the user's cannot be imported.
    """
    check(bool(experiment.stages), "stages is empty; name at least one, such as --stages=pretrain")
    check_has_data(experiment)
    log = experiment.logging
    check_installed(tensorboard=log.tensorboard, wandb=log.wandb)
    with naming("data.download"):
        parse_requests(experiment.data.download)
    for stage in experiment.stages:
        if stage in ("midtrain", "sft"):
            with naming(f"{stage}.mixture"):
                parse_mixture(getattr(experiment, stage).mixture)
            tasks = getattr(experiment, stage).tasks
            with naming(f"{stage}.tasks"):
                check_scorable(tasks)
                programs = [name for name, _ in parse_mixture(tasks) if name in PROGRAMS]
                check(
                    not programs,
                    f"{' and '.join(programs)}, which runs programs that the model writes, is for the evaluate stage "
                    "(--evaluate.humaneval, docs/programs.md); leave it out",
                )
        if stage in ("rl", "evaluate"):
            tasks = getattr(experiment, stage).tasks
            # Conversations of the user's may leave nothing to ask.
            may_be_empty = stage == "evaluate" and (measures_core(experiment) or has_chats(experiment.data))
            check(
                bool(tasks) or may_be_empty,
                f"{stage}.tasks is empty; name at least one, or leave {stage} out of --stages",
            )
            with naming(f"{stage}.tasks"):
                check_scorable(tasks)
            programs = [name for name, _ in parse_mixture(tasks) if name in PROGRAMS]
            check(
                getattr(experiment, stage).humaneval or not programs,
                f"{stage}.tasks names {' and '.join(programs)}, which runs programs that the model writes; add "
                f"--{stage}.humaneval if they may run here (docs/programs.md), or leave it out",
            )
    if "rl" in experiment.stages and experiment.rl.reward is not None:
        check_reward(experiment.rl.reward)
    check(
        bool(experiment.evaluate.of) or measures_core(experiment) or "evaluate" not in experiment.stages,
        "evaluate.of is empty; name at least one stage, or leave evaluate out of --stages",
    )


def measures_core(experiment: Experiment) -> bool:
    """Whether the evaluate stage measures models by CORE, if the data folder has its bundle."""
    return experiment.data.folder is not None and bool(experiment.evaluate.core)


def check_has_data(experiment: Experiment) -> None:
    """Raises UserError if the experiment has no data: no folder, nothing to download, generate, or named as a file."""
    check(
        experiment.data.folder is not None or experiment.data.generate or names_files_alone(experiment),
        f"{experiment.name} trains on your text: give it a folder with --data=DIR, or name data sets with "
        "--data.download",
    )


def check_run(
    experiment: Experiment, directory: RunDirectory, *, redo: Collection[str] = (), given: Collection[str] = ()
) -> None:
    """Checks that what is in a run's directory lets the experiment's stages go on; writes nothing.

    Args:
      given: stages that will be there before the first one runs.

    Raises:
      UserError: another run is there; what a stage needs is neither there nor made before it.
    """
    directory.check(experiment, redo=redo)
    again = directory.following(redo)
    there = [stage for stage in STAGES if stage in given or (stage not in again and directory.finished(stage))]
    for stage in experiment.stages:
        if stage == "report":
            check(bool(there), f"{directory} has nothing to report yet; run a stage before it")
        if stage == "evaluate" or (stage in TRAINED and stage not in there):
            check("tokenizer" in there, f"{directory} has no tokenizer yet; run the stage 'tokenizer' first")
        if stage == "evaluate":
            of = dict.fromkeys(
                (*experiment.evaluate.of, *(experiment.evaluate.core if measures_core(experiment) else ()))
            )
            check(
                not set(of).isdisjoint(there),
                f"{directory} has no model of {', '.join(of)} yet; run one of these stages first, or name others in "
                "evaluate.of",
            )
        if stage in TRAINED and stage not in there:
            before = TRAINED[: TRAINED.index(stage)]
            check(
                not before or any(earlier in there for earlier in before),
                f"{stage} needs an earlier stage's parameters; run one of {', '.join(before)} first",
            )
        there.append(stage)


def describe_programs(experiment: Experiment) -> str | None:
    """What will run programs that the model writes, and how they are contained, in words; None if nothing will.

    Raises:
      UserError: programs do not run on this machine, or it cannot contain them and a stage is not told to run them all
        the same.
    """
    stages = [
        stage for stage in ("rl", "evaluate") if stage in experiment.stages and getattr(experiment, stage).humaneval
    ]
    if not stages:
        return None
    careful = [stage for stage in stages if not getattr(experiment, stage).uncontained]
    if possible() and careful:
        options = " and ".join(f"--{stage}.uncontained" for stage in careful)
        raise UserError(
            f"this machine cannot contain the programs of a model: they could {listed(possible(), 'and')}; add "
            f"{options} to run them all the same (docs/programs.md), or leave --{careful[0]}.humaneval out"
        )
    return f"{' and '.join(stages)} will run what the model writes, in processes of its own: {containment()}"


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts the setting that a UserError is about before its message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
