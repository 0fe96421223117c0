"""What the inside view is drawn from, compared with the model in NumPy."""

import base64
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from jaxchat.analysis.prediction import after_settings, entropy
from jaxchat.model import reference
from jaxchat.serve.http import inside
from tests.analysis.test_attention import expected_maps
from tests.serve.conftest import CONTEXT
from tests.serve.http.conftest import QUESTION

ANSWER = {
    "role": "assistant",
    "content": "It is 92.",
    "tool_runs": [{"call": "34 + 58", "output": "92", "at": 0}],
}


@pytest.fixture(scope="module")
def numpy_model(engine):
    """Probabilities [T, V] by the model in NumPy."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), engine.params)

    def logits(tokens):
        return reference.logits(engine.model_config, params, np.array(tokens))

    return logits


def look(client, what, **body):
    reply = client.post(f"/api/inside/{what}", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(client, what, **body):
    reply = client.post(f"/api/inside/{what}", json=body)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def ids_of(reply):
    return [token["id"] for token in reply["tokens"]]


def test_tokens_of_a_conversation(client, engine, numpy_model):
    reply = look(client, "tokens", messages=[*QUESTION, ANSWER])
    tokens, ids = reply["tokens"], ids_of(reply)
    tokenizer = engine.tokenizer
    content = [("python", "34 + 58"), ("python_output", "92"), ("text", "It is 92.")]
    parts = [{"type": kind, "text": text} for kind, text in content]
    assert ids == tokenizer.render_conversation({"messages": [*QUESTION, {"role": "assistant", "content": parts}]})[0]
    assert "".join(token["text"] for token in tokens) == tokenizer.decode(ids)
    assert [bytes(token["bytes"]) for token in tokens] == [tokenizer.id_to_bytes(id) for id in ids]
    assert [token["text"] for token in tokens if token["special"]] == [
        "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|python_start|>", "<|python_end|>",
        "<|output_start|>", "<|output_end|>", "<|assistant_end|>",
    ]  # fmt: skip
    assert "probability" not in tokens[0]
    probabilities = np.stack([after_settings(scores) for scores in numpy_model(ids)])[:-1]
    own = probabilities[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose([token["probability"] for token in tokens[1:]], own, rtol=2e-3, atol=1e-7)
    for token, likely in zip(tokens[1:], probabilities, strict=True):
        assert abs(token["rank"] - 1 - (likely > likely[token["id"]]).sum()) <= 1
        assert [one["probability"] for one in token["alternatives"]] == pytest.approx(-np.sort(-likely)[:10], rel=2e-3)
        assert token["entropy"] == pytest.approx(entropy(likely), abs=1e-3)


def test_a_question_goes_on_to_the_start_of_the_answer(client, engine):
    reply = look(client, "tokens", messages=QUESTION)
    assert ids_of(reply) == engine.tokenizer.render_for_completion({"messages": QUESTION})


def test_an_answer_that_filled_the_context(client, engine):
    """The model never wrote the end that rendering adds."""
    context, tokenizer = engine.model_config.sequence_len, engine.tokenizer
    begun = len(tokenizer.render_for_completion({"messages": QUESTION}))
    answer = {"role": "assistant", "content": "\x00" * (context - begun)}  # a token each
    ids = ids_of(look(client, "tokens", messages=[*QUESTION, answer]))
    assert len(ids) == context and ids[-1] != tokenizer.encode_special("<|assistant_end|>")
    answer["content"] += "\x00"
    assert "context" in refused(client, "tokens", messages=[*QUESTION, answer])["message"]


def test_text_begins_with_bos_and_may_name_special_tokens(client, engine):
    special = engine.tokenizer.encode_special
    ids = ids_of(look(client, "tokens", text="a<|user_end|>ü"))
    assert ids[0] == special("<|bos|>") and ids.count(special("<|user_end|>")) == 1
    assert ids_of(look(client, "tokens", text="<|bos|>a")) == ids[:2]
    assert ids_of(look(client, "tokens", tokens=ids[1:])) == ids[1:]
    pieces = look(client, "tokens", text="🐉")["tokens"][1:]
    assert b"".join(bytes(piece["bytes"]) for piece in pieces).decode() == "🐉"
    assert all(piece["text"].startswith("bytes:") for piece in pieces)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0}, {"temperature": 0.6, "top_k": 5, "top_p": 0.9}, {"top_k": -1}],
    ids=str,
)
def test_the_next_token(client, numpy_model, settings):
    ids = ids_of(look(client, "tokens", messages=QUESTION))
    reply = look(client, "next", messages=QUESTION, **settings)
    scores = numpy_model(ids)[-1]
    before = after_settings(scores)
    after = after_settings(
        scores, **{**settings, "top_k": None if settings.get("top_k") == -1 else settings.get("top_k")}
    )
    top = [token["id"] for token in reply["top"]]
    assert len(top) == 20 and top[0] == int(before.argmax())
    np.testing.assert_allclose([token["probability"] for token in reply["top"]], before[top], rtol=2e-3, atol=1e-9)
    np.testing.assert_allclose([token["after"] for token in reply["top"]], after[top], rtol=5e-3, atol=1e-9)
    assert reply["entropy"] == pytest.approx(entropy(before), abs=1e-3)
    assert reply["entropy_after"] == pytest.approx(entropy(after), abs=5e-3)
    assert reply["can_be_drawn"] == (after > 0).sum() and reply["vocabulary"] == len(before)


def test_attention_maps(client, engine):
    ids = ids_of(look(client, "tokens", messages=[*QUESTION, ANSWER]))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), engine.params)
    for layer in range(engine.model_config.depth):
        reply = look(client, "attention", tokens=ids, layer=layer)
        side = reply["side"]
        assert side == reply["length"] == len(ids) and ids_of(reply) == ids
        raw = [np.frombuffer(base64.b64decode(one), np.uint8).reshape(side, side) for one in reply["maps"]]
        weights = (np.stack(raw) / 255) ** 2
        np.testing.assert_allclose(weights, expected_maps(engine.model_config, params, np.array(ids), layer), atol=4e-3)
    part = look(client, "attention", tokens=ids, layer=0, start=5)
    assert (part["start"], part["side"]) == (5, len(ids) - 5)


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, None),
        ({"text": "a", "tokens": [1]}, None),
        ({"tokens": []}, "tokens"),
        ({"tokens": [10**6]}, "tokens"),
        ({"tokens": [1.5]}, "tokens"),
        ({"tokens": "1"}, "tokens"),
        ({"text": 5}, "text"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("what", ["tokens", "next", "attention"])
def test_what_is_nothing_to_look_into(client, what, body, param):
    error = refused(client, what, **body)
    assert (error["param"] or "").rstrip(".") == (param or "") and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [{"text": "ab " * CONTEXT}, {"tokens": [1] * (CONTEXT + 1)}, {"text": "x" * 10**6}])
def test_more_than_the_context(client, body):
    assert refused(client, "tokens", **body)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("fields", [{"layer": 2}, {"layer": -1}, {"layer": "a"}, {"layer": 0, "start": 3}])
def test_a_layer_or_part_that_is_not_there(client, fields):
    assert refused(client, "attention", tokens=[1, 2, 3], **fields)["param"] in fields


def test_a_whole_context_and_a_single_token(client):
    for tokens in ([1] * CONTEXT, [1]):
        assert ids_of(look(client, "tokens", tokens=tokens)) == tokens
        assert look(client, "attention", tokens=tokens)["side"] == len(tokens)
        assert len(look(client, "next", tokens=tokens)["top"]) == 20


def test_a_base_model_knows_no_conversations(base_client):
    assert "base model" in refused(base_client, "tokens", messages=QUESTION)["message"]
    assert look(base_client, "tokens", text="Es war einmal")["tokens"]


def test_one_looks_at_a_time_and_few_wait(client, monkeypatch):
    monkeypatch.setattr(inside, "MOST_WAITING", 3)
    with ThreadPoolExecutor(24) as threads:
        replies = list(threads.map(lambda _: client.post("/api/inside/next", json={"tokens": [1, 2, 3]}), range(24)))
    assert {reply.status_code for reply in replies} <= {200, 429}
    assert sum(reply.status_code == 200 for reply in replies) >= 3
    for reply in replies:
        if reply.status_code == 429:
            assert reply.headers["retry-after"] == "1" and reply.json()["error"]["code"] == "queue_full"


def test_chats_go_on_meanwhile(client):
    with ThreadPoolExecutor(8) as threads:
        looks = [threads.submit(look, client, "attention", tokens=[1] * 100, layer=1) for _ in range(4)]
        chats = [threads.submit(client.chat, QUESTION) for _ in range(4)]
        assert {chat.result().json()["choices"][0]["message"]["content"] for chat in chats} == {"It is 92."}
        assert all(one.result()["side"] == 100 for one in looks)
