"""Configuration as JSON, as a run keeps it in its `config.json`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jaxchat.config import Experiment
from jaxchat.errors import check


def to_json(config: Any) -> str:
    """The dataclass as indented JSON; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, cls: type = Experiment) -> Any:
    """Builds `cls` (a dataclass of jaxchat.config) from `to_json`'s text.

    Raises:
      UserError: a field the class does not know, as an older or newer version would have written.
    """
    return _build(cls, json.loads(text))


# Fields of earlier versions that followed from others, or that nothing read.
RETIRED = {"ModelConfig": {"vocab_size", "border_token"}, "RLConfig": {"batch_tokens"}}


def _build(cls: type, values: dict[str, Any]) -> Any:
    values = {name: value for name, value in values.items() if name not in RETIRED.get(cls.__name__, ())}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    check(not unknown, f"config has unknown fields ({', '.join(unknown)}); use the version of jaxchat that wrote it")
    built = {}
    for name, value in values.items():
        nested = fields[name].default_factory
        if isinstance(value, dict) and isinstance(nested, type):
            value = _build(nested, value)
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return cls(**built)
