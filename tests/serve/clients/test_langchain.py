"""LangChain as it is: invoke, stream, batch, and what it makes of errors."""

import asyncio

import pytest

from tests.serve.clients.conftest import GREETING

langchain_openai = pytest.importorskip("langchain_openai")
from langchain_core.exceptions import ContextOverflowError  # noqa: E402
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage  # noqa: E402
from langchain_core.prompts import ChatPromptTemplate  # noqa: E402


@pytest.fixture(scope="module")
def options(server):
    model = asyncio.run(server.address.ask("GET", "/v1/models")).json["data"][0]["id"]
    return {"base_url": f"{server.url}/v1", "api_key": "none", "model": model, "temperature": 0, "max_retries": 0}


@pytest.fixture(scope="module")
def chat(options):
    return langchain_openai.ChatOpenAI(max_tokens=60, **options)


def test_invoke(chat, options):
    answer = chat.invoke("Hello?")
    assert answer.content == GREETING
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["total_tokens"] == sum(
        answer.usage_metadata[name] for name in ("input_tokens", "output_tokens")
    )
    assert answer.response_metadata["model_name"] == options["model"]


def test_stream(chat):
    pieces = list(chat.stream("Hello?", stream_usage=True))
    assert "".join(piece.content for piece in pieces) == GREETING
    whole = sum(pieces[1:], pieces[0])
    assert whole.usage_metadata == chat.invoke("Hello?").usage_metadata
    assert whole.response_metadata["finish_reason"] == "stop"


def test_batch(chat):
    asked = ["Hello?", "What is 34 + 58?"] * 6
    assert [answer.content for answer in chat.batch(asked)] == [GREETING, "It is 92."] * 6


def test_async(chat):
    async def all_at_once():
        streamed = [piece.content async for piece in chat.astream("Hello?")]
        return "".join(streamed), (await chat.ainvoke("What is 34 + 58?")).content

    assert asyncio.run(all_at_once()) == (GREETING, "It is 92.")


def test_a_conversation_and_a_chain(chat):
    history = [HumanMessage("What is 34 + 58?"), AIMessage("It is 92."), HumanMessage("Hello?")]
    assert isinstance(chat.invoke([SystemMessage("Be kind."), *history]).content, str)
    chain = ChatPromptTemplate.from_messages([("human", "{word}?")]) | chat
    assert chain.invoke({"word": "Hello"}).content == GREETING


def test_stop_and_log_probabilities(chat):
    assert chat.invoke("Hello?", stop=["日"]).content == "Grüße, "
    entries = chat.bind(logprobs=True, top_logprobs=2).invoke("Hello?").response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).startswith("Gr")


def test_completions(options):
    completion = langchain_openai.OpenAI(max_tokens=6, **options)
    text = completion.invoke("Es war einmal")
    assert text == "".join(completion.stream("Es war einmal"))


def test_what_is_too_long(chat):
    with pytest.raises(ContextOverflowError):
        chat.invoke("long " * 500)
