"""Experiments by name, from the files of a checkout, without a change to the module search path."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxchat.cli import experiments
from jaxchat.cli.experiments import experiment_names, load_experiment, summaries
from jaxchat.cli.launch import main
from jaxchat.cli.options import configure
from jaxchat.config import Experiment, ModelConfig, OptimizerConfig, PretrainConfig
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.devices.machine import device_peak_flops
from jaxchat.errors import UserError
from jaxchat.model.parameters import count_parameters
from jaxchat.optim.schedules import multiplier
from jaxchat.planning.rules import follow_rules
from jaxchat.recipes import counted_parameters, modern
from jaxchat.stages.workspace import planned_model
from jaxchat.train.budget import flops_per_token, training_length
from tests.tiny import ROOT, refusal


def test_experiments_of_this_checkout():
    before = list(sys.path)
    loaded = [load_experiment(name) for name in experiment_names()]
    assert [experiment.name for experiment in loaded] == experiment_names()
    assert {"quickstart", "d12", "speedrun"} <= set(experiment_names())
    assert sys.path == before and not any(name.startswith("experiments") for name in sys.modules)
    assert all(len(summary) > 20 for summary in summaries().values()) and set(summaries()) == set(experiment_names())


def documented(name):
    """The docstring of an experiment, on one line."""
    return " ".join((ast.get_docstring(ast.parse((ROOT / f"experiments/{name}.py").read_bytes())) or "").split())


def pretraining(experiment):
    """The tokens of pretraining, and the hours that they are expected to take."""
    model, peak = planned_model(experiment), device_peak_flops(experiment.cost.device)
    tokens = training_length(experiment.pretrain, model) * experiment.pretrain.batch_tokens
    return tokens, experiment.cost.hours(tokens * flops_per_token(model), peak)


@pytest.mark.parametrize("name", experiment_names())
def test_an_experiment_documents_its_command(name):
    assert f"python launch.py --experiment={name}" in documented(name)


@pytest.mark.parametrize("name", ["rtx8gb", "rtx24gb", "d12", "speedrun", "d32", "gpt2", "d12_modern"])
def test_the_expected_hours_follow_from_the_peak(name):
    (hours,) = re.findall(r"Expected, not measured: ([\d.]+) hours (?:for|of) pretraining", documented(name))
    digits = len(hours.partition(".")[2])
    assert round(pretraining(load_experiment(name))[1], digits) == float(hours)


@pytest.mark.parametrize("name, gigabytes", {"rtx8gb": 6, "rtx24gb": 16}.items())
def test_an_evening_on_a_graphics_card(name, gigabytes):
    experiment = load_experiment(name)
    parameters = count_parameters(planned_model(experiment))
    tokens, hours = pretraining(experiment)
    assert 2.5 < hours < 5.5
    assert 12 < tokens / (parameters.matrices + parameters.head) < 13.5
    assert 16 * parameters.total < gigabytes * 1e9 / 4  # the rest is for activations
    (text,) = [request for request in parse_requests(experiment.data.download) if request.is_text]
    assert text.shards * 53e6 * 0.8 < tokens < text.shards * 53e6  # nothing twice, nothing downloaded in vain
    assert "rl" not in experiment.stages and experiment.cost.devices == 1


@pytest.mark.parametrize("name", ["d6", "d12", "speedrun", "d32", "gpt2", "d12_modern"])
def test_reinforcement_learning_trains_on_what_it_samples(name):
    """And fills up its batches for a model that solves as much of GSM8K as nanochat's d20 does before RL, 4.55 %."""
    rl = load_experiment(name).rl
    assert (rl.method, rl.advantage, rl.average, rl.updates_per_batch) == ("reinforce", "centred", "tokens", 1)
    assert (rl.temperature, rl.top_k, rl.kl, rl.entropy) == (1.0, None, 0.0, 0.0)
    rates = np.asarray(multiplier(rl.schedule, 443)(np.arange(443)))
    assert rates[0] == 1 and np.all(np.diff(rates) < 0) and rates.mean() == pytest.approx(0.5, abs=0.01)
    wrong, right = (share**rl.samples_per_question for share in (1 - 0.0455, 0.0455))
    teach = 1 - wrong - right  # share of questions with answers of both kinds
    assert teach < 0.6 and rl.refill * teach > 1


