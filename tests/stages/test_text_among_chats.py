"""Midtraining on all tokens, and on text that is read on from where pretraining stopped."""

import json

import numpy as np
import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import DataConfig, Experiment, FinetuneConfig, Impossible, ModelConfig
from jaxchat.data.loader import pretrain_batches
from jaxchat.data.mixed import text_places
from jaxchat.data.synthetic import write_synthetic
from jaxchat.data.text.folder import find_text
from jaxchat.errors import UserError
from jaxchat.infer.trained import load_tokenizer
from jaxchat.stages.settings import check_has_data
from jaxchat.stages.training import Batches
from tests.stages.test_path import assert_same_training, interrupt_at
from tests.tiny import STEPS, copy, record, refusal, start, values

ROWS, TEXT = 8, 2
OPTIONS = ["--stages=midtrain", "--midtrain.targets=all", f"--midtrain.text-fraction={TEXT / ROWS}"]


@pytest.fixture
def seen(monkeypatch):
    """The batches that training takes, as `[rows, T]` in the loader's order."""
    found, real = [], Batches.next_batch

    def next_batch(self, step, params):
        batch, extra = real(self, step, params)
        found.append({k: np.asarray(v).swapaxes(0, 1).reshape(-1, v.shape[-1]) for k, v in batch.items()})
        return batch, extra

    monkeypatch.setattr(Batches, "next_batch", next_batch)
    return found


@pytest.fixture(scope="module")
def mixed(finished, tmp_path_factory):
    """A run whose midtraining has text in it, and what it said."""
    run = copy(finished, tmp_path_factory.mktemp("mixed") / "run", "pretrain")
    code, out, err = start(run, *OPTIONS)
    assert code == 0, err
    return run, out


def pretraining_rows(run, first, count):
    """Rows of the pretraining text, read from its beginning."""
    text = find_text(run / "data").train
    batches = pretrain_batches(
        text, load_tokenizer(run / "tokenizer"), rows=1, sequence_len=64, seed=Experiment().seed, shuffle=True
    )
    rows = [next(batches) for _ in range(first + count)][first:]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def test_text_is_read_on_from_where_pretraining_stopped(finished, tmp_path, seen):
    run = copy(finished, tmp_path / "run", "pretrain")
    code, out, err = start(run, *OPTIONS)
    assert code == 0, err
    assert "midtrain  2 rows of a step are text, read on from where it was read up to" in out
    places = text_places(TEXT, ROWS)
    assert len(seen) == STEPS and all(len(batch["inputs"]) == ROWS for batch in seen)
    expected = pretraining_rows(run, STEPS * ROWS, STEPS * TEXT)
    for name, rows in expected.items():
        np.testing.assert_array_equal(np.concatenate([batch[name][places] for batch in seen]), rows)
    bos = load_tokenizer(run / "tokenizer").special_tokens["<|bos|>"]
    for batch in seen:
        chats, targets = batch["inputs"][~places], batch["targets"][~places]
        assert (chats[:, 0] == bos).all() and (targets[:, 0] != -1).all()
        filled = targets != -1  # of a row everything up to its padding, so that each target is the next input
        np.testing.assert_array_equal(targets[:, :-1][filled[:, 1:]], chats[:, 1:][filled[:, 1:]])
    # SFT reads on after midtraining.
    seen.clear()
    code, out, err = start(run, "--stages=sft", *OPTIONS[1:], f"--sft.text-fraction={TEXT / ROWS}")
    assert code == 0, err
    rows = pretraining_rows(run, STEPS * (ROWS + TEXT), TEXT)["inputs"]
    np.testing.assert_array_equal(seen[0]["inputs"][places], rows)


def test_the_record_says_how_much_is_text(mixed, finished):
    run, out = mixed
    assert record(run, "midtrain")["text_fraction"] == TEXT / ROWS
    assert "25.0% of the rows are text of pretraining" in out
    assert "text_fraction" not in record(finished, "midtrain")
    packed = record(run, "midtrain")["packing"]
    assert packed["rows"] == STEPS * (ROWS - TEXT)
    assert values(run, "midtrain") != values(finished, "midtrain")
    # Before the first step both are the same model, measured alike.
    assert values(run, "midtrain", "bpb")[0] == values(finished, "midtrain", "bpb")[0]


