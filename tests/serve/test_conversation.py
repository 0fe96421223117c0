"""Conversations with a model that has memorized a few: what is remembered, what is cut, and what is said about it."""

import io
import threading

import jax
import pytest

from jaxchat.errors import UserError
from jaxchat.infer.answers import SHORT_OUTPUT
from jaxchat.infer.engine import Engine
from jaxchat.serve.conversation import Answer, Conversation, Turn, without_open_call
from jaxchat.serve.settings import Settings
from jaxchat.serve.terminal import reply
from jaxchat.tools.python import run_code
from tests.serve.conftest import CONTEXT

SUM = "What is 34 + 58?"
SUM_TOKENS = len("34 + 5892") + 4  # of its tool call; each of these characters is a token


@pytest.fixture
def new(engine):
    def conversation(**changes):
        base = changes.pop("base", False)
        settings = {"temperature": 0.0, "top_k": None, "max_tokens": 40} | changes
        return Conversation(engine, Settings(**settings), base=base)

    return conversation


def ask(conversation, text):
    out, notes = io.StringIO(), io.StringIO()
    assert not reply(conversation, text, out, notes)
    return out.getvalue(), notes.getvalue()


def prompt_of(conversation, text):
    """What the model would be given for the next question, with special tokens spelled out."""
    return conversation.engine.tokenizer.decode(conversation._prompt(text, [], Answer(), 0))


def user(text):
    return f"<|user_start|>{text}<|user_end|><|assistant_start|>"


