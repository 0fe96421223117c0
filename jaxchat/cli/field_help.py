"""The help page of an experiment: every field with its values, its meaning, its range and its default."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxchat.config import Experiment, declared_range

# Fields that are not listed: an experiment's name is its file's, and launch.py has an option --stages of its own.
UNLISTED = ("name", "stages")
_LETTERS = {int: "N", float: "X", str: "TEXT"}


def add_fields(parser: argparse.ArgumentParser, experiment: Experiment) -> None:
    """Adds the fields of `experiment` to the parser's help page, one section after another."""
    _add_section(parser, "", "experiment", experiment)


def _add_section(parser: argparse.ArgumentParser, prefix: str, title: str, config: Any) -> None:
    helps, kinds = field_help(type(config)), get_type_hints(type(config))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    group = parser.add_argument_group(title, inspect.getdoc(type(config)))
    for name, value in values.items():
        if not dataclasses.is_dataclass(value) and prefix + name not in UNLISTED:
            limits = declared_range(type(config), name)
            text = f"{helps[name]} {limits.sentence()}" if limits else helps[name]
            _add_field(group, prefix + name.replace("_", "-"), kinds[name], text, value)
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            _add_section(parser, f"{prefix}{name}.", f"{prefix}{name}", value)


def _add_field(group: Any, name: str, kind: Any, text: str, default: Any) -> None:
    text = f"{text} (default {_written(default)})".replace("%", "%%")
    if kind is bool:
        section, _, last = name.rpartition(".")
        group.add_argument(f"--{name}", f"--{section}.no-{last}", action="store_true", help=text)
    else:
        group.add_argument(f"--{name}", metavar=_metavar(kind), help=text)


def _metavar(kind: Any) -> str:
    """The values of a type, as help pages write them: N, X, TEXT, {a,b}, A,B, X X X or N|auto."""
    if kind in _LETTERS:
        return _LETTERS[kind]
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is Literal:
        return f"{{{','.join(parts)}}}"
    if get_origin(kind) is tuple:
        return "A,B" if parts[-1] is Ellipsis else " ".join(map(_metavar, parts))
    words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    return "|".join([_metavar(parts[0]), *words])


def _written(value: Any) -> str:
    """A default value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "empty"
    return str(value) if value != "" else "empty"


def field_help(config: type) -> dict[str, str]:
    """The line of help of each field of a configuration class, by the field's name: the string under the field."""
    found: dict[str, str] = {}
    for base in reversed([base for base in config.__mro__ if dataclasses.is_dataclass(base)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found
