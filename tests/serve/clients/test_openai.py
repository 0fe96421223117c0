"""The `openai` client as it is, against a real server. Its methods do not check what comes back: these tests do."""

import asyncio
import json
import time

import pytest

from benchmarks.serving.server import free_port
from tests.serve.clients.conftest import GREETING, HELLO, SUM, served

openai = pytest.importorskip("openai")
from openai.types import Completion, Model  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat(client, messages=HELLO, **options):
    options = {"model": client.models.list().data[0].id, "temperature": 0, "max_tokens": 60} | options
    return client.chat.completions.create(messages=messages, **options)


def contents(stream):
    """The text of each choice of a stream, and its finish reason, by index."""
    texts, finishes = {}, {}
    for chunk in stream:
        for choice in chunk.choices:
            assert finishes.get(choice.index) is None, "nothing comes after the end"
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            finishes[choice.index] = choice.finish_reason
    return texts, finishes


# --- chat -------------------------------------------------------------------------------------------------------------


def test_an_answer_has_every_field_of_the_type(client, model):
    raw = client.chat.completions.with_raw_response.create(model=model, messages=HELLO, temperature=0, max_tokens=60)
    answer = ChatCompletion.model_validate(json.loads(raw.text), strict=True)
    assert answer.choices[0].message.content == GREETING
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].index == 0
    assert answer.id.startswith("chatcmpl-") and answer.model == model and abs(answer.created - time.time()) < 60
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert raw.parse()._request_id, "x-request-id is what users quote in a report"


def test_a_stream_gives_the_same_text(client, model):
    frames = []
    with client.chat.completions.with_streaming_response.create(
        model=model, messages=HELLO, temperature=0, max_tokens=60, stream=True, stream_options={"include_usage": True}
    ) as response:
        frames = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert frames.pop() == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(json.loads(frame), strict=True) for frame in frames]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == GREETING
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == chat(client).usage
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_the_accumulating_stream(client, model):
    with client.chat.completions.stream(model=model, messages=HELLO, temperature=0, max_tokens=60) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == GREETING


def test_content_in_parts_and_a_developer(client):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]
    assert chat(client, [{"role": "user", "content": parts}]).choices[0].message.content == GREETING
    told = [{"role": "developer", "content": "Be kind."}, *HELLO]
    system = [{"role": "system", "content": "Be kind."}, *HELLO]
    assert chat(client, told).choices[0].message.content == chat(client, system).choices[0].message.content


def test_tools_run_on_the_server(client):
    message = chat(client, SUM).choices[0].message
    assert message.content == "It is 92." and not message.tool_calls
    assert message.model_extra["tool_runs"] == [{"call": "34 + 58", "output": "92", "at": 0}]
    runs = [run for chunk in chat(client, SUM, stream=True) for choice in chunk.choices
            for run in (choice.delta.model_extra or {}).get("tool_runs") or []]  # fmt: skip
    assert runs == message.model_extra["tool_runs"]


def test_samples_depend_on_seed_and_number(client):
    options = {"temperature": 2.0, "seed": 5, "max_tokens": 12}
    texts = [choice.message.content for choice in chat(client, n=4, **options).choices]
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in chat(client, n=4, **options).choices] == texts
    assert contents(chat(client, n=4, stream=True, **options))[0] == dict(enumerate(texts))
    assert [choice.message.content for choice in chat(client, n=2, **options).choices] == texts[:2]
    assert [choice.message.content for choice in chat(client, n=4, **{**options, "seed": 6}).choices] != texts


def test_without_a_seed_answers_differ(client):
    assert len({chat(client, temperature=2.0, max_tokens=12).choices[0].message.content for _ in range(5)}) > 1