def test_a_system_prompt_comes_before_the_first_question_that_is_remembered(new):
    conversation = new()
    conversation.instruct("Be brief.")
    ask(conversation, "Hello?")
    first = conversation.turns[0]
    assert prompt_of(conversation, "x").startswith(f"<|bos|>{user('Be brief.' + chr(10) * 2 + 'Hello?')}")
    expected = conversation.engine.tokenizer.render_for_completion(
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]}
    )
    conversation.turns.clear()
    assert conversation._prompt("Hello?", [], Answer(), 0) == expected
    conversation.turns[:] = [first, first]
    conversation._prompt("x" * (CONTEXT // 2), [], Answer(), 40)
    assert len(conversation.turns) < 2 and prompt_of(conversation, "x").count("Be brief.") == 1
    conversation.instruct("")
    assert "Be brief." not in prompt_of(conversation, "x")


def test_a_system_prompt_leaves_room(new):
    conversation = new()
    conversation.instruct("z" * (CONTEXT // 2))
    with pytest.raises(
        UserError, match=f"this system prompt has {CONTEXT // 2 + 1} tokens; at most {CONTEXT // 2} fit"
    ):
        conversation.instruct("z" * (CONTEXT // 2 + 1))
    fits = CONTEXT - 5 - CONTEXT // 2 - 2
    conversation.ask("z" * fits)
    with pytest.raises(UserError, match=f"at most {fits} fit into the model's context of {CONTEXT} with the system"):
        conversation.ask("z" * (fits + 1))


def test_another_answer_takes_the_place_of_the_last(new):
    conversation = new()
    ask(conversation, "Hello?")
    ask(conversation, SUM)
    out, notes = io.StringIO(), io.StringIO()
    before = conversation.settings.seed
    reply(conversation, None, out, notes)
    assert out.getvalue() == "⟨34 + 58 → 92⟩ It is 92.\n" and len(conversation.turns) == 2
    assert conversation.settings.seed == before + 1


def test_another_answer_that_does_not_begin_leaves_the_last(new):
    conversation = new()
    ask(conversation, "Hello?")
    turns = list(conversation.turns)
    conversation.retry().chunks.close()
    assert conversation.turns == turns and conversation.unanswered is None
    generator = conversation.retry().chunks
    next(filter(None, generator))
    generator.close()
    assert len(conversation.turns) == 1 and conversation.turns != turns


def test_turns_are_taken_back(new):
    conversation = new()
    with pytest.raises(UserError, match="nothing to take back"):
        conversation.undo()
    with pytest.raises(UserError, match="no question yet"):
        conversation.retry()
    ask(conversation, "Hello?")
    ask(conversation, SUM)
    assert conversation.undo() == SUM
    assert ask(conversation, SUM) == ("⟨34 + 58 → 92⟩ It is 92.\n", "")
    assert [conversation.undo(), conversation.undo(), conversation.turns] == [SUM, "Hello?", []]


def test_a_base_model_has_no_conversation(new):
    conversation = new(base=True)
    ask(conversation, "Es war einmal")
    assert not conversation.turns
    for action in (conversation.undo, conversation.messages, lambda: conversation.instruct("x")):
        with pytest.raises(UserError, match="^a base model "):
            action()
    out = io.StringIO()
    reply(conversation, None, out, None)
    assert out.getvalue().startswith(" ein Bär 🐻.")


def test_a_conversation_goes_on_from_its_messages(new):
    first, second = new(), new()
    first.instruct("Be brief.")
    ask(first, "Hello?")
    ask(first, SUM)
    messages = first.messages()
    assert messages[-1] == {
        "role": "assistant",
        "content": "It is 92.",
        "tool_runs": [{"call": "34 + 58", "output": "92", "at": 0}],
    }
    second.resume(messages)
    assert second.system == "Be brief." and second.messages() == messages
    assert prompt_of(second, "x") == prompt_of(first, "x")
    second.resume([{"role": "user", "content": SUM}])
    assert (second.system, second.turns, second.unanswered) == ("", [], SUM)
    out = io.StringIO()
    reply(second, None, out, None)
    assert out.getvalue() == "⟨34 + 58 → 92⟩ It is 92.\n" and second.unanswered is None


def test_a_long_output_of_a_tool_loses_its_middle(engine):
    calls = []

    def tool(call):
        calls.append(call)
        return "begin" + "x" * 1000 + "end"

    conversation = Conversation(engine, Settings(temperature=0, top_k=None, max_tokens=90), base=False, tool=tool)
    ask(conversation, SUM)
    (run,) = conversation.messages()[1]["tool_runs"]
    assert calls == ["34 + 58"] and run["output"].startswith("beginx") and run["output"].endswith("xend")
    assert "\n...\n" in run["output"] and len(run["output"]) <= SHORT_OUTPUT


def test_a_tool_that_takes_long_can_be_stopped(engine):
    """As at the terminal: the answer is left, and the program ends."""
    ended = threading.Event()

    def tool(call):
        run_code("import time\ntime.sleep(999)", cancelled=lambda: not conversation.answering)
        ended.set()

    conversation = Conversation(engine, Settings(temperature=0, top_k=None), base=False, tool=tool)
    answer, written = conversation.ask(SUM), []
    for chunk in answer.chunks:
        written += chunk
        if engine.tokenizer.encode_special("<|python_end|>") in written and not chunk:
            break
    answer.chunks.close()
    assert ended.wait(10)
    assert (
        ask(Conversation(engine, Settings(temperature=0, top_k=None), base=False), "Hello?")[0] == "Grüße, 日本 🙂!\n"
    )


def test_turns_are_remembered_until_they_are_cleared(new):
    conversation = new()
    assert ask(conversation, "Hello?") == ("Grüße, 日本 🙂!\n", "")
    assert ask(conversation, SUM) == ("⟨34 + 58 → 92⟩ It is 92.\n", "")
    assert ask(conversation, "Again?") == ("You said Hello? first.\n", "")
    conversation.clear()
    assert ask(conversation, SUM) == ("⟨34 + 58 → 92⟩ It is 92.\n", "")
    assert ask(conversation, "Again?") == ("Hello? was never asked.\n", "")


@pytest.mark.parametrize(
    ("max_tokens", "answer", "kept"),
    [
        (1, "⟨", ""),
        (3, "⟨34", ""),
        (SUM_TOKENS - 2, "⟨34 + 58 → 9", ""),
        (SUM_TOKENS - 1, "⟨34 + 58 → 92", ""),
        (SUM_TOKENS, "⟨34 + 58 → 92⟩ ", "<|python_start|>34 + 58<|python_end|><|output_start|>92<|output_end|>"),
    ],
)
def test_an_answer_cut_by_the_limit(new, max_tokens, answer, kept):
    conversation = new(max_tokens=max_tokens)
    assert ask(conversation, SUM) == (f"{answer}\n", f"(cut: --max-tokens {max_tokens})\n")
    assert prompt_of(conversation, "x") == f"<|bos|>{user(SUM)}{kept}<|assistant_end|>{user('x')}"
    ask(conversation, "Hello?")  # the next prompt is taken


def test_an_answer_cut_by_the_context(new):
    conversation = new()
    room = 9
    text = "z" * (CONTEXT - 4 - room - len(SUM)) + SUM  # four special tokens; each of these characters is a token
    answer = conversation.ask(text)
    count = sum(map(len, answer.chunks))
    assert count in range(1, room + 1)
    assert (answer.cut == f"the context of {CONTEXT} tokens is full") == (count == room)


def test_what_the_model_ends_is_not_cut(new, engine):
    answer = new().ask("Hello?")
    count = sum(map(len, answer.chunks))
    assert answer.cut is None
    exact = new(max_tokens=count + 1).ask("Hello?")
    assert sum(map(len, exact.chunks)) == count and exact.cut is None
    short = new(max_tokens=count).ask("Hello?")
    assert sum(map(len, short.chunks)) == count and short.cut == f"--max-tokens {count}"


def test_an_answer_that_is_closed_early_is_kept_without_a_remark(new):
    conversation = new()
    answer = conversation.ask("Hello?")
    first = next(filter(None, answer.chunks))
    answer.chunks.close()
    assert answer.cut is None and first
    assert conversation.turns[0].answer[:-1] == first


@pytest.mark.parametrize("base", [False, True])
def test_the_longest_message(new, base):
    fits = CONTEXT - (2 if base else 5)
    conversation = new(base=base)
    assert sum(map(len, conversation.ask("z" * fits).chunks)) <= 1
    with pytest.raises(
        UserError, match=f"has {fits + 1} tokens; at most {fits} fit into the model's context of {CONTEXT}; shorten it"
    ):
        conversation.ask("z" * (fits + 1))


def test_half_of_the_context_is_kept_free_for_an_answer(new):
    conversation, notes = new(max_tokens=1000), []
    for _ in range(8):
        _, note = ask(conversation, "Hello?")
        notes.append(note)
    assert notes.count("(the context is full: the oldest turns are now being forgotten)\n") == 1
    assert notes.count("") == 7
    kept = sum(len(turn.question) + 3 + len(turn.answer) for turn in conversation.turns[:-1])
    assert kept <= CONTEXT // 2


def test_a_long_answer_makes_room_for_itself(new, engine):
    """With noise for parameters, and none for special tokens, the model never ends an answer."""
    noise = iter(jax.random.split(jax.random.key(0), 100))
    params = jax.tree.map(lambda leaf: jax.random.normal(next(noise), leaf.shape, leaf.dtype) / 8, engine.params)
    first = min(engine.tokenizer.special_tokens.values())
    params["head"]["kernel"] = params["head"]["kernel"].at[:, first:].set(0)
    conversation = new(max_tokens=1000)
    conversation.engine = Engine(engine.model_config, params, engine.tokenizer, dtype=engine.dtype)
    conversation.turns = [Turn("a" * 17, [98] * 10), Turn("cc", [98] * 15)]
    answer = conversation.ask("z" * 6)
    chunks = list(answer.chunks)
    assert sum(map(len, chunks)) == CONTEXT - 1 - 6 - 3
    assert answer.forgets and answer.cut == f"the context of {CONTEXT} tokens is full"
    assert len(conversation.turns) == 1 and conversation.turns[0].answer[:-1] == [t for chunk in chunks for t in chunk]


def test_only_whole_calls_are_kept(engine):
    tokenizer = engine.tokenizer
    start, end, out, done = map(
        tokenizer.encode_special, ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
    )
    whole = [start, 49, end, out, 50, done]
    for open_call in ([start], [start, 49], [start, 49, end], [start, 49, end, out], [start, start, 49, end, out, 50]):
        assert without_open_call(tokenizer, [97, *whole, 98, *open_call]) == [97, *whole, 98]
    assert without_open_call(tokenizer, whole) == whole
