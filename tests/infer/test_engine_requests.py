"""Requests that join and leave: each answer is what a full forward pass a token gives, whatever its company."""

import dataclasses
import random
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.errors import UserError
from jaxchat.infer.engine import Engine
from jaxchat.infer.request import Request, Sampling
from jaxchat.infer.runner import compilations
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params, logits
from jaxchat.tools.calculator import calculate
from jaxchat.tools.python import given_up

CONTEXT, ROWS = 200, 4
WINDOW = 50  # a quarter of the context, in two of the three layers


@pytest.fixture(scope="module")
def windowed(tokenizer):
    """Two query heads share one of keys and values."""
    return GPTConfig(
        depth=3, sequence_len=CONTEXT, vocab_size=tokenizer.vocab_size, window_pattern="SL", num_kv_heads=1
    )


@pytest.fixture(scope="module")
def params(windowed):
    leaves, tree = jax.tree.flatten(jax.jit(init_params, static_argnums=0)(windowed, jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.fixture(scope="module")
def engine(windowed, params, tokenizer):
    """A server's engine, compiled ahead."""
    engine = Engine(windowed, params, tokenizer, dtype="float32", rows=ROWS, cache_tokens=3 * CONTEXT)
    seen = []
    engine.warm_up(lambda done, count: seen.append((done, count)))
    assert seen == [(i, len(seen) - 1) for i in range(len(seen))]
    return engine


@pytest.fixture(scope="module")
def forward(windowed, params):
    """The logits of a whole text, by the training forward."""
    run = jax.jit(lambda tokens: logits(windowed, params, hidden_states(windowed, params, tokens)))

    def scores(ids):
        row = np.zeros((1, CONTEXT), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(run(row))[0, : len(ids)]

    return scores


@pytest.fixture(autouse=True)
def leaves_nothing_behind(engine):
    yield
    assert not engine.busy and engine.running == engine.waiting == 0 and engine.cache_usage == 0


def texts(seed, *lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, length).tolist() for length in lengths]


def serve(engine, requests, arrivals=1):
    """Submits some requests before each step; returns each one's outputs."""
    outputs, numbers, waiting = {}, [], list(requests)
    while waiting or engine.busy:
        for request in waiting[:arrivals]:
            numbers.append(engine.submit(request))
        del waiting[:arrivals]
        for output in engine.step():
            outputs.setdefault(output.request, []).append(output)
    return [outputs[number] for number in numbers]


def tokens_of(outputs):
    return [token.id for output in outputs for token in output.tokens]


def greedy(forward, prompt, count, stops):
    ids = list(prompt)
    while len(ids) < min(len(prompt) + count, CONTEXT) and (len(ids) == len(prompt) or ids[-1] not in stops):
        ids.append(int(np.argmax(forward(ids)[-1])))
    return ids[len(prompt) :]


def test_greedy_answers_at_every_border_are_those_of_full_forward_passes(engine, forward):
    """Borders of the window, of a page and of a chunk; prompts that begin alike; more requests than rows."""
    (text,) = texts(0, CONTEXT)
    lengths = (WINDOW - 1, WINDOW, WINDOW + 1, 63, 64, 65, 66, 1, 31, 32, 33, 34, 128, 129, 150, CONTEXT - 1)
    requests = [Request(text[:length], 20, Sampling(temperature=0)) for length in lengths]
    requests += [Request([*text[:70], *other], 20, Sampling(temperature=0)) for other in texts(1, 9, 40)]
    for request, outputs in zip(requests, serve(engine, requests), strict=True):
        expected = greedy(forward, request.prompt, 20, engine.stops)
        assert tokens_of(outputs) == expected, len(request.prompt)
        assert outputs[-1].finish == ("stop" if expected[-1] in engine.stops else "length")
        assert all(output.finish is None for output in outputs[:-1])


SETTINGS = (
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0.7, top_k=5, seed=3),
    Sampling(top_p=0.8, min_p=0.01, seed=4, number=2),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2, seed=5),
    Sampling(logit_bias={65: 4.0, 66: -100.0}, seed=6),
)


def test_a_request_gets_the_same_alone_and_in_any_company_and_order(engine):
    prompts = texts(2, 5, 40, 70, 120)
    requests = [
        Request(prompts[i % 4], 12 + i, sampling, logprobs=None if i % 2 else 2)
        for i, sampling in enumerate(SETTINGS * 2)
    ]
    alone = [tokens_of(serve(engine, [request])[0]) for request in requests]
    order = list(range(len(requests)))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        mixed = serve(engine, [requests[i] for i in order], arrivals=1 + 3 * seed)
        assert [tokens_of(outputs) for outputs in mixed] == [alone[i] for i in order]
    assert len({tuple(tokens) for tokens in alone}) > 8