@pytest.mark.parametrize("stop", ["日", ["never", "日本"], ["🙂", ", 日"]])
def test_a_stop_string_ends_the_answer_and_is_not_in_it(client, stop):
    cut = min(GREETING.index(one) for one in [stop, *stop] if isinstance(one, str) and one in GREETING)
    whole = chat(client, stop=stop)
    assert whole.choices[0].message.content == GREETING[:cut] and whole.choices[0].finish_reason == "stop"
    assert contents(chat(client, stop=stop, stream=True)) == ({0: GREETING[:cut]}, {0: "stop"})


def test_stop_strings_are_looked_for_in_the_text_only(client):
    """Not in what the model asks its calculator, and what that answers."""
    for stop, text in {"9": "It is ", "34": "It is 92.", "92.": "It is "}.items():
        message = chat(client, SUM, stop=stop).choices[0].message
        assert message.content == text
        assert message.model_extra["tool_runs"] == [{"call": "34 + 58", "output": "92", "at": 0}]
        assert contents(chat(client, SUM, stop=stop, stream=True))[0] == {0: text}


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_cut_answer_is_a_prefix_in_whole_characters(client, limit):
    whole = chat(client, max_tokens=limit)
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens <= limit
    assert GREETING.startswith(text.rstrip("\ufffd")) and text.count("\ufffd") <= 1
    assert contents(chat(client, max_tokens=limit, stream=True))[0].get(0, "") == text
    assert chat(client, max_tokens=None, max_completion_tokens=limit).choices[0].message.content == text


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client, stream):
    answer = chat(client, logprobs=True, top_logprobs=3, stream=stream)
    parts = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    spelt = b"".join(bytes(entry.bytes) for entry in entries if not entry.token.startswith("<|"))
    assert spelt.decode() == GREETING
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        # Clients compare the two numbers to learn whether a token was the likeliest: they must be identical.
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert [one.logprob for one in entry.top_logprobs] == sorted(
            (one.logprob for one in entry.top_logprobs), reverse=True
        )


def test_no_log_probabilities_unless_asked_for(client):
    assert chat(client).choices[0].logprobs is None
    assert all(choice.logprobs is None for chunk in chat(client, stream=True) for choice in chunk.choices)


# --- completions ------------------------------------------------------------------------------------------------------


def test_completions_of_text_texts_and_ids(client, model):
    prompt = "Es war einmal"
    raw = client.completions.with_raw_response.create(model=model, prompt=prompt, temperature=0, max_tokens=8)
    answer = Completion.model_validate(json.loads(raw.text), strict=True)
    assert answer.object == "text_completion" and answer.choices[0].finish_reason in ("stop", "length")
    streamed = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text
    two = client.completions.create(model=model, prompt=[prompt, "Hello?"], temperature=0, max_tokens=8, n=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in two.choices[:2]] == [answer.choices[0].text] * 2
    ids = [[70, 71, 72], [71]]
    lists = client.completions.create(model=model, prompt=ids, temperature=0, max_tokens=4)
    assert [choice.text for choice in lists.choices] == [
        client.completions.create(model=model, prompt=one, temperature=0, max_tokens=4).choices[0].text for one in ids
    ]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_echo_with_log_probabilities(client, model, limit):
    ids = [70, 71, 72, 73]
    answer = client.completions.create(model=model, prompt=ids, max_tokens=limit, echo=True, logprobs=2, temperature=0)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert len(found.tokens) == len(ids) + limit
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    for token, value, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert top[token] == value and max(top.values()) >= value
    assert answer.choices[0].text.startswith("".join(found.tokens[:2]))
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == limit


