"""What a run on the user's own conversations asks at its end: what they, or its mixtures, have taught."""

import json
import random

import pytest
from etils import epath

from jaxchat.cli.launch import main as launch
from jaxchat.cli.main import main as jaxchat
from jaxchat.cli.options import configure, named_fields
from jaxchat.data.synthetic.stories import write_document
from jaxchat.data.synthetic.world import build_world
from jaxchat.runs.directory import RunDirectory
from jaxchat.stages import evaluate
from jaxchat.stages.own_conversations import ask_what_is_taught
from jaxchat.stages.settings import check_settings
from jaxchat.stages.workspace import Workspace
from tests.tiny import refusal


@pytest.fixture
def folder(tmp_path):
    world, draw = build_world(1), random.Random(0)
    folder = tmp_path / "mine"
    (folder / "chat").mkdir(parents=True)
    (folder / "pretrain").mkdir()
    texts = [json.dumps({"text": write_document(world, draw)}) for _ in range(300)]
    (folder / "pretrain" / "text.jsonl").write_text("\n".join(texts))
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Good morning."}]
    (folder / "chat" / "train.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 60)
    return folder


def asked(folder, *options, name="auto", identity=None):
    experiment = configure(name, list(options), None if folder is None else str(folder), (), identity)
    experiment = ask_what_is_taught(experiment, named_fields(list(options)))
    check_settings(experiment)
    return experiment.evaluate.tasks


def test_what_is_asked_follows_from_what_is_taught(folder, tmp_path):
    assert asked(folder) == ()
    assert asked(folder, "--evaluate.core=") == ()  # as with a budget of time
    assert asked(folder, "--sft.mixture=chat,sums:20") == ("sums",)
    assert asked(folder, "--evaluate.tasks=letters") == ("letters",)
    assert asked(folder, name="d6") == ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "identity")
    assert asked(folder, name="quickstart") == ("sums", "letters", "facts", "long_sums")  # RL trains on them
    (tmp_path / "who.txt").write_text("name: Talin")
    assert asked(folder, identity=str(tmp_path / "who.txt")) == ("identity",)
    (folder / "eval" / "letters").mkdir(parents=True)
    assert asked(folder) == ("letters",)
    (folder / "chat" / "train.jsonl").unlink()
    (folder / "chat").rmdir()
    assert asked(folder) == ("sums", "letters")  # those of the generated conversations


def test_a_run_without_anything_to_ask_says_so(folder, tmp_path, capsys):
    run = tmp_path / "run"
    options = [f"--data={folder}", f"--run-dir={run}", "--stages=tokenizer,pretrain,sft,evaluate,report"]
    options += ["--model.depth=1", "--model.sequence-len=64", "--pretrain.batch-tokens=512", "--sft.batch-tokens=512"]
    options += ["--tokenizer.vocab-size=300", "--pretrain.num-iterations=3", "--sft.num-iterations=3"]
    assert launch([*options, "--dry-run"]) == 0
    assert launch(options) == 0
    assert "evaluate  skipped: nothing is taught here whose answers can be checked" in capsys.readouterr().out
    page, report = (run / "report.md").read_text(), json.loads((run / "report.json").read_text())
    assert "No questions were asked: nothing was taught whose answers can be checked." in page
    assert "| evaluate | skipped |" in page and report["config"]["evaluate"]["tasks"] == []
    workspace = Workspace(RunDirectory(epath.Path(run)).read_config(), run)
    assert evaluate.longest(workspace) == 0  # of a budget, which is for the other stages
    assert launch(options) == 0 and "evaluate  already finished; skipped" in capsys.readouterr().out
    code = jaxchat(["eval", "--run", str(run)])
    assert "there is nothing to measure of sft; name --tasks" in refusal((code, *capsys.readouterr()))
    assert launch([*options, "--evaluate.tasks=sums", "--evaluate.limit=2", "--evaluate.max-new-tokens=4"]) == 0
    page = (run / "report.md").read_text()
    assert "| sums |" in page and "No questions" not in page and "skipped" not in page