def test_interrupted_training_is_the_uninterrupted_one(finished, mixed, tmp_path, monkeypatch):
    run = copy(finished, tmp_path / "run", "pretrain")
    for step in (1, 4):
        with monkeypatch.context() as patch:
            interrupt_at(patch, Batches, step)
            code, _, _ = start(run, *OPTIONS)
        assert code == 130
    code, _, err = start(run, *OPTIONS)
    assert code == 0 and "resuming at step 4 of 6" in err, err
    assert_same_training(run, mixed[0], "midtrain", "bpb")
    positions = [Checkpoints(each / "midtrain" / "checkpoints").read_position() for each in (run, mixed[0])]
    assert positions[0] == positions[1]


def test_an_epoch_of_conversations_takes_more_steps_with_text(finished, tmp_path):
    run = copy(finished, tmp_path / "run", "pretrain")
    config = json.loads((run / "config.json").read_text())
    assert start(run, *OPTIONS, "--midtrain.num-iterations=None", "--midtrain.epochs=1")[0] == 0
    with_text = record(run, "midtrain")["steps"]
    other = copy(finished, tmp_path / "other", "pretrain")
    assert config["midtrain"]["text_fraction"] == 0
    assert start(other, "--stages=midtrain", "--midtrain.num-iterations=None", "--midtrain.epochs=1")[0] == 0
    assert with_text == pytest.approx(record(other, "midtrain")["steps"] * ROWS / (ROWS - TEXT), abs=1)


def test_other_text_is_read_from_its_beginning(finished, tmp_path, seen):
    folder = tmp_path / "data"
    write_synthetic(folder, seed=9, documents=300, conversations=200)
    run = tmp_path / "run"
    code, _, err = start(run, f"--data={folder}", "--stages=tokenizer,pretrain")
    assert code == 0, err
    seen.clear()
    other = tmp_path / "other"
    write_synthetic(other, seed=10, documents=300, conversations=200)
    code, out, err = start(run, f"--data={other}", *OPTIONS)
    assert code == 0, err
    assert "text, read from its beginning, since it is not what was read before: " in out
    first = pretraining_rows_of(other, run)
    np.testing.assert_array_equal(seen[0]["inputs"][text_places(TEXT, ROWS)], first)


def pretraining_rows_of(folder, run):
    text = find_text(folder).train
    batches = pretrain_batches(
        text, load_tokenizer(run / "tokenizer"), rows=TEXT, sequence_len=64, seed=Experiment().seed, shuffle=True
    )
    return next(batches)["inputs"]


def test_what_is_trained_on_is_fixed_once_a_stage_has_begun(mixed):
    said = refusal(start(mixed[0], "--stages=midtrain"))
    assert "midtrain was made with midtrain.targets all, not assistant" in said
    said = refusal(start(mixed[0], *OPTIONS[:2], "--midtrain.text-fraction=0.5"))
    assert "midtrain was made with midtrain.text-fraction 0.25, not 0.5" in said


@pytest.mark.parametrize(
    "fraction, lanes, message",
    [
        (0.01, 1, "midtrain.text-fraction is 0.01, which of the 8 rows of a step leaves none for text; "
         "the nearest that works is 0.125"),
        (0.99, 1, "midtrain.text-fraction is 0.99, which of the 8 rows of a step leaves none for conversations; the "
         "nearest that works is 0.875"),
        (0.1, 4, "midtrain.text-fraction is 0.1, which of the 8 rows of a step leaves none for text; the nearest that "
         "works is 0.5"),
        (0.5, 8, "midtrain.text-fraction is 0.5, but a step has only 8 rows for 8 lanes; raise midtrain.batch-tokens, "
         "or set midtrain.text-fraction to 0"),
        (-0.1, 1, "text-fraction is -0.1; it must be at least 0 and below 1"),
    ],
)  # fmt: skip
def test_a_step_needs_rows_of_both(fraction, lanes, message):
    with pytest.raises(Impossible) as refused:
        Experiment(
            model=ModelConfig(sequence_len=64),
            data=DataConfig(lanes=lanes),
            midtrain=FinetuneConfig(batch_tokens=512, text_fraction=fraction),
        )
    assert message in str(refused.value)


def test_text_fractions_count_in_lanes():
    config = FinetuneConfig(text_fraction=0.3)
    assert [config.text_rows(rows, 1) for rows in (10, 100)] == [3, 30]
    assert config.text_rows(64, 8) == 16 and FinetuneConfig().text_rows(64, 8) == 0


def test_text_among_conversations_needs_text():
    for fraction in (0.0, 0.5):
        sft = FinetuneConfig(mixture=("chats.jsonl",), text_fraction=fraction)
        alone = Experiment(stages=("sft",), sft=sft)
        if fraction == 0:
            check_has_data(alone)
            continue
        with pytest.raises(UserError, match="trains on your text: give it a folder with --data=DIR"):
            check_has_data(alone)
