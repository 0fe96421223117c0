"""Quality beside nanochat: what its script is given, what is changed of it, and what follows from what it says."""

import argparse
import importlib
import json
import random
import sys
import types
from pathlib import Path

import nanochat_quality as peer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import quality_against_nanochat as against
import quality_runs

from jaxchat.data.synthetic.stories import write_document
from jaxchat.data.synthetic.world import build_world
from jaxchat.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
# Learns as fast as its rates are high, and has what it was given.
PEER = f"""#!{sys.executable}
import os, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import nanochat_quality, numpy
del sys.argv[0]

def measure(options, script):
    files = sorted(options.text.iterdir())
    return dict(
        times=[9.0] + [0.5] * (options.at[-1] - 1), scores=[(step, 4.0 / (options.rates or 1)) for step in options.at],
        device="none", script=script, files=[os.path.basename(os.path.realpath(file)) for file in files],
        rows=numpy.load(options.rows).tolist(), tokenizer=options.tokenizer.read_text(),
        momentum=options.momentum and options.momentum(3, 10 * options.at[-1]),
        sizes=[options.total_batch_size, options.device_batch_size, options.seed],
        batches=options.batches and numpy.load(options.batches).tolist(),
    )

nanochat_quality.measure = measure
nanochat_quality.main()
"""


@pytest.fixture
def given(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "base_train.py").write_text("optimizer = model.setup_optimizer(")
    (tmp_path / "python").write_text(PEER)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "text").mkdir()
    world = build_world(0)
    for name in "cab":
        texts = [write_document(world, random.Random(name + str(number))) for number in range(60)]
        pq.write_table(pa.table({"text": texts}), tmp_path / "text" / f"{name}.parquet", row_group_size=20)
    return ["quality", "--checkout", str(tmp_path), "--python", str(tmp_path / "python"), "--data",
            str(tmp_path / "text"), "--model.depth=1", "--model.sequence-len=64", "--tokenizer.vocab-size=300",
            "--pretrain.batch-tokens=512", "--pretrain.eval-tokens=512", "--steps=12", "--rows=4"]  # fmt: skip


@pytest.fixture
def here(monkeypatch):
    """In this process, and without jaxchat's own training."""

    def train_all(runs, file, within):
        learnt = {"times": [0.25] * 12, "scores": [(6, 3.0), (12, 2.5)], "device": "none"}
        return quality_runs.carry_out(runs, lambda run: learnt, file, within)

    monkeypatch.setattr(against, "train_all", train_all)
    monkeypatch.setattr(against, "alone", lambda work, *arguments, **settings: (work(*arguments), 0))


def test_both_learn_from_the_same_text(given, here, tmp_path, capsys):
    main = importlib.import_module("against_nanochat").main
    file, png = tmp_path / "all.jsonl", tmp_path / "all.png"
    asked = [
        "--recipe",
        "guide:",
        "modern:--model.depth=2",
        "--peer",
        "rule:",
        "best:--rates=2 --momentum=0,1,0.5,0.3,0.3",
        "--at=6",
        "--seeds",
        "3",
        "5",
        "--only",
        "guide",
        "rule",
        "best",
        f"--json={file}",
        f"--png={png}",
    ]
    assert main([*given, *asked]) == 0, capsys.readouterr()
    out, found = capsys.readouterr().out, [json.loads(line) for line in file.read_text().splitlines()]
    assert [one["recipe"] for one in found] == ["guide", "guide", "rule", "best", "rule", "best"]
    assert [one["program"] for one in found] == ["jaxchat"] * 2 + ["nanochat"] * 4
    best = found[3]
    assert best["curve"] == [[6, 3.0, 2.0], [12, 6.0, 2.0]] and best["step_ms"] == 500, "the first step compiled"
    assert best["files"] == ["a.parquet", "b.parquet", "c.parquet"] and best["momentum"] == pytest.approx(1 / 12)
    assert best["script"] == ["--depth=1", "--max-seq-len=64", "--window-pattern=L"]
    assert best["sizes"] == [512, 4, 3] and found[2]["momentum"] is None and found[4]["seed"] == 5
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "tokenizer.json").write_text(best["tokenizer"])
    tokenizer = load_tokenizer(tmp_path / "given" / "tokenizer.json")
    rows = np.array(best["rows"])
    assert rows.shape == (8, 2, 64) and (rows[:, 0, 1:] == rows[:, 1, :-1]).all()
    first = pq.read_table(tmp_path / "text" / "c.parquet")["text"][0].as_py()
    ids = [tokenizer.bos_token_id, *tokenizer.encode(first)]
    assert rows[0, 0].tolist() == ids[:64], "the last file is for validation"
    assert "| best, seed 5 | 2.0000 | 2.0000 | 500.0 | 6.0 |" in out
    assert "| best | 2.0000 | 2.0000 | -0.5000 | 0.0000 | 2 | 500.0 | 6.0 |" in out
    written = file.read_text()
    assert main([*given, *asked]) == 0 and file.read_text() == written and png.exists()
    assert main([*given, *asked, "--pretrain.eval-tokens=256", "--only", "rule", "--seeds", "3"]) == 0
    assert len(json.loads(file.read_text().splitlines()[-1])["rows"]) == 4, "other rows are another run"


