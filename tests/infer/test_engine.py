"""The engine against the training forward, alone and in company, and its tool calls with a model that makes some."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.errors import UserError
from jaxchat.infer.engine import Engine
from jaxchat.infer.runner import compilations
from jaxchat.model.gpt import hidden_states, logits
from jaxchat.model.parameters import shardings

# Prompts and limits below share few buckets of lengths and rows on purpose: what takes time here is compilation.


@pytest.fixture(scope="module")
def engine(config, random_params, tokenizer):
    return Engine(config, random_params, tokenizer, dtype=jnp.float32)


@pytest.fixture(scope="module")
def clever(config, trained_params, tokenizer):
    return Engine(config, trained_params, tokenizer, dtype=jnp.float32)


@pytest.fixture(scope="module")
def prompts(config):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).tolist() for length in (1, 5, 16, 17, 66, 3, 31)]


def greedy_by_training_forward(config, params, prompt, stops, new_tokens):
    forward = jax.jit(lambda tokens: logits(config, params, hidden_states(config, params, tokens)))
    ids = list(prompt)
    while len(ids) < min(len(prompt) + new_tokens, config.sequence_len) and (
        len(ids) == len(prompt) or ids[-1] not in stops
    ):
        row = np.zeros((1, config.sequence_len), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(forward(row)[0, len(ids) - 1])))
    return ids[len(prompt) :]


def test_greedy_decoding_is_the_training_forwards_argmax_for_mixed_lengths(config, random_params, engine, prompts):
    completions = engine.generate(prompts, max_new_tokens=30, temperature=0, tools=False)
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = greedy_by_training_forward(config, random_params, prompt, engine.stops, 30)
        assert completion.finished == (expected[-1] in engine.stops)
        assert completion.tokens == (expected[:-1] if completion.finished else expected)
        assert completion.sampled == [True] * len(completion.tokens)
    assert len({tuple(c.tokens) for c in completions}) == len(prompts)


def test_windows_decode_as_they_train(config, random_params, tokenizer, engine, prompts):
    """The same parameters see a quarter of the context, 24 tokens, in their first layer."""
    config = dataclasses.replace(config, window_pattern="SL")
    windowed = Engine(config, random_params, tokenizer, dtype=jnp.float32)
    options = {"max_new_tokens": 30, "temperature": 0, "tools": False}
    chosen = [prompts[i] for i in (2, 4, 6)]  # shorter and longer than the window
    completions = windowed.generate(chosen, **options)
    for prompt, completion in zip(chosen, completions, strict=True):
        expected = greedy_by_training_forward(config, random_params, prompt, windowed.stops, 30)
        assert completion.tokens == (expected[:-1] if completion.finished else expected)
    assert completions != engine.generate(chosen, **options)


def test_a_row_is_the_same_alone_in_company_and_in_any_split(engine, prompts):
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 5}
    together = engine.generate(prompts, **options)
    assert engine.generate(prompts[:1], **options)[0] == together[0]
    assert engine.generate(prompts, **options, max_batch=3) == together


def test_seeds_and_rows_differ_from_the_first_token_on(engine, prompts):
    same = [prompts[4]] * 8
    options = {"max_new_tokens": 4, "temperature": 2.0}
    first = engine.generate(same, **options, seed=0)
    assert engine.generate(same, **options, seed=0) == first
    firsts = [c.tokens[:1] for c in first]
    assert len(set(map(tuple, firsts))) > 3
    assert [c.tokens[:1] for c in engine.generate(same, **options, seed=1)] != firsts


def test_hot_sampling_stays_within_the_vocabulary(config, engine, prompts):
    completions = engine.generate(prompts, max_new_tokens=80, temperature=1e6, tools=False)
    ids = [token for completion in completions for token in completion.tokens]
    assert max(ids) < config.vocab_size < config.padded_vocab_size
    assert len(set(ids)) > 100


def test_stream_is_generate(engine, prompts):
    options = {"max_new_tokens": 21, "temperature": 1.0, "seed": 3}
    rows = {}
    for chunk in engine.stream(prompts, **options, max_batch=3):
        for row, token in chunk:
            rows.setdefault(row, []).append((token.id, token.sampled))
    for row, completion in enumerate(engine.generate(prompts, **options)):
        ended = [(rows[row][-1][0], True)] if completion.finished else []
        assert not ended or ended[0][0] in engine.stops
        assert rows[row] == list(zip(completion.tokens, completion.sampled, strict=True)) + ended


def test_a_stop_token_ends_a_row(config, random_params, tokenizer, prompts):
    for name in ("<|assistant_end|>", "<|bos|>"):
        head = (
            random_params["head"]["kernel"]
            .at[:, tokenizer.encode_special(name)]
            .add(
                jnp.linspace(-1, 1, config.width)  # often the likeliest, not always
            )
        )
        engine = Engine(config, {**random_params, "head": {"kernel": head}}, tokenizer, dtype="float32")
        completions = engine.generate(prompts, max_new_tokens=40, temperature=1.0)
        finished = [c for c in completions if c.finished]
        assert finished and any(c.tokens for c in finished)
        assert all(len(c.tokens) < 40 for c in finished)
        assert not any(set(c.tokens) & set(engine.stops) for c in completions)


def test_the_limits_of_length(config, engine, prompts):
    for new_tokens in (1, 2, 8, 9, 10):
        for completion in engine.generate(prompts, max_new_tokens=new_tokens, temperature=0):
            assert completion.finished or len(completion.tokens) == new_tokens
    long = [[7] * (config.sequence_len - 1), [7] * (config.sequence_len - 3), [7], [8], [9]]
    lengths = [len(c.tokens) for c in engine.generate(long, max_new_tokens=1000, temperature=0) if not c.finished]
    assert set(lengths) <= {1, 3, config.sequence_len - 1}


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 has 0 tokens"),
        ([[1] * 96], {}, "prompt 0 has 96 tokens"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1}, "temperature is -1"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"max_batch": 0}, "max_batch is 0"),
    ],
)
def test_bad_requests(engine, prompts, options, message):
    with pytest.raises(UserError, match=message):
        engine.generate(prompts, **{"max_new_tokens": 4} | options)


def test_no_prompts(engine):
    assert engine.generate([], max_new_tokens=4) == []


def test_tools_answer_inside_the_text(clever, tokenizer, conversations):
    prompts = [tokenizer.render_for_completion(c) for c in conversations]
    completions = clever.generate(prompts, max_new_tokens=60, temperature=0)
    for conversation, prompt, completion in zip(conversations, prompts, completions, strict=True):
        ids, mask = tokenizer.render_conversation(conversation)
        assert completion.finished
        # Whatever is masked in training was forced in here, and nothing else.
        assert [*prompt, *completion.tokens] == ids[:-1]
        assert completion.sampled == [bool(m) for m in mask[len(prompt) : -1]]
    assert tokenizer.decode(completions[0].tokens) == (
        "<|python_start|>34 + 58<|python_end|><|output_start|>92<|output_end|>It is 92."
    )
    assert (
        tokenizer.decode(completions[2].tokens) == "<|python_start|>1/0<|python_end|><|output_start|><|output_end|>No."
    )


def test_outputs_are_forced_in_where_they_are_never_drawn(config, trained_params, clever, tokenizer, conversations):
    engine = Engine(config, trained_params, tokenizer, dtype=jnp.float32, drawn=tokenizer.without_output)
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    assert engine.generate(prompts, max_new_tokens=60, temperature=0) == clever.generate(
        prompts, max_new_tokens=60, temperature=0
    )


def test_forced_tokens_count_towards_the_limit(clever, tokenizer, conversations):
    prompt = tokenizer.render_for_completion(conversations[0])
    whole = clever.generate([prompt], max_new_tokens=35, temperature=0)[0]
    assert whole.finished
    for limit in range(1, len(whole.tokens) + 1):
        cut = clever.generate([prompt], max_new_tokens=limit, temperature=0)[0]
        assert (cut.tokens, cut.sampled) == (whole.tokens[:limit], whole.sampled[:limit])
        assert not cut.finished


def test_without_tools_nothing_is_forced(clever, tokenizer, conversations):
    prompt = tokenizer.render_for_completion(conversations[0])
    completion = clever.generate([prompt], max_new_tokens=35, temperature=0, tools=False)[0]
    assert tokenizer.decode(completion.tokens).startswith("<|python_start|>34 + 58<|python_end|>")
    assert all(completion.sampled)


def test_an_end_without_a_start_is_left_alone(clever, tokenizer):
    # The call's start stands in the prompt, so that the end the model writes closes nothing of its own.
    conversation = {"messages": [{"role": "user", "content": "What is 34 + 58?"}]}
    prompt = [*tokenizer.render_for_completion(conversation), tokenizer.encode_special("<|python_start|>")]
    completion = clever.generate([prompt], max_new_tokens=35, temperature=0)[0]
    assert tokenizer.decode(completion.tokens).startswith("34 + 58<|python_end|>")
    assert all(completion.sampled)


def test_a_row_does_not_notice_its_companions_tool_calls(clever, tokenizer, conversations):
    prompts = [tokenizer.render_for_completion(c) for c in conversations]
    talk = clever.generate([prompts[4]], max_new_tokens=35, temperature=0)[0]
    assert tokenizer.decode(talk.tokens) == "Grüße, 日本 🙂!"
    assert clever.generate(prompts, max_new_tokens=60, temperature=0)[4] == talk


def test_new_parameters_compile_nothing(config, engine, clever, tokenizer, prompts):
    options = {"max_new_tokens": 12, "temperature": 1.0}
    engine.generate(prompts, **options)
    before = compilations()
    moved = Engine(config, clever.params, tokenizer, dtype=jnp.float32)
    first = moved.generate(prompts, **options)
    assert first != engine.generate(prompts, **options)
    moved.params = engine.params
    assert moved.generate(prompts, **options) == engine.generate(prompts, **options)
    moved.params = clever.params
    assert moved.generate(prompts, **options) == first
    moved.generate(prompts[::-1], max_new_tokens=11, temperature=0.7, seed=9, tools=False)
    assert compilations() == before


def test_lists_of_any_length_share_a_reserved_cache_and_its_programs(config, random_params, engine, tokenizer, prompts):
    reserving = Engine(config, random_params, tokenizer, dtype=jnp.float32)
    reserving.reserve(8, config.sequence_len)
    options = {"max_new_tokens": 12, "temperature": 1.0}
    answers = reserving.generate(prompts, **options)
    assert reserving.generate(prompts, **options) == answers  # copies what is cached of them
    before = compilations()
    for count in (3, 5):
        assert reserving.generate(prompts[:count], **options) == answers[:count]
    assert compilations() == before
    assert engine.generate(prompts[:5], **options) == answers[:5]
    reserving.release()
    assert reserving.generate(prompts[:5], **options) == answers[:5]


def test_parameters_are_held_in_the_computation_dtype(config, random_params, tokenizer, prompts):
    engine = Engine(config, random_params, tokenizer, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(engine.params)} == {"bfloat16"}
    assert all(c.tokens for c in engine.generate(prompts, max_new_tokens=8))


def test_a_mesh_generates_what_one_device_does(config, trained_params, clever, tokenizer, conversations):
    prompts = [tokenizer.render_for_completion(c) for c in conversations]
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    spread = jax.device_put(trained_params, shardings(mesh, trained_params))
    engine = Engine(config, spread, tokenizer, dtype="float32")
    options = {"max_new_tokens": 60, "temperature": 1.0, "seed": 2}
    assert engine.generate(prompts, **options) == clever.generate(prompts, **options)
