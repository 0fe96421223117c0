"""The benchmark of scaling: the grid, its fits on runs whose optima are known, and that no run is done twice."""

import itertools
import json
import math

import pytest
import scaling
import scaling_fits

from jaxchat.errors import UserError
from jaxchat.planning.rules import RATES
from jaxchat.runs.directory import RunDirectory

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


def known_runs():
    """Runs whose best model grows with compute to the 0.45, batch with tokens to 0.3, rate with the batch to 0.6."""
    sizes, batches, rates = (3e6, 1e7, 3e7, 1e8, 3e8), (2**15, 2**17, 2**19, 2**21), (0.002, 0.01, 0.05)
    for flops, (depth, size), batch, rate in itertools.product((1e17, 1e18, 1e19), enumerate(sizes), batches, rates):
        tokens = flops / 6 / size
        model = math.log(size / (0.15 * flops**0.45)) ** 2
        of_batch = math.log(batch / (600 * tokens**0.3)) ** 2
        of_rate = math.log(rate / (0.01 * (batch / 2**18) ** 0.6)) ** 2
        yield {
            **{"flops": flops, "depth": depth, "parameters": size, "batch_tokens": batch, "tokens": tokens},
            **{"rate": rate, "lr_fraction": rate / 0.02, "steps": 100},
            "bpb": 3 - 0.1 * math.log10(flops) + 0.01 * model + 0.01 * of_batch + 0.01 * of_rate,
        }


def test_the_fits_find_the_exponents_of_known_runs(tmp_path):
    records = [*known_runs(), {**next(known_runs()), "bpb": None}]
    found = scaling_fits.fits(records)
    laws = {name: law["fit"] for name, law in found["laws"].items()}
    assert laws["rate against batch"]["exponent"] == pytest.approx(0.6, abs=1e-6)
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
    assert [run.name for run in runs] == [f"8e+09-d1-{batch}-{rate}" for batch in (512, 1024) for rate in ("0.5", "1")]
    for run in runs:
        facts = run.facts
        assert facts["steps"] * facts["batch_tokens"] == facts["tokens"]
        assert facts["real_flops"] == pytest.approx(8e9, rel=0.1)
        root = (facts["batch_tokens"] / 2**19) ** 0.5
        assert facts["rate"] == pytest.approx(facts["lr_fraction"] * RATES["matrix_lr"] * root)
    assert len(planned("--fewest-steps", str(runs[0].facts["steps"]))) == 1  # the larger batch has fewer
    with pytest.raises(UserError, match="no run has 1,000,000 steps or more"):
        planned("--fewest-steps", "1000000")
    with pytest.raises(UserError, match=r"model.depth is 0"):
        planned("--depths", "0")
    assert scaling.main(["--out=unused", *TINY, "--plan"]) == 0
    assert "2 runs" in capsys.readouterr().out


def test_a_finished_run_is_not_done_again_and_a_failed_one_is(tmp_path, monkeypatch, capsys):
    launched, fails = [], {"8e+09-d1-1024-1"}

    def launch(run, directory, stages, *more):
        launched.append((directory.name, stages))
        if run.name in fails and stages != "tokenizer":
            return False
        for stage in stages.split(","):
            (directory / stage / "checkpoints").mkdir(parents=True)
            (directory / stage / "stage.json").write_text("{}")
        lines = [{"stage": "pretrain", "step": step, "time": 1.0, "bpb": bpb} for step, bpb in ((0, 6.0), (9, 3.5))]
        RunDirectory(directory).path.joinpath("metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        return True

    monkeypatch.setattr(scaling, "_launch", launch)
    assert scaling.main([f"--out={tmp_path}", *TINY]) == 2
    assert [name for name, _ in launched] == ["tokenizer", "8e+09-d1-512-1", "8e+09-d1-1024-1"]
    assert not (tmp_path / "runs" / "8e+09-d1-512-1" / "pretrain" / "checkpoints").exists()
    fails.clear()
    launched.clear()
    assert scaling.main([f"--out={tmp_path}", *TINY]) == 0
    assert [name for name, _ in launched] == ["8e+09-d1-1024-1"]
    launched.clear()
    assert scaling.main([f"--out={tmp_path}", *TINY]) == 0
    assert launched == []
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert [run["bpb"] for run in written["runs"]] == [3.5, 3.5]
    assert "too few optima inside the grid" in capsys.readouterr().out
    assert scaling.main([f"--out={tmp_path}", *TINY, "--depths", "2", "--within", "0"]) == 0
    assert launched == []


@pytest.mark.slow
def test_it_trains_by_launch(tmp_path, capfd):
    assert scaling.main([f"--out={tmp_path}", *TINY, "--rules=nanochat"]) == 0
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert [run["batch_tokens"] for run in written["runs"]] == [512, 1024]
    for run in written["runs"]:
        assert run["curve"][-1][0] == run["steps"] and run["bpb"] < run["curve"][0][2]
    assert (tmp_path / "scaling.png").exists() and "| 8e+09 | d1 |" in capfd.readouterr().out
