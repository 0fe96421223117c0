"""The comparison of recipes: what is trained, what is kept, and the figures that follow."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jaxchat_quality
import numpy as np
import pytest
import quality
import quality_runs
import quality_tables
import recipes
from quality_runs import Run

from jaxchat.cli.experiments import load_experiment
from jaxchat.errors import UserError
from jaxchat.model.config import GPTConfig
from jaxchat.optim.optimizer import peak_rates
from jaxchat.optim.schedules import muon_momentum
from tests.tiny import ARGUMENTS, start, values

ROOT = Path(__file__).parents[2]
SEED = str(load_experiment("quickstart").seed)
PARTS = """
common = "--pretrain.batch-tokens=512"
[recipes]
guide = ""
[parts]
a = "--optimizer.matrix-lr=0.01"
b = "--optimizer.head-lr=0.01 --seed=3"
"c d" = "--clip"
[nanochat]
rule = "--warmup-steps=0"
"""


def planned(*given):
    parser = quality.argparse.ArgumentParser()
    quality.add_options(parser)
    options, overrides = parser.parse_known_args([*given])
    return quality.plan(options, quality.recipes_of(options), overrides, [])


@pytest.fixture
def file(tmp_path):
    def written(text):
        (tmp_path / "recipes.toml").write_text(text)
        return str(tmp_path / "recipes.toml")

    return written


def test_recipes_of_a_file(file):
    found = recipes.read(file(PARTS))
    assert found.common == ("--pretrain.batch-tokens=512",)
    assert found.recipes == (recipes.Recipe("guide"),) and found.nanochat[0].options == ("--warmup-steps=0",)
    ablation = {recipe.name: recipe.options for recipe in recipes.ablation(found.parts)}
    a, b, c = ("--optimizer.matrix-lr=0.01",), ("--optimizer.head-lr=0.01", "--seed=3"), ("--clip",)
    assert ablation == {
        **{"base": (), "whole": a + b + c, "a alone": a, "b alone": b, "c d alone": c},
        **{"without a": b + c, "without b": a + c, "without c d": a + b},
    }
    assert list(ablation)[:2] == ["base", "whole"]
    two = [recipe.name for recipe in recipes.ablation(found.parts[:2])]
    assert two == ["base", "whole", "a alone", "b alone"], "b without a is b alone"
    assert [recipe.name for recipe in recipes.chosen(found.parts, ["c d", "a"])] == ["a", "c d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("common = 1", "common in .* must be a text"),
        ("recipe = 1", "has 'recipe'.*recipes"),
        ("[parts]\na = 1", r"\[parts\] in .* must have lines such as"),
        ('[parts]\na = "\'"', "the options of 'a' cannot be read"),
        ("a b", "cannot be read as TOML"),
    ],
)
def test_files_that_are_refused(file, text, message):
    with pytest.raises(UserError, match=message):
        recipes.read(file(text))


def test_the_parts_of_the_modern_recipe_can_be_combined():
    file = str(ROOT / "benchmarks" / "modern.toml")
    found, runs = recipes.read(file), {run.recipe: run for run in planned("--file", file, "--steps", "400")}
    assert len(runs) == 2 + 2 * len(found.parts) and len(found.nanochat) == 6
    base, whole = runs["base"].experiment, runs["whole"].experiment
    assert base.model == load_experiment("d12").model and base.pretrain.batch_tokens == 131_072
    for part in found.parts:
        alone, without = (runs[name].experiment for name in (recipes.alone(part.name), recipes.left_out(part.name)))
        for one, beside in ((alone, base), (without, whole)):
            changed = [
                name for name in ("model", "optimizer", "pretrain") if getattr(one, name) != getattr(beside, name)
            ]
            assert changed and len(changed) < 3, part.name


def test_the_whole_is_the_modern_experiment():
    file = str(ROOT / "benchmarks" / "modern.toml")
    recipe = "rules:--experiment=d12_modern"
    runs = planned("--file", file, "--recipe", recipe, "--only", "whole", "rules", "--steps", "400")
    by_rules, whole = (run.experiment for run in runs)
    assert (whole.model, whole.pretrain) == (by_rules.model, by_rules.pretrain)
    for field in dataclasses.fields(whole.optimizer):
        own, found = (getattr(each.optimizer, field.name) for each in (whole, by_rules))
        assert own == (pytest.approx(found, rel=0.005) if isinstance(found, float) else found), field.name


def test_recipes_of_the_command_line():
    assert recipes.parse("a b: --x=1 '--y=2 3'") == recipes.Recipe("a b", ("--x=1", "--y=2 3"))
    for wrong in ("--x=1", ":--x"):
        with pytest.raises(UserError, match="is no recipe; write NAME:OPTIONS"):
            recipes.parse(wrong)
    with pytest.raises(UserError, match="two recipes are called 'a'"):
        recipes.chosen([recipes.Recipe("a"), recipes.Recipe("a")], None)
    with pytest.raises(UserError, match="--only has 'gide', did you mean 'guide'"):
        recipes.chosen([recipes.Recipe("guide")], ["gide"])


def test_seconds_leave_out_what_compiles():
    times = [60.0, 0.5] + [1.0] * 8 + [1.0, 2.0, 3.0]
    assert quality_runs.steady(times) == [2.0, 0.5] + [1.0] * 8 + [1.0, 2.0, 3.0]
    assert quality_runs.steady([9.0, 1.0, 1.0]) == [1.0, 1.0, 1.0]
    found = quality_runs.figures([9.0, 1.0, 1.0, 1.0], [(2, 3.5), (4, math.nan)])
    assert found == {"curve": [[2, 2.0, 3.5], [4, 4.0, None]], "step_ms": 1000.0, "seconds": 4.0}


def test_a_target_is_reached_between_two_evaluations():
    curve = [[100, 10.0, 1.5], [200, 30.0, 1.3], [400, 70.0, 1.1]]
    assert quality_tables.reached({"curve": curve}, 1.35) == pytest.approx((175, 25.0))
    assert quality_tables.reached({"curve": curve}, 1.1) == pytest.approx((400, 70.0))
    assert quality_tables.reached({"curve": curve}, 1.6) == (100, 10.0)
    assert quality_tables.reached({"curve": curve}, 1.09) is None
    assert quality_tables.reached({"curve": [[100, 10.0, 1.5], [200, 30.0, None]]}, 1.3) is None


def a_record(recipe, seed, scores, ms=200.0, **more):
    curve = [[step, step * ms / 1000, bpb] for step, bpb in scores]
    facts = {"program": "jaxchat", "device": "none", "batch_tokens": 512, "options": [], "all_seconds": 100.0}
    return {**facts, "recipe": recipe, "seed": seed, "curve": curve, "step_ms": ms, "seconds": curve[-1][1], **more}


def test_tables(capsys):
    records = [
        a_record("guide", 0, [(100, 1.5), (400, 1.1)]),
        a_record("modern", 0, [(100, 1.4), (400, 1.05)], 210.0),
        a_record("guide", 1, [(100, 1.52), (400, 1.102)]),
        a_record("modern", 1, [(100, 1.41), (400, 1.0502)], 212.0),
        a_record("broken", 0, [(100, None)]),
    ]
    quality_tables.show(records, 1.101)
    lines = capsys.readouterr().out.splitlines()
    assert "| modern, seed 1 | 1.4100 | 1.0502 | 212.0 | 84.8 | 358 | 75.8 |" in lines
    assert "| guide | 1.5100 | 1.1010 | +0.0000 | 0.0020 | 2 | 200.0 | 80.0 |  |  |" in lines, "one seed fell short"
    assert "| modern | 1.4050 | 1.0501 | -0.0509 | 0.0002 | 2 | 211.0 | 84.4 | 357 | 75.3 |" in lines
    assert "| broken |  |  |  |  | 1 | 200.0 | 20.0 |  |  |" in lines
    assert quality_tables.draw(records).startswith(b"\x89PNG")


def test_the_table_of_parts(capsys):
    means = {"base": 1.1, "whole": 1.0, "a alone": 1.09, "without a": 1.04, "b alone": 1.02}
    quality_tables.show_parts([a_record(name, 0, [(400, bpb)]) for name, bpb in means.items()], ["a", "b"])
    lines = capsys.readouterr().out.splitlines()
    assert "| base; whole | 1.1000 |  | 200.0 | 1.0000 | -0.1000 | 200.0 |" in lines
    assert "| a | 1.0900 | -0.0100 | 200.0 | 1.0400 | +0.0400 | 200.0 |" in lines
    assert "| b | 1.0200 | -0.0800 | 200.0 |  |  |  |" in lines


def runs_of(*names, options=()):
    experiment = load_experiment("d12")
    return [Run("jaxchat", name, (name, *options), experiment, 0, (2, 4)) for name in names]


def measured(run):
    if run.recipe == "too large":
        raise UserError("out of memory")
    if run.recipe == "stopped":
        raise KeyboardInterrupt
    return {"times": [1.0] * 4, "scores": [(2, 2.0), (4, 1.0)], "device": "none"}


def test_runs_are_kept_and_not_done_again(tmp_path):
    file = str(tmp_path / "runs" / "all.jsonl")
    done = quality_runs.carry_out(runs_of("a", "too large", "b", "stopped", "c"), measured, file, None)
    assert [found and found["recipe"] for found in done] == ["a", None, "b"]
    with open(file, "a") as lines:
        lines.write('{"program": "jaxc')  # a run that was killed while it wrote
    asked = []
    done = quality_runs.carry_out(
        runs_of("a", "b", "c"), lambda run: asked.append(run.recipe) or measured(run), file, None
    )
    assert [found["recipe"] for found in done] == ["a", "b", "c"] and asked == ["c"]
    assert [one["recipe"] for one in quality_runs.read(file)] == ["a", "b", "c"]
    (same,) = runs_of("a")
    known = quality_runs.read(file)
    assert quality_runs.find(known, dataclasses.replace(same, recipe="another name"))
    for other in ({"seed": 1}, {"at": (2, 3, 4)}, {"program": "nanochat"}, {"options": ("a", "--more")}):
        assert quality_runs.find(known, dataclasses.replace(same, **other)) is None
    (tmp_path / "other.jsonl").write_text('{"stage": "pretrain"}\n')
    with pytest.raises(UserError, match="line 1 is no record of a run"):
        quality_runs.read(str(tmp_path / "other.jsonl"))


def test_no_run_begins_that_would_end_too_late(tmp_path, monkeypatch):
    file, clock = str(tmp_path / "all.jsonl"), [0.0]
    monkeypatch.setattr(quality_runs.time, "perf_counter", lambda: clock[0])

    def takes_a_minute(run):
        clock[0] += 60
        return measured(run)

    assert len(quality_runs.carry_out(runs_of("a", "b", "c"), takes_a_minute, file, 150.0)) == 2
    assert len(quality_runs.carry_out(runs_of("a", "b", "c"), takes_a_minute, file, 50.0)) == 2, "it knows how long"
    assert len(quality_runs.carry_out(runs_of("a", "b", "c"), takes_a_minute, file, 61.0)) == 3


def test_a_recipe_is_trained_as_launch_trains_it(tmp_path, capsys):
    code, _, err = start(tmp_path / "run", "--stages=tokenizer,pretrain")
    assert code == 0, err
    expected = dict(values(tmp_path / "run", "pretrain", "bpb"))
    file = tmp_path / "all.jsonl"
    given = ["--experiment=quickstart", "--recipe", "tiny:", "hot:--pretrain.lr-fraction=4", "--at=3", "--target=8",
             "--seeds", SEED, f"--json={file}", f"--png={tmp_path / 'all.png'}", *ARGUMENTS[1:]]  # fmt: skip
    assert quality.main(given) == 0
    tiny, hot = map(json.loads, file.read_text().splitlines())
    assert [step for step, *_ in tiny["curve"]] == [3, 6] and tiny["steps"] == 6
    for step, _, bpb in tiny["curve"]:
        assert bpb == pytest.approx(expected[step], rel=1e-6)
    assert hot["curve"][-1][2] != pytest.approx(expected[6], rel=1e-3)
    assert tiny["seed"] == int(SEED) and tiny["all_seconds"] > tiny["seconds"] > 0 and tiny["parameters"] > 10_000
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    written = file.read_text()
    assert quality.main(given) == 0 and file.read_text() == written, "it is not trained again"
    assert f"| tiny | {tiny['curve'][0][2]:.4f} |" in capsys.readouterr().out


def test_growing_batches_are_trained_as_launch_trains_them(tmp_path):
    grows = ["--pretrain.batch-tokens=1024", "--pretrain.phases.batch-tokens=512", "--pretrain.phases.until=0.5",
             "--optimizer.matrix-weight-decay=0.1"]  # fmt: skip
    code, _, err = start(tmp_path / "run", "--stages=tokenizer,pretrain", *grows)
    assert code == 0, err
    expected = dict(values(tmp_path / "run", "pretrain", "bpb"))
    (run,) = planned("--experiment=quickstart", "--recipe", "tiny:", "--at=3", "--seeds", SEED, *ARGUMENTS[1:], *grows)
    scores = jaxchat_quality.Trainer(tmp_path)(run.experiment, run.at)["scores"]
    assert scores == [(step, pytest.approx(expected[step], rel=1e-6)) for step in (3, 6)]


def test_rates_seeds_and_lengths_share_a_program_and_the_rows(tmp_path):
    own = ["--optimizer.matrix-weight-decay=0.1", "--optimizer.muon-momentum-ratio=0.5"]
    recipes = [
        "a:",
        "b:--pretrain.lr-fraction=0.3",
        "c:--pretrain.num-iterations=3",
        "d:--pretrain.schedule.decay=cosine",
    ]
    runs = planned("--experiment=quickstart", "--recipe", *recipes, "--at=2", *ARGUMENTS[1:], *own)
    shared, traced = jaxchat_quality.Trainer(tmp_path / "shared"), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, fun_name="", **rest: traced.append(fun_name) if "jaxpr_trace" in event else None
    )
    scores = [shared(run.experiment, run.at)["scores"] for run in runs]
    assert traced.count("step") == 1
    alone = [jaxchat_quality.Trainer(tmp_path / run.recipe)(run.experiment, run.at)["scores"] for run in runs]
    assert scores == alone and len({of_run[-1] for of_run in scores}) == 4
    assert traced.count("step") == 5


def test_lengths_by_the_rules_share_a_program_too():
    own = "--experiment=d12_modern", "--pretrain.batch-tokens=131072"
    runs = [planned("--recipe", "a:", f"--steps={steps}", *own)[0].experiment for steps in (300, 900)]
    assert jaxchat_quality.program(runs[0]) != jaxchat_quality.program(runs[1])
    one, other = map(jaxchat_quality.by_matrix_rate, runs)
    assert jaxchat_quality.program(one) == jaxchat_quality.program(other)
    for given, shared in zip(runs, (one, other), strict=True):
        rates = [peak_rates(each.optimizer, GPTConfig(depth=1), each.pretrain.lr_fraction) for each in (given, shared)]
        assert rates[1] == pytest.approx(rates[0], rel=1e-5) and shared.optimizer.matrix_lr == 0.02
        rates = muon_momentum(given.optimizer, given.pretrain.schedule, 300)(np.arange(300))
        assert np.all(rates == muon_momentum(shared.optimizer, given.pretrain.schedule, 300)(np.arange(300)))


def test_the_length_is_known_to_the_rules():
    recipe = "short:--experiment=d12_modern --pretrain.batch-tokens=131072"
    rates = [planned("--recipe", recipe, f"--steps={steps}")[0].experiment.optimizer for steps in (400, 800)]
    assert rates[0].matrix_lr == pytest.approx(2**0.32 * rates[1].matrix_lr)
    assert rates[0].muon_momentum < rates[1].muon_momentum


def test_tokens_of_a_batch_that_grows(capsys):
    grows = ["--pretrain.batch-tokens=4096", "--pretrain.phases.batch-tokens=2048"]
    (run,) = planned("--recipe", "a:", "--tokens", "98304", *grows)
    assert run.at[-1] == 36, "of the tokens half in steps of 2,048, half in steps of 4,096"
    done = quality_runs.carry_out(
        [run], lambda run: {"times": [1.0] * 36, "scores": [(36, 2.0)], "device": "none"}, None, None
    )
    quality_tables.show([one for one in done if one])
    assert "2,731 tokens a step" in capsys.readouterr().out


def test_lengths_and_options_that_are_refused(capsys):
    sizes = ["--recipe", "a:", "b:--pretrain.batch-tokens=4096 --model.depth=4", "c:--pretrain.num-iterations=7"]
    sizes += ["--pretrain.batch-tokens=2048"]
    found = planned(*sizes, "--tokens", "81920", "--seeds", "5", "6")
    assert [(run.recipe, run.seed, run.at[-1]) for run in found[:4]] == [
        ("a", 5, 40),
        ("b", 5, 20),
        ("c", 5, 7),
        ("a", 6, 40),
    ]
    assert [run.experiment.pretrain.num_iterations for run in found[:3]] == [40, 20, 7]
    assert found[0].at == (10, 20, 30, 40) and found[3].experiment.seed == 6 and found[1].experiment.model.depth == 4
    assert planned(*sizes, "--steps", "9", "--at", "4", "40")[0].at == (4, 9)
    other = planned("--recipe", "a:", "b:--experiment=d6", "--steps", "9")
    assert [run.experiment.model.depth for run in other] == [12, 6] and other[1].options[0] == "--experiment=d6"
    for given, message in (
        (["--recipe", "a:"], "a: nothing says how long it is"),
        (["--steps", "4"], "no recipe is given"),
        (["--recipe", "a:--model.depht=1", "--steps=4"], "a: unknown option --model.depht"),
        (["--recipe", "a:", "--at", "0", "--steps=4"], "--at has a number below 1"),
    ):
        assert quality.main(given) == 2
        assert message in capsys.readouterr().err
