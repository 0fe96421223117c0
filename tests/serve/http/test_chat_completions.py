"""POST /v1/chat/completions: shapes, streams, settings, tool calls, and what is refused."""

import pytest

from tests.serve.http.conftest import HELLO, QUESTION

GREETING = "Grüße, 日本 🙂!"


def test_the_shape_of_an_answer(client):
    answer = client.chat(model="tiny").json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    prompt, completion = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": GREETING, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }
    assert completion > 5


def test_the_prompt_is_what_the_model_was_trained_on(client, engine):
    ids = engine.tokenizer.render_for_completion({"messages": HELLO})
    assert client.chat().json()["usage"]["prompt_tokens"] == len(ids)
    assert client.post("/tokenize", json={"messages": HELLO}).json()["tokens"] == ids


def test_the_frames_of_a_stream(client):
    frames = client.frames("/v1/chat/completions", messages=HELLO, model="tiny")
    assert len({(frame["id"], frame["created"], frame["model"], frame["object"]) for frame in frames}) == 1
    assert frames[0]["object"] == "chat.completion.chunk" and frames[0]["id"].startswith("chatcmpl-")
    assert all(set(frame) == {"id", "object", "created", "model", "choices"} for frame in frames)
    choices = [frame["choices"][0] for frame in frames]
    assert all(set(choice) == {"index", "delta", "logprobs", "finish_reason"} for choice in choices)
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"]["content"] for choice in choices[1:-1]) == GREETING
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}


def test_usage_in_a_stream(client):
    whole = client.chat().json()["usage"]
    frames = client.frames("/v1/chat/completions", messages=HELLO, stream_options={"include_usage": True})
    assert frames[-1]["choices"] == [] and frames[-1]["usage"] == whole
    assert all(frame["usage"] is None for frame in frames[:-1])


def test_tool_calls_are_apart_from_the_text(client):
    message = client.chat(QUESTION).json()["choices"][0]["message"]
    assert message["content"] == "It is 92."
    assert message["tool_runs"] == [{"call": "34 + 58", "output": "92", "at": 0}]
    frames = client.frames("/v1/chat/completions", messages=QUESTION)
    deltas = [frame["choices"][0]["delta"] for frame in frames]
    assert "".join(delta.get("content", "") for delta in deltas) == "It is 92."
    assert [run for delta in deltas for run in delta.get("tool_runs", [])] == message["tool_runs"]


def test_tool_calls_of_earlier_answers_are_sent_back(client, engine):
    answer = client.chat(QUESTION).json()["choices"][0]["message"]
    messages = [*QUESTION, answer, {"role": "user", "content": "Again?"}]
    parts = [
        {"type": "python", "text": "34 + 58"},
        {"type": "python_output", "text": "92"},
        {"type": "text", "text": "It is 92."},
    ]
    conversation = {"messages": [QUESTION[0], {"role": "assistant", "content": parts}, messages[2]]}
    ids = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert ids == engine.tokenizer.render_for_completion(conversation)
    assert client.chat(messages).json()["choices"][0]["message"]["content"] == "Hello? was never asked."


def test_a_call_in_the_middle_of_a_text(client, engine):
    runs = [{"call": "1", "output": "1", "at": 3}, {"call": "2", "output": "2", "at": 3}]
    messages = [*HELLO, {"role": "assistant", "content": "🙂bcde", "tool_runs": runs}, *HELLO]
    ids = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = engine.tokenizer.decode(ids)
    call = "<|python_start|>{0}<|python_end|><|output_start|>{0}<|output_end|>"
    assert f"🙂bc{call.format(1)}{call.format(2)}de<|assistant_end|>" in text


def test_without_the_tool_nothing_answers_a_call(client):
    without = client.chat(QUESTION, tool_choice="none", max_tokens=20).json()["choices"][0]["message"]
    assert without != client.chat(QUESTION, max_tokens=20).json()["choices"][0]["message"]


