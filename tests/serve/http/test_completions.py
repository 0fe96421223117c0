"""POST /v1/completions: raw text, prompts of all kinds, echo, and log-probabilities against a full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.infer.request import NewToken, Output
from jaxchat.model.gpt import hidden_states, logits
from jaxchat.ops.compute import Compute
from jaxchat.serve.http.completions import _Answer
from jaxchat.serve.http.spelling import Spelling

START = "Es war einmal"


def logprobs_of(engine, ids):
    """The log-probabilities of every id after each of `ids`, by one full forward pass."""
    hidden = hidden_states(engine.model_config, engine.params, jnp.array([ids]), Compute("float32"))
    scores = logits(engine.model_config, engine.params, hidden)[0]
    return np.asarray(jax.nn.log_softmax(scores, axis=-1))


def test_the_shape_of_a_continuation(base_client, engine):
    answer = base_client.complete(START, max_tokens=8).json()
    assert answer.pop("id").startswith("cmpl-") and isinstance(answer.pop("created"), int)
    text = answer["choices"][0]["text"]
    count = len(engine.tokenizer.encode(START)) + 1
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": count, "completion_tokens": 8, "total_tokens": count + 8},
    }
    assert " ein Bär 🐻. Er ging".startswith(text) and text


def test_a_stream(base_client):
    whole = base_client.complete(START, max_tokens=9).json()
    options = {"prompt": START, "max_tokens": 9, "stream_options": {"include_usage": True}}
    *frames, last = base_client.frames("/v1/completions", **options)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(set(frame) == {"id", "object", "created", "model", "choices", "usage"} for frame in frames)
    assert all(frame["object"] == "text_completion" and frame["usage"] is None for frame in frames)
    assert "".join(frame["choices"][0]["text"] for frame in frames) == whole["choices"][0]["text"]
    assert [frame["choices"][0]["finish_reason"] for frame in frames] == [None] * (len(frames) - 1) + ["length"]


def test_prompts_of_all_kinds(base_client, engine):
    ids = [engine.tokenizer.bos_token_id, *engine.tokenizer.encode(START)]

    def texts(prompt, **fields):
        answer = base_client.complete(prompt, max_tokens=5, **fields).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
        return [choice["text"] for choice in answer["choices"]]

    (expected,) = texts(START)
    assert texts(ids) == texts([START]) == texts([ids]) == [expected]
    assert texts("<|bos|>" + START, add_special_tokens=False) == [expected]
    assert texts([START, ids]) == texts(START, n=2) == [expected] * 2
    two = texts([START, "Er ging"], n=2)
    assert two[:2] == [expected] * 2 and two[2] == two[3] != expected
    assert len(texts("")) == 1


def test_special_tokens_in_a_prompt(client, engine):
    text = "<|user_start|>Hello?<|user_end|><|assistant_start|>"
    answer = client.complete(text).json()
    assert answer["choices"][0]["text"] == "Grüße, 日本 🙂!" and answer["choices"][0]["finish_reason"] == "stop"
    call = client.complete("<|user_start|>What is 34 + 58?<|user_end|><|assistant_start|>", max_tokens=20).json()
    assert call["choices"][0]["text"].startswith("<|python_start|>34 + 58<|python_end|>")


def test_echo_and_log_probabilities_are_those_of_a_full_forward_pass(base_client, engine):
    tokenizer = engine.tokenizer
    answer = base_client.complete(START, max_tokens=6, echo=True, logprobs=3).json()
    choice, ids = answer["choices"][0], [tokenizer.bos_token_id, *tokenizer.encode(START)]
    found = choice["logprobs"]
    assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert choice["text"].startswith(START) and found["tokens"][0] == "<|bos|>"
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    rest = base_client.complete(START, max_tokens=6, logprobs=0).json()["choices"][0]
    assert choice["text"] == START + rest["text"]
    written = tokenizer.encode(choice["text"])[len(ids) - 1 :]
    expected = logprobs_of(engine, [*ids, *written])
    for at, token in enumerate([*ids, *written][1 : len(found["tokens"])]):
        assert found["token_logprobs"][at + 1] == pytest.approx(expected[at, token], abs=2e-4)
        top = sorted(found["top_logprobs"][at + 1].values(), reverse=True)[:3]
        assert top == pytest.approx(sorted(expected[at], reverse=True)[:3], abs=2e-4)
    assert rest["logprobs"]["token_logprobs"] == pytest.approx(found["token_logprobs"][len(ids) :], abs=1e-5)


def test_a_greedy_token_equals_the_likeliest_exactly(base_client):
    found = base_client.complete(START, max_tokens=20, echo=True, logprobs=1).json()["choices"][0]["logprobs"]
    for own, top in list(zip(found["token_logprobs"], found["top_logprobs"], strict=True))[-20:]:
        assert own == max(top.values())  # as lm-evaluation-harness compares them


def test_text_offsets(base_client):
    choice = base_client.complete("Ein Bär 🐻. Er", max_tokens=4, echo=True, logprobs=0).json()["choices"][0]
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[:2] == [0, 0]
    for token, at in zip(choice["logprobs"]["tokens"][1:], offsets[1:], strict=True):
        if not token.startswith("bytes:"):
            assert text[at:].startswith(token)


def test_text_offsets_of_bytes_that_are_no_text(base_client):
    bytes_of = base_client.post("/tokenize", json={"prompt": "ABC"}).json()["tokens"]
    stray = base_client.post("/tokenize", json={"prompt": "🐻"}).json()["tokens"][-1]
    choice = base_client.complete([stray, *bytes_of[-3:]], max_tokens=0, echo=True, logprobs=0).json()["choices"][0]
    strange = choice["text"].removesuffix("ABC")
    assert set(strange) == {"\ufffd"} and len(strange) + 3 == len(choice["text"])
    assert choice["logprobs"]["text_offset"] == [0, *range(len(strange), len(strange) + 3)]


def test_the_token_that_ends_an_answer_has_its_log_probability(client, engine):
    """lm-evaluation-harness cuts off the last entry: it must be there even if that is a stop token."""
    text = "<|user_start|>Hello?<|user_end|><|assistant_start|>Grüße, 日本 🙂!"
    choice = client.complete(text, max_tokens=1, echo=True, logprobs=1).json()["choices"][0]
    assert choice["logprobs"]["tokens"][-1] == "<|assistant_end|>" and choice["finish_reason"] == "stop"
    assert choice["text"] == text
    assert (
        len(choice["logprobs"]["tokens"]) == len(client.post("/tokenize", json={"prompt": text}).json()["tokens"]) + 1
    )


def test_scoring_without_a_token_more(base_client):
    answer = base_client.complete(START, max_tokens=0, echo=True, logprobs=1).json()
    one = base_client.complete(START, max_tokens=1, echo=True, logprobs=1).json()["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"] == START and answer["usage"]["completion_tokens"] == 0
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(one["token_logprobs"][:-1], nan_ok=True)
    assert answer["choices"][0]["finish_reason"] == "length"


def test_echo_in_a_stream(base_client):
    fields = {"prompt": START, "max_tokens": 6, "echo": True, "logprobs": 1}
    whole = base_client.complete(**fields).json()["choices"][0]
    choices = [frame["choices"][0] for frame in base_client.frames("/v1/completions", **fields)]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name in ("tokens", "text_offset"):
        assert sum((choice["logprobs"][name] for choice in choices), []) == whole["logprobs"][name]


def test_lists_of_unequal_length_as_lm_evaluation_harness_sends_them(base_client, engine):
    texts = ["Es", "Es war einmal ein Bär 🐻.", "Er ging in den"]
    prompts = [engine.tokenizer.encode(text) for text in texts]
    answer = base_client.complete(prompts, max_tokens=1, logprobs=1, echo=True, seed=1234).json()
    for ids, text, choice in zip(prompts, texts, answer["choices"], strict=True):
        logprobs, expected = choice["logprobs"], logprobs_of(engine, ids)
        assert len(logprobs["token_logprobs"]) == len(ids) + 1 and choice["text"].startswith(text)
        total = sum(expected[i, token] for i, token in enumerate(ids[1:]))
        assert sum(logprobs["token_logprobs"][1:-1]) == pytest.approx(total, abs=1e-3)


def test_tokens_with_one_spelling_and_without_a_probability(tokenizer_with_two_spellings):
    tokenizer, first, second = tokenizer_with_two_spellings
    answer = _Answer(Spelling(tokenizer), None, logprobs=True, only_echo=False)
    token = NewToken(second, logprob=-2.0, alternatives=((first, -1.0), (second, -2.0), (0, -np.inf)))
    answer.add(Output(0, (token,)))
    found = answer.logprobs([token])
    assert found["token_logprobs"] == [-2.0] and -9999.0 in found["top_logprobs"][0].values()
    assert max(found["top_logprobs"][0].values()) == -1.0


@pytest.fixture
def tokenizer_with_two_spellings(engine, monkeypatch):
    """Two ids that are spelled alike."""
    tokenizer = engine.tokenizer
    spelled = [*tokenizer.tokens()]
    spelled[260] = spelled[261]
    monkeypatch.setattr(type(tokenizer), "tokens", lambda self: spelled)
    return tokenizer, 260, 261


def test_bytes_that_are_no_text_have_a_spelling_of_their_own(engine):
    spelling = Spelling(engine.tokenizer)
    assert spelling.string(0xE2) != spelling.string(0xE3) and spelling.string(0xE2) == "bytes:\\xe2"
    assert len({spelling.string(token) for token in range(engine.tokenizer.vocab_size)}) == engine.tokenizer.vocab_size


@pytest.mark.parametrize(
    "prompt, expected",
    [
        (None, "prompt is null; it must be a string, an array of token ids"),
        ([], "prompt is []"),
        ([[]], "prompt is an array"),
        (3, "prompt is 3"),
        ([1, "x"], "prompt is an array"),
        ([1, 2.5], "prompt is an array"),
        ([True], "prompt is an array"),
        ([[1], [2, None]], "prompt is an array"),
        ([10**9], "ids that are not below"),
        ([-1], "ids that are not below"),
        ({"a": 1}, "prompt is an object"),
        (["x"] * 2000, "2,000 answers are asked for at once"),
    ],
)
def test_prompts_that_cannot_be_continued(base_client, prompt, expected):
    response = base_client.complete(prompt, max_tokens=1)
    assert response.status_code == 400 and expected in response.json()["error"]["message"]


def test_an_empty_prompt_without_special_tokens(base_client):
    response = base_client.complete("", add_special_tokens=False)
    assert "at least one token" in response.json()["error"]["message"]


@pytest.mark.parametrize("prompt", ["x y " * 100, [5] * 128, "x" * 100_000])
def test_a_prompt_that_does_not_fit(base_client, prompt):
    error = base_client.complete(prompt, max_tokens=1).json()["error"]
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"


@pytest.mark.parametrize("fields", [{"suffix": "x"}, {"best_of": 2}, {"prompt_logprobs": 1}, {"n": 2, "best_of": 3}])
def test_what_would_change_the_text_is_refused(base_client, fields):
    response = base_client.complete(START, **fields)
    assert response.status_code == 400 and response.json()["error"]["param"] in fields


def test_best_of_as_many_as_n_is_no_choice(base_client):
    assert base_client.complete(START, max_tokens=1, n=2, best_of=2).status_code == 200


@pytest.mark.parametrize(
    "name, value, must_be",
    [
        ("max_tokens", 0, "at least 1 without echo"),
        ("max_tokens", -1, "at least 0"),
        ("max_tokens", "5", "a whole number"),
        ("max_tokens", 1.5, "a whole number"),
        ("max_tokens", 10**30, "at most"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", "hot", "a number"),
        ("temperature", True, "a number"),
        ("temperature", 1e300, "at most 100"),
        ("top_p", 0, "above 0"),
        ("top_p", 1.1, "at most 1"),
        ("top_k", -2, "at least -1"),
        ("top_k", 2.5, "a whole number"),
        ("min_p", 2, "at most 1"),
        ("repetition_penalty", 0, "above 0"),
        ("frequency_penalty", 2.1, "at most 2"),
        ("presence_penalty", -3, "at least -2"),
        ("seed", "x", "a whole number"),
        ("seed", 2**70, "at most"),
        ("n", 0, "at least 1"),
        ("n", 1000, "at most 128"),
        ("logprobs", 21, "at most 20"),
        ("logprobs", True, "a whole number"),
        ("stream", "yes", "true or false"),
        ("echo", 1, "true or false"),
        ("stream_options", [], "an object"),
        ("stop", 3, "a string, or an array of strings"),
        ("stop", ["a", None], "a string, or an array of strings"),
        ("stop", ["a"] * 17, "at most 16"),
        ("stop", "a" * 501, "at most 500 characters"),
        ("stop_token_ids", [-1], "ids below"),
        ("stop_token_ids", "x", "an array"),
        ("logit_bias", [1], "an object"),
        ("logit_bias", {"x": 1}, "an id below"),
        ("logit_bias", {"-1": 1}, "an id below"),
        ("logit_bias", {"99999": 1}, "an id below"),
        ("logit_bias", {"5": 101}, "at most 100"),
        ("logit_bias", {"5": "x"}, "a number"),
        ("logit_bias", {str(i): 0 for i in range(301)}, "at most 300"),
        ("model", 3, "a string"),
    ],
)
def test_values_that_a_field_cannot_have(base_client, name, value, must_be):
    response = base_client.post("/v1/completions", json={"prompt": START, "max_tokens": 1, name: value})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert name in error["message"] and must_be in error["message"] and name in error["param"]


def test_null_counts_as_left_out(base_client):
    names = ("temperature", "top_p", "stop", "seed", "n", "logprobs", "stream", "echo", "logit_bias", "model", "suffix")
    response = base_client.post("/v1/completions", json={"prompt": START, "max_tokens": 1, **dict.fromkeys(names)})
    assert response.status_code == 200


def test_biases_penalties_and_stop_tokens(base_client, engine):
    token = engine.tokenizer.encode("x")[0]
    biased = base_client.complete(START, max_tokens=3, logit_bias={str(token): 100}).json()["choices"][0]
    assert biased["text"] == "xxx"
    stopped = base_client.complete(START, logit_bias={str(token): 100}, stop_token_ids=[token]).json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
    fields = {"logit_bias": {str(token): 5}, "presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 50}
    assert base_client.complete(START, max_tokens=10, **fields).json()["choices"][0]["text"].count("x") < 4


def test_an_answer_that_goes_on_after_its_end(client):
    text = "<|user_start|>Hello?<|user_end|><|assistant_start|>"
    choice = client.complete(text, ignore_eos=True, max_tokens=30).json()["choices"][0]
    assert choice["finish_reason"] == "length" and "<|assistant_end|>" in choice["text"]