def test_both_have_the_same_batches_if_asked(given, here, tmp_path):
    main, file = importlib.import_module("against_nanochat").main, tmp_path / "all.jsonl"
    peers = ["--peer", "own:", "same:--same-batches --rates=2"]
    asked = ["--recipe", "guide:", *peers, "--seeds=1", f"--json={file}", "--data.packing=concat"]
    assert main([*given, *asked]) == 0
    guide, own, same = [json.loads(line) for line in file.read_text().splitlines()]
    assert guide["program"] == "jaxchat" and own["batches"] is None and "--same-batches" not in same["script"]
    batches = np.array(same["batches"])
    assert batches.shape == (12 * 8, 2, 64), "12 batches of 512 tokens"
    assert (batches[:, 0, 1:] == batches[:, 1, :-1]).all()
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "tokenizer.json").write_text(same["tokenizer"])
    tokenizer = load_tokenizer(tmp_path / "given" / "tokenizer.json")
    first = pq.read_table(tmp_path / "text" / "a.parquet")["text"][0].as_py()
    ids = [tokenizer.bos_token_id, *tokenizer.encode(first)]
    assert batches[0, 0].tolist() == ids[:64], "they begin with the first file"


def test_refusals(given, here, tmp_path, capsys):
    main = importlib.import_module("against_nanochat").main
    assert main(["quality", "--checkout", str(tmp_path / "text")]) == 2
    assert "is not a nanochat checkout" in capsys.readouterr().err
    assert main([*given, "--peer", "rule:"]) == 2
    assert "no recipe is given" in capsys.readouterr().err
    for file in (tmp_path / "text").iterdir():
        file.with_suffix(".txt").write_text("Some words. " * 1000)
        file.unlink()
    assert main([*given, "--recipe", "guide:", "--peer", "rule:"]) == 2
    assert "nanochat reads files of parquet" in capsys.readouterr().err
    (tmp_path / "scripts" / "base_train.py").write_text("optimizers = model.setup_optimizers(")
    assert main([*given, "--recipe", "guide:"]) == 2
    assert "is too old" in capsys.readouterr().err


def test_momentum_rises_and_falls():
    at = peer.momentum_curve("0.85,0.97,0.9,0.35,0.65")
    assert [round(at(step, 400), 4) for step in (0, 70, 140, 270, 400)] == [0.85, 0.91, 0.97, 0.935, 0.9]
    flat = peer.momentum_curve("0.85,0.95,0.95,0,0")
    assert flat(0, 400) == flat(399, 400) == 0.95
    with pytest.raises(argparse.ArgumentTypeError, match="not five numbers"):
        peer.momentum_curve("0.85,0.97")


class Optimizer:
    def __init__(self, rates):
        self.param_groups = [{"kind": "adamw", "lr": rates["embedding_lr"]}, {"kind": "muon", "momentum": 0.95}]
        self.seen = []

    def step(self):
        self.seen.append(self.param_groups[1]["momentum"])


SCRIPT = """
from nanochat.common import print0
from nanochat.loss_eval import evaluate_bpb
optimizer = model.setup_optimizer(embedding_lr=0.15, weight_decay=0.28)
for step in range(7):
    if step % 2 == 0:
        print0(f"bpb {evaluate_bpb(model, iter([]), 3, [1, 2])}")
    optimizer.param_groups[1]["momentum"] = 0.5
    optimizer.step()
    print0(f"step {step} | loss: 1.0 | dt: {1000 + step:.2f}ms | tok/sec: 1")
"""


