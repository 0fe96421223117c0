"""What is said of the bits per byte to expect, by a law that is made up."""

import dataclasses
import json

from jaxchat.cli.experiments import load_experiment
from jaxchat.cli.launch import main
from jaxchat.planning import expected_quality
from jaxchat.planning.expected_quality import QualityLaw, load_law, quality_lines
from jaxchat.recipes import counted_parameters

LAW = QualityLaw(
    **{"floor": 0.55, "model_factor": 60.0, "model_exponent": 0.33, "data_factor": 90.0, "data_exponent": 0.3},
    **{"error": 0.0042, "runs": 18, "experiment": "d12", "text": "FineWeb-Edu", "date": "2026-11-30"},
    **{"flops": (3e15, 1e17), "parameters": (1e7, 3e8), "tokens": (1e7, 1e9)},
)


def test_what_is_said_of_an_experiment():
    experiment = load_experiment("d12")
    size = counted_parameters(experiment.model, experiment.tokenizer.vocab_size)
    first, second = quality_lines(experiment, 10**8, 7e16, LAW)
    assert first == (
        f"about {0.55 + 60 / size**0.33 + 90 / 1e8**0.3:.3f} bits per byte after pretraining, by a law of 18 runs of "
        "d12 with 3e+15 to 1e+17 FLOPs on FineWeb-Edu"
    )
    assert second.startswith("where its error is 0.0042; text that is read more than four times counts for less")
    for tokens, flops in ((10**8, 1e18), (10**10, 7e16), (10**6, 7e16)):
        assert quality_lines(experiment, tokens, flops, LAW)[1].startswith("an extrapolation")
    deep = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, depth=30))
    assert quality_lines(deep, 10**8, 7e16, LAW)[1].startswith("an extrapolation")
    assert quality_lines(experiment, 10**8, 7e16, None) == []
    assert quality_lines(load_experiment("quickstart"), 10**8, 7e16, LAW) == [], "a world of its own"


def test_the_dry_run_says_it_where_there_is_a_law(tmp_path, monkeypatch, capsys):
    small = ["--experiment=d12", "--dry-run", f"--run-dir={tmp_path / 'run'}", "--model.depth=2",
             "--model.sequence-len=64", "--tokenizer.vocab-size=512", "--pretrain.batch-tokens=1024",
             "--pretrain.num-iterations=100", "--stages=tokenizer,pretrain"]  # fmt: skip
    monkeypatch.setattr(expected_quality, "FILE", tmp_path / "law.json")
    assert load_law() is None
    assert main(small) == 0
    assert "bits per byte" not in capsys.readouterr().out
    expected_quality.FILE.write_text(json.dumps(dataclasses.asdict(LAW)))
    assert load_law() == LAW
    assert main(small) == 0
    size = 2 * 12 * 128**2 + 512 * 128
    out = capsys.readouterr().out
    assert f"quality       about {LAW(size, 102_400):.3f} bits per byte" in out and f"{'':<14}an extrapolation" in out


def test_the_law_in_the_package_can_be_read():
    assert load_law() is None or load_law()(1e8, 1e9) > 0  # pyright: ignore[reportOptionalCall]
