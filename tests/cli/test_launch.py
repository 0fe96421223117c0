"""The command line: what it accepts, and that bad input is one readable line, exit code 2, and nothing lost."""

import errno
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.cli.experiments import experiment_names, load_experiment
from jaxchat.cli.launch import main
from jaxchat.cli.options import describe, field_types, override
from jaxchat.config import FinetuneConfig
from jaxchat.errors import UserError
from tests.tiny import ARGUMENTS, refusal, start, start_process


class TestProcess:
    """`python py` itself."""

    def test_list_and_help(self):
        listed = start_process("--list")
        assert listed.returncode == 0
        assert [line.split()[0] for line in listed.stdout.splitlines()] == experiment_names()
        assert all(len(line.split()) > 3 for line in listed.stdout.splitlines())
        helped = start_process("--help", "--experiment=quickstart")
        assert helped.returncode == 0
        for option in ("--dry-run", "--fresh", "--pretrain.num-iterations", "--rl.tasks"):
            assert option in helped.stdout

    def test_bad_input(self, tmp_path):
        for arguments, expected in {
            ("--experiment=quickstar",): "did you mean 'quickstart'?",
            ("--experiment=quickstart", "--model.depth=two"): "--model.depth=two: the value must be a whole number",
            (*ARGUMENTS, f"--data={tmp_path}"): "it is empty; put .parquet, .jsonl or .txt files there",
        }.items():
            message = refusal(start_process(*arguments, f"--run-dir={tmp_path / '..' / 'run'}"))
            assert expected in message


@pytest.mark.parametrize(
    "arguments, expected",
    {
        "": "no experiment given; write --experiment=auto|d12|d12_modern|d32|d6|",
        "quickstart": "no experiment given; write --experiment=quickstart",
        "--experiment": "--experiment needs a value",
        "--experiment=": "unknown experiment ''. Experiments: auto, d12, d12_modern, d32",
        "--experiment=quickstar": "unknown experiment 'quickstar', did you mean 'quickstart'?",
        "--help --experiment=speed": "did you mean 'speedrun'?",
        "--experiment=d12 --fresh=yes": "--fresh takes no value",
        "--experiment=d12 --stages": "--stages needs a value",
        "--experiment=d12 stray": "'stray' is not an option",
        "-experiment=d12": "unknown option -experiment, did you mean '--experiment'?",
        "--experimnt d12": "unknown option --experimnt, did you mean '--experiment'?",
        "--experiment=d12 --stages=sft,": "--stages is 'sft,'; it must be words separated by commas",
        "--experiment=d12 --num-processes=0": "--num-processes is 0; it must be at least 1",
        "--experiment=d12 —seed=3": "—seed=3 begins with a dash; write two hyphens: --seed=3",
    }.items(),
)
def test_bad_command(capsys, arguments, expected):
    assert expected in refused(capsys, arguments)


def refused(capsys, arguments):
    code = main(arguments.split())
    out, err = capsys.readouterr()
    assert out == ""
    return refusal((code, out, err))


@pytest.mark.parametrize(
    "arguments, expected",
    {
        "--pretrain.num-iteration=5": "unknown option --pretrain.num-iteration, did you mean '--pretrain.num-iteration",
        "--dryrun": "unknown option --dryrun, did you mean '--dry-run'?",
        "--qqqq=1": "unknown option --qqqq. python launch.py --experiment=NAME --help lists all",
        "-seed=3": "unknown option -seed, did you mean '--seed'?",
        "--pretrain=3": "unknown option --pretrain",
        "--depth=3": "unknown option --depth; its section is missing: --model.depth.",
        "--epochs 3": "unknown option --epochs; its section is missing: --midtrain.epochs or --sft.epochs.",
        "--model.Depth=3": "unknown option --model.Depth, did you mean '--model.depth'?",
        "--" + "x" * 999: "unknown option --xxxx",
        # ill-typed
        "--pretrain.num-iterations=abc": "--pretrain.num-iterations=abc: the value must be a whole number or None",
        "--pretrain.num_iterations 1.5": "--pretrain.num_iterations 1.5: the value must be a whole number or None",
        "--pretrain.num-iterations": "--pretrain.num-iterations needs a value: a whole number or None",
        "--optimizer.matrix-lr=high": "--optimizer.matrix-lr=high: the value must be a number",
        "--sft.schedule.decay=square": "--sft.schedule.decay=square: the value must be one of linear, cosine",
        "--data.shuffle=True": "write --data.shuffle for yes, --data.no-shuffle for no",
        "--data.no-shuffle=1": "write --data.shuffle for yes, --data.no-shuffle for no",
        "--optimizer.newton-schulz-coefficients 1 2": "the value must be 3 numbers",
        "--seed 3 4": "--seed 3 4: the value must be a whole number",
        # The one at fault is named, not the one that is only possible together with another.
        "--model.num-kv-heads=4 --seed=x --model.depth=8": "--seed=x: the value",
        # impossible
        "--rl.tasks=": "rl.tasks is empty; name at least one task",
        "--rl.reward=": "rl.reward is ''; it must be text that is not empty",
        "--sft.mixture=a,,b": "sft.mixture is ('a', '', 'b'); it must be text that is not empty",
        "--seed=" + "9" * 99: "seed is a whole number of about 99 digits; it must be at most 2,147,483,647",
        "--seed=" + "9" * 9999: "the value must be a whole number",
        "--model.depth=0": "model.depth is 0; it must be at least 1",
        "--sft.num-iterations=0": "sft.num-iterations is 0; it must be at least 1",
        "--rl.samples-per-question=1": "must be at least 2",
        "--pretrain.schedule.warmup-ratio=0.9": "ratio is 0.9 and decay-ratio is 0.2; they must sum to at most 1",
    }.items(),
)
def test_bad_option(capsys, arguments, expected):
    assert expected in refused(capsys, f"--experiment=quickstart {arguments}")


