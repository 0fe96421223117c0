"""Sizes that follow from the text: decided once, written down, kept; and what a start says about passes."""

import dataclasses
import json
import random
import re

import pytest

from jaxchat.cli.launch import main
from jaxchat.config import DataConfig, Experiment, ModelConfig, PretrainConfig, TokenizerConfig
from jaxchat.data.synthetic.stories import write_document
from jaxchat.data.synthetic.world import build_world
from jaxchat.model.config import GPTConfig
from jaxchat.planning.lines import format_tokens
from jaxchat.planning.settle import SIZES, keep_sizes, settle
from jaxchat.runs.directory import RunDirectory
from jaxchat.tokenizer import load_tokenizer
from jaxchat.train.budget import flops_per_token
from tests.tiny import refusal

WORLD = build_world(3)


def add_text(folder, name, documents):
    draw = random.Random(name)
    texts = (write_document(WORLD, draw) for _ in range(documents))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    add_text(folder, "train", 600)
    add_text(folder, "val", 20)
    return folder


@pytest.fixture(scope="module")
def begun(folder, tmp_path_factory):
    """A run of which the tokenizer is made, and what the start said."""
    directory = tmp_path_factory.mktemp("runs") / "auto"
    return directory, *launch(f"--data={folder}", f"--run-dir={directory}", "--model.sequence-len=64")


def launch(*arguments):
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*arguments, "--stages=tokenizer"])
    return code, out.getvalue(), err.getvalue()


def sizes_of(directory):
    config = json.loads((directory / "config.json").read_text())
    return {name: config[field.split(".")[0]][field.split(".")[1]] for name, field in SIZES.items()}


def test_a_folder_of_text_is_all_that_it_takes(begun):
    directory, code, out, err = begun
    assert code == 0, err
    config, sizes = json.loads((directory / "config.json").read_text()), sizes_of(directory)
    assert config["name"] == "auto" and config["sizes"] == "auto"
    assert sizes["sequence_len"] == 64  # as the user has set
    assert load_tokenizer(directory / "tokenizer").vocab_size == sizes["vocab_size"]
    assert config["pretrain"]["eval_every"] <= sizes["steps"]
    lines = [line.removeprefix("sizes     ") for line in out.splitlines() if line.startswith("sizes ")]
    assert len(lines) == 3
    assert re.search(r"kB of text to train on in 600 documents: about [\d.]+ thousand tokens", lines[0])
    for name in ("depth", "vocab_size", "steps", "batch_tokens"):
        assert f"{sizes[name]:,}" in lines[1]


def test_a_run_keeps_its_sizes_when_the_text_grows(begun, tmp_path):
    directory = begun[0]
    add_text(tmp_path, "train", 3000)
    add_text(tmp_path, "val", 20)
    before = sizes_of(directory)
    code, out, err = launch("--experiment=auto", f"--data={tmp_path}", f"--run-dir={directory}")
    assert code == 0, err
    assert sizes_of(directory) == before
    assert "sizes " not in out
    fresh = tmp_path / "fresh"
    assert launch(f"--data={tmp_path}", f"--run-dir={fresh}", "--model.sequence-len=64")[0] == 0
    assert sizes_of(fresh)["steps"] > before["steps"]


def test_what_contradicts_the_run_is_refused(begun, folder):
    directory = begun[0]
    vocab_size = sizes_of(directory)["vocab_size"]
    other = launch("--experiment=auto", f"--data={folder}", f"--run-dir={directory}", "--tokenizer.vocab-size=300")
    assert f"tokenizer was made with tokenizer.vocab-size {vocab_size}, not 300" in refusal(other)


def test_sizes_that_do_not_go_together_are_one_line(folder, tmp_path):
    options = (f"--data={folder}", f"--run-dir={tmp_path / 'run'}", "--data.lanes=7")
    assert "data.lanes is 7; it must divide the" in refusal(launch(*options))
    assert not (tmp_path / "run").exists()


def test_a_length_that_the_user_sets_stays(begun):
    run = RunDirectory(begun[0])
    for field, value in (("num_iterations", 7), ("target_flops", 1e9), ("tokens_per_param", 3.0)):
        asked = Experiment(sizes="auto", pretrain=PretrainConfig(**{field: value}))
        kept = keep_sizes(asked, run, {f"pretrain.{field}"})
        assert getattr(kept.pretrain, field) == value
        assert kept.pretrain.num_iterations == asked.pretrain.num_iterations
        assert kept.model.depth == sizes_of(begun[0])["depth"]


def fixed(folder, steps):
    return Experiment(
        data=DataConfig(path=str(folder)),
        tokenizer=TokenizerConfig(vocab_size=512),
        model=ModelConfig(depth=1, sequence_len=64),
        pretrain=PretrainConfig(batch_tokens=2048, num_iterations=steps),
    )


def said(experiment):
    lines = []
    settled = settle(experiment, None, say=lines.append)
    return settled, [line.removeprefix("data      ") for line in lines]


def test_fixed_sizes_are_told_how_often_they_read_the_text(folder):
    experiment = fixed(folder, 20)
    settled, lines = said(experiment)
    assert settled == experiment
    assert len(lines) == 2 and lines[1].startswith(f"pretraining reads {format_tokens(20 * 2048)} tokens (20 steps): ")


def test_many_passes_are_a_warning_with_what_to_change(folder):
    _, lines = said(fixed(folder, 2000))
    assert len(lines) == 3
    assert lines[2].startswith("warning: a text that is read more than 4 times") and "--sizes=auto" in lines[2]
    steps = int(re.search(r"--pretrain.num-iterations=(\d+) stops after 4 passes", lines[2])[1])
    assert len(said(fixed(folder, steps))[1]) == 2


def test_compute_bounds_the_training(folder):
    experiment = dataclasses.replace(fixed(folder, None), sizes="auto")
    settled = settle(experiment, None, flops=1e10, say=lambda line: None)
    model = GPTConfig.of(settled.model, settled.tokenizer.vocab_size)
    steps, batch = settled.pretrain.num_iterations, settled.pretrain.batch_tokens
    assert steps == 1 or steps * batch * flops_per_token(model) <= 1e10


def test_text_that_is_not_there_yet():
    downloads = Experiment(sizes="auto", data=DataConfig(path="nowhere", download=("fineweb-edu:16",)))
    _, lines = said(dataclasses.replace(downloads, sizes="fixed"))
    assert lines[0].startswith("about 4.0 GB of text to train on") and "about 848 million tokens" in lines[0]
    generated = Experiment(
        data=DataConfig(generate=True, synthetic_documents=2000), tokenizer=TokenizerConfig(vocab_size=1024)
    )
    assert "in about 2,000 documents" in said(generated)[1][0]
