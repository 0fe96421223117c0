"""Recipes that are trained side by side: names with options, from the command line or from a TOML file.

    common = "--pretrain.batch-tokens=131072 --data.packing=concat"

    [recipes]                      # options of launch.py
    guide = ""
    modern = "--model.window-pattern=SSSL --pretrain.schedule.decay-ratio=0.65"

    [parts]                        # of one recipe, for an ablation
    "windows" = "--model.window-pattern=SSSL"
    "long warm-down" = "--pretrain.schedule.decay-ratio=0.65"

    [nanochat]                     # options of its script, for against_nanochat.py
    "its own rule" = ""

Of the parts, an ablation makes a recipe without any of them, one with all, and for each part one with it alone and one
with all others. A name on the command line ends at its first colon: `modern:--model.window-pattern=SSSL`.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError, check, closest

BASE, WHOLE = "base", "whole"
TABLES = ("recipes", "parts", "nanochat")


@dataclass(frozen=True)
class Recipe:
    """A name and the options of the program that trains it; the last counts of those given twice."""

    name: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipes:
    """What a file has: options that all of jaxchat's recipes begin with, and the recipes of each kind."""

    common: tuple[str, ...] = ()
    recipes: tuple[Recipe, ...] = ()
    parts: tuple[Recipe, ...] = ()
    nanochat: tuple[Recipe, ...] = field(default=())


def parse(entry: str) -> Recipe:
    """The recipe that `NAME:OPTIONS` describes.

    Raises:
      UserError: there is no name, or a quotation that is not closed.
    """
    name, colon, options = entry.partition(":")
    check(bool(colon and name.strip()), f"{entry!r} is no recipe; write NAME:OPTIONS, or NAME: for no options")
    return Recipe(name.strip(), _words(name, options))


def read(file: str) -> Recipes:
    """The recipes in a TOML file.

    Raises:
      UserError: it cannot be read, is no TOML, or has something else in it.
    """
    try:
        found = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as TOML: {error}") from None
    for name in found:
        check(name in ("common", *TABLES), f"{file} has {name!r}{closest(name, ['common', *TABLES])}")
    common = found.get("common", "")
    check(isinstance(common, str), f"common in {file} must be a text of options")
    return Recipes(_words("common", common), **{name: _table(file, name, found.get(name, {})) for name in TABLES})


def ablation(parts: Iterable[Recipe]) -> list[Recipe]:
    """The recipes of an ablation: without the parts, with all, with each alone, and with all but each."""
    parts = list(parts)
    if not parts:
        return []
    recipes = [joined(BASE, []), joined(WHOLE, parts), *(joined(alone(part.name), [part]) for part in parts)]
    if len(parts) > 2:  # of two, the one that is left out leaves the other alone
        recipes += [joined(left_out(part.name), [each for each in parts if each is not part]) for part in parts]
    return recipes


def alone(part: str) -> str:
    return f"{part} alone"


def left_out(part: str) -> str:
    return f"without {part}"


def joined(name: str, parts: Iterable[Recipe]) -> Recipe:
    return Recipe(name, tuple(option for part in parts for option in part.options))


def chosen(recipes: Iterable[Recipe], only: Iterable[str] | None) -> list[Recipe]:
    """The recipes, or those named by `only`, in their own order.

    Raises:
      UserError: two have the same name, or there is none of a name in `only`.
    """
    recipes = list(recipes)
    names = [recipe.name for recipe in recipes]
    for name in names:
        check(names.count(name) == 1, f"two recipes are called {name!r}; give each its own name")
    for name in only or ():
        check(name in names, f"--only has {name!r}{closest(name, names)} The recipes are {', '.join(names)}")
    return [recipe for recipe in recipes if only is None or recipe.name in set(only)]


def _table(file: str, name: str, table: Any) -> tuple[Recipe, ...]:
    good = isinstance(table, Mapping) and all(isinstance(options, str) for options in table.values())
    check(good, f'[{name}] in {file} must have lines such as NAME = "OPTIONS"')
    return tuple(Recipe(recipe, _words(recipe, options)) for recipe, options in table.items())


def _words(name: str, options: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(options))
    except ValueError as error:
        raise UserError(f"the options of {name!r} cannot be read: {error}") from None