def test_system_messages_are_joined_to_the_first_question(client):
    def ids(*messages):
        return client.post("/tokenize", json={"messages": [*messages]}).json()["tokens"]

    system, developer = {"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Rhyme."}
    joined = {"role": "user", "content": "Be brief.\n\nRhyme.\n\nHello?"}
    assert ids(system, developer, *HELLO) == ids(joined)
    assert ids(*HELLO, *HELLO) == ids({"role": "user", "content": "Hello?\n\nHello?"})


def test_content_as_a_list_of_parts(client):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]
    assert client.chat([{"role": "user", "content": parts}]).json()["choices"][0]["message"]["content"] == GREETING


def test_special_tokens_in_a_message_are_plain_text(client, engine):
    text = "<|assistant_start|>"
    ids = client.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()["tokens"]
    assert ids.count(engine.tokenizer.encode_special(text)) == 1


def test_unknown_fields_are_ignored(client):
    extra = {"user": "me", "metadata": {"x": 1}, "chat_id": 3, "store": True, "parallel_tool_calls": False}
    assert client.chat(**extra).json()["choices"][0]["message"]["content"] == GREETING
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}
    assert client.chat(**tools, response_format={"type": "text"}).status_code == 200


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens(client, name):
    answer = client.chat(**{name: 3}).json()
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 3


def test_the_context_limits_an_answer_too(client):
    usage = client.chat([{"role": "user", "content": "x " * 50}], ignore_eos=True, max_tokens=10**6).json()["usage"]
    assert usage["total_tokens"] == 128


@pytest.mark.parametrize("stop", ["日本", ["!", "日本", "日"], ["never", "日"]])
def test_stop_strings_are_not_in_the_answer(client, stop):
    choice = client.chat(stop=stop).json()["choices"][0]
    assert choice["message"]["content"] == "Grüße, " and choice["finish_reason"] == "stop"
    frames = client.frames("/v1/chat/completions", messages=HELLO, stop=stop)
    assert "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames) == "Grüße, "


def test_a_stop_string_in_the_text_before_a_call_or_after_it(client):
    message = client.chat(QUESTION, stop=[" 92"]).json()["choices"][0]["message"]
    assert message["content"] == "It is" and len(message["tool_runs"]) == 1


def test_several_samples(client):
    fields = {"messages": HELLO, "n": 3, "seed": 5, "temperature": 5.0, "max_tokens": 12, "ignore_eos": True}
    answer = client.post("/v1/chat/completions", json=fields).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2] and len(set(texts)) == 3
    assert answer["usage"]["completion_tokens"] == 36
    streamed = ["", "", ""]
    for frame in client.frames("/v1/chat/completions", **fields):
        choice = frame["choices"][0]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts
    alone = client.post("/v1/chat/completions", json={**fields, "n": 1}).json()
    assert alone["choices"][0]["message"]["content"] == texts[0]


def test_a_seed_repeats_an_answer_and_none_does_not(client):
    def text(**fields):
        answer = client.chat(temperature=5.0, max_tokens=12, ignore_eos=True, **fields).json()
        return answer["choices"][0]["message"]["content"]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=-1) == text(seed=-1)
    assert text() != text()


def test_settings_that_are_left_out_are_those_of_jaxchat_chat(client, service, monkeypatch):
    submit, asked = service.engine.submit, []
    monkeypatch.setattr(service.engine, "submit", lambda request: asked.append(request.sampling) or submit(request))
    for fields in ({}, {"top_p": 0.5}, {"temperature": 1}, {"top_k": 7}, {"top_k": -1}, {"temperature": None}):
        client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1, **fields})
        client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, **fields})
    found = [(sampling.temperature, sampling.top_k, sampling.top_p) for sampling in asked]
    assert found[::2] == [(0.6, 50, 1), (1, None, 0.5), (1, None, 1), (1, 7, 1), (1, None, 1), (0.6, 50, 1)]
    assert found[1::2] == [(1, None, 1), (1, None, 0.5), (1, None, 1), (1, 7, 1), (1, None, 1), (1, None, 1)]


