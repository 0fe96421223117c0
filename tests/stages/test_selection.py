"""Where a little text is read many times, a stage's result is its best checkpoint, for all that comes after it."""

import json
import random
import shutil

import numpy as np
import pytest

from jaxchat.export.card import model_card
from jaxchat.infer.trained import load_model
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.init_from import find_start
from jaxchat.stages.training import Batches
from tests.devices.test_processes import start_several
from tests.stages.test_path import assert_same_training, interrupt_at, parameters
from tests.tiny import ARGUMENTS, STEPS, record, refusal, start, values

LENGTH = 80
SETTINGS = (f"--pretrain.num-iterations={LENGTH}", "--pretrain.eval-every=10", "--pretrain.save-every=0",
            "--pretrain.lr-fraction=2", "--checkpoints.keep=1")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dozen documents to train on, and as many others for validation, of the same made-up words."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(2, 6))) for _ in range(60)]
    for name in ("train", "val"):
        documents = [" ".join(draw.choices(words, k=60)) + "." for _ in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def train(directory, data, *arguments, stages="tokenizer,pretrain"):
    return start(directory, f"--data={data}", f"--stages={stages}", *SETTINGS, *arguments)


@pytest.fixture(scope="module")
def turned(tmp_path_factory, data, finished):  # `finished`: with its cache of compiled programs
    directory = tmp_path_factory.mktemp("runs") / "turned"
    code, out, err = train(directory, data, stages="tokenizer,pretrain,report")
    assert code == 0, err
    return directory, out


def best_and_last(directory):
    curve = [(bpb, step) for step, bpb in values(directory, "pretrain", "bpb") if step > 0]
    return min(curve), curve[-1]


def test_it_turns_and_says_so(turned):
    directory, out = turned
    (best, step), (last, end) = best_and_last(directory)
    assert step < end == LENGTH and best < 0.9 * last
    facts = record(directory, "pretrain")
    assert (facts["result_step"], facts["steps"]) == (step, LENGTH)
    assert facts["turned"] == {"bpb": best, "bpb_at_end": last}
    assert {int(p.name) for p in (directory / "pretrain" / "checkpoints").iterdir() if p.is_dir()} == {step, LENGTH}
    said = (
        f"validation turned at step {step} ({best:.3f} bits per byte; {last:.3f} at the end): the result is step {step}"
    )
    assert f"pretrain  {said}; more text, --sizes=auto or --pretrain.num-iterations={step} would do better\n" in out
    report = (directory / "report.md").read_text()
    assert f"\n\npretrain: {said}.\n" in report
    assert f"Bits per byte of text, held out: {best:.3f} after pretrain." in report
    facts = json.loads((directory / "report.json").read_text())
    assert facts["evaluation"]["pretrain"]["bpb"] == best and facts["stages"]["pretrain"]["metrics"]["bpb"] == last


def test_all_that_comes_after_it_takes_the_result(turned):
    directory, _ = turned
    (best, step), _ = best_and_last(directory)
    model = load_model(directory)
    assert model.step == step and load_model(directory, "pretrain", str(LENGTH)).step == LENGTH
    assert not np.array_equal(model.params["head"]["kernel"], parameters(directory, "pretrain")["['head']['kernel']"])
    assert find_start(directory).step == step
    card = model_card(model, RunDirectory(directory), step, title="tiny", dtype="float32")
    assert f"made, after {step} steps." in card and f"| pretrain | {step} of {LENGTH} |" in card
    assert f"Bits per byte of held-out text: {best:.3f}." in card
    assert "Bits per byte" not in model_card(model, RunDirectory(directory), LENGTH, title="tiny", dtype="float32")


def test_stopped_at_the_best_and_after_it_the_result_is_the_same(turned, data, tmp_path, monkeypatch):
    directory, _ = turned
    step = record(directory, "pretrain")["result_step"]
    for at in (step, step + 15):
        with monkeypatch.context() as patch:
            interrupt_at(patch, Batches, at)
            assert train(tmp_path / "run", data)[0] == 130
        if at == step:  # saved by the interruption
            mine, result = parameters(tmp_path / "run", "pretrain"), load_model(directory).params
            np.testing.assert_array_equal(mine["['head']['kernel']"], result["head"]["kernel"])
    code, _, err = train(tmp_path / "run", data)
    assert code == 0 and f"resuming at step {step + 15} of {LENGTH}" in err, err
    assert_same_training(tmp_path / "run", directory, "pretrain", "bpb")
    for name in ("result_step", "turned"):
        assert record(tmp_path / "run", "pretrain")[name] == record(directory, "pretrain")[name]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_choose_as_one(turned, data, tmp_path):
    run, program = tmp_path / "run", "import sys; from jaxchat.cli.launch import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*ARGUMENTS, f"--run-dir={run}", f"--data={data}", "--stages=tokenizer,pretrain", *SETTINGS]
    for code, said in start_several((program,), arguments):
        assert code == 0, said
    (best, step), (last, _) = best_and_last(run)
    facts = record(run, "pretrain")
    assert facts["result_step"] == step == record(turned[0], "pretrain")["result_step"]
    assert facts["turned"] == {"bpb": best, "bpb_at_end": last}
    assert load_model(run, "pretrain").step == step


def test_a_result_that_is_damaged_or_gone_is_named_with_its_remedy(turned, data, tmp_path):
    run = shutil.copytree(turned[0], tmp_path / "run")
    step = record(run, "pretrain")["result_step"]
    folder, file = run / "pretrain" / "checkpoints" / str(step), run / "pretrain" / "stage.json"
    (folder / "manifest.json").unlink()
    message = refusal(train(run, data, stages="evaluate"))
    assert f"checkpoint {folder} is damaged" in message
    assert f"delete it and {file} to resume from step {LENGTH}, or train again with --redo=pretrain" in message
    shutil.rmtree(folder)
    message = refusal(train(run, data, stages="evaluate"))
    assert f"has no checkpoint of step {step}, the result of pretrain; delete {file} to go on from step" in message
    file.unlink()
    code, out, err = train(run, data, stages="pretrain")
    assert code == 0 and "turned" not in out, err
    assert record(run, "pretrain")["result_step"] == LENGTH


def test_where_validation_never_turns_the_last_step_is_the_result(finished):
    for stage in ("pretrain", "midtrain", "sft", "rl"):
        facts = record(finished, stage)
        assert facts["result_step"] == facts["steps"] and "turned" not in facts
    assert record(finished, "sft")["parent"]["step"] == STEPS
