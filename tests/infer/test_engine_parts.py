"""The engine with all optional parts of the model: what it needs of a row's past beside the cache is right.

Requests of all kinds, each against one full forward pass a token: smearing and bigrams need the token before each
chunk's first, before a row's newest, and after a tool's answer.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.infer.engine import Engine
from jaxchat.infer.request import Request, Sampling
from jaxchat.infer.runner import compilations
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params, logits
from jaxchat.model.parameters import shardings
from jaxchat.tools.calculator import calculate
from jaxchat.train.step import init_state, make_train_step
from tests.infer.test_engine_requests import serve, texts, tokens_of

CONTEXT, ROWS = 200, 4
WINDOW = 50  # a quarter of the context, in two of the three layers
PARTS = {
    "attention_scale": 1.44,
    **dict.fromkeys(("residual_scales", "value_embeddings", "smear", "bigrams", "backout"), True),
}
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Two query heads share one of keys and values."""
    return GPTConfig(
        depth=3, sequence_len=CONTEXT, vocab_size=tokenizer.vocab_size, window_pattern="SL", num_kv_heads=1, **PARTS
    )


@pytest.fixture(scope="module")
def params(model):
    leaves, tree = jax.tree.flatten(jax.jit(init_params, static_argnums=0)(model, jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, moved)
    return params | {"smear": params["smear"] | {"scale": jnp.float32(0.7)}}  # a mistake moves every logit


@pytest.fixture(scope="module")
def engine(model, params, tokenizer):
    engine = Engine(model, params, tokenizer, dtype="float32", rows=ROWS, cache_tokens=3 * CONTEXT)
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def forward(model, params):
    """Log-probabilities of a whole text, by the training forward."""
    run = jax.jit(
        lambda tokens: jax.nn.log_softmax(
            logits(model, params, hidden_states(model, params, tokens))[..., : model.vocab_size]
        )
    )

    def scores(ids):
        row = np.zeros((1, CONTEXT), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(run(row))[0, : len(ids)]

    return scores


def check_answer(forward, engine, request, outputs):
    """A greedy answer has the tokens and the log-probabilities of full forward passes."""
    written = [token for output in outputs for token in output.tokens]
    ids = [*request.prompt, *(token.id for token in written)]
    expected = forward(ids)[len(request.prompt) - 1 : -1]
    assert [token.id for token in written] == expected.argmax(-1).tolist(), len(request.prompt)
    assert len(written) == request.max_new_tokens or written[-1].id in engine.stops
    got = [token.logprob for token in written]
    np.testing.assert_allclose(got, expected.max(-1), atol=1e-5, rtol=1e-5)


def test_answers_at_every_border_are_those_of_full_forward_passes(engine, forward):
    """Of windows, pages and chunks; prompts that begin alike, and the same prompt again; more requests than rows."""
    (text,) = texts(0, CONTEXT)
    lengths = (1, 2, 31, 32, 33, WINDOW, WINDOW + 1, 63, 64, 65, 66, 65, 128, 129, CONTEXT - 1)
    requests = [Request(text[:length], 12, GREEDY, logprobs=0) for length in lengths]
    requests += [Request([*text[:70], *other], 12, GREEDY, logprobs=0) for other in texts(1, 9, 40)]
    requests = [dataclasses.replace(one, max_new_tokens=min(12, CONTEXT - len(one.prompt))) for one in requests]
    before = compilations()
    for request, outputs in zip(requests, serve(engine, requests), strict=True):
        check_answer(forward, engine, request, outputs)
    turn = [*requests[6].prompt, *tokens_of(serve(engine, [requests[6]])[0]), 1, 2, 3]
    hits = engine.prefix_hits
    check_answer(forward, engine, *_served(engine, Request(turn, 12, GREEDY, logprobs=0)))
    assert engine.prefix_hits > hits and compilations() == before


def _served(engine, request):
    return request, serve(engine, [request])[0]


def test_a_prompts_own_scores(engine, forward):
    (prompt,) = texts(6, 150)
    (outputs,) = serve(engine, [Request(prompt, 2, GREEDY, logprobs=0, prompt_logprobs=True)])
    read = [token for output in outputs for token in output.prompt or ()]
    expected = forward(prompt)
    np.testing.assert_allclose(
        [token.logprob for token in read[1:]],
        expected[np.arange(len(prompt) - 1), prompt[1:]],
        atol=1e-5,
        rtol=1e-5,
    )


def test_samples_are_the_same_alone_and_in_any_company(engine, monkeypatch):
    """Also where calls are made before the last result is read, and where others leave halfway."""
    prompts = texts(2, 5, 40, 70, 70)
    requests = [
        Request(prompts[i % 4], 9 + i, Sampling(temperature=0.8 + 0.1 * (i % 3), seed=i), logprobs=i % 2 or None)
        for i in range(9)
    ] + [Request(prompts[3], 20, Sampling(seed=number)) for number in range(4)]
    alone = [tokens_of(serve(engine, [request])[0]) for request in requests]
    assert len(set(map(tuple, alone))) > 6
    engine.params = engine.params  # forgets what is cached
    assert [tokens_of(outputs) for outputs in serve(engine, requests, arrivals=5)] == alone
    monkeypatch.setattr(engine._turns, "lookahead", 1)
    order = [7, 2, 11, 0, 5, 9, 12, 3, 10, 1, 4, 8, 6]
    assert [tokens_of(outputs) for outputs in serve(engine, [requests[i] for i in order], arrivals=2)] == [
        alone[i] for i in order
    ]
    numbers, written = [engine.submit(request) for request in requests[:6]], {}
    for turn in range(1000):
        if not engine.busy:
            break
        for output in engine.step():
            written.setdefault(output.request, []).extend(token.id for token in output.tokens)
        if turn == 3:
            engine.cancel(numbers[1])
    assert [written[number] for i, number in enumerate(numbers) if i != 1] == [alone[i] for i in (0, 2, 3, 4, 5)]


@pytest.fixture(scope="module")
def clever(config, tokenizer, conversations):
    """A model with all parts that knows `conversations` by heart, and calls tools in them."""
    model, length = dataclasses.replace(config, **PARTS), config.sequence_len
    inputs, targets = np.zeros((1, 5, length), np.int32), np.full((1, 5, length), -1, np.int32)
    for i, conversation in enumerate(conversations):
        ids, mask = map(np.array, tokenizer.render_conversation(conversation, max_tokens=length + 1))
        inputs[0, i, : len(ids) - 1] = ids[:-1]
        targets[0, i, : len(ids) - 1] = np.where(mask[1:] == 1, ids[1:], -1)
    params = init_params(model, jax.random.key(0))
    params["smear"]["scale"] += 0.5
    optimizer = optax.adam(3e-3)
    step, state = make_train_step(model, optimizer), init_state(params, optimizer)
    for _ in range(80):
        state, metrics = step(state, {"inputs": inputs, "targets": targets})
    assert metrics["loss"] < 0.02
    return model, state["params"]


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_tools_answer_inside_the_text(clever, tokenizer, conversations, weights):
    model, params = clever
    engine = Engine(model, params, tokenizer, dtype="float32", rows=2, weights=weights)
    requests = [
        Request(tokenizer.render_for_completion(one), 60, GREEDY, tool=calculate, logprobs=0) for one in conversations
    ]
    for conversation, request, outputs in zip(conversations, requests, serve(engine, requests, 5), strict=True):
        ids, mask = tokenizer.render_conversation(conversation)
        assert [*request.prompt, *tokens_of(outputs)] == ids
        written = [token for output in outputs for token in output.tokens]
        assert [token.sampled for token in written] == [bool(m) for m in mask[len(request.prompt) :]]
        if weights == "int8":
            continue
        hidden = hidden_states(model, params, jnp.array([ids[:-1]]))
        scores = jax.nn.log_softmax(logits(model, params, hidden)[0, :, : model.vocab_size])
        for i, token in enumerate(written, len(request.prompt)):
            assert not token.sampled or token.logprob == pytest.approx(float(scores[i - 1, ids[i]]), abs=2e-5)


def test_a_mesh_generates_what_one_device_does(clever, tokenizer, conversations):
    model, params = clever
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    spread = Engine(model, jax.device_put(params, shardings(mesh, params)), tokenizer, dtype="float32")
    options = {"max_new_tokens": 60, "temperature": 1.0, "seed": 2}
    alone = Engine(model, params, tokenizer, dtype="float32").generate(prompts, **options)
    assert spread.generate(prompts, **options) == alone
