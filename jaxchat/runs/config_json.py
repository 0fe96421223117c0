"""Experiments as JSON, the format of `config.json` in a run directory."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jaxchat.config import Experiment, Impossible
from jaxchat.errors import check


def to_json(config: Any) -> str:
    """The dataclass as indented JSON; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, cls: type = Experiment) -> Any:
    """Builds `cls` (a dataclass of jaxchat.config) from `to_json`'s text.

    Raises:
      UserError: a field that the class does not have, as an older or newer version may have written.
    """
    return build(json.loads(text), cls)


# Fields of earlier versions that are now derived from others, or that nothing ever read.
RETIRED = {"ModelConfig": {"vocab_size", "border_token"}, "RLConfig": {"batch_tokens"}}


def build(values: dict[str, Any], cls: type = Experiment) -> Any:
    """Builds `cls` from the object that `to_json` writes.

    Raises:
      UserError: a field that the class does not have, or that cannot have its value.
    """
    values = {name: value for name, value in values.items() if name not in RETIRED.get(cls.__name__, ())}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    check(not unknown, f"config has fields that this version of jaxchat does not know: {', '.join(unknown)}")
    built = {}
    for name, value in values.items():
        section = fields[name].default_factory
        if isinstance(section, type):
            check(isinstance(value, dict), f"config has no section {name!r}, but a single value")
            try:
                value = build(value, section)
            except Impossible as error:
                raise error.within(name) from None
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return cls(**built)