@pytest.mark.parametrize("name, steps, counted", [("gpt2", 5568, 729_808_896), ("d12_modern", 2520, 110_100_480)])
def test_modern_experiments_read_as_many_tokens_as_nanochats_runs(name, steps, counted):
    """Its sixth run took 5,568 steps of 2^20 tokens at 24 layers, and its fits say 2,520 of 2^19 at 12."""
    experiment = load_experiment(name)
    parameters = count_parameters(planned_model(experiment))
    assert parameters.matrices + parameters.head == counted == counted_parameters(experiment.model, 32_768)
    assert abs(training_length(experiment.pretrain, planned_model(experiment)) - steps) <= 1
    (text,) = [request for request in parse_requests(experiment.data.download) if request.is_text]
    each = 59e6 if text.dataset.name == "climbmix" else 53e6
    assert pretraining(experiment)[0] < text.shards * each


def test_the_modern_recipe_follows_nanochats_rules():
    gpt2, d12 = load_experiment("gpt2"), load_experiment("d12_modern")
    for experiment in (gpt2, d12):  # the values in the file are those that the rules give
        ruled = follow_rules(experiment)
        assert ruled.pretrain == experiment.pretrain
        for field in dataclasses.fields(OptimizerConfig):
            own, found = (getattr(each.optimizer, field.name) for each in (experiment, ruled))
            assert own == (pytest.approx(found, rel=0.005) if isinstance(found, float) else found), field.name
    # Rates grow with the root of the batch; decay falls with the parameters that count.
    for field in ("matrix_lr", "embedding_lr", "head_lr", "value_embedding_lr", "residual_scale_lr", "input_scale_lr"):
        assert getattr(gpt2.optimizer, field) == pytest.approx(2**0.5 * getattr(d12.optimizer, field), rel=0.01), field
    assert (gpt2.optimizer.matrix_weight_decay, d12.optimizer.matrix_weight_decay) == (0.0597, 0.28)
    # Batches below the reference do not lower the rates, and the decay as the rule has it.
    small = modern(Experiment(pretrain=PretrainConfig(batch_tokens=131_072, num_iterations=400)))
    assert small.optimizer.matrix_lr == 0.02 and small.optimizer.matrix_weight_decay == 0.14
    assert small.pretrain.num_iterations == 400 and small.optimizer.muon_momentum_ratio == 0.35
    # 400 steps, as far as the rates do not fall before.
    ratio = gpt2.optimizer.muon_momentum_ratio
    assert ratio is not None and ratio * 5568 == pytest.approx(400, rel=0.01)
    rates = np.asarray(multiplier(gpt2.pretrain.schedule, 5568)(np.arange(5568)))
    assert rates[0] == pytest.approx(1 / 40) and rates[38] < rates[39] == rates[1000] == 1 and rates[-1] < 0.0504
    # The letters repeat, and the last layer sees everything whatever they say.
    assert planned_model(gpt2).windows == (512, 512, 512, None) * 6


def test_no_other_experiment_is_modern():
    for name in set(experiment_names()) - {"gpt2", "d12_modern", "quickstart_modern"}:
        experiment = load_experiment(name)
        assert experiment.optimizer == OptimizerConfig(), name
        sizes = {"depth", "sequence_len"}
        changed = {field.name for field in dataclasses.fields(ModelConfig)
                   if getattr(experiment.model, field.name) != getattr(ModelConfig(), field.name)}  # fmt: skip
        assert changed <= sizes, name


def test_the_modern_quickstart_differs_in_the_recipe_alone():
    plain, recipe = load_experiment("quickstart"), load_experiment("quickstart_modern")
    assert (recipe.data, recipe.tokenizer, recipe.evaluate) == (plain.data, plain.tokenizer, plain.evaluate)
    assert recipe.model.value_embeddings and recipe.model.window_pattern == plain.model.window_pattern
    assert recipe.rules == "none" and recipe.pretrain.num_iterations < plain.pretrain.num_iterations
    for stage in ("midtrain", "sft", "rl"):
        own, before = getattr(recipe, stage), getattr(plain, stage)
        assert own == dataclasses.replace(before, lr_fraction=own.lr_fraction), stage
        assert own.lr_fraction == before.lr_fraction / 2, stage


