"""Fine-tuning of an imported model on one's own conversations: `launch.py --init-from`."""

import contextlib
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest

from jaxchat.cli.launch import main
from jaxchat.cli.main import main as jaxchat
from jaxchat.cli.options import configure
from jaxchat.infer.trained import load_model
from jaxchat.runs.directory import RunDirectory
from jaxchat.stages.preflight import check_planned_data
from jaxchat.stages.settings import check_settings
from tests.export.nanochat_files import parameters, weights, write_nanochat
from tests.tiny import record, refusal, values

SMALL = ["--sft.batch-tokens=512", "--sft.device-rows=2", "--sft.eval-tokens=256", "--sft.num-iterations=3"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    assert (
        jaxchat(["import", str(write_nanochat(folder / "source")), "--from=nanochat", f"--run={folder / 'run'}"]) == 0
    )
    return folder / "run"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with conversations, and another with none."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mine" / "chat").mkdir(parents=True)
    (folder / "none").mkdir()
    turns = [{"role": "user", "content": "the fox?"}, {"role": "assistant", "content": "the dog, thirty-four."}]
    (folder / "mine" / "chat" / "train.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)
    return folder


def start(run, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["--experiment=finetune", f"--run-dir={run}", *SMALL, *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def finetuned(imported, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("finetuned") / "run"
    code, out, err = start(run, f"--init-from={imported}", f"--data={data / 'mine'}", "--model.sequence-len=32")
    assert code == 0, err
    assert f"pretrain  is the model of sft of {imported}, step 650" in out
    assert "29 conversations to train on (chat 29), 1 to validate with" in out
    return run


def test_training_starts_from_the_model(imported, finetuned):
    before, after = load_model(finetuned, "pretrain"), load_model(finetuned)
    jax.tree.map(np.testing.assert_array_equal, before.params, parameters(weights()))
    assert after.stage == "sft" and after.model.sequence_len == 32
    assert not np.array_equal(after.params["head"]["kernel"], before.params["head"]["kernel"])
    bpb = [value for _, value in values(finetuned, "sft", "bpb")]
    assert len(bpb) == 2 and bpb[-1] < bpb[0]
    assert record(finetuned, "sft")["parent"] == {"stage": "pretrain", "step": 650}
    source = record(finetuned, "pretrain")["imported"]
    assert source == {
        **{"from": "jaxchat", "run": str(imported), "stage": "sft", "step": 650},
        **{"id": RunDirectory(imported).id_of("sft"), "rms_norm_eps": 1.1920929e-07},
    }
    report = (finetuned / "report.md").read_text()
    assert "A chatbot that began as the sft model of run: 492k parameters" in report
    assert "| pretrain | the sft model of run | 650 |" in report


def test_few_steps_are_said_with_what_to_change(imported, data, tmp_path):
    options = [f"--init-from={imported}", f"--data={data / 'mine'}", "--model.sequence-len=32"]
    code, out, err = start(tmp_path / "run", *options, "--sft.num-iterations=None")
    assert code == 0, err
    steps, epochs = map(int, re.search(r"(\d+) steps? only, .*--sft.epochs=(\d+) makes 20 steps", out).groups())
    assert record(tmp_path / "run", "sft")["steps"] == steps < 20 and epochs == pytest.approx(3 * 20 / steps, rel=0.5)


def test_the_same_command_again_and_without_its_source(imported, finetuned, data, tmp_path):
    own = [f"--data={data / 'mine'}", "--model.sequence-len=32"]
    for options in ([f"--init-from={imported}"], []):
        code, out, err = start(finetuned, *own, *options)
        assert code == 0 and "sft       already finished; skipped" in out, err
    other = shutil.copytree(finetuned, tmp_path / "other")
    assert "began with another model" in refusal(start(finetuned, *own, f"--init-from={other}"))


def test_the_same_command_again_when_its_source_has_gone_on_or_is_gone(imported, data, tmp_path):
    source, run = shutil.copytree(imported, tmp_path / "source"), tmp_path / "run"
    options = [f"--init-from={source}", f"--data={data / 'mine'}", "--model.sequence-len=32"]
    assert start(run, *options, "--stages=sft")[0] == 0
    (source / "rl").mkdir()
    shutil.copytree(source / "sft" / "checkpoints", source / "rl" / "checkpoints")
    (source / "rl" / "stage.json").write_text(json.dumps({**record(source, "sft"), "id": "another"}))
    said = f"pretrain  is this run's copy of the model of {source}, which has another one now or is gone\n"
    for change in (lambda: None, lambda: shutil.rmtree(source)):
        change()
        code, out, err = start(run, *options)
        assert code == 0 and out.count(said) == 1 and "sft       already finished; skipped" in out, err
    for again in ("--fresh", "--redo=pretrain"):  # these need the other run
        assert "there is no run directory" in refusal(start(run, *options, again))
    (run / "pretrain" / "stage.json").unlink()  # as if it had been stopped before its copy was whole
    assert "there is no run directory" in refusal(start(run, *options))


def test_a_fine_tuned_model_leaves_too(finetuned, tmp_path):
    assert jaxchat(["export", "--run", str(finetuned), "--to", "hf", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 32


def test_a_start_that_was_stopped_is_taken_up(imported, finetuned, data, tmp_path):
    """Before the model was complete, while the tokenizer was."""
    run = shutil.copytree(finetuned, tmp_path / "run")
    shutil.rmtree(run / "sft")
    (run / "pretrain" / "stage.json").unlink()
    options = [f"--data={data / 'mine'}", f"--init-from={imported}", "--model.sequence-len=32", "--stages=report"]
    code, out, err = start(run, *options)
    assert code == 0 and "pretrain  is the model of sft" in out, err
    jax.tree.map(np.testing.assert_array_equal, load_model(run).params, parameters(weights()))


def bad(imported, data):
    mine = f"--data={data / 'mine'}"
    start_from = f"--init-from={imported}"
    return [
        ([mine], "finetune starts from a model: name its run with --init-from=RUN"),
        ([mine, f"--init-from={data}/absent"], "there is no run directory"),
        ([mine, f"--init-from={imported / 'config.json'}"], "config.json is a file; name the folder of a run"),
        ([mine, f"--init-from={imported.parent / 'source'}"], "jaxchat import --from nanochat"),
        ([mine, f"--init-from={data / 'mine'}"], "is not a run: it has no config.json"),
        ([start_from], "give a folder with --data=DIR, or name a file of conversations with --sft.mixture=FILE.jsonl"),
        ([start_from, f"--data={data / 'none'}"], "has no conversations of yours: put them into"),
        ([start_from, mine, "--model.depth=3"], "--model.depth is 3, but the model of"),
        ([start_from, mine, "--model.sequence-len=128"], "--model.sequence-len is 128; it must be at most 64"),
        ([start_from, mine, "--tokenizer.vocab-size=999"], "--tokenizer.vocab-size: the run takes the tokenizer of"),
    ]


@pytest.mark.parametrize("which", range(10))
def test_what_cannot_be_fine_tuned_is_a_line(which, imported, data, tmp_path):
    arguments, what = bad(imported, data)[which]
    assert what in refusal(start(tmp_path / "run", *arguments))
    assert not (tmp_path / "run").exists()


def test_a_run_of_its_own_is_not_replaced(imported, data):
    options = [f"--init-from={imported}", f"--data={data / 'mine'}"]
    assert "--init-from names the run itself" in refusal(start(imported, *options))
    assert "--init-from names the run that --fresh puts aside" in refusal(start(imported, *options, "--fresh"))


def test_a_file_of_conversations_needs_no_folder(data):
    file, lines = data / "mine" / "chat" / "train.jsonl", []
    experiment = configure("finetune", [f"--sft.mixture={file}"], None, ())
    check_settings(experiment)
    check_planned_data(experiment, say=lines.append)
    assert lines == [f"sft       29 conversations to train on ({file} 29), 1 to validate with"]
