"""Files of a run directory, damaged in every way: one line that names the file, what is wrong, and the remedy."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat import stopping
from jaxchat.config import DataConfig, EvaluateConfig, Experiment
from jaxchat.errors import UserError
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.files import Damaged, Object, misfit, parse_json, read_json, read_lines, write_bytes
from jaxchat.runs.lock import locked
from jaxchat.runs.starting import check_redo, take
from jaxchat.stages.settings import check_run

SCHEMA = Object(
    required={"steps": int},
    optional={"seconds": (None, float), "parent": (None, Object({"stage": str})), "events": [Object({"why": str})]},
)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"steps": 3', "not JSON: Expecting ',' delimiter, line 1"),
        (b'{"steps": 3}\n{"steps"', "not JSON: Extra data, line 2"),
        (b"\xff\xfe{\x00", "byte 0 is not UTF-8"),
        ('{"steps": "ü'.encode()[:-1], "it ends inside a character"),
        (b"\x00" * 20, "not JSON: Expecting value, line 1"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b"[]", "it is a list, not an object"),
        (b"null", "it is null, not an object"),
        (b'"text"', 'it is "text", not an object'),
        (b"7", "it is 7, not an object"),
        (b"{}", "it has no 'steps'"),
        (b'{"steps": "3"}', 'steps is "3", not a whole number'),
        (b'{"steps": true}', "steps is true, not a whole number"),
        (b'{"steps": 3.5}', "steps is 3.5, not a whole number"),
        (b'{"steps": null}', "steps is null, not a whole number"),
        (b'{"steps": 1, "steps": 2}', "the key 'steps' is there twice"),
        (b'{"steps": 123456789012345678901234}', "the number 123456789012... is too large"),
        (b'{"steps": ' + b"9" * 10_000 + b"}", "the number 999999999999... is too large"),
        (b'{"steps": 1, "seconds": 1e999}', "seconds is Infinity, not a number"),
        (b'{"steps": 1, "seconds": NaN}', "seconds is NaN, not a number"),
        (b'{"steps": 1, "parent": {"stage": 5}}', "parent.stage is 5, not text"),
        (b'{"steps": 1, "parent": []}', "parent is a list, not an object"),
        (b'{"steps": 1, "events": [{"why": "a"}, {}]}', "events[1] has no 'why'"),
    ],
)
def test_damage_is_said_in_one_line(tmp_path, data, what):
    path = tmp_path / "stage.json"
    path.write_bytes(data)
    with pytest.raises(Damaged) as error:
        read_json(path, SCHEMA, "do this")
    assert str(error.value) == f"{path} is damaged ({what}); do this"


def test_what_is_there_instead_of_a_file(tmp_path):
    assert read_json(tmp_path / "none.json", SCHEMA, "do this") is None
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(Damaged, match=r"folder.json is damaged \(it is a folder\); do this"):
        read_json(tmp_path / "folder.json", SCHEMA, "do this")
    (tmp_path / "link.json").symlink_to("nowhere")
    with pytest.raises(Damaged, match=r"\(it is a link to nowhere, which does not exist\); do this"):
        read_json(tmp_path / "link.json", SCHEMA, "do this")
    (tmp_path / "file").write_text("")
    with pytest.raises(Damaged, match=r"file is damaged \(it is not a folder\); do this"):
        read_json(tmp_path / "file" / "stage.json", SCHEMA, "do this")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_not_damage(tmp_path):
    path = tmp_path / "stage.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read.*Permission denied"):
        read_json(path, SCHEMA, "do this")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_whatever_json_wrote_is_read_back(value):
    assert parse_json(json.dumps(value).encode()) == value


@given(st.binary() | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_raise_anything_else(data):
    try:
        assert misfit(parse_json(data), SCHEMA) is None or True
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


@given(JSON)
def test_every_value_fits_or_a_fault_is_named(value):
    fault = misfit(value, SCHEMA)
    fits = isinstance(value, dict) and isinstance(value.get("steps"), int)
    assert fault is not None or fits


def test_of_json_lines_only_the_damaged_ones_are_lost(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(
        '{"steps": 1}\n{"steps": "x"}\n\0\0\0\n{"st\n{"steps": 2, "text": "a\u2028b"}\n{"steps": 3, "ü'.encode()[:-1]
    )
    values, bad = read_lines(path, SCHEMA, "do this")
    assert values == [{"steps": 1}, {"steps": 2, "text": "a\u2028b"}] and bad == 3
    assert read_lines(tmp_path / "none", SCHEMA, "do this") == ([], 0)


def test_writing_over_a_folder_or_below_a_file_is_refused(tmp_path):
    (tmp_path / "report.md").mkdir()
    (tmp_path / "plots").write_text("mine")
    for path in (tmp_path / "report.md", tmp_path / "plots" / "loss.png"):
        with pytest.raises(UserError, match="is in the way of what is to be written; move it aside"):
            write_bytes(path, b"new")
    assert (tmp_path / "plots").read_text() == "mine"


class TestLock:
    def test_a_second_process_is_refused_and_told_which(self, tmp_path):
        program = """
            import sys
            from jaxchat.errors import UserError
            from jaxchat.runs.lock import locked
            try:
                with locked(sys.argv[1]):
                    print("free")
            except UserError as error:
                print(error)
        """
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
        with locked(tmp_path):
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"{tmp_path} is in use by process {os.getpid()} on ")
        assert said.endswith("; wait for it or stop it, or choose another --run-dir\n")
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "free\n"

    def test_the_lock_of_a_killed_process_is_free(self, tmp_path):
        program = """
            import os, signal, sys
            from jaxchat.runs.lock import locked
            with locked(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
        """
        killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)])
        assert killed.returncode == -9 and (tmp_path / ".lock").read_text()
        with locked(tmp_path):
            pass

    def test_it_is_taken_before_an_earlier_run_is_renamed(self, tmp_path):
        run = tmp_path / "run"
        run.mkdir()
        (run / "config.json").write_text("{}")
        with locked(run), contextlib.ExitStack() as held, pytest.raises(UserError, match="is in use by process"):
            take(run, held, fresh=True)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        with contextlib.ExitStack() as held:
            take(run, held, fresh=True)
            with pytest.raises(UserError, match="is in use by process"), locked(run):
                pass
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.old-1"]

    def test_a_folder_of_somebody_elses_is_not_touched(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        with contextlib.ExitStack() as held, pytest.raises(UserError, match="not a run"):
            take(tmp_path, held)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_a_lock_file_with_anything_in_it(self, tmp_path):
        for text in ("", "{", "[]", '{"pid": 1}', '{"pid": 1, "host": "a", "since": 1e300}'):
            (tmp_path / ".lock").write_text(text)
            with open(tmp_path / ".lock", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                with pytest.raises(UserError, match="is in use by another process; wait for it"), locked(tmp_path):
                    pass


def test_stages_to_redo_are_checked():
    stages = ("tokenizer", "pretrain", "sft")
    check_redo((), stages)
    check_redo(("sft", "pretrain"), stages)
    with pytest.raises(UserError, match="unknown stage 'stf', did you mean 'sft'"):
        check_redo(("stf",), stages)
    with pytest.raises(UserError, match="--redo=rl: this start runs only tokenizer, pretrain, sft"):
        check_redo(("rl",), stages)


def test_a_stage_needs_what_is_there_or_made_before_it(tmp_path):
    run = RunDirectory(tmp_path / "run")

    def begin(*stages, redo=(), of=("sft",)):
        data, asked = DataConfig(generate=True), EvaluateConfig(tasks=("sums",), of=of)
        check_run(Experiment(stages=stages, data=data, evaluate=asked), run, redo=redo)

    begin("tokenizer", "pretrain", "midtrain", "sft", "evaluate", "report")
    for stages, missing in {
        ("report",): "nothing to report yet",
        ("evaluate",): "no tokenizer yet",
        ("rl", "report"): "no tokenizer yet",
        ("tokenizer", "sft"): "run one of pretrain, midtrain first",
        ("tokenizer", "pretrain", "evaluate"): "no model of sft yet",
    }.items():
        with pytest.raises(UserError, match=missing):
            begin(*stages)
    run.open(Experiment(data=DataConfig(generate=True)))
    run.write_record("tokenizer", {})
    begin("report")
    run.write_record("pretrain", {"steps": 1})
    run.write_record("sft", {"steps": 1})
    begin("evaluate")
    begin("evaluate", of=("midtrain", "sft"))
    with pytest.raises(UserError, match="no model of midtrain, rl yet; run one of these stages first, or name others"):
        begin("evaluate", of=("midtrain", "rl"))
    with pytest.raises(UserError, match="no model of sft yet"):
        begin("pretrain", "evaluate", redo=("pretrain", "sft"))


def test_a_folder_in_place_of_the_lock_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock is a folder, .*; move it aside"), locked(tmp_path):
        pass


def test_a_start_with_fresh_is_resumed_without_it_also_in_a_new_directory(tmp_path):
    with stopping.resuming(True), contextlib.ExitStack() as held:
        take(tmp_path / "run", held, fresh=True)
        assert stopping.same_command() == "the same command without --fresh"
    with stopping.resuming(True), contextlib.ExitStack() as held:
        take(tmp_path / "run", held)
        assert stopping.same_command() == "the same command"
