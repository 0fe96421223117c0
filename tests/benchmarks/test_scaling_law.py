"""The law of bits per byte: that a fit to runs of a known one finds its constants, and that the package reads it."""

import dataclasses
import random

import pytest
import scaling
import scaling_law

from jaxchat.errors import UserError
from jaxchat.planning import expected_quality
from jaxchat.planning.expected_quality import Curve
from jaxchat.recipes import counted_parameters
from tests.benchmarks.test_scaling import TINY

LAW = Curve(floor=0.55, model_factor=60.0, model_exponent=0.33, data_factor=90.0, data_exponent=0.3)
SIZES = {4: 11_534_336, 6: 23_199_744, 8: 41_943_040, 10: 70_123_520, 12: 110_100_480, 16: 234_881_024}


def grid(noise=0.0):
    """Runs of which LAW is true, those with the second batch but for a hundredth."""
    draw = random.Random(1)
    for flops in (3e15, 1e16, 3e16, 1e17):
        for depth, size in SIZES.items():
            tokens = flops / 7 / size
            for batch, worse in ((65536, 0.0), (131072, 0.01)):
                bpb = LAW(size, tokens) + worse + draw.gauss(0, noise)
                yield {
                    **{"flops": flops, "real_flops": flops, "depth": depth, "parameters": size, "tokens": tokens},
                    **{"batch_tokens": batch, "bpb": bpb, "passes": 3},
                }


def test_a_fit_finds_the_constants_of_a_known_law():
    spoilt = [*grid(), {**next(grid()), "bpb": None}, {**next(grid()), "bpb": 0.1, "passes": 4}]
    law = scaling_law.fit_law(spoilt, "d12", "FineWeb-Edu")
    assert law.runs == 24 and law.error < 1e-5 and (law.experiment, law.text) == ("d12", "FineWeb-Edu")
    assert dataclasses.asdict(law.fitted) == pytest.approx(dataclasses.asdict(LAW), rel=0.01)
    assert (law.published.model_exponent, law.published.data_exponent) == (0.34, 0.28)
    assert law.published(5e7, 1e8) == pytest.approx(LAW(5e7, 1e8), abs=0.01), "they are near these"
    assert law.flops == (3e15, 1e17) and law.parameters == (SIZES[4], SIZES[16])


def test_a_fit_to_noisy_runs_says_what_lies_between_and_a_little_beyond():
    law = scaling_law.fit_law(list(grid(noise=0.001)), "d12", "FineWeb-Edu")
    assert 0.0003 < law.error < 0.002
    assert law.fitted(5e7, 1e8) == pytest.approx(LAW(5e7, 1e8), abs=0.002)
    assert law.fitted(3e8, 1e9) == pytest.approx(LAW(3e8, 1e9), abs=0.02)


def test_one_run_that_went_wrong_moves_a_fit_little():
    records = list(grid())
    records = [{**one, "bpb": one["bpb"] + 0.05 * (one["flops"] == 1e16 and one["depth"] == 8)} for one in records]
    law = scaling_law.fit_law(records, "d12", "FineWeb-Edu")
    assert law.fitted(5e7, 1e8) == pytest.approx(LAW(5e7, 1e8), abs=0.002)


def test_too_few_runs():
    for few in ([one for one in grid() if one["flops"] < 2e16], [one for one in grid() if one["depth"] < 8]):
        with pytest.raises(UserError, match="three depths with three budgets"):
            scaling_law.fit_law(few, "d12", "FineWeb-Edu")


def test_the_benchmark_writes_what_the_package_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(expected_quality, "FILE", tmp_path / "law.json")
    monkeypatch.setattr(scaling, "prepare_jax", lambda: None)

    def learns(experiment, at):
        size = counted_parameters(experiment.model, experiment.tokenizer.vocab_size)
        bpb = LAW(size, at[-1] * experiment.pretrain.batch_tokens)
        measured = {"times": [0.1] * at[-1], "scores": [(at[-1], bpb)], "passes": 0}
        return measured | {"peak_memory_bytes": 1, "device": "none"}

    monkeypatch.setattr(scaling, "Trainer", lambda scratch: learns)
    grid = [f"--out={tmp_path}", *TINY, "--depths", "1", "2", "3", "--flops", "1e11", "3e11", "1e12"]
    assert scaling.main([*grid, "--write-law=stories"]) == 0
    law = expected_quality.load_law()
    assert law is not None and law.runs == 9 and (law.experiment, law.text) == ("quickstart", "stories")
    assert law.flops == (pytest.approx(1e11, rel=0.1), pytest.approx(1e12, rel=0.1))
    assert law.fitted(1e6, 1e6) == pytest.approx(LAW(1e6, 1e6), rel=0.001)
