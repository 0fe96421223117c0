"""A training that resumes continues with the conversations that it began with, or says what has changed."""

import copy
import itertools
import json

import pytest

from jaxchat.data.chat import fingerprint as module
from jaxchat.data.chat.fingerprint import fingerprint, what_changed
from jaxchat.data.loader import chat_batches
from jaxchat.data.mixed import MixedBatches, text_places
from jaxchat.errors import UserError
from tests.data.small_text import TOKENIZER, take, text_batches
from tests.tiny import record, refusal, start


def chats(count: int, what: str) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": f"say {what} {i}"}, {"role": "assistant", "content": f"{what} {i}"}]}
        for i in range(count)
    ]


TASKS = {"chat": chats(30, "a"), "sums": chats(20, "é"), "own.jsonl": chats(1, "\ud800")}


def prints(tasks: dict[str, list[dict]]) -> dict:
    return json.loads(json.dumps(fingerprint([*tasks.items()])))


def edit(tasks, name="chat", place=17):
    tasks[name][place]["messages"][1]["content"] += "!"


CHANGES = {
    "chat has other content": edit,
    "sums has other content": lambda tasks: tasks["sums"].reverse(),
    "chat has 31 items, not 30": lambda tasks: tasks["chat"].append(tasks["sums"][0]),
    "chat has 29 items, not 30, sums has other content": lambda tasks: (tasks["chat"].pop(), edit(tasks, "sums")),
    "own.jsonl is gone": lambda tasks: tasks.pop("own.jsonl"),
    "letters is new": lambda tasks: tasks.update(letters=chats(3, "b")),
    "chat is gone, sums is gone, own.jsonl is gone and 1 more": lambda tasks: (tasks.clear(), tasks.update(b=[])),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_changed_is_said(message):
    tasks = copy.deepcopy(TASKS)
    assert what_changed(prints(TASKS), prints(tasks)) is None
    CHANGES[message](tasks)
    assert what_changed(prints(TASKS), prints(tasks)) == message


def test_a_task_that_is_named_twice_counts_as_one():
    both = fingerprint([("chat", TASKS["chat"][:9]), ("sums", TASKS["sums"]), ("chat", TASKS["chat"][9:])])
    assert both == fingerprint([*TASKS.items()][:2])


def test_what_json_cannot_say_counts_for_nothing():
    """A user's own task may keep anything in its conversations, also what is another object in each process."""
    first, second = ([{**TASKS["chat"][0], "check": object(), ("a", "b"): 1}] for _ in range(2))
    assert prints({"own": first}) == prints({"own": second})
    assert what_changed(prints({"own": first}), prints({"own": [{**second[0], "answer": "7"}]}))


def test_of_many_some_are_hashed_in_all_parts(monkeypatch):
    monkeypatch.setattr(module, "SAMPLED", 10)
    before = prints(TASKS)
    seen = []
    for name, place in [*itertools.product(["chat"], range(30)), *itertools.product(["sums"], range(20))]:
        tasks = copy.deepcopy(TASKS)
        edit(tasks, name, place)
        if what_changed(before, prints(tasks)):
            seen.append((name, place))
    assert seen == [("chat", i) for i in range(0, 30, 6)] + [("sums", i) for i in range(0, 20, 6)]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_position_is_of_its_conversations(mixed, side):
    now = copy.deepcopy(TASKS["chat"])

    def batches(rows=4):
        options = {"rows": rows, "sequence_len": 40, "seed": 0}
        alone = chat_batches(now, TOKENIZER, **options, fingerprint=prints({"chat": now}))
        if not mixed:
            return alone
        return MixedBatches(alone, text_batches(side, rows=2, sequence_len=40), text_places(2, rows + 2), rows + 2, 0)

    iterator = batches()
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    for rows in (4, 8):
        (again := batches(rows)).set_state(state)
        assert again.get_state() == state
    edit({"chat": now})
    with pytest.raises(
        UserError, match=r"the conversations have changed .*: chat has other content; put them back, or .* --redo=sft"
    ):
        batches().set_state(state)
    del state["fingerprint"]  # as earlier versions wrote it
    batches().set_state(state)


def test_a_run_refuses_to_go_on_with_other_conversations(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats(60, "cats")))
    arguments = ["--stages=tokenizer,pretrain,sft", f"--sft.mixture={file}", "--sft.text-fraction=0.5"]
    code, _, err = start(tmp_path / "run", *arguments)
    assert code == 0, err
    steps = record(tmp_path / "run", "sft")["steps"]
    (tmp_path / "run" / "sft" / "stage.json").unlink()  # as if it had been stopped
    as_it_was = file.read_text()
    file.write_text(as_it_was.replace("say cats 7", "say dogs 7"))
    message = refusal(start(tmp_path / "run", *arguments))
    assert message.startswith("the conversations have changed") and f"{file} has other content" in message
    code, _, err = start(tmp_path / "run", *arguments, "--redo=sft")
    assert code == 0, err
    (tmp_path / "run" / "sft" / "stage.json").unlink()
    code, out, err = start(tmp_path / "run", *arguments)
    assert code == 0, err
    assert record(tmp_path / "run", "sft")["steps"] == steps
