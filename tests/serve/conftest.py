"""A run directory with a model that has memorized a few conversations."""

import json

import jax
import numpy as np
import optax
import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import Experiment, ModelConfig
from jaxchat.infer.trained import load_model
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import init_params
from jaxchat.runs.config_json import to_json
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.step import init_state, make_train_step

CONTEXT = 128
STORY = "Es war einmal ein Bär 🐻. " + "Er ging in den Wald. " * 3
TURNS = [
    ("Hello?", "Grüße, 日本 🙂!"),
    ("What is 34 + 58?", [("python", "34 + 58"), ("python_output", "92"), ("text", "It is 92.")]),
]


def conversation(*turns):
    messages = []
    for question, answer in turns:
        if not isinstance(answer, str):
            answer = [{"type": kind, "text": text} for kind, text in answer]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


@pytest.fixture(scope="session")
def engine(run_dir):
    return load_model(run_dir, "sft").engine()


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train_from_iterator([STORY * 2], 290)
    tokenizer.save(directory / "tokenizer")
    experiment = Experiment(name="tiny", model=ModelConfig(depth=2, sequence_len=CONTEXT))
    model = GPTConfig.of(experiment.model, tokenizer.vocab_size)
    (directory / "config.json").write_text(to_json(experiment))
    rows = [
        tokenizer.render_conversation(one, max_tokens=CONTEXT + 1)
        for one in (
            conversation(*TURNS),
            conversation(TURNS[1], ("Again?", "Hello? was never asked.")),
            conversation(*TURNS, ("Again?", "You said Hello? first.")),
            conversation(("Say\n/both!", "Both.")),
        )
    ]
    story = tokenizer.encode(STORY, prepend=tokenizer.bos_token_id)
    rows.append((story, [1] * len(story)))
    inputs, targets = np.zeros((1, len(rows), CONTEXT), np.int32), np.full((1, len(rows), CONTEXT), -1, np.int32)
    for i, (ids, mask) in enumerate(rows):
        inputs[0, i, : len(ids) - 1] = ids[:-1]
        targets[0, i, : len(ids) - 1] = np.where(np.array(mask[1:]) == 1, ids[1:], -1)
    optimizer = optax.adam(3e-3)
    step = make_train_step(model, optimizer)
    state = init_state(jax.jit(init_params, static_argnums=0)(model, jax.random.key(0)), optimizer)
    for _ in range(300):
        state, metrics = step(state, {"inputs": inputs, "targets": targets})
    assert metrics["loss"] < 0.01  # so that sampled answers are those that it was shown
    for stage in ("pretrain", "sft"):
        checkpoints = Checkpoints(directory / stage / "checkpoints")
        checkpoints.save(300, state, data={}, meta={})
        checkpoints.close()
        (directory / stage / "stage.json").write_text(json.dumps({"stage": stage, "steps": 300}))
    # A stage that was skipped for lack of data, and one that is still running.
    (directory / "rl").mkdir()
    (directory / "rl" / "stage.json").write_text(json.dumps({"stage": "rl", "steps": 0}))
    (directory / "midtrain").mkdir()
    return directory
