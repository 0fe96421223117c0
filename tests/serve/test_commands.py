"""Commands at the prompt: what they do, and that a bad one is one line and changes nothing."""

import json

import pytest

from jaxchat.errors import UserError
from jaxchat.serve.commands import HELP, NAMES, Commands, completions
from jaxchat.serve.conversation import Conversation, Turn
from jaxchat.serve.settings import SETTINGS, Settings


@pytest.fixture
def conversation(engine):
    conversation = Conversation(engine, Settings(seed=7), base=False)
    end = engine.tokenizer.encode_special("<|assistant_end|>")
    conversation.turns = [Turn("Hello?", [*engine.tokenizer.encode("Hi."), end])]
    return conversation


@pytest.fixture
def run(conversation):
    return Commands(conversation, "tools calculator").run


def test_help_lists_all_commands():
    assert {line.split()[0] for line in HELP.splitlines() if line.startswith("/")} == set(NAMES) - {"/save!"}


def test_settings_are_changed_and_shown(run, conversation):
    run("/set temperature 0.3")
    run("/set top-k none")
    run("/set --top_p=0.9")
    run("/system Be brief.")
    assert conversation.settings == Settings(temperature=0.3, top_k=None, top_p=0.9, seed=7)
    assert run("/settings") == (
        "temperature 0.3 · top-k none · top-p 0.9 · min-p 0 · repetition-penalty 1 · max-tokens 256 · seed 7 · "
        "system Be brief. · tools calculator"
    )


def test_the_system_prompt(run, conversation):
    assert run("/system") == "system prompt: none"
    assert run("/system  Be brief.\nBe kind.") == "system prompt set, from the next answer on"
    assert conversation.system == "Be brief.\nBe kind."
    assert run("/clear") == "forgotten; the system prompt stays" and conversation.turns == []
    run("/system none")
    assert conversation.system == "" and run("/clear") == "forgotten"


def test_a_conversation_is_saved_and_loaded(run, conversation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = list(conversation.turns)
    assert run("/save chat 1.json") == f"2 messages saved to {tmp_path}/chat 1.json"
    run("/system Be brief.")
    assert run("/save").startswith("3 messages saved")  # its own file
    run("/clear")
    with pytest.raises(UserError, match="needs the name of a file, as in /save chat.json"):
        run("/save")
    with pytest.raises(UserError, match="nothing to save yet"):
        run("/system none") and run("/save x")
    assert run("/load chat 1.json").startswith("3 messages loaded")
    assert conversation.turns == turns and conversation.system == "Be brief."
    (tmp_path / "other").write_text("mine")
    with pytest.raises(UserError, match="there already; /save! .*other replaces it"):
        run("/save other")
    run("/save! other")
    assert len(json.loads((tmp_path / "other").read_text())["messages"]) == 3


def test_a_question_without_an_answer_can_be_asked(run, conversation, tmp_path):
    (tmp_path / "a").write_text(json.dumps({"messages": [{"role": "user", "content": "Why?"}]}))
    assert run(f"/load {tmp_path}/a").endswith("the last one has no answer yet, /retry asks 'Why?'")
    assert conversation.unanswered == "Why?" and run("/undo") == "taken back: 'Why?'"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/qqqqqq", "unknown command /qqqqqq. /help lists the commands"),
        ("/sav", "unknown command /sav, did you mean '/save'? /help lists the commands"),
        ("/" + "x" * 999, "unknown command /x"),
        ("/clear all", '/clear takes nothing after it; a message that begins with / goes between """'),
        ("/undo 2", "/undo takes nothing after it"),
        ("/set", "write /set NAME VALUE, as in /set temperature 0.3; names: temperature, top-k"),
        ("/set temperature", "write /set NAME VALUE"),
        ("/set temperatur 1", "there is no setting 'temperatur', did you mean 'temperature'? Choose one of "),
        ("/set temperature hot", "temperature takes a number"),
        ("/set temperature -1", "temperature is -1.0; it must be at least 0"),
        ("/set temperature nan", "temperature is nan; it must be finite, at least 0"),
        ("/set temperature none", "temperature takes a number"),
        ("/set top-k 0", "top-k is 0; it must be at least 1"),
        ("/set top-k 1.5", "top-k takes a whole number, or none"),
        ("/set top-p 0", "top-p is 0.0; it must be above 0 and at most 1"),
        ("/set min-p 1.1", "min-p is 1.1; it must be at least 0 and at most 1"),
        ("/set seed -1", "seed is -1; it must be at least 0"),
        ("/set max-tokens 99999999999", "max-tokens is 99999999999; it must be at most"),
        ("/save", "/save needs the name of a file"),
        ("/save no/such/folder/x", "no/such/folder/x cannot be written (No such file or directory)"),
        ("/load", "/load needs the name of a file"),
        ("/load no/such", "no/such cannot be read (No such file or directory)"),
        ("/load pyproject.toml", "is not a conversation that /save writes: not JSON"),
        ("/system " + "z" * 500, "this system prompt has"),
    ],
)
def test_bad_use_is_one_line_and_changes_nothing(run, conversation, line, why):
    before = (list(conversation.turns), conversation.settings, conversation.system)
    with pytest.raises(UserError) as caught:
        run(line)
    said = str(caught.value)
    assert why in said and "\n" not in said and len(said) < 300
    assert (conversation.turns, conversation.settings, conversation.system) == before


def test_completions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats").mkdir()
    (tmp_path / "chat[1].json").touch()
    assert completions("", "/se") == ["/set ", "/settings "]
    assert completions("", "What") == []
    assert completions("/set ", "top") == ["top-k ", "top-p "]
    assert completions("/load ", "chat") == ["chat[1].json", "chats/"]
    assert completions("/load ", "chat[") == ["chat[1].json"]
    assert completions("What is ", "cha") == ()


def test_every_setting_has_a_default_and_reads_what_it_writes():
    for setting in SETTINGS.values():
        value = setting.default
        assert setting.parse("none" if value is None else str(value)) == value
