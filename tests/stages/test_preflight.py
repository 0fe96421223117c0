"""What a run would stop at hours later is refused before its first stage, and what it leaves out is said."""

import json
import math

import pytest

from jaxchat.config import DataConfig, EvaluateConfig, Experiment, FinetuneConfig, ModelConfig, RLConfig
from jaxchat.data.synthetic import write_synthetic
from jaxchat.errors import UserError
from jaxchat.stages.preflight import SAID, check_data
from jaxchat.stages.task_source import NotYet, TaskSource
from jaxchat.tokenizer import Tokenizer
from tests.tiny import refusal, start

TOKENIZER = Tokenizer.train_from_iterator(["the cat sat on the mat, and the cat sat on the hat"] * 3, 275)
SHORT = [{"question": "2 + 2?", "answer": "#### 4"}]


def talk(question="the cat", answer="sat"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(folder, files):
    for name, records in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def checked(folder, *, stages=("sft",), given=(), tokenizer=None, on_bad="refuse", length=64, source=None, **sections):
    """The lines that are said about the data in `folder`."""
    data = DataConfig(path=str(folder), on_bad=on_bad)
    experiment = Experiment(data=data, model=ModelConfig(depth=1, sequence_len=length), **sections)
    said = []
    source = source or TaskSource(data, None)
    check_data(experiment, source, stages, tokenizer=tokenizer, given=given, say=said.append)
    return said


def refused(folder, **settings):
    with pytest.raises(UserError) as error:
        checked(folder, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


MANY = [talk(f"the cat {i}") for i in range(40)]


@pytest.fixture(autouse=True)
def however_slow(monkeypatch):
    """A slow machine is not told how long the checks took."""
    monkeypatch.setattr("jaxchat.stages.preflight.SLOW", math.inf)


def test_what_is_read_is_said(tmp_path):
    write(tmp_path, {"chat/train.jsonl": MANY, "chat/val.jsonl": MANY[:7], "chat/other.jsonl": MANY})
    said = checked(tmp_path, stages=("tokenizer", "pretrain", "midtrain", "sft", "report"))
    assert "sft       40 conversations to train on (chat 40), 7 to validate with" in said
    assert "data      read by no task: chat/other.jsonl" in said
    assert len(said) == 3


# --- nothing to train on


def test_prompts_longer_than_the_context_are_refused_even_without_a_tokenizer(tmp_path):
    write(tmp_path, {"chat/train.jsonl": [talk("word " * 200)] * 40})
    for tokenizer in (None, TOKENIZER):
        line = refused(tmp_path, tokenizer=tokenizer, length=128)
        assert line.startswith("sft: 0 of 38 conversations have anything to train on: 38 prompts are longer than "
                               "model.sequence-len 128")  # fmt: skip


def test_a_context_too_short_for_any_prompt_is_refused_once_there_is_a_tokenizer(tmp_path):
    write(tmp_path, {"chat/train.jsonl": [talk("xyzxyzxyzxyzxyz")] * 40})
    assert checked(tmp_path, length=16)
    assert "38 prompts are longer than model.sequence-len 16; raise it" in refused(
        tmp_path, tokenizer=TOKENIZER, length=16
    )


@pytest.mark.parametrize("answer", [None, "", [], [{"type": "python_output", "text": "4"}]])
def test_conversations_without_an_answer_are_refused(tmp_path, answer):
    chats = [talk("q", answer) for _ in range(40)]
    if answer is None:
        chats = [{"messages": chat["messages"][:1]} for chat in chats]
    write(tmp_path, {"chat/train.jsonl": chats})
    assert "sft: 0 of 38 conversations have anything to train on: in 38 the assistant writes nothing" in refused(
        tmp_path
    )


def test_some_without_anything_to_train_on_are_said(tmp_path):
    chats = [*MANY, *[talk("word " * 200)] * 3, talk("q", "")]
    write(tmp_path, {"chat/train.jsonl": chats, "chat/val.jsonl": chats[40:]})
    said = checked(tmp_path, length=128)
    assert said[0] == (
        "sft       4 of 44 conversations have nothing to train on: 3 prompts are longer than model.sequence-len 128, "
        "in 1 the assistant writes nothing"
    )
    assert "no conversation to validate with (3 prompts are longer" in said[2] and "bpb is not measured" in said[2]


def test_a_single_conversation_has_none_to_validate_with(tmp_path):
    write(tmp_path, {"chat/train.jsonl": [talk()]})
    assert "no conversation to validate with (none is held out)" in checked(tmp_path)[-1]


# --- bad data


@pytest.mark.parametrize("stage", ["midtrain", "sft"])
def test_one_bad_conversation_among_many_is_found_before_training(tmp_path, stage):
    chats = [talk(f"q{i}") for i in range(6000)]
    chats[4321] = {"messages": [*talk()["messages"], *[{"role": "user", "content": "c?"}] * 2]}
    write(tmp_path, {"chat/train.jsonl": chats, "chat/val.jsonl": MANY})
    line = refused(tmp_path, stages=(stage,))
    assert line.startswith(f"{tmp_path / 'chat/train.jsonl'}:4322: ") and "--data.on-bad=skip" in line
    said = checked(tmp_path, stages=(stage,), on_bad="skip")
    assert "train.jsonl:4322: " in said[0] and said[0].endswith("left out")
    assert said[1] == "data      chat: 1 left out"
    assert "5,999 conversations to train on" in said[2]


def test_many_bad_lines_are_counted_and_only_some_are_said(tmp_path):
    write(tmp_path, {"chat/train.jsonl": [*MANY, *[{"x": 1}] * 100], "chat/val.jsonl": MANY})
    said = checked(tmp_path, on_bad="skip")
    assert sum("train.jsonl:" in line for line in said) == SAID
    assert "data      chat: 100 left out" in said


def test_bad_questions_of_rl_and_evaluation_are_found(tmp_path):
    bad = [*SHORT, {"question": "2+2?", "answer": "4"}]
    for stage, name in (("rl", "train"), ("evaluate", "test")):
        good = {"eval/gsm8k/train.jsonl": SHORT}
        folder = write(tmp_path / stage / name, good | {f"eval/gsm8k/{name}.jsonl": bad})
        sections = {"rl": RLConfig(tasks=("gsm8k",)), "evaluate": EvaluateConfig(tasks=("gsm8k",))}
        line = refused(folder, stages=(stage,), **sections)
        assert f"{name}.jsonl:2: the answer '4' does not end with '#### '" in line
        checked(folder, stages=(stage,), on_bad="skip", **sections)


# --- what is there


def test_a_task_that_the_user_names_must_be_there(tmp_path):
    write(tmp_path, {"chat/train.jsonl": MANY})
    sections = {"sft": FinetuneConfig(mixture=("chat", "gsm8k"))}
    assert checked(tmp_path, **sections)[0].startswith("sft       left out, not in the data folder: gsm8k (")
    line = refused(tmp_path, given=("sft.mixture",), **sections)
    assert line.startswith("sft.mixture names gsm8k, but gsm8k needs ") and "'jaxchat data get gsm8k'" in line
    sections = {"evaluate": EvaluateConfig(tasks=("arc_easy",))}
    assert "'jaxchat data get arc'" in refused(tmp_path, stages=("evaluate",), given=("evaluate.tasks",), **sections)


def test_what_cannot_be_scored_on_the_way_is_left_out_unless_the_user_names_it(tmp_path):
    long = [{"question": "the cat " * 90, "answer": "#### 4"}]
    write(tmp_path, {"chat/train.jsonl": MANY, "eval/gsm8k/test.jsonl": long})
    sections = {"sft": FinetuneConfig(tasks=("gsm8k", "mmlu"))}
    said = checked(tmp_path, **sections)
    assert any(line.startswith("sft       not scored, not in the data folder: mmlu (") for line in said)
    assert "sft       not scored, no question fits into model.sequence-len 64: gsm8k" in said
    assert "sft.tasks names mmlu" in refused(tmp_path, given=("sft.tasks",), **sections)
    sections = {"sft": FinetuneConfig(tasks=("gsm8k",))}
    assert "the 1 questions of gsm8k fits into" in refused(tmp_path, given=("sft.tasks",), **sections)
    sections = {"sft": FinetuneConfig(tasks=("nanochat_gsm8k",))}  # asked at its full length
    assert not any("gsm8k" in line for line in checked(tmp_path, given=("sft.tasks",), **sections))


def test_a_path_must_be_there_whoever_names_it(tmp_path):
    write(tmp_path, {"chat/train.jsonl": MANY, "chats.jsonl": MANY})
    sections = {"sft": FinetuneConfig(mixture=("chat", str(tmp_path / "chatz.jsonl")))}
    assert "chatz.jsonl does not exist, did you mean 'chats.jsonl'?" in refused(tmp_path, **sections)


def test_a_stage_without_any_of_its_tasks_is_refused(tmp_path):
    sections = {"sft": FinetuneConfig(mixture=("chat", "gsm8k"))}
    (tmp_path / "chat").mkdir()
    line = refused(tmp_path, **sections)
    assert line.startswith("sft: the data folder has none of its tasks: chat (chat needs ") and "gsm8k needs" in line
    (tmp_path / "chat/train.csv").write_text("question,answer\nq,a\n")
    assert "; convert train.csv with: python -c " in refused(tmp_path, **sections)


def test_fewer_items_than_asked_for_and_names_given_twice_are_said(tmp_path):
    write(tmp_path, {"chat/train.jsonl": MANY, "chat/val.jsonl": MANY[:3]})
    said = checked(tmp_path, sft=FinetuneConfig(mixture=("chat:2000", "chat:2")))
    assert "sft       sft.mixture names chat more than once: it counts as often" in said
    assert "sft       chat has 40 items, not the 2,000 that sft.mixture asks for" in said
    assert any("42 conversations to train on" in line for line in said)


def test_questions_that_do_not_fit_are_said_and_refused_if_none_fits(tmp_path):
    long = {"question": "word " * 200, "answer": "#### 4"}
    write(tmp_path, {"eval/gsm8k/train.jsonl": [long] * 30, "eval/gsm8k/test.jsonl": [*SHORT, long]})
    sections = {"rl": RLConfig(tasks=("gsm8k",)), "evaluate": EvaluateConfig(tasks=("gsm8k",))}
    assert refused(tmp_path, stages=("rl",), **sections) == (
        "rl: none of the 29 questions of gsm8k fits into model.sequence-len 64; raise it, "
        "or leave gsm8k out of rl.tasks"
    )
    assert checked(tmp_path, stages=("evaluate",), **sections) == [
        "evaluate  1 of 2 questions of gsm8k do not fit into model.sequence-len 64, and score 0"
    ]
    assert checked(tmp_path, stages=("evaluate",), evaluate=EvaluateConfig(tasks=("gsm8k:1",))) == []  # asks the first


def test_a_task_of_which_every_question_is_left_out_is_refused(tmp_path):
    write(tmp_path, {"eval/gsm8k/test.jsonl": [{"question": "2+2?", "answer": "4"}]})
    line = refused(tmp_path, stages=("evaluate",), on_bad="skip", evaluate=EvaluateConfig(tasks=("gsm8k",)))
    assert line == "evaluate: gsm8k has no questions; leave it out of evaluate.tasks"


def test_a_part_of_the_mixture_with_nothing_to_train_on_is_said(tmp_path):
    write(tmp_path, {"chat/train.jsonl": MANY, "long.jsonl": [talk("word " * 200)] * 5})
    long = str(tmp_path / "long.jsonl")
    said = checked(tmp_path, sft=FinetuneConfig(mixture=("chat", long)))
    assert f"sft       {long} has nothing to train on: 4 prompts are longer than model.sequence-len 64" in said


# --- what is still to come


def test_what_is_still_to_come_is_not_waited_for(tmp_path):
    data = DataConfig(path=str(tmp_path), generate=True)
    downloading = TaskSource(data, None, lambda task: True)
    sections = {"sft": FinetuneConfig(mixture=("smoltalk", "chat"))}
    given = ("sft.mixture",)
    assert checked(tmp_path, source=downloading, given=given, **sections) == []
    write(tmp_path, {"chat/train.jsonl": [{"x": 1}]})
    assert "train.jsonl:1: no conversation" in refused(tmp_path, source=downloading, given=given, **sections)
    with pytest.raises(NotYet):
        TaskSource(DataConfig(generate=True), None).load("chat", "train", None, None)


def test_the_generated_corpus_passes(tmp_path):
    write_synthetic(tmp_path, seed=1, documents=100, conversations=300)
    source = TaskSource(DataConfig(generate=True), lambda: tmp_path)
    sections = {
        "rl": RLConfig(tasks=("long_sums", "sums:30")),
        "evaluate": EvaluateConfig(tasks=("sums", "letters", "facts")),
    }
    said = checked(tmp_path, source=source, stages=("midtrain", "sft", "rl", "evaluate"), length=128, **sections)
    assert [line.split()[0] for line in said] == ["midtrain", "sft"]


# --- by the commands


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_start_and_its_dry_run_refuse_alike_before_anything_is_trained(tmp_path, dry):
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(record) + "\n" for record in [*MANY, {"messages": [{"role": "user"}]}]))
    for mixture, wanted in {
        str(chats): f"{chats}:41: 'content' of message 1, from the user, is missing; --data.on-bad=skip leaves it out",
        str(tmp_path / "chat.jsonl"): f"{tmp_path / 'chat.jsonl'} does not exist, did you mean 'chats.jsonl'?",
    }.items():
        assert refusal(start(tmp_path / "run", f"--sft.mixture={mixture}", *dry)) == wanted
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_a_task_named_on_the_command_line_must_be_there(tmp_path):
    write(tmp_path / "data", {"chat/train.jsonl": MANY, "text.jsonl": [{"text": f"{i} " * 50} for i in range(9)]})
    for option in ("--sft.mixture=chat,gsm8k", "--rl.tasks=gsm8k", "--evaluate.tasks=gsm8k"):
        line = refusal(start(tmp_path / "run", f"--data={tmp_path / 'data'}", option))
        assert line.startswith(f"{option[2:].partition('=')[0]} names gsm8k, but ")
