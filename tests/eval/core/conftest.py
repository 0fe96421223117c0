import json

import jax
import jax.numpy as jnp
import pytest

from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import init_params
from jaxchat.tokenizer import Tokenizer

WORDS = "the cat sat on a red mat and saw two dogs run home while rain fell over old green hills".split()

# A query of some words, so that prompts with examples are longer than the context of the tests' models, and longer
# than a page.
LONG = "Once upon a time the two old dogs saw a red cat run over the green hills while rain fell on the home mat"
MULTIPLE_CHOICE = [
    {"query": "The cat sat on the", "choices": ["mat", "hills", "rain", "dogs run"], "gold": 0},
    {"query": "One choice begins like the other:", "choices": ["red", "red mat", "red mat and cat"], "gold": 1},
    {"query": "So too when it comes second:", "choices": ["old dogs", "old"], "gold": 0},
    {"query": f"{LONG}. Who ran?", "choices": ["A", "B", "C"], "gold": 2},
    {"query": "Equal choices:", "choices": ["the rain", "the rain"], "gold": 1},
    {"query": "A single one:", "choices": ["home"], "gold": 0},
    {"query": f"{LONG}, {LONG} and", "choices": [f"fell {LONG}", "ran home"], "gold": 1},
    {"query": "日本 and the cat", "choices": ["日本", "日木", " 🙂"], "gold": 0},
]
SCHEMA = [
    {"context_options": ["The dogs saw the cat; the dogs", "The dogs saw the cat; the cat"],
     "continuation": "ran home", "gold": 0},
    # Options that end alike lengthen the common suffix beyond the continuation.
    {"context_options": ["Old dogs and the cat", "Red dogs and the cat"], "continuation": "ran home.", "gold": 1},
    {"context_options": [f"{LONG}. The rain", f"{LONG}. The hills"], "continuation": "fell.", "gold": 0},
    # Equal options: the suffix is the whole prompt, and nothing is left that could be predicted.
    {"context_options": ["The rain", "The rain"], "continuation": "fell", "gold": 0},
    {"context_options": ["The cat", "A cat", "Two cats"], "continuation": "and a dog sat on the mat", "gold": 2},
]  # fmt: skip
LANGUAGE_MODELING = [
    {"context": "  the cat sat on the red \n", "continuation": "mat"},
    {"context": f"{LONG} and then they all ran", "continuation": "home and saw the rain"},
    {"context": "two old dogs", "continuation": "run"},
    {"context": f"{LONG}. {LONG}", "continuation": "."},
    {"context": "", "continuation": "a"},
]


def entry(label, kind, shots, **more):
    return {"label": label, "dataset_uri": f"made/{label}.jsonl", "num_fewshot": [shots], "icl_task_type": kind, **more}


def write_bundle(folder, tasks):
    """Writes (entry of core.yaml, items) as a bundle."""
    (folder / "eval_data" / "made").mkdir(parents=True, exist_ok=True)
    for listed, items in tasks:
        lines = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in items]
        (folder / "eval_data" / listed["dataset_uri"]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    # JSON is YAML.
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": [listed for listed, _ in tasks]}), encoding="utf-8")
    return folder


TASKS = [
    (entry("piqa", "multiple_choice", 2, continuation_delimiter="\nAnswer: "), MULTIPLE_CHOICE),
    (entry("copa", "multiple_choice", 0), MULTIPLE_CHOICE),
    (entry("winograd", "schema", 0), SCHEMA),
    (entry("winogrande", "schema", 1), SCHEMA),
    (entry("jeopardy", "language_modeling", 2, continuation_delimiter="\nAnswer: "), LANGUAGE_MODELING[:4]),
    (entry("lambada_openai", "language_modeling", 0), LANGUAGE_MODELING),
]


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundle"), TASKS)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train_from_iterator([LONG, " ".join(WORDS), LONG.lower(), "ran home.", "Answer: a, b"], 300)


@pytest.fixture(scope="session")
def config(tokenizer):
    """A context shorter than most prompts, and windows of 8 tokens in one of two layers."""
    return GPTConfig(depth=2, sequence_len=32, vocab_size=tokenizer.vocab_size, window_pattern="SL")


@pytest.fixture(scope="session")
def params(config):
    """Parameters without zeros, and a head that makes some tokens much likelier than others."""
    tree = init_params(config, jax.random.key(0))
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    made = [
        jnp.where(jnp.any(leaf), leaf, jax.random.normal(key, leaf.shape) / len(leaf) ** 0.5)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, made)