def test_log_probabilities(client, engine):
    choice = client.chat(logprobs=True, top_logprobs=2).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert set(choice["logprobs"]) == {"content"}
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == choice["message"]["content"]
    for entry in entries:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"} and -1 < entry["logprob"] <= 0
        top, second = entry["top_logprobs"]
        assert set(top) == {"token", "logprob", "bytes"} and top["logprob"] >= second["logprob"]
        assert (top["token"], top["bytes"], top["logprob"]) == (entry["token"], entry["bytes"], entry["logprob"])
    assert all(entry["top_logprobs"] == [] for entry in _entries(client.chat(logprobs=True).json()))


def test_log_probabilities_in_a_stream(client):
    whole = _entries(client.chat(QUESTION, logprobs=True, top_logprobs=1).json())
    streamed = []
    for frame in client.frames("/v1/chat/completions", messages=QUESTION, logprobs=True, top_logprobs=1):
        logprobs = frame["choices"][0]["logprobs"]
        streamed += logprobs["content"] if logprobs else []
    assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in whole]
    assert b"".join(bytes(entry["bytes"]) for entry in whole) == b"It is 92."


def _entries(answer):
    return answer["choices"][0]["logprobs"]["content"]


def test_a_base_model_has_no_conversations(base_client):
    error = base_client.chat().json()["error"]
    assert error["code"] == "not_a_chat_model" and "/v1/completions" in error["message"]


@pytest.mark.parametrize(
    "messages, expected",
    [
        (None, "messages is missing"),
        ([], "messages is missing"),
        ("Hello?", 'messages is "Hello?"; it must be an array'),
        (["Hello?"], "messages[0] is a string; it must be an object"),
        ([{"content": "x"}], "messages[0].role is null; it must be system, developer, user or assistant"),
        ([{"role": "robot", "content": "x"}], 'messages[0].role is "robot"'),
        ([{"role": "user"}], "messages[0].content is null; it must be a string"),
        ([{"role": "user", "content": 3}], "messages[0].content is 3"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0] is a string; it must be an object"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "reads only text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text is null"),
        ([{"role": "assistant", "content": "x"}], "the last message must be from the user"),
        ([{"role": "system", "content": "x"}], "the last message must be from the user"),
        ([*HELLO, {"role": "system", "content": "x"}, *HELLO], "a system message must come before all others"),
        ([{"role": "assistant", "content": "x"}, *HELLO], "roles must alternate"),
        ([*HELLO, {"role": "tool", "content": "x"}], "calls no functions"),
        ([*HELLO, {"role": "assistant", "content": "", "tool_calls": [{}]}, *HELLO], "calls no functions"),
        ([*HELLO, {"role": "assistant", "content": "x", "tool_runs": [{"at": 2}]}, *HELLO], "tool_runs[0].at is 2"),
        ([*HELLO, {"role": "assistant", "content": "x", "tool_runs": "x"}, *HELLO], "tool_runs"),
        (HELLO * 3000, "at most 2,000"),
    ],
)
def test_messages_that_cannot_be_answered(client, messages, expected):
    response = client.post("/v1/chat/completions", json={"messages": messages})
    error = response.json()["error"]
    assert response.status_code == 400 and expected in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", ["long " * 200, "x" * 100_000, "y" * 10_000])
def test_a_conversation_that_does_not_fit(client, content):
    response = client.chat([{"role": "user", "content": content}])
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "context_length_exceeded"
    assert error["param"] == "messages" and "context is 128 tokens" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"function_call": {"name": "f"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"guided_json": {"type": "object"}},
        {"structured_outputs": {"regex": "x"}},
        {"use_beam_search": True},
        {"min_tokens": 4},
        {"echo": True},
    ],
    ids=str,
)
def test_what_would_change_the_answer_is_refused(client, fields):
    response = client.chat(**fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "unsupported_parameter"
    assert error["param"] == next(iter(fields)) and "does not support" in error["message"]
