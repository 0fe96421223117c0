"""The benchmark of scaling: the grid, its fits on runs whose optima are known, and that no run is done twice."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scaling
import scaling_fits
from filelock import FileLock

from jaxchat.errors import UserError
from jaxchat.recipes import RATES, rate_factor

ROOT = Path(__file__).parents[2]

TINY = [
    "--experiment=quickstart", "--depths", "1", "--batches", "512", "1024", "--flops", "8e9", "--fewest-steps", "4",
    "--data.synthetic-documents=200", "--data.synthetic-conversations=200", "--tokenizer.vocab-size=300",
    "--model.sequence-len=64", "--pretrain.device-rows=8", "--pretrain.eval-tokens=512",
]  # fmt: skip


def test_the_optimum_of_a_parabola():
    points = [(x, 0.8 + 0.1 * math.log(x / 300) ** 2) for x in (100, 200, 400, 800)]
    found = scaling_fits.optimum([*points, (200, 0.99)])  # of several runs at one place the best
    assert found["inside"] and found["x"] == pytest.approx(300) and found["bpb"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "points, best",
    [
        ([(1, 0.9), (2, 0.8), (4, 0.75)], 4),  # still falling
        ([(1, 0.7), (2, 0.8), (4, 0.75)], 1),  # opens downwards
        ([(1, 0.9), (2, 0.8)], 2),  # too few
    ],
)
def test_an_optimum_that_the_grid_does_not_have(points, best):
    assert scaling_fits.optimum(points) == {"x": best, "bpb": min(bpb for _, bpb in points), "inside": False}
    assert scaling_fits.optimum([]) is None


def test_power_laws():
    found = scaling_fits.power_law([(x, 5 * x**0.383) for x in (1e8, 1e9, 3e9)])
    assert found["exponent"] == pytest.approx(0.383) and found["factor"] == pytest.approx(5)
    assert found["error"] == pytest.approx(0, abs=1e-6) and found["points"] == 3
    assert scaling_fits.power_law([(1, 2), (10, 20)])["error"] is None
    assert scaling_fits.power_law([(1, 2), (1, 3)]) is None
    noisy = scaling_fits.power_law([(1, 1), (10, 2), (100, 1)])
    assert noisy["exponent"] == pytest.approx(0, abs=1e-9) and noisy["error"] > 0.05


def test_a_law_of_several():
    rng = np.random.default_rng(0)
    points = [{"a": a, "b": b, "c": 7.0 + i / 100, "y": 3 * a**0.5 * b**-0.3}
              for i, (a, b) in enumerate(np.exp(rng.uniform(0, 5, (6, 2))))]  # fmt: skip
    found = scaling_fits.joint_law(points, ("a", "b", "c"))
    assert found["a"]["exponent"] == pytest.approx(0.5) and found["b"]["exponent"] == pytest.approx(-0.3)
    assert found["a"]["error"] == pytest.approx(0, abs=1e-6) and found["c"] is None  # it hardly varies
    noise = rng.normal(0, 0.1, 40)
    noisy = [{"a": math.exp(i / 10), "y": math.exp(0.7 * i / 10 + e)} for i, e in enumerate(noise)]
    of_noisy, alone = (
        scaling_fits.joint_law(noisy, ["a"])["a"],
        scaling_fits.power_law([(p["a"], p["y"]) for p in noisy]),
    )
    assert alone is not None and of_noisy == pytest.approx({name: alone[name] for name in of_noisy})
    assert scaling_fits.joint_law(points[:3], ("a", "b")) == {"a": None, "b": None}, "nothing tells their errors"
    twice = [point | {"b": point["a"] ** 2 * rng.uniform(0.999, 1.001)} for point in points]
    assert scaling_fits.joint_law(twice, ("a", "b")) == {"a": None, "b": None}, "they cannot be told apart"
    assert scaling_fits.joint_law([], ["a"]) == {"a": None}


def known_runs():
    """Runs whose best model grows with compute to the 0.45, batch with tokens to 0.3, rate with the batch to 0.6.

    The rate falls with the tokens to the power of 0.2.
    """
    sizes, batches, rates = (3e6, 1e7, 3e7, 1e8, 3e8), (2**15, 2**17, 2**19, 2**21), (0.002, 0.01, 0.05)
    for flops, (depth, size), batch, rate in itertools.product((1e17, 1e18, 1e19), enumerate(sizes), batches, rates):
        tokens = flops / 6 / size
        model = math.log(size / (0.15 * flops**0.45)) ** 2
        of_batch = math.log(batch / (600 * tokens**0.3)) ** 2
        of_rate = math.log(rate / (0.01 * (batch / 2**18) ** 0.6 * (tokens / 1e10) ** -0.2)) ** 2
        yield {
            **{"flops": flops, "depth": depth, "parameters": size, "batch_tokens": batch, "tokens": tokens},
            **{"rate": rate, "lr_fraction": rate / 0.02, "steps": 100},
            "bpb": 3 - 0.1 * math.log10(flops) + 0.01 * model + 0.01 * of_batch + 0.01 * of_rate,
        }


def test_the_fits_find_the_exponents_of_known_runs(tmp_path):
    records = [*known_runs(), {**next(known_runs()), "bpb": None}]
    found = scaling_fits.fits(records)
    laws = {name: law["fit"] for name, law in found["laws"].items()}
    for name, exponent in {"batch": 0.6, "tokens": -0.2, "parameters": 0.0}.items():
        assert laws[f"rate against {name}"]["exponent"] == pytest.approx(exponent, abs=1e-6)
    # The best of the other grids is only near their optimum, which moves the parabola's a little.
    assert laws["parameters against compute"]["exponent"] == pytest.approx(0.45, abs=0.06)
    assert laws["batch against tokens"]["exponent"] == pytest.approx(0.3, abs=0.06)
    assert found["laws"]["batch against tokens"]["published"] == 0.383
    rows = scaling_fits.law_rows(found)
    assert rows[3][0] == "rate against batch" and rows[3][1].startswith("0.600 ± 0.000")
    assert [row[0] for row in scaling_fits.budget_rows(found)] == ["1e+17", "1e+18", "1e+19"]
    scaling_fits.draw(records, found, str(tmp_path / "scaling.png"))
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def planned(*more):
    options, overrides = scaling._parser().parse_known_args(["--out=unused", *TINY, *more])
    return scaling.plan(options, overrides)


def test_the_grid(capsys):
    runs = planned("--rules=nanochat", "--rates", "0.5", "1")
    assert [run.name for run in runs] == [f"8e+09-d1-{batch}-{rate}" for rate in ("0.5", "1") for batch in (512, 1024)]
    for run in runs:
        facts = run.facts
        assert facts["steps"] * facts["batch_tokens"] == facts["tokens"]
        assert facts["real_flops"] == pytest.approx(8e9, rel=0.1)
        rate = rate_factor(facts["batch_tokens"], facts["tokens"]) * RATES["matrix_lr"]
        assert facts["rate"] == pytest.approx(facts["lr_fraction"] * rate)
    assert len(planned("--fewest-steps", str(runs[0].facts["steps"]))) == 1  # the larger batch has fewer
    few = "--fewest-steps", "1", "--most-tokens", str(runs[0].facts["tokens"] - 1)
    deeper = planned("--depths", "1", "3", *few)
    assert {run.facts["depth"] for run in deeper} == {3}, "it takes fewer tokens for the same FLOPs"
    with pytest.raises(UserError, match="no run has 1,000,000 steps or more; "):
        planned("--fewest-steps", "1000000")
    with pytest.raises(UserError, match="no run has 4 steps or more and 9 tokens or fewer"):
        planned("--most-tokens", "9")
    with pytest.raises(UserError, match=r"model.depth is 0"):
        planned("--depths", "0")
    assert scaling.main(["--out=unused", *TINY, "--plan"]) == 0
    assert "2 runs" in capsys.readouterr().out


class Learns:
    """A trainer that needs no time, and fails with batches of these sizes."""

    def __init__(self, *fails):
        self.fails, self.asked = fails, []

    def __call__(self, experiment, at):
        batch = experiment.pretrain.batch_tokens
        self.asked.append((batch, experiment.pretrain.target_flops))
        if batch in self.fails:
            raise UserError("out of memory")
        return {
            **{"times": [0.5] * at[-1], "scores": [(at[-1], 3.5)], "passes": 0},
            **{"peak_memory_bytes": 1, "device": "none"},
        }


def test_a_finished_run_is_not_done_again_and_a_failed_one_is(tmp_path, monkeypatch, capsys):
    trains = Learns(1024)
    monkeypatch.setattr(scaling, "Trainer", lambda scratch: trains)
    monkeypatch.setattr(scaling, "prepare_jax", lambda: None)
    assert scaling.main([f"--out={tmp_path}", *TINY]) == 2
    assert [batch for batch, _ in trains.asked] == [512, 1024]
    assert "8e+09-d1-1024-1 failed: out of memory" in capsys.readouterr().err
    trains.fails = ()
    trains.asked.clear()
    assert scaling.main([f"--out={tmp_path}", *TINY]) == 0
    assert [batch for batch, _ in trains.asked] == [1024]
    trains.asked.clear()
    assert scaling.main([f"--out={tmp_path}", *TINY, "--depths", "2", "--within", "0"]) == 0
    assert trains.asked == [], "no time is left"
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert [run["bpb"] for run in written["runs"]] == [3.5, 3.5], "all that is there"
    assert "too few optima inside the grid" in capsys.readouterr().out


def test_a_process_takes_what_no_other_has_begun(tmp_path):
    first, second = planned()
    trains = Learns()
    with FileLock(tmp_path / "claims" / claim_name(first)):
        assert not scaling.carry_out([first, second], tmp_path, trains, None)
    assert trains.asked == [(1024, 8e9)]
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "claims" / claim_name(first))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        assert scaling._claim(first, tmp_path) is None
        other.kill()
    assert not scaling.carry_out([first, second], tmp_path, trains, None)
    assert trains.asked == [(1024, 8e9), (512, 8e9)], "its process is gone"


def claim_name(run):
    return f"{run.name}-{hashlib.sha256(repr(run.options).encode()).hexdigest()[:8]}"


def test_the_order_of_a_grid(tmp_path):
    runs = planned("--batches", "1024", "512", "--flops", "3e10", "1e10")
    assert [run.facts["flops"] for run in runs] == [1e10, 1e10, 3e10, 3e10]
    assert [run.facts["batch_tokens"] for run in runs] == [1024, 512] * 2
    trains = Learns()
    with FileLock(tmp_path / "claims" / claim_name(runs[0])):
        scaling.carry_out(runs, tmp_path, trains, None)
    assert trains.asked == [(512, 1e10), (512, 3e10), (1024, 3e10)], "what is compiled comes first"


def test_how_long_a_run_will_take():
    (run, _) = planned()
    model = {"depth": 1, "seconds": 4.0, "real_flops": run.facts["real_flops"] / 2, "all_seconds": 30.0}
    assert scaling.expected_seconds(run, [model], compiled=False) == pytest.approx(8 + 26)
    warm, deep = {**model, "all_seconds": 5.0}, {**model, "depth": 4, "seconds": 1000.0, "all_seconds": 1010.0}
    assert scaling.expected_seconds(run, [model, warm, deep], compiled=True) == pytest.approx(8 + 1)
    gpu = dataclasses.replace(run.experiment.cost, device="NVIDIA H200", expected_mfu=0.5)
    run = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, cost=gpu))
    assert scaling.expected_seconds(run, [], False) == pytest.approx(run.facts["real_flops"] / 494.5e12, rel=0.01)


@pytest.mark.slow
def test_processes_share_a_grid(tmp_path, capsys):
    """Of the small models here two share a program: what is different of them comes with the batches."""
    grid = [f"--out={tmp_path}", *TINY, "--flops", "8e9", "16e9", "--rules=nanochat", "--rates", "0.2"]
    command = [sys.executable, "-m", "scaling", *grid]
    folders = [str(ROOT), str(ROOT / "benchmarks")]
    processes = [
        subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)}) for _ in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    written = json.loads((tmp_path / "scaling.json").read_text())["runs"]
    runs = {run["name"]: run for run in written}
    assert len(written) == len(runs) == 4, "each is done once"
    for batch in (512, 1024):
        short, long = (runs[f"{flops}-d1-{batch}-0.2"] for flops in ("8e+09", "1.6e+10"))
        assert long["bpb"] < short["bpb"] < 7 and long["curve"][-1][0] == long["steps"] == long["tokens"] // batch
        assert short["passes"] == 0 and short["seconds"] < short["all_seconds"]
    assert len(list((tmp_path / "shared").glob("tokenizer-*/tokenizer.json"))) == 1
    before = (tmp_path / "runs.jsonl").read_text()
    assert scaling.main(grid) == 0 and (tmp_path / "runs.jsonl").read_text() == before
    assert (tmp_path / "scaling.png").exists() and "| 8e+09 | d1 |" in capsys.readouterr().out
