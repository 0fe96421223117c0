"""Options of an experiment: fields given on the command line, such as `--pretrain.num-iterations=100`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

import tyro

from jaxchat.cli.experiments import experiment_names, load_experiment
from jaxchat.cli.parser import refuse_long_dash, shorten
from jaxchat.config import LENGTHS, Experiment, Impossible, declared, describe, shown
from jaxchat.errors import UserError, check, closest

DEFAULT = "auto"  # the experiment for a folder of text
OPTION = re.compile(r"--?[A-Za-z]")
# What is not a field of an experiment, although one might look for it there.
INSTEAD = {
    "--model.vocab-size": "follows from the tokenizer; write --tokenizer.vocab-size",
    "--model.border-token": "follows from the tokenizer; write --data.mask-borders",
    "--rl.batch-tokens": "follows from the answers that a step samples; write --rl.questions-per-step and "
    "--rl.samples-per-question",
}


def configure(
    name: str | None, overrides: list[str], data: str | None, options: Sequence[str], identity: str | None = None
) -> Experiment:
    """Experiment `name` with the user's overrides, data folder and identity, and with what its rules decide.

    Args:
      name: None, with a data folder, for the experiment that suits any text.
      data: the folder; None leaves the experiment's own.
      options: the command's own options, for hints about misspelt ones.
      identity: the file that describes it; None leaves the experiment's own.

    Raises:
      UserError: no name or an unknown one, a folder that does not exist, or as `override` and `read_identity`.
    """
    names = experiment_names() if name is None else []
    if data is not None and DEFAULT in names and not set(names).intersection(overrides):
        name = DEFAULT
    if name is None:
        _by_option([word for word in overrides if OPTION.match(word)], field_types(Experiment), options)
        meant = next((word for word in overrides if word in names), "|".join(names))
        raise UserError(f"no experiment given; write --experiment={meant}")
    experiment = _with_identity(override(load_experiment(name), overrides, options), identity)
    experiment = _with_lengths(experiment, named_fields(overrides))
    if experiment.rules != "none":
        from jaxchat.planning.rules import follow_rules

        experiment = follow_rules(experiment, named_fields(overrides))
    folder = experiment.data.path if data is None else data
    if folder is None:
        return experiment
    from jaxchat.storage import is_folder, is_remote, to_path  # slow to import, as what follows

    check(not os.path.isfile(folder), f"{folder!r} is a file; give --data the folder that contains it")
    check(is_folder(to_path(folder)), f"data folder {folder!r} does not exist; give --data a folder with text")
    settings: dict[str, Any] = {"path": folder if is_remote(folder) else os.path.abspath(folder)}
    if experiment.data.download and not any(word.startswith("--data.download") for word in overrides):
        from jaxchat.data.hub.download import own_text

        if is_remote(folder) or own_text(Path(folder)):
            settings["download"] = ()  # the user's own text is all that is trained on
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **settings))


def _with_lengths(experiment: Experiment, given: Collection[str]) -> Experiment:
    """`experiment` without lengths of its own that would count before those that the user has set (`given`)."""
    check(
        experiment.rules != "none" or "pretrain.tokens_per_matrix_param" not in given,
        "--pretrain.tokens-per-matrix-param counts only with --rules=nanochat; without them, give "
        "--pretrain.tokens-per-param",
    )
    for stage, names in LENGTHS.items():
        by_user = [f"{stage}.{name}" in given for name in names]
        if any(by_user):
            section = dataclasses.replace(getattr(experiment, stage), **dict.fromkeys(names[: by_user.index(True)]))
            experiment = dataclasses.replace(experiment, **{stage: section})
    return experiment


def _with_identity(experiment: Experiment, file: str | None) -> Experiment:
    """`experiment` with the identity that a file describes, trained on by midtraining and SFT, and scored at the end.

    Without a file, its own: jaxchat's, which is among the tasks where the experiment wants it, has no text.
    """
    if file is None and experiment.data.identity is None:
        return experiment
    from jaxchat.data.identity.description import parse_identity, read_identity  # slow to import, as what follows

    text = experiment.data.identity if file is None else read_identity(file)
    parse_identity(text or "")
    changed: dict[str, Any] = {"data": dataclasses.replace(experiment.data, identity=text)}
    for stage, field in (("midtrain", "mixture"), ("sft", "mixture"), ("evaluate", "tasks")):
        section = getattr(experiment, stage)
        entries = getattr(section, field)
        if not any(entry.partition(":")[0] == "identity" for entry in entries):
            changed[stage] = dataclasses.replace(section, **{field: (*entries, "identity")})
    return dataclasses.replace(experiment, **changed)


def named_fields(overrides: Sequence[str], data: str | None = None) -> frozenset[str]:
    """The fields that the user has named on the command line, such as `sft.mixture`; --data names `data.path`."""
    fields = field_types(Experiment)
    flags = [word.partition("=")[0] for word in overrides if OPTION.match(word)]
    named = {_field(flag, fields).replace("-", "_") for flag in flags}
    return frozenset(named if data is None else {*named, "data.path"})


def override(experiment: Experiment, arguments: list[str], options: Sequence[str] = ()) -> Experiment:
    """`experiment` with the fields named in `arguments`, such as `--pretrain.num-iterations=100`.

    The values of a field that is a list are separated by spaces or commas. The closest name to a misspelt option is
    looked for among the fields and `options`.

    Raises:
      UserError: an unknown field, a value of the wrong type, or an impossible one.
    """
    for word in arguments:
        name = word.partition("=")[0]
        instead = INSTEAD.get(name.replace("_", "-"))
        check(instead is None, f"{name} {instead}")
    fields = field_types(type(experiment))
    groups = _by_option(arguments, fields, options)
    try:
        return _parse(experiment, groups)
    except (SystemExit, Impossible) as error:
        # The option at fault fails when it is the only one, too.
        for group in groups:
            try:
                _parse(experiment, [group])
            except Impossible:
                pass
            except SystemExit:
                raise UserError(_explain(group, fields)) from None
        if isinstance(error, SystemExit):
            raise UserError(f"{shorten(' '.join(arguments))}: these do not go together; see --help") from None
        # A section that several stages have does not know which of them it is built for.
        for section in dict.fromkeys(_section(group) for group in groups):
            try:
                _parse(experiment, [group for group in groups if _section(group) == section])
            except Impossible as alone:
                raise alone.within(section) from None
        raise error from None


def _parse(experiment: Experiment, groups: list[list[str]]) -> Experiment:
    """Raises SystemExit, silently, for what tyro does not understand, and `Impossible` for impossible values."""
    unread = io.StringIO()
    with contextlib.redirect_stderr(unread), contextlib.redirect_stdout(unread):
        return tyro.cli(Experiment, default=experiment, args=[word for group in groups for word in group])


def _section(group: list[str]) -> str:
    """The section of an option's field: `sft` of `--sft.schedule.decay=cosine`, "" of `--seed=3`."""
    section, dot, _ = group[0].removeprefix("--").partition(".")
    return section if dot else ""