@pytest.mark.parametrize(
    "arguments, expected",
    {
        "--seed=-1": "seed is -1; it must be at least 0",
        "--tokenizer.vocab-size=264": "tokenizer.vocab-size is 264; it must be at least 265",
        "--mesh.fsdp=3": "does not divide the number of devices, 4; choose a product among 1, 2, 4",
        # found before the first stage, although a later one would trip over it
        "--sft.batch-tokens=1000": "sft: batch-tokens 1000 is not a multiple of 256 (device-rows 1 x 4 data-parallel "
        "devices x sequence-len 64); nearest that work: batch-tokens 768 or 1024",
        "--rl.tasks=sums,leters": "rl.tasks: unknown task 'leters', did you mean 'letters'?",
        "--midtrain.mixture=chat:many": "midtrain.mixture: mixture entry 'chat:many'",
        "--model.vocab-size=999": "--model.vocab-size follows from the tokenizer; write --tokenizer.vocab-size",
        "--model.border_token=1": "--model.border_token follows from the tokenizer; write --data.mask-borders",
        "--rl.batch-tokens=64": "--rl.batch-tokens follows from the answers that a step samples; "
        "write --rl.questions-per-step and --rl.samples-per-question",
        "--num-processes=x": "--num-processes takes a whole number; see launch.py --help",
        f"--data={__file__}": "test_launch.py' is a file; give --data the folder that contains it",
        "--rl.reward=mine": "rl.reward: 'mine' is not a module and a function; write module:function or file.py:",
        "--rl.tasks=chat": "rl.tasks: chat has no answers that can be checked",
        "--evaluate.tasks=sums,mine.jsonl": "evaluate.tasks: mine.jsonl has no answers that can be checked",
        "--evaluate.tasks=": "evaluate.tasks is empty; name at least one, or leave evaluate out of --stages",
        "--evaluate.of=base": "evaluate.of names 'base'. The stages with a model are pretrain, midtrain, sft, rl",
        "--stages=pretrian": "unknown stage 'pretrian', did you mean 'pretrain'?",
        "--stages=sft,pretrain": "stages must be in order",
        "--stages=": "--stages needs a value",
        "--name=../x": "name is '../x'; it must be a name for a folder, without / and control characters",
    }.items(),
)
def test_bad_setting(tmp_path, arguments, expected):
    assert expected in refusal(start(tmp_path / "run", *arguments.split()))
    assert not (tmp_path / "run").exists()


