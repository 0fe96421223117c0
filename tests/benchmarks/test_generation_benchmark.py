"""The comparison of generation runs, with a stand-in for nanochat, and prints what both have reported."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEER = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import nanochat_generation
del sys.argv[0]

def measure(options):
    names = "depth context new vocab_size sequence_len repeats".split()
    variant = [
        dict(rows=rows, first_token_seconds=0.5, samples_of_one_prompt=dict(
            first_token_seconds=0.25, tokens_per_second=10.0 * rows)) for rows in options.rows
    ]
    return dict(variants={{"as it is": variant}}, dtype="bfloat16", attention="none", device="no device", torch="2",
                options=[getattr(options, name) for name in names])

nanochat_generation.measure = measure
nanochat_generation.main()
"""
SMALL = "--depth 1 --rows 1 2 --context 5 --new 12 --vocab-size 300 --sequence-len 64 --repeats 1".split()


@pytest.fixture
def peer(tmp_path):
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "engine.py").touch()
    python = tmp_path / "python"
    python.write_text(PEER)
    python.chmod(0o755)
    return ["--checkout", str(tmp_path), "--python", str(python)]


def test_both_do_the_same_work_and_stand_in_one_table(peer, tmp_path, capsys):
    file = tmp_path / "all.json"
    code = importlib.import_module("generation").main([*peer, *SMALL, "--json", str(file)])
    out = capsys.readouterr().out
    assert code == 0, out
    figures = json.loads(file.read_text())
    assert figures["nanochat"]["options"] == [1, 5, 12, 300, 64, 1]
    ours = figures["jaxchat"]
    assert ours["model"] | {"depth": 1, "vocab_size": 300, "sequence_len": 64} == ours["model"]
    assert [(one["rows"], one["context"], one["new"]) for one in ours["measured"]] == [(1, 5, 12), (2, 5, 12)]
    for one, theirs in zip(ours["measured"], (10, 20), strict=True):
        samples, rows = one["samples_of_one_prompt"], one["rows"]
        ratio = samples["tokens_per_second"] / theirs
        assert f"| nanochat, as it is | {rows} | 500.0 | 250.0 | {theirs} |  |  | {ratio:.1f} |" in out
        assert f"| jaxchat | {rows} | {1000 * one['first_token_seconds']:,.1f} |" in out


def test_refusals(peer, tmp_path, capsys):
    main = importlib.import_module("generation").main
    assert main(["--checkout", str(tmp_path / "nanochat")]) == 2
    assert "is not a nanochat checkout" in capsys.readouterr().err
    assert main([*peer, *SMALL, "--context", "60"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: jaxchat failed: ") and "do not fit the model's context of 64" in last