def test_calls_made_before_the_last_result_is_read_change_nothing(
    engine, monkeypatch, config, trained_params, tokenizer, conversations
):
    """As on a GPU, with rows that end, pause for a tool, and are replaced while a call for them is under way."""
    caller = Engine(config, trained_params, tokenizer, dtype="float32", rows=2)
    requests = [
        Request(prompt, 9 + i, SETTINGS[i], stop=("e",)) for i, prompt in enumerate(texts(2, 5, 40, 70, 9, 4, 8))
    ]
    calls = [
        Request(tokenizer.render_for_completion(conversation), 60, Sampling(temperature=0), tool=calculate)
        for conversation in conversations
    ]
    both = (engine, requests), (caller, calls)
    read_at_once = [[tokens_of(outputs) for outputs in serve(*work, arrivals=4)] for work in both]
    for one, _ in both:
        monkeypatch.setattr(one._turns, "lookahead", 1)
    assert [[tokens_of(outputs) for outputs in serve(*work, arrivals=4)] for work in both] == read_at_once
    assert caller.cache_usage == 0


def test_an_engine_without_a_cache_samples_what_one_with_a_cache_does(engine, windowed, params, tokenizer):
    other = Engine(windowed, params, tokenizer, dtype="float32")
    prompts = texts(3, 20, 20)
    options = {"max_new_tokens": 10, "temperature": 0.9, "top_k": 7, "seed": 8, "tools": False}
    expected = other.generate(prompts, **options)
    assert engine.generate(prompts, **options) == expected
    requests = [
        Request(prompt, 10, Sampling(temperature=0.9, top_k=7, seed=8, number=i)) for i, prompt in enumerate(prompts)
    ]
    for outputs, completion in zip(serve(engine, requests), expected, strict=True):
        assert tokens_of(outputs) == completion.tokens + [completion.stop] * completion.finished


def test_a_fixed_list_among_other_requests(engine):
    request, (prompt,) = Request(texts(10, 20)[0], 30, SETTINGS[2]), texts(11, 8)
    expected = tokens_of(serve(engine, [request])[0])
    number = engine.submit(request)
    completions = engine.generate([prompt] * 3, max_new_tokens=50, temperature=0.0, max_batch=2)
    assert completions[0] == completions[1] == completions[2]
    outputs = []
    while engine.busy:
        outputs += engine.step()
    assert {output.request for output in outputs} == {number} and tokens_of(outputs) == expected


def test_after_the_warm_up_nothing_is_compiled(engine):
    before = compilations()
    prompts = texts(4, 1, 30, 90, 199)
    requests = [
        Request(prompt, most, sampling, logprobs=logs, prompt_logprobs=logs == 3)
        for prompt in prompts
        for most in (1, 20)
        for sampling in SETTINGS
        for logs in (None, 3)
    ]
    serve(engine, requests, arrivals=5)
    serve(engine, requests[:1])
    engine.params = engine.params
    engine.generate(prompts, max_new_tokens=3)
    assert compilations() == before


def test_samples_of_a_prompt_and_the_next_turn_share_their_beginning(engine):
    engine.params = engine.params  # forgets what other tests have left
    (prompt,) = texts(5, 100)
    before = engine.prefix_queries, engine.prefix_hits
    requests = [Request(prompt, 9, Sampling(seed=number)) for number in range(4)]
    shared = serve(engine, requests, arrivals=4)
    assert (engine.prefix_queries - before[0], engine.prefix_hits - before[1]) == (400, 3 * 100)
    before = engine.prefix_hits
    turn = [*prompt, *tokens_of(shared[1]), 1, 2, 3]
    again = serve(engine, [Request(turn, 5, Sampling(temperature=0))])[0]
    assert engine.prefix_hits - before >= 100
    engine.params = engine.params
    before = engine.prefix_hits
    assert tokens_of(serve(engine, [Request(turn, 5, Sampling(temperature=0))])[0]) == tokens_of(again)
    assert engine.prefix_hits == before
    for request, outputs in zip(requests, shared, strict=True):
        engine.params = engine.params
        assert tokens_of(serve(engine, [request])[0]) == tokens_of(outputs)


def test_nothing_is_shared_of_rows_that_began_with_other_parameters(engine, params):
    (prompt,) = texts(9, 130)
    new = Request([*prompt, 1, 2], 5, Sampling(temperature=0))
    try:
        engine.submit(Request(prompt, 20, Sampling(temperature=0)))
        engine.step()
        engine.params = jax.tree.map(lambda leaf: 1.5 * leaf, params)
        while engine.busy:
            engine.step()
        before = engine.prefix_hits
        (outputs,) = serve(engine, [new])
        assert engine.prefix_hits == before
        engine.params = engine.params
        assert tokens_of(serve(engine, [new])[0]) == tokens_of(outputs)
    finally:
        engine.params = params


