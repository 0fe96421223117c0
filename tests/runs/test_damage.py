"""Every file of a small run, damaged in every way: it is used all the same, or a line says which and what to do.

`benchmarks/robustness/run_directory.py` does the same with whole commands.
"""

from __future__ import annotations

import json
import random
import re
import shutil

import pytest
from robustness.run_directory import damage, kinds_of_damage

from jaxchat.config import Experiment, ModelConfig
from jaxchat.errors import UserError
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.files import write_bytes
from jaxchat.runs.metrics import Metrics
from jaxchat.runs.report import build_report, write_report

EXPERIMENT = Experiment(name="tiny", model=ModelConfig(depth=4))
MACHINE = {
    "platform": "cpu", "device_kind": "cpu", "device_count": 1, "hosts": 1, "cores": 2, "memory_bytes": 1,
    "jax": "1", "python": "3",
}  # fmt: skip
FILES = ("config.json", "metrics.jsonl", "tokenizer/begun.json", "tokenizer/stage.json", "sft/begun.json",
         "sft/stage.json", "evaluate/sft/sums.jsonl")  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = RunDirectory(tmp_path_factory.mktemp("runs") / "run")
    directory.open(EXPERIMENT)
    for stage, sources in (("tokenizer", []), ("sft", ["tokenizer"])):
        directory.begin(stage, EXPERIMENT, sources)
        times = {"seconds": 1.5, "started": 1.0, "finished": 2.0, "train_seconds": 1.0, "peak_memory_bytes": 5}
        facts = {"steps": 4, "tokens": 64, "machine": MACHINE, "metrics": {"vocab_size": 300}, "parent": None}
        facts |= {"packing": {"rows": 4, "targets": 60, "utilisation": 0.9}, "left_out": {"too_long": 1}}
        facts |= {"divergences": [{"step": 3, "back_to": 1, "batches": 2, "why": "loss is nan"}]}
        directory.write_record(stage, {"stage": stage, "id": directory.id_of(stage), **times, **facts})
    with Metrics(directory.path, "sft", identity=directory.id_of("sft"), live=False) as metrics:
        for step in range(4):
            metrics.log(step, loss=1.0, step_seconds=1.0, input_seconds=0.1)
        metrics.log(4, bpb=1.0)
        metrics.sample(4, "Who?", "Mé.")
    with Metrics(directory.path, "evaluate", live=False) as metrics:
        metrics.log(4, of="sft", model=directory.id_of("sft"), **{"score/sums": 0.5, "count/sums": 2})
    answer = {"question": "1 + 1?", "answer": "2", "right": "2", "score": 1.0, "cut": False}
    write_bytes(directory.answers("sft", "sums"), (json.dumps(answer) + "\n").encode())
    write_report(directory, vocab_size=300, parameters=1000)
    return directory.path


def use(path):
    """What a start does with a finished run: opens it, looks for models, and reports."""
    directory = RunDirectory(path)
    directory.open(EXPERIMENT)
    directory.stages_with_model()
    said = []
    build_report(directory, directory.read_metrics(said.append), vocab_size=300, parameters=1000)
    return said


@pytest.mark.parametrize("kind", kinds_of_damage())
@pytest.mark.parametrize("file", FILES)
def test_damage_is_told_with_a_remedy_that_works(finished, tmp_path, file, kind):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    if not damage(run / file, kind, random.Random(f"{file} {kind}")):
        return
    for _ in range(4):
        try:
            said = use(run)
        except UserError as error:
            message = str(error)
        else:
            assert all("damaged" in line and "metrics.jsonl" in line for line in said)
            return
        assert "\n" not in message and str(run) in message, message
        assert re.search("delete it|move it aside|--redo=|correct that", message), message
        if "correct that" in message:  # no permission
            (run / file).chmod(0o600)
        elif found := re.search(rf"{re.escape(str(run))}/[^\s;,:()]+", message):
            place = run.parent / found[0]
            place.rename(place.with_name(f"{place.name}.damaged"))
    pytest.fail(f"still, after four remedies: {message}")


@pytest.mark.parametrize("file", ["report.json", "report.md", "plots/loss.png"])
def test_the_report_is_written_over_all_but_a_folder(finished, tmp_path, file):
    run = RunDirectory(shutil.copytree(finished, tmp_path / "run"))
    for kind in ("missing", "a folder", "a dangling link", "NULs"):
        if (run.path / file).exists():
            damage(tmp_path / "run" / file, kind, random.Random(0))
        if kind == "a folder":
            with pytest.raises(UserError, match=f"{file} is in the way of what is to be written; move it aside"):
                write_report(run, vocab_size=300, parameters=1000)
            (run.path / file).rmdir()
        write_report(run, vocab_size=300, parameters=1000)
        assert (run.path / file).stat().length > 100


def test_lines_that_are_lost_are_counted(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    damage(run / "metrics.jsonl", "cut in a character", random.Random(0))
    assert use(run) == [f"{run / 'metrics.jsonl'}: 1 damaged line is left out"]