def test_a_length_that_the_user_sets_counts_before_the_experiments_own():
    def lengths(*options):
        experiment = configure("quickstart", list(options), None, ())
        pretrain = experiment.pretrain
        return pretrain.num_iterations, pretrain.target_flops, experiment.midtrain.num_iterations

    steps, _, mid = lengths()
    assert steps and mid
    assert lengths("--pretrain.target-flops=1e12") == (None, 1e12, mid)
    assert lengths("--pretrain.tokens-per-param=9", "--midtrain.epochs", "2") == (None, None, None)
    assert lengths("--pretrain.num-iterations=7", "--pretrain.tokens-per-param=9") == (7, None, mid)
    with pytest.raises(UserError, match="counts only with --rules=nanochat"):
        lengths("--pretrain.tokens-per-matrix-param=8")


@pytest.mark.parametrize("name", ["gpt2", "d12_modern"])
def test_a_dry_run_of_a_modern_experiment(name, tmp_path, capsys):
    """At a size that compiles in seconds: the layers keep their kinds, value embeddings and windows among them."""
    small = ["--model.depth=4", "--model.sequence-len=128", "--pretrain.batch-tokens=1024",
             "--tokenizer.vocab-size=512", "--midtrain.batch-tokens=1024", "--sft.batch-tokens=1024"]  # fmt: skip
    assert main([f"--experiment={name}", "--dry-run", f"--run-dir={tmp_path}", *small]) == 0
    out = capsys.readouterr().out
    assert f"{name}: d4, width 256" in out and "windows       SSSL: 3 of 4 layers see 32 tokens back" in out
    assert re.search(r"pretrain +\d", out) and "expected on" in out
    assert ("a CPU has no fp8: the step is analysed in bf16" in out) == (name == "gpt2")


def test_files_that_are_not_experiments(tmp_path, monkeypatch):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "number.py").write_text("experiment = 3")
    monkeypatch.setattr(experiments, "experiments_folder", lambda: tmp_path)
    assert summaries() == {"empty": "", "number": ""}
    for name in ("empty", "number"):
        with pytest.raises(UserError, match=f"{name}.py defines no experiment; write experiment = Experiment"):
            load_experiment(name)