def test_impossible_settings_leave_the_earlier_run_in_place(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    refusal(start(tmp_path / "run", "--fresh", "--sft.batch-tokens=1000"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_dry_run_tells_what_windows_save(tmp_path):
    code, out, err = start(tmp_path / "run", "--dry-run", "--model.depth=2", "--model.window-pattern=sl")
    assert code == 0, err
    # 6 x 442,368 multiplied parameters, and 12 x 128 for each of 64 keys, or of the band's 1,840 / 64.
    assert "FLOPs a token 2.797e+06" in out
    assert "windows       SL: 1 of 2 layers see 16 tokens back; 1.9% fewer FLOPs than with full attention in all" in out


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


def broken_jsonl(folder):
    lines = [json.dumps({"text": f"line {i}"}) for i in range(9)]
    (folder / "a.jsonl").write_text("\n".join([*lines, '{"text": "cut', *lines]))
    (folder / "b.jsonl").write_text("\n".join(lines))


BAD_FOLDERS = {
    "empty": (lambda folder: None, "no text in {folder}; it is empty"),
    "photos": (lambda folder: (folder / "cat.jpg").write_bytes(b"x"), "it contains cat.jpg; put .parquet, .jsonl"),
    "no-parquet": (lambda folder: (folder / "a.parquet").write_bytes(b"rubbish" * 9), "{folder}/a.parquet is no"),
    "no-column": (lambda folder: write_parquet(folder / "a.parquet", body=["x"]), "has no column 'text'; its columns"),
    "numbers": (lambda folder: write_parquet(folder / "a.parquet", text=[1, 2]), "column 'text' contains int64, not"),
    "broken-line": (broken_jsonl, "{folder}/a.jsonl:10: broken JSON"),
    "no-text": (lambda folder: (folder / "a.jsonl").write_text('{"body": "x"}\n' * 9), "a.jsonl:1: no field 'text'"),
    "latin-1": (lambda folder: (folder / "a.txt").write_bytes(b"caf\xe9\n\n" * 9), "a.txt is not UTF-8 text"),
    "one-document": (lambda folder: (folder / "a.txt").write_text("alone"), "too few documents"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_data_folder(tmp_path, name):
    make, expected = BAD_FOLDERS[name]
    folder = tmp_path / name
    folder.mkdir()
    make(folder)
    before = sorted(folder.iterdir())
    message = refusal(start(tmp_path / "run", f"--data={folder}", "--stages=tokenizer"))
    assert expected.format(folder=folder) in message
    assert sorted(folder.iterdir()) == before
    assert not (tmp_path / "run").exists()


def test_fresh_gives_the_earlier_run_back_where_the_data_is_refused(tmp_path):
    run = tmp_path / "run"
    (run / "tokenizer").mkdir(parents=True)
    (run / "config.json").write_text('{"name": "quickstart"}')
    (tmp_path / "empty").mkdir()
    refusal(start(run, "--fresh", f"--data={tmp_path / 'empty'}"))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "empty"}
    assert (run / "config.json").read_text() == '{"name": "quickstart"}' and (run / "tokenizer").is_dir()


def test_bad_data_options(tmp_path):
    assert "data folder 'nowhere' does not exist" in refusal(start(tmp_path / "run", "--data=nowhere"))
    assert "--data is empty; name a file or folder" in refusal(start(tmp_path / "run", "--data="))
    assert "data.path is ''; it must be text that is not empty" in refusal(start(tmp_path / "run", "--data.path="))
    assert "data folder '/nowhere' does not exist" in refusal(start(tmp_path / "run", "--data.path=/nowhere"))
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert "is a file; give --data the folder" in refusal(start(tmp_path / "run", f"--data={tmp_path / 'a.txt'}"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "b.txt").write_text("three")
    message = refusal(start(tmp_path / "run", f"--data={tmp_path}", "--data.val-shard=c", "--stages=tokenizer"))
    assert "validation shard 'c' is not in" in message


class TestOverride:
    experiment = load_experiment("quickstart")

    def test_typed_fields(self):
        changed = override(
            self.experiment,
            ["--pretrain.num-iterations=7", "--model.num_kv_heads", "1", "--sft.schedule.decay=cosine",
             "--data.no-shuffle", "--optimizer.matrix-lr=1e-3", "--rl.top-k=None",
             "--optimizer.newton-schulz-coefficients", "1", "2", "3"],
        )  # fmt: skip
        assert changed.pretrain.num_iterations == 7
        assert changed.model.num_kv_heads == 1
        assert changed.sft.schedule.decay == "cosine"
        assert changed.data.shuffle is False
        assert changed.optimizer.matrix_lr == 1e-3
        assert changed.rl.top_k is None
        assert changed.optimizer.newton_schulz_coefficients == (1.0, 2.0, 3.0)
        assert changed.midtrain == self.experiment.midtrain  # what is not named stays as the experiment has it

    @pytest.mark.parametrize("words", [["--sft.mixture=chat:5,sums"], ["--sft.mixture", "chat:5", "sums"]])
    def test_lists_by_spaces_or_commas(self, words):
        assert override(self.experiment, words).sft.mixture == ("chat:5", "sums")

    @pytest.mark.parametrize("words", [["--sft.epochs=x", "--rl.top-k=0"], ["--rl.top-k=0", "--sft.epochs=x"]])
    def test_an_ill_typed_value_beside_an_impossible_one(self, words):
        with pytest.raises(UserError, match="^--sft.epochs=x: the value must be a number$"):
            override(self.experiment, words)

    def test_nothing_changes_without_arguments(self):
        for name in experiment_names():
            experiment = load_experiment(name)
            assert override(experiment, []) == experiment
            assert experiment.name == name

    def test_settings_that_are_impossible_only_together(self):
        with pytest.raises(UserError, match="^rl.schedule.warmup-ratio is 0.6 and decay-ratio is 0.6; they must sum"):
            override(self.experiment, ["--rl.schedule.warmup-ratio=0.6", "--rl.schedule.decay-ratio=0.6"])

    def test_every_field_can_be_named(self):
        fields = field_types(FinetuneConfig)
        assert {"num-iterations", "schedule.decay", "mixture"} <= set(fields)
        for kind in field_types(type(self.experiment)).values():
            assert kind is bool or describe(kind)


def test_a_disk_that_fails_is_a_line(tmp_path, capsys, monkeypatch):
    def fail(workspace, given, start):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(workspace.directory.path / "metrics.jsonl"))

    monkeypatch.setattr("jaxchat.stages.pipeline.run_stages", fail)
    assert main(["--experiment=quickstart", f"--run-dir={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {tmp_path / 'run' / 'metrics.jsonl'}: No space left on device; "
        "make room, and the same command resumes from here"
    )