def test_a_list_that_is_refused_or_left_leaves_the_engine_as_it_was(windowed, params, tokenizer):
    engine = Engine(windowed, params, tokenizer, dtype="float32", rows=2, cache_tokens=128)
    with pytest.raises(UserError, match="take 4 pages of the cache, which has 2"):
        engine.generate([[1, 2, 3], [1] * 120], max_new_tokens=100, max_batch=1)
    assert not engine.busy and engine.waiting == engine.running == 0
    first = engine.stream([[1, 2, 3]], max_new_tokens=20)
    next(first)
    with pytest.raises(UserError, match="generating another list"):
        engine.generate([[4, 5]], max_new_tokens=2)
    first.close()
    assert len(engine.generate([[4, 5], [6, 7]], max_new_tokens=2, max_batch=2)) == 2


def test_log_probabilities_are_those_of_the_model(engine, forward):
    (prompt,) = texts(6, 90)
    (outputs,) = serve(engine, [Request(prompt, 6, Sampling(temperature=0), logprobs=3, prompt_logprobs=True)])
    (read,) = [output.prompt for output in outputs if output.prompt]
    written = [token for output in outputs for token in output.tokens]
    tokens = [*read, *written]
    assert [token.id for token in tokens[:90]] == prompt
    assert read[0].logprob is None and not any(token.sampled for token in read)
    expected = np.asarray(jax.nn.log_softmax(jnp.asarray(forward([token.id for token in tokens[:-1]]))))
    for token, row in zip(tokens[1:], expected, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=2e-4)
        assert [id for id, _ in token.alternatives] == np.argsort(-row, kind="stable")[:3].tolist()
        assert [value for _, value in token.alternatives] == pytest.approx(np.sort(row)[::-1][:3], abs=2e-4)
        assert token.logprob in [value for id, value in token.alternatives if id == token.id] or (
            token.id not in dict(token.alternatives)
        )
    for token in written:
        assert token.alternatives[0] == (token.id, token.logprob)


def test_the_last_token_is_there_even_if_it_stops_the_answer(engine, forward):
    (prompt,) = texts(7, 30)
    first = int(np.argmax(forward(prompt)[-1]))
    request = Request(prompt, 1, Sampling(temperature=0), stop_tokens=(first,), logprobs=1, prompt_logprobs=True)
    (outputs,) = serve(engine, [request])
    assert tokens_of(outputs) == [first] and (outputs[-1].finish, outputs[-1].stopped_by) == ("stop", first)
    assert outputs[-1].tokens[0].logprob is not None and sum(len(output.prompt) for output in outputs) == 30


def test_cancelling_frees_the_row_at_once_and_says_so(engine):
    prompts = texts(8, 10, 120, 10, 10, 10, 10)
    numbers = [engine.submit(Request(prompt, 60)) for prompt in prompts]
    assert engine.waiting == 6
    engine.step()
    assert (engine.running, engine.waiting) == (4, 2) and 0 < engine.cache_usage <= 1
    for number in (numbers[0], numbers[1], numbers[5], 12345):
        engine.cancel(number)
    assert engine.running == 2
    outputs = engine.step()
    assert {output.request for output in outputs if output.finish == "cancelled"} == {
        numbers[0],
        numbers[1],
        numbers[5],
    }
    later = []
    while engine.busy:
        later += engine.step()
    engine.cancel(numbers[0])
    assert not {numbers[0], numbers[1], numbers[5]} & {output.request for output in later}
    assert {output.request for output in later if output.finish} == {numbers[2], numbers[3], numbers[4]}
    assert engine.step() == []


def test_an_endless_mix_loses_nothing(engine):
    chance = random.Random(9)
    (text,) = texts(9, CONTEXT)
    alive, ended, counts = {}, set(), {}
    for _ in range(150):
        while len(alive) < 7:
            start = chance.choice((0, 0, 30))
            prompt = text[start : start + chance.randrange(1, 150)]
            request = Request(
                prompt, chance.randrange(1, 30), chance.choice(SETTINGS), stop=chance.choice(((), ("e",)))
            )
            alive[engine.submit(request)] = request
        if chance.random() < 0.3:
            engine.cancel(chance.choice(list(alive)))
        for output in engine.step():
            counts[output.request] = counts.get(output.request, 0) + len(output.tokens)
            if output.finish:
                request = alive.pop(output.request)
                assert output.request not in ended and counts[output.request] <= request.max_new_tokens
                ended.add(output.request)
    assert len(ended) > 100
    for number in alive:
        engine.cancel(number)
    assert {output.request for output in engine.step()} >= set(alive)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "the prompt has 0 tokens"),
        ({"prompt": [1] * CONTEXT}, f"the prompt has {CONTEXT} tokens"),
        ({"prompt": [1, 290]}, "token ids from 1 to 290"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p is 0"),
    ],
)
def test_impossible_requests_are_refused(engine, change, message):
    with pytest.raises(UserError, match=message):
        engine.submit(dataclasses.replace(Request([1], 4), **change))