FILES = {
    "v2.0": "from jaxchat.recipes import on_text\nexperiment = on_text(4, devices=1, mfu=0.3, shards=1)\n",
    "my run": "from jaxchat.config import Experiment\nexperiment = Experiment()\n",
    "ünï": "from jaxchat.config import Experiment\nexperiment = Experiment()\n",
    "-x": "from jaxchat.config import Experiment\nexperiment = Experiment()\n",
}
BROKEN = {
    "syntax": (
        "from jaxchat.config import *\nexperiment = Experiment(\n",
        "syntax.py:2: SyntaxError: '(' was never closed",
    ),
    "import": ("\nimport no_such_module\n", "import.py:2: ModuleNotFoundError: No module named 'no_such_module'"),
    "own": ("def f():\n    raise KeyError('k')\n\n\nf()\n", "own.py:2: KeyError: 'k'"),
    "exit": ("import sys\nsys.exit(3)\n", "exit.py:2: it ends the program; an experiment only defines its settings"),
    "latin": (b"cafe = 'caf\xe9'\n", "latin.py:1: SyntaxError: (unicode error) 'utf-8' codec"),
    "null": (b"experiment = 1\0\n", "null.py: "),
    "lines": ("raise ValueError('one\\ntwo')", "lines.py:1: ValueError: one"),
    "none": ("", "none.py defines no experiment; write experiment = Experiment(...) there"),
    "number": ("experiment = 3", "number.py defines no experiment; write experiment = Experiment"),
    "class": ("from jaxchat.config import Experiment\nexperiment = Experiment", "class.py defines no experiment"),
    "impossible": (
        "from jaxchat.config import *\nexperiment = Experiment(\n    rl=RLConfig(\n        top_k=0,\n    ),\n)\n",
        "impossible.py:3: rl.top-k is 0; it must be at least 1",
    ),
    "stage": (
        "from jaxchat.config import *\nexperiment = Experiment(sft=FinetuneConfig(epochs=float('inf')))\n",
        "stage.py:2: epochs is inf; it must be finite, above 0 and at most 10,000",
    ),
    "unknown": (
        "from jaxchat.config import *\nexperiment = Experiment(sft=FinetuneConfig(epoch=1))\n",
        "unknown.py:2: TypeError: FinetuneConfig.__init__() got an unexpected keyword argument 'epoch'",
    ),
    "deep": ("experiment = " + "(" * 5000 + ")" * 5000, "deep.py"),
    "endless": ("def f(): f()\nf()\n", "endless.py:1: RecursionError"),
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of experiments of one's own."""
    monkeypatch.setattr(experiments, "experiments_folder", lambda: tmp_path)
    for name, text in {**FILES, **{name: text for name, (text, _) in BROKEN.items()}}.items():
        (tmp_path / f"{name}.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def answer(capsys, *arguments):
    code = main([*arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", FILES)
def test_any_file_name_will_do(own, name):
    assert load_experiment(name).name == name


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_run_is_named_with_its_line(own, capsys, name):
    for more in ([], ["--help"]):
        assert BROKEN[name][1] in refusal(answer(capsys, f"--experiment={name}", *more))


def test_the_list_marks_files_that_are_no_python(own, capsys):
    (own / ".#d12.py").symlink_to("nowhere")  # as emacs leaves it
    (own / "folder.py").mkdir()
    (own / "dangling.py").symlink_to("nowhere")
    (own / "__init__.py").write_text("")
    code, out, err = answer(capsys, "--list")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == len(FILES) + len(BROKEN)
    (marked,) = [line for line in out.splitlines() if line.startswith("syntax ")]
    width = max(map(len, [*FILES, *BROKEN]))
    assert marked == f"{'syntax':<{width}} broken: {own}/syntax.py:2: SyntaxError: '(' was never closed"
    assert {line.split()[0] for line in out.splitlines() if " broken: " in line} >= {"syntax", "latin", "null", "deep"}


@pytest.mark.parametrize(
    "name, hint",
    {
        "v2.0.py": ", did you mean 'v2.0'?",
        "experiments/own.py": ", did you mean 'own'?",
        "/home/me/new idea.py": "; put the file into {own}, and write --experiment='new idea'.",
        "imprt": ", did you mean 'import'?",
        "\0": "unknown experiment '\\x00'.",
        "../own": "unknown experiment '../own'",
        "x" * 500: "unknown experiment 'xxx",
    }.items(),
)
def test_what_was_meant(own, capsys, name, hint):
    message = refusal(answer(capsys, f"--experiment={name}"))
    assert hint.format(own=own) in message and len(message) < 500


def test_the_checkout_is_the_packages_or_the_working_directory(tmp_path):
    """The installed package has no experiments: those of the working directory are used, nothing else there is."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "experiments", checkout / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "launch.py").touch()
    (checkout / "experiments" / "mine.py").write_text("from jaxchat.recipes import on_text\nexperiment = 3\n")
    (checkout / "json.py").write_text("raise SystemExit('a file of the working directory was imported')")
    (elsewhere / "site").mkdir(parents=True)
    (elsewhere / "site" / "jaxchat").symlink_to(ROOT / "jaxchat")
    (elsewhere / "experiments").mkdir()  # of another project
    program = [sys.executable, "-c", "import sys; from jaxchat.cli.launch import main; sys.exit(main(sys.argv[1:]))"]
    environment = {**os.environ, "PYTHONPATH": str(elsewhere / "site"), "PYTHONSAFEPATH": "1"}

    def start(folder):
        arguments = [*program, "--experiment=mine"]
        return refusal(subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True))

    assert f"{checkout / 'experiments' / 'mine.py'} defines no experiment" in start(checkout)
    assert "start the command in the folder that has launch.py and experiments/" in start(elsewhere)