def field_types(config: type, prefix: str = "") -> dict[str, Any]:
    """The type of each field of a configuration class, by the field's name on the command line."""
    fields: dict[str, Any] = {}
    for name, kind, _ in declared(config):
        path = prefix + name.replace("_", "-")
        is_section = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        fields |= field_types(kind, f"{path}.") if is_section else {path: kind}
    return fields


def _by_option(arguments: list[str], fields: dict[str, Any], options: Sequence[str]) -> list[list[str]]:
    """Each option with its values, as tyro wants them: `--rl.tasks=a,b` becomes `--rl.tasks a b`."""
    groups: list[list[str]] = []
    for argument in arguments:
        if OPTION.match(argument) is None:
            refuse_long_dash(argument)
            check(bool(groups), f"{shown(argument)} is not an option; options begin with --, see --help")
            groups[-1].append(argument)
            continue
        flag, equals, value = argument.partition("=")
        kind = fields.get(_field(flag, fields))
        if kind is None:
            hint = _hint(flag, fields, options)
            raise UserError(f"unknown option {shorten(flag)}{hint} python launch.py --experiment=NAME --help lists all")
        as_list = equals and _is_list(kind)
        groups.append([flag, *(each.strip() for each in value.split(",") if value.strip())] if as_list else [argument])
    return groups


def _hint(flag: str, fields: dict[str, Any], options: Sequence[str]) -> str:
    """The option that was meant; of one without its section, all that there are."""
    last = flag.lstrip("-").replace("_", "-")
    complete = [f"--{name}" for name in fields if name.rpartition(".")[2] == last != name]
    if complete:
        return f"; its section is missing: {' or '.join(complete)}."
    return closest(flag.replace("_", "-"), [*(f"--{name}" for name in fields), *options])


def _is_list(kind: Any) -> bool:
    return get_args(kind)[-1:] == (Ellipsis,)


def _field(flag: str, fields: dict[str, Any]) -> str:
    """The field of an option; that of `--data.no-shuffle` is `data.shuffle`."""
    name = flag.removeprefix("--").replace("_", "-")
    section, _, last = name.rpartition(".")
    positive = f"{section}.{last.removeprefix('no-')}"
    return positive if fields.get(positive) is bool else name


def _negative(name: str) -> str:
    section, _, last = name.rpartition(".")
    return f"{section}.no-{last}"


def _explain(group: list[str], fields: dict[str, Any]) -> str:
    """What an option takes, when it was given something else."""
    flag = group[0].partition("=")[0]
    name = _field(flag, fields)
    if fields[name] is bool:
        return f"{shorten(' '.join(group))}: write --{name} for yes, --{_negative(name)} for no, without a value"
    if group == [flag]:
        return f"{flag} needs a value: {describe(fields[name])}"
    return f"{shorten(' '.join(group))}: the value must be {describe(fields[name])}"