def test_given_batches_take_the_loaders_place(tmp_path, monkeypatch):
    kept = np.arange(4 * 2 * 3).reshape(4, 2, 3).astype(np.int32)
    np.save(tmp_path / "batches.npy", kept)
    tensor = types.SimpleNamespace(from_numpy=lambda array: types.SimpleNamespace(to=lambda device: array))
    monkeypatch.setitem(sys.modules, "torch", tensor)
    loader = peer.loading(tmp_path / "batches.npy")(None, 2, 3, split="train", device="cpu", resume_state_dict=None)
    seen = [next(loader) for _ in range(3)]
    inputs = [batch[0].tolist() for batch in seen]
    assert inputs == [kept[:2, 0].tolist(), kept[2:, 0].tolist(), kept[:2, 0].tolist()], "then from the first on"
    assert seen[1][1].tolist() == kept[2:, 1].tolist() and seen[0][2].keys() == {"pq_idx", "rg_idx", "epoch"}


def test_the_script_is_watched(tmp_path, monkeypatch, capsys):
    kept = np.arange(5 * 2 * 3).reshape(5, 2, 3).astype(np.int32)
    np.save(tmp_path / "rows.npy", kept)
    tensor = types.SimpleNamespace(from_numpy=lambda array: types.SimpleNamespace(to=lambda device: array))
    monkeypatch.setitem(sys.modules, "torch", tensor)
    options = argparse.Namespace(
        at=[4, 6], rates=2.0, momentum=lambda step, steps: step / steps, total_batch_size=2**17, device_batch_size=2,
        rows=tmp_path / "rows.npy",
    )  # fmt: skip
    watch, made, given = peer.Watch(options), [], []

    def setup(model, **settings):
        made.append((Optimizer(settings), settings))
        return made[0][0]

    def evaluate(model, batches, steps, sizes):
        given.append((list(batches), steps, sizes))
        return 1.5

    model = types.SimpleNamespace(get_device=lambda: "cpu", parameters=lambda: [types.SimpleNamespace(numel=lambda: 7)])
    model.setup_optimizer = lambda **settings: watch.optimizing(setup)(model, **settings)
    common = types.SimpleNamespace(print0=watch.printing(print))
    losses = types.SimpleNamespace(evaluate_bpb=watch.evaluating(evaluate))
    for name, module in (("", None), (".common", common), (".loss_eval", losses)):
        monkeypatch.setitem(sys.modules, f"nanochat{name}", module or types.ModuleType("nanochat"))
    with pytest.raises(peer.Left):
        exec(SCRIPT, {"model": model})
    assert watch.scores == [(4, 1.5), (6, 1.5)] and watch.times == pytest.approx([1.0 + n / 1000 for n in range(6)])
    assert made[0][1] == {"embedding_lr": pytest.approx(0.15 * 2 / 0.5), "weight_decay": 0.28} and watch.parameters == 7
    assert made[0][0].seen == pytest.approx([n / 6 for n in range(6)]), "not the script's own momentum"
    batches, steps, sizes = given[0]
    assert steps == 3 and sizes == [1, 2] and len(given) == 2, "every step between is left out"
    inputs, targets = (np.concatenate([batch[side] for batch in batches]) for side in (0, 1))
    assert (inputs[:5] == kept[:, 0]).all() and (targets[:5] == kept[:, 1]).all()
    assert inputs.shape == (6, 3) and (targets[5] == -1).all()
    out = capsys.readouterr().out
    assert "bpb nan" in out and "1.5000 bits per byte after 4 steps" in out and "dt:" not in out


def test_what_its_own_rules_are_is_left_alone(monkeypatch):
    watch = peer.Watch(argparse.Namespace(rates=None, momentum=None, at=[2]))
    optimizer, started = Optimizer({"embedding_lr": 0.15}), []
    model = types.SimpleNamespace(parameters=list)
    assert watch.optimizing(lambda model, **settings: optimizer)(model, embedding_lr=0.15) is optimizer
    optimizer.step()
    assert optimizer.seen == [0.95] and watch.step == 1
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(manual_seed=started.append))
    assert peer.seeded(lambda kind: started.append(42) or kind, 7)("cpu") == "cpu"
    assert started == [42, 7]
