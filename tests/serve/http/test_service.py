"""The thread that owns the device, without HTTP around it."""

import asyncio
import json
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxchat.infer.request import Request, Sampling
from jaxchat.serve.http.errors import ApiError
from tests.serve.http.conftest import wait_until

GREEDY = Sampling(temperature=0)


def test_a_request_as_a_stream_of_outputs(service, engine):
    prompt = engine.tokenizer.render_for_completion({"messages": [{"role": "user", "content": "Hello?"}]})

    async def ask():
        return [output async for output in service.stream(Request(prompt, 40, GREEDY))]

    outputs = asyncio.run(ask())
    assert "".join(output.text for output in outputs) == "Grüße, 日本 🙂!"
    assert [output.finish for output in outputs] == [None] * (len(outputs) - 1) + ["stop"]


def test_leaving_the_loop_cancels(service, engine, slow):
    async def ask():
        async for _ in service.stream(Request([65], 120, GREEDY, stop_tokens=())):
            assert engine.running == 1
            return

    asyncio.run(ask())
    wait_until(lambda: engine.running == 0 and service._in_flight == 0, seconds=0.5)  # an answer takes longer


def test_a_function_in_the_thread_of_the_device(service):
    def fail():
        raise KeyError("x")

    async def call():
        assert await service.call(threading.current_thread) is service._thread
        with pytest.raises(KeyError):
            await service.call(fail)
        return await asyncio.gather(*(service.call(lambda i=i: i) for i in range(20)))

    assert asyncio.run(call()) == list(range(20))


def test_what_the_engine_refuses(service, engine):
    async def ask(*requests):
        return [batch async for batch in service.outputs(requests)]

    with pytest.raises(ApiError) as refused:
        asyncio.run(ask(Request([65], 5, GREEDY), Request([], 5, GREEDY)))
    assert refused.value.status == 400
    wait_until(lambda: not engine.busy)
    assert service.state == "ready"


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner))
NAMES = st.sampled_from(
    ["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "stream", "echo"]
    + ["logprobs", "top_logprobs", "logit_bias", "seed", "stream_options", "tool_choice", "suffix", "best_of", "tokens"]
    + ["response_format", "stop_token_ids", "add_special_tokens", "modalities", "min_tokens", "typical_p"]
)
TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": VALUES}))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]),
    body=st.dictionaries(NAMES, VALUES, max_size=5),
    turns=TURNS,
)
def test_no_request_is_a_bug(client, path, body, turns):
    """Whatever the fields hold, the answer is one, or an error of the client's in OpenAI's form."""
    body = {"messages": turns, "max_tokens": 2, **body}
    response = client.post(path, content=json.dumps(body))
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
