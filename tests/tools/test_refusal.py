"""Programs that the machine cannot contain are refused before the first stage, unless the stage is told otherwise."""

import dataclasses

import pytest

from jaxchat.config import EvaluateConfig, Experiment, RLConfig
from jaxchat.errors import UserError
from jaxchat.stages import settings
from jaxchat.tools import python


def experiment(**stages):
    sections = {"evaluate": EvaluateConfig(), "rl": RLConfig()} | stages
    return dataclasses.replace(Experiment(), **sections)


ASKED, TOLD = {"humaneval": True}, {"humaneval": True, "uncontained": True}


def test_programs_that_cannot_be_contained(monkeypatch):
    for module in (settings, python):
        monkeypatch.setattr(module, "possible", lambda: ("read your files",))
    assert settings.describe_programs(experiment()) is None
    with pytest.raises(UserError, match="they could read your files; add --evaluate.uncontained to run them") as caught:
        settings.describe_programs(experiment(evaluate=EvaluateConfig(**ASKED)))
    assert "\n" not in str(caught.value)
    both = experiment(evaluate=EvaluateConfig(**TOLD), rl=RLConfig(**ASKED))
    with pytest.raises(UserError, match="add --rl.uncontained to run .* or leave --rl.humaneval out"):
        settings.describe_programs(both)
    said = settings.describe_programs(experiment(evaluate=EvaluateConfig(**TOLD)))
    assert said is not None and said.endswith("on this machine they CAN read your files")
