"""lm-evaluation-harness as it is, with `local-completions`: its log-likelihoods against this model's own."""

import asyncio

import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.infer.trained import load_model
from jaxchat.model.gpt import hidden_states, logits
from tests.serve.conftest import CONTEXT, STORY

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI  # noqa: E402

NEAR = 2e-3  # nats a request: the server adds up in another order
# Contexts and continuations of unequal length: memorized ones, unlikely ones, broken UTF-8, special tokens.
PAIRS = [
    ("Es war einmal", " ein Bär 🐻."),
    ("Es war einmal ein Bär 🐻. Er ging", " in den Wald."),
    ("Es war einmal ein Bär", " 日本🙂"),
    ("", "Es war einmal"),
    ("Er", " ging"),
    ("Bär", "!"),
    ("x" * 60, "y" * 40),
    ("Er ging in den Wald. " * 4, "<|assistant_end|>"),
]


@pytest.fixture(scope="module")
def trained(run_dir):
    return load_model(run_dir, "pretrain")


@pytest.fixture(scope="module", params=["one by one", "in batches", "at once"])
def harness(request, base_server):
    options = {"one by one": {}, "in batches": {"batch_size": 4}, "at once": {"num_concurrent": 8, "batch_size": 2}}
    return of(base_server, **options[request.param])


def of(server, **options):
    """The harness's client as `--model local-completions --model_args base_url=...` makes it."""
    model = asyncio.run(server.address.ask("GET", "/v1/models")).json["data"][0]["id"]
    options = {"max_length": CONTEXT, "max_gen_toks": 16} | options
    return LocalCompletionsAPI(model=model, base_url=f"{server.url}/v1/completions", **options)


def instances(kind, arguments):
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def own(trained, ids):
    """Log-probabilities of tokens 1, 2, ... of a row, and whether each is the likeliest, by one forward pass."""
    hidden = hidden_states(trained.model, trained.params, jnp.array([ids]))
    scores = np.asarray(logits(trained.model, trained.params, hidden), np.float64)[0, :-1]
    scores = scores[:, : trained.tokenizer.vocab_size] - scores.max(-1, keepdims=True)
    table = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return table[np.arange(len(ids) - 1), ids[1:]], table.argmax(-1) == np.array(ids[1:])


def test_it_finds_the_tokenizer_by_itself(base_server, trained, harness):
    assert harness.tokenizer_backend == "remote", "no files are needed"
    assert harness.eot_token_id == trained.tokenizer.encode_special("<|assistant_end|>") or (
        harness.eot_token_id == trained.tokenizer.bos_token_id
    )
    assert harness.prefix_token_id == trained.tokenizer.bos_token_id
    for text, more in PAIRS:
        plain = text + more.replace("<|assistant_end|>", "")
        assert harness.tok_encode(plain) == trained.tokenizer.encode(plain)
        assert harness.tokenizer.decode(harness.tok_encode(plain)) == plain


def test_loglikelihoods_are_the_models_own(harness, trained):
    answers = harness.loglikelihood(instances("loglikelihood", PAIRS))
    assert len(answers) == len(PAIRS)
    greedy = []
    for (context, continuation), (value, is_greedy) in zip(PAIRS, answers, strict=True):
        if context:
            before, after = harness._encode_pair(context, continuation)
        else:
            before, after = [harness.prefix_token_id], harness.tok_encode(continuation)
        logprobs, likeliest = own(trained, (before + after)[-(CONTEXT - 1) :])
        assert value == pytest.approx(logprobs[-len(after) :].sum(), abs=NEAR), (context, continuation)
        assert is_greedy == likeliest[-len(after) :].all()
        greedy.append(is_greedy)
    assert any(greedy) and not all(greedy)


