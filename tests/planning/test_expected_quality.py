"""What is said of the bits per byte to expect, by a law that is made up."""

import dataclasses
import json

from jaxchat.cli.experiments import load_experiment
from jaxchat.cli.launch import main
from jaxchat.planning import expected_quality
from jaxchat.planning.expected_quality import Curve, QualityLaw, load_law, quality_lines
from jaxchat.recipes import counted_parameters

FITTED, PUBLISHED = Curve(0.55, 60.0, 0.33, 90.0, 0.3), Curve(0.4, 70.0, 0.34, 80.0, 0.28)
LAW = QualityLaw(
    **{"fitted": FITTED, "published": PUBLISHED},
    **{"error": 0.0042, "runs": 18, "experiment": "d12", "text": "FineWeb-Edu", "date": "2026-11-30"},
    **{"flops": (3e15, 1e17), "parameters": (4e6, 3e8), "tokens": (1e6, 1e9)},
)


def test_what_is_said_of_an_experiment():
    experiment = load_experiment("d12")
    size = counted_parameters(experiment.model, experiment.tokenizer.vocab_size)
    first, second = quality_lines(experiment, 10**8, 7e16, LAW)
    assert first == (
        f"about {0.55 + 60 / size**0.33 + 90 / 1e8**0.3:.3f} bits per byte after pretraining, by 18 runs of d12 "
        "with 3e+15 to 1e+17 FLOPs on FineWeb-Edu"
    )
    assert second.startswith("from which it errs by 0.004; another recipe or text differs")
    for tokens, flops in ((10**8, 1e18), (10**10, 7e16), (200_000, 7e16)):
        lowest, highest = sorted((0.55 + 60 / size**0.33 + 90 / tokens**0.3, 0.4 + 70 / size**0.34 + 80 / tokens**0.28))
        far, how = quality_lines(experiment, tokens, flops, LAW)
        assert far.startswith(f"{lowest:.2f} to {highest:.2f} bits per byte after pretraining, far from 18 runs of d12")
        assert how.startswith("by exponents as published and as fitted")
    deep = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, depth=30))
    assert "far from" in quality_lines(deep, 10**8, 7e16, LAW)[0]
    assert quality_lines(experiment, 10**8, 7e16, None) == []
    assert quality_lines(experiment, 99_999, 7e16, LAW) == [], "a tenth of the runs' fewest tokens"
    assert quality_lines(experiment, 10**8, 7e16, dataclasses.replace(LAW, parameters=(2e9, 3e9))) == []
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
    lowest, highest = sorted((FITTED(size, 102_400), PUBLISHED(size, 102_400)))
    assert f"quality       {lowest:.2f} to {highest:.2f} bits per byte" in out and f"{'':<14}by exponents" in out


def test_the_law_in_the_package_can_be_read():
    law = load_law()
    assert law is not None and 0.3 < law.published(1e8, 1e9) < law.fitted(1e8, 1e9) < 1.5