def test_a_request_that_the_cache_cannot_hold_is_refused(windowed, params, tokenizer):
    small = Engine(windowed, params, tokenizer, dtype="float32", rows=1, cache_tokens=64)
    with pytest.raises(UserError, match="take 2 pages of the cache, which has 1"):
        small.submit(Request([1] * 30, 40))
    assert not small.busy and small.submit(Request([1] * 30, 35)) == 0


def test_a_tool_that_fails_ends_nothing_but_its_call(config, trained_params, tokenizer, conversations, capsys):
    engine = Engine(config, trained_params, tokenizer, dtype="float32", rows=2)
    prompt = tokenizer.render_for_completion(conversations[0])

    def broken(text):
        raise OSError("no room")

    for instant in (True, False):
        request = Request(prompt, 60, Sampling(temperature=0), tool=broken, instant=instant)
        text = tokenizer.decode(tokens_of(serve(engine, [request])[0]))
        assert "<|python_start|>34 + 58<|python_end|><|output_start|><|output_end|>" in text
        assert "OSError: no room" in capsys.readouterr().err


def test_a_tool_is_told_that_its_request_has_ended(config, trained_params, tokenizer, conversations):
    engine = Engine(config, trained_params, tokenizer, dtype="float32", rows=2)
    begun, told = threading.Event(), threading.Event()

    def slow(text):
        over = given_up.get()
        assert not over()
        begun.set()
        while not over():
            time.sleep(0.01)
        told.set()
        return ""

    prompt = tokenizer.render_for_completion(conversations[0])
    number = engine.submit(Request(prompt, 60, Sampling(temperature=0), tool=slow))
    while not begun.is_set():
        engine.step()
    engine.cancel(number)
    assert told.wait(20)


def test_other_requests_go_on_while_a_tool_is_at_work(config, trained_params, tokenizer, conversations):
    engine = Engine(config, trained_params, tokenizer, dtype="float32", rows=2)
    calls, may_end = [], threading.Event()

    def slow(text):
        calls.append(text)
        assert may_end.wait(60)
        return "9" * 20

    greedy = Sampling(temperature=0)
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    caller = engine.submit(Request(prompts[0], 60, greedy, tool=slow))
    talker = engine.submit(Request(prompts[4], 60, greedy, tool=calculate))
    text = {caller: "", talker: ""}
    ended = {}
    while engine.busy:
        for output in engine.step():
            text[output.request] += output.text
            if output.finish:
                ended[output.request] = output
        if talker in ended:
            may_end.set()
        assert caller not in ended or may_end.is_set()
    assert calls == ["34 + 58"]
    assert text[talker] == "Grüße, 日本 🙂!" and ended[talker].stopped_by == engine.stops[0]
    assert text[caller].startswith(f"<|python_start|>34 + 58<|python_end|><|output_start|>{'9' * 20}<|output_end|>")


def test_stop_strings_end_an_answer_before_themselves(config, trained_params, tokenizer, conversations):
    engine = Engine(config, trained_params, tokenizer, dtype="float32", rows=1)
    prompt = tokenizer.render_for_completion(conversations[0])
    for stop, text in {("is 9",): "It ", ("nowhere", "2."): "It is 9", ("nowhere",): "It is 92."}.items():
        (outputs,) = serve(engine, [Request(prompt, 60, Sampling(temperature=0), stop=stop, tool=calculate)])
        assert "".join(output.text for output in outputs).rpartition("<|output_end|>")[2] == text
        by_text = text != "It is 92."
        assert outputs[-1].finish == "stop" and (outputs[-1].stopped_by in stop) == by_text


def test_a_gpu_has_more_lanes_than_rows(engine, windowed, params, tokenizer):
    other = Engine(windowed, params, tokenizer, dtype="float32", rows=3, cache_tokens=3 * CONTEXT)
    runner = other._opened().runner
    runner.on_cpu = False
    assert runner._row_sizes() == [1, 8]
    requests = [Request(list(range(20 + i, 26 + 2 * i)), 12, Sampling(seed=5, number=i)) for i in range(5)]
    answers = []
    for one in (engine, other):
        numbers, tokens = [one.submit(request) for request in requests], {}
        while one.busy:
            for output in one.step():
                tokens.setdefault(output.request, []).extend(token.id for token in output.tokens)
        answers.append([tokens[number] for number in numbers])
    assert answers[0] == answers[1]
