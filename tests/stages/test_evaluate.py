"""ChatCORE of the evaluate stage: of scores that are new and scores that were there."""

from types import SimpleNamespace

import pytest

from jaxchat.eval.statistics import CHANCE
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.metrics import Metrics
from jaxchat.stages.evaluate import _log_chat_core


def test_chat_core_is_logged_when_all_five_tasks_are_there(tmp_path):
    said = []
    workspace = SimpleNamespace(directory=RunDirectory(tmp_path), say=said.append)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "stage.json").write_text('{"stage": "sft", "steps": 3}')
    *four, last = CHANCE
    with Metrics(tmp_path, "evaluate", live=False) as metrics:
        metrics.log(3, of="sft", **{f"score/{four[0]}": 1.0})
        metrics.log(3, of="rl", **{f"score/{last}": 0.75})
        _log_chat_core(workspace, metrics, "sft", 3, {name: 0.5 for name in four})
        assert said == [], "the fifth is of another stage"
        metrics.log(3, of="sft", **{f"score/{name}": 0.5 for name in four})
        _log_chat_core(workspace, metrics, "sft", 3, {"sums": 1.0})
        assert said == [], "nothing of it is new"
        _log_chat_core(workspace, metrics, "sft", 3, {last: 0.75})
    scores = {name: 0.5 for name in four} | {last: 0.75}
    expected = sum((scores[name] - chance) / (1 - chance) for name, chance in CHANCE.items()) / 5
    (line,) = [line for line in workspace.directory.read_metrics() if "chat_core" in line]
    assert line["of"] == "sft" and line["chat_core"] == pytest.approx(expected)
    assert said == [f"evaluate  sft       ChatCORE {expected:.4f}"]