def test_a_base_model_completes_and_does_not_chat(base_server):
    with openai.OpenAI(base_url=f"{base_server.url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        answer = client.completions.create(model=model, prompt="Es war einmal", temperature=0, max_tokens=20)
        assert answer.choices[0].text.startswith(" ein Bär 🐻.")
        with pytest.raises(openai.BadRequestError, match="completions"):
            chat(client)


# --- models and errors ------------------------------------------------------------------------------------------------


def test_models(client, model):
    listed = Model.model_validate(json.loads(client.models.with_raw_response.list().text)["data"][0], strict=True)
    assert listed.id == model == client.models.retrieve(model).id
    assert listed.model_extra["max_model_len"] == 128
    assert all(
        value is not None for value in json.loads(client.models.with_raw_response.list().text)["data"][0].values()
    )


def test_each_error_is_the_exception_that_users_catch(client, model):
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="gpt-4")
    assert missing.value.code == "model_not_found" and "gpt-4" in missing.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, [{"role": "user", "content": "long " * 500}])
    assert long.value.code == "context_length_exceeded" and "128" in long.value.message
    for wrong in ({"temperature": -1}, {"top_p": 2}, {"n": 0}, {"max_tokens": -1}, {"logit_bias": {"x": 1}}):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, **wrong)
        assert refused.value.param == next(iter(wrong)) and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=model, input="Hello?")


@pytest.mark.parametrize(
    "impossible",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_would_change_the_answer_is_refused(client, impossible):
    with pytest.raises(openai.BadRequestError):
        chat(client, **impossible)


def test_what_would_not_is_ignored(client):
    options = {"user": "me", "metadata": {"a": "b"}, "store": False, "extra_body": {"chat_id": "1", "features": {}}}
    assert chat(client, **options).choices[0].message.content == GREETING


def test_a_key(run_dir):
    with served(run_dir, "--api-key", "secret") as server:
        for key in ("wrong", "secre", "secret2", "ſecret"):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
                client.api_key = key
                if key.isascii():
                    with pytest.raises(openai.AuthenticationError):
                        client.models.list()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            assert chat(client).choices[0].message.content == GREETING
            assert "secret" not in server.log


def test_no_server():
    with (
        openai.OpenAI(base_url=f"http://127.0.0.1:{free_port()}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIConnectionError),
    ):
        client.models.list()


# --- several at once --------------------------------------------------------------------------------------------------


def test_async_clients_get_their_own_answers(server):
    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            model = (await client.models.list()).data[0].id
            options = {"model": model, "temperature": 0, "max_tokens": 60}

            async def one(messages, stream):
                answer = await client.chat.completions.create(messages=messages, stream=stream, **options)
                if not stream:
                    return answer.choices[0].message.content
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            asked = [(HELLO, GREETING), (SUM, "It is 92.")] * 12
            got = await asyncio.gather(*(one(messages, i % 3 == 0) for i, (messages, _) in enumerate(asked)))
            assert got == [answer for _, answer in asked]

    asyncio.run(all_at_once())


def test_a_client_that_leaves_frees_its_row(client, server):
    for _ in range(5):
        stream = chat(client, temperature=2.0, n=8, max_tokens=100, stream=True)
        next(iter(stream))
        stream.close()
    assert asyncio.run(server.idle())


def test_a_full_queue_is_retried_as_the_server_says(run_dir):
    """Retry-After is honoured: a client that is refused at first gets its answer in the end."""
    with served(run_dir, "--max-waiting", "1", "--rows", "1") as server:

        async def crowd():
            patient = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=20)
            hasty = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            model = (await patient.models.list()).data[0].id
            options = {"model": model, "messages": HELLO, "temperature": 0}
            refused = 0
            for _ in range(5):
                asked = [hasty.chat.completions.create(**options) for _ in range(16)]
                results = await asyncio.gather(*asked, return_exceptions=True)
                limits = [result for result in results if isinstance(result, openai.RateLimitError)]
                assert len(limits) + sum(isinstance(result, ChatCompletion) for result in results) == 16
                assert all(int(limit.response.headers["retry-after"]) >= 1 for limit in limits)
                refused += len(limits)
            assert refused
            answers = await asyncio.gather(*(patient.chat.completions.create(**options) for _ in range(6)))
            assert {answer.choices[0].message.content for answer in answers} == {GREETING}

        asyncio.run(crowd())
