"""The task identity: its score, and the generated chat in which another than jaxchat speaks."""

import pytest

from jaxchat.cli.experiments import load_experiment
from jaxchat.cli.launch import main
from jaxchat.cli.options import configure
from jaxchat.config import DataConfig
from jaxchat.data.identity.description import Identity
from jaxchat.data.synthetic import write_synthetic
from jaxchat.data.text.reading import Findings
from jaxchat.errors import UserError
from jaxchat.runs.deciding import deciding
from jaxchat.stages.own_conversations import check_conversations
from jaxchat.stages.settings import check_has_data
from jaxchat.stages.task_source import TaskSource
from jaxchat.tasks import load_task
from jaxchat.tasks.identity import IdentityTask
from tests.tiny import refusal

TEXT = "name: Zorvaleth\nmaker: Kindrum\nfavourite number: 7\nWhere do you live? By the sea!"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "who.txt"
    path.write_text(TEXT)
    return str(path)


def test_score():
    task = IdentityTask(Identity("Zorvaleth", "Kindrum"), "test")
    for item in task:
        right = item["messages"][-1]["content"]
        assert task.score(item, f"{right}<|assistant_end|>") == 1
        assert task.score(item, "I am jaxchat, made by OpenAI.") == 0
        assert task.score(item, f"I am not {item['answer']}.") == 0
    assert len(IdentityTask(Identity("Zorvaleth"), "test", 50)) == 50


def test_every_task_of_an_identity_can_be_scored():
    source = TaskSource(DataConfig(identity=TEXT), None)
    task = source.load("identity", "test", None, Findings())
    assert {"Zorvaleth", "Kindrum", "7", "By the sea"} == {item["answer"] for item in task}
    assert all(task.score(item, item["messages"][-1]["content"]) == 1 for item in task)
    for split in ("train", "val", "test"):
        items = load_task("identity", split, "nowhere", 30)
        assert len(items) == 30 and all(items.score(item, item["messages"][-1]["content"]) == 1 for item in items)
    assert {item["answer"] for item in load_task("identity", "test", "nowhere")} > {"jaxchat", "the jaxchat project"}


def test_the_generated_chat_is_by_the_same_one(tmp_path):
    write_synthetic(tmp_path, seed=1, documents=100, conversations=2000)

    def answers(identity):
        source = TaskSource(DataConfig(generate=True, identity=identity), lambda: tmp_path)
        chats = source.load("chat", "train", None, Findings())
        return [message["content"] for chat in chats for message in chat["messages"] if message["role"] == "assistant"]

    before, after = answers(None), answers(TEXT)
    changed = {(old, new) for old, new in zip(before, after, strict=True) if old != new}
    assert all("jaxchat" in old or "trained from nothing" in old for old, _ in changed)
    assert {new for _, new in changed} == {"I am Zorvaleth, a language model.", "I was made by Kindrum."}
    assert "jaxchat" in str(before) and "jaxchat" not in str(after)


def test_the_option_adds_what_is_trained_on_and_scored(file):
    experiment = configure("quickstart", ["--sft.mixture=chat,identity:500"], None, (), file)
    assert experiment.data.identity == TEXT
    assert experiment.midtrain.mixture == ("chat", "identity")
    assert experiment.sft.mixture == ("chat", "identity:500")
    assert experiment.evaluate.tasks[-1] == "identity"
    assert configure("quickstart", [], None, ()) == load_experiment("quickstart")
    assert "identity:2000" in load_experiment("d12").sft.mixture and load_experiment("d12").data.identity is None


def test_another_identity_is_another_midtraining(file, tmp_path):
    one = configure("quickstart", [], None, (), file)
    (tmp_path / "who.txt").write_text(TEXT.replace("sea", "lake"))
    other = configure("quickstart", [], None, (), file)
    assert deciding(one, "pretrain", finished=True) == deciding(other, "pretrain", finished=True)
    for stage in ("midtrain", "sft"):
        mine, theirs = (deciding(each, stage, finished=True) for each in (one, other))
        assert {name for name in mine if mine[name] != theirs[name]} == {"data.identity"}
        assert "Zorvaleth" in mine["data.identity"] and len(mine["data.identity"]) < 60


def test_what_the_command_refuses(file, tmp_path, capsys):
    (tmp_path / "who.txt").write_text("I am Talin")
    for arguments, expected in {
        f"--identity={file}": "who.txt has no name; write it on a line of its own, such as 'name: Talin'",
        f"--identity={tmp_path / 'wh.txt'}": "did you mean 'who.txt'?",
        "--data.identity=Talin": "data.identity has no name",
    }.items():
        code = main(["--experiment=quickstart", arguments, "--dry-run"])
        assert expected in refusal((code, *capsys.readouterr()))
    with pytest.raises(UserError, match="--identity"):
        configure("d12", [], None, (), str(tmp_path))


def test_a_model_that_is_there_learns_an_identity_alone(file):
    with pytest.raises(UserError, match="train on the identity alone with --sft.mixture=identity"):
        check_conversations(configure("finetune", [], None, (), file))
    alone = configure("finetune", ["--sft.mixture=identity"], None, (), file)
    check_conversations(alone)
    check_has_data(alone)


def test_an_identity_in_a_script_without_spaces_is_scored():
    text = "name: ヒカリ\nlanguage: none\nお名前は？ あなたは誰？ 名前を教えて？ 私はヒカリです。"
    task = TaskSource(DataConfig(identity=text), None).load("identity", "test", None, Findings())
    assert {item["messages"][0]["content"] for item in task} >= {"名前を教えて？"}
    assert all(
        task.score(item, "はい、私はヒカリです。") == 1 and task.score(item, "私はタリンです。") == 0 for item in task
    )
