"""What a training shows of its model: one batch of prompts with lengths and draws of their own."""

import jax
import numpy as np
import pytest

from jaxchat.config import MeshConfig
from jaxchat.data.synthetic.world import STATEMENTS, build_world
from jaxchat.devices.mesh import make_mesh
from jaxchat.infer.engine import Engine
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import init_params
from jaxchat.model.parameters import shardings
from jaxchat.runs.metrics import Metrics, read_metrics
from jaxchat.stages.samples import (
    FACTS,
    FACTS_OF_THE_GENERATED_WORLD,
    Prompt,
    continuations,
    fixed_prompts,
    is_english,
    prompts_of_texts,
)
from jaxchat.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, and then it sleeps. " * 3], 290)


@pytest.fixture(scope="module")
def model(tokenizer):
    """A tiny model whose parameters are all random, so that what it writes depends on what it reads."""
    config = GPTConfig(depth=1, sequence_len=48, vocab_size=tokenizer.vocab_size)
    leaves, tree = jax.tree.flatten(init_params(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    filled = [jax.random.normal(k, x.shape) / np.sqrt(x.shape[0]) for k, x in zip(keys, leaves, strict=True)]
    return config, jax.tree.unflatten(tree, filled)


def test_each_prompt_is_continued_as_if_it_were_alone(model, tokenizer):
    config, params = model
    engine = Engine(config, params, tokenizer, dtype="float32")
    bos = tokenizer.bos_token_id
    prompts = prompts_of_texts(tokenizer, ["the quick brown fox jumps over the lazy dog", "dog"])
    prompts += [Prompt("the fox", [bos, *tokenizer.encode("the fox")], 5), Prompt("", [bos], seed=0)]
    prompts += [Prompt("", [bos], seed=1), Prompt("too long", [bos] * config.sequence_len)]
    found = list(continuations(engine, prompts))
    assert [prompt for prompt, _ in found] == prompts[:-1]  # the last has no room for an answer
    for prompt, text in found:
        options = {"temperature": 0.0} if prompt.seed is None else {"temperature": 1.0, "seed": prompt.seed}
        alone = engine.generate([prompt.ids], max_new_tokens=prompt.tokens, **options)[0]
        assert text == tokenizer.decode(alone.tokens)
    assert found[3][1] != found[4][1]
    assert list(continuations(engine, prompts[-1:])) == []


def test_devices_share_them(model, tokenizer):
    config, params = model
    prompts = fixed_prompts(tokenizer, generated=True)
    mesh = make_mesh(MeshConfig())
    assert mesh.size == 4
    spread = jax.device_put(params, shardings(mesh, params))
    one, four = (list(continuations(Engine(config, p, tokenizer, dtype="float32"), prompts)) for p in (params, spread))
    assert one == four


@pytest.mark.parametrize(
    "text", ["日本語の文を読みます。", "हिन्दी में लिखा हुआ", "Größere Übungen für Füße", "🙂🙂🙂🙂🙂"]
)
def test_a_beginning_ends_with_a_whole_character(tokenizer, text):
    (prompt,) = prompts_of_texts(tokenizer, [text])
    assert text.startswith(prompt.text) and prompt.text
    assert tokenizer.decode(prompt.ids[1:]) == prompt.text


def test_facts_in_english_are_for_english_text(tokenizer):
    asked = {language: fixed_prompts(tokenizer, generated=False, english=language) for language in (True, False)}
    assert [prompt.text for prompt in asked[True]] == [*FACTS, "", ""]
    assert [prompt.text for prompt in asked[False]] == ["", ""]
    english = "It was the best of times. A man walked into the bar and said that the drinks were on him."
    assert is_english([english]) and is_english([english, "x" * 99])
    for other in (
        "Die Datei liegt im Ordner the, der hier beschrieben wird; " + "mehr dazu weiter unten. " * 20,
        "日本語の文",
    ):
        assert not is_english([other])


def test_the_generated_world_is_asked_for_its_own_facts():
    world = build_world(42)
    beginnings = {
        statement.split("{v}")[0].strip().format(**world.people[name].words(pronoun=False))
        for statements in STATEMENTS.values()
        for statement in statements
        for name in world.people
    }
    assert beginnings.issuperset(FACTS_OF_THE_GENERATED_WORLD)


def test_texts_of_its_own_are_told_apart_by_their_seed(tmp_path):
    with Metrics(tmp_path, "pretrain", live=False) as metrics:
        for seed in (0, 1, 1):  # the last one again, after a resume
            metrics.sample(3, "", f"text {seed}", seed=seed)
        metrics.sample(3, "The", " end.")
    kept = [(line.get("seed"), line["sample"]) for line in read_metrics(tmp_path)]
    assert kept == [(0, "text 0"), (1, "text 1"), (None, " end.")]