def test_each_token_of_an_answer(base_server, trained):
    """The numbers behind the sums: with a stop token as the last prompt token, and as the one that is generated."""
    tokenizer = trained.tokenizer
    rows = [
        tokenizer.encode("Es war einmal ein Bär 🐻", prepend=tokenizer.bos_token_id),
        tokenizer.encode(STORY, prepend=tokenizer.bos_token_id)[: CONTEXT - 1],
        [*tokenizer.encode("Er ging"), tokenizer.encode_special("<|assistant_end|>")],
        [tokenizer.bos_token_id],
        list(range(250, 290)),  # bytes that are no UTF-8, rare tokens and special ones
    ]
    # Each special token as the one that is drawn, which ends the answer or opens a tool call.
    for forced in (None, *tokenizer.special_tokens.values()):
        body = {"prompt": rows, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
        body |= {} if forced is None else {"logit_bias": {str(forced): 100}}
        reply = asyncio.run(base_server.address.ask("POST", "/v1/completions", body))
        assert reply.status == 200, reply.body
        for row, choice in zip(rows, reply.json["choices"], strict=True):
            found = choice["logprobs"]
            assert len(found["token_logprobs"]) == len(row) + 1, (
                "the token that was drawn must be there, or one is lost"
            )
            logprobs, likeliest = own(trained, row)
            np.testing.assert_allclose(found["token_logprobs"][1:-1], logprobs, atol=1e-3)
            for value, top, best in zip(
                found["token_logprobs"][1:-1], found["top_logprobs"][1:-1], likeliest, strict=True
            ):
                assert (value == max(top.values())) == best
            if forced is not None:
                drawn, _ = own(trained, [*row, forced])
                assert found["token_logprobs"][-1] == pytest.approx(drawn[-1], abs=1e-3)


def test_rolling_loglikelihood(base_server, trained):
    harness = of(base_server)
    texts = [(STORY,), ("Er ging in den Wald.",), (STORY * 6,)]  # the last needs several windows
    values = harness.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    for (text,), value in list(zip(texts, values, strict=True))[:2]:
        ids = trained.tokenizer.encode(text, prepend=trained.tokenizer.bos_token_id)
        if len(ids) < CONTEXT - 1:
            assert value == pytest.approx(own(trained, ids)[0].sum(), abs=NEAR)
    assert values[2] < values[1]


@pytest.mark.parametrize("concurrent", [1, 4])
def test_generation_until(base_server, concurrent):
    harness = of(base_server, num_concurrent=concurrent)
    asked = [
        ("Es war einmal", {"until": ["."], "max_gen_toks": 40}),
        ("Es war einmal ein", {"until": ["🐻", "\n"], "max_gen_toks": 40}),
        ("Er ging", {"until": [" Wald"], "max_gen_toks": 40, "do_sample": False}),
    ]
    assert harness.generate_until(instances("generate_until", asked)) == [" ein Bär 🐻", " Bär ", " in den"]


def test_chats(server):
    model = asyncio.run(server.address.ask("GET", "/v1/models")).json["data"][0]["id"]
    harness = LocalChatCompletion(model=model, base_url=f"{server.url}/v1/chat/completions", max_length=CONTEXT)
    history = harness.apply_chat_template([{"role": "user", "content": "Hello?"}])
    (answer,) = harness.generate_until(instances("generate_until", [(history, {"until": ["🙂"], "max_gen_toks": 60})]))
    assert answer == "Grüße, 日本 "


def test_too_long_contexts_are_cut_by_the_harness(base_server, trained):
    """`max_length` must be the model's context; then what is too long loses its beginning, as with other models."""
    harness, asked = of(base_server), (STORY * 6, " Er ging in den Wald.")
    ((value, _),) = harness.loglikelihood(instances("loglikelihood", [asked]))
    before, after = harness._encode_pair(*asked)
    assert len(before) > CONTEXT
    assert value == pytest.approx(own(trained, (before + after)[-(CONTEXT - 1) :])[0][-len(after) :].sum(), abs=NEAR)
