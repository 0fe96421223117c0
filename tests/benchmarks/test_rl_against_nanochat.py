"""A step of reinforcement learning beside one of nanochat's script: the same work, and what follows from the times."""

import importlib
import json
import sys
import types
from pathlib import Path

from jaxchat.tokenizer import load_tokenizer
from tests.export import golden

ROOT = Path(__file__).parents[2]
# Takes as long for each question as it says, and has what it was given.
PEER = f"""#!{sys.executable}
import json, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import nanochat_rl
del sys.argv[0]

def measure(options):
    tokenizer = nanochat_rl.KnownTokenizer(options.tokenizer)
    step = dict(seconds=10.0, sampling_seconds=6.0, optimizer_seconds=2.0, tokens=600)
    return dict(variants=[dict(rows=rows, steps=[step] * options.steps) for rows in options.rows], device="none",
                attention="none", torch="2", prompts=len(tokenizer.prompts), texts=len(tokenizer.texts))

nanochat_rl.measure = measure
nanochat_rl.main()
"""


def load(name):
    return importlib.import_module(name)


def test_a_step_of_all_questions_follows_from_that_of_a_few():
    measured = [{"seconds": 10.0, "sampling_seconds": 6.0, "optimizer_seconds": 2.0, "tokens": 600},
                {"seconds": 12.0, "sampling_seconds": 8.0, "optimizer_seconds": 2.0, "tokens": 800}]  # fmt: skip
    step = load("rl_against_nanochat").whole_step(measured, 8.0)
    assert step == {"tokens_per_second": 100.0, "step_seconds": 8 * 7 + 8 * 2 + 2, "sampling_seconds": 56.0}


def test_both_do_the_same_work_and_stand_in_one_table(tmp_path, capsys):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "chat_rl.py").touch()
    (tmp_path / "python").write_text(PEER)
    (tmp_path / "python").chmod(0o755)
    golden.tokenizer().save(tmp_path)
    given = ["rl", "--checkout", str(tmp_path), "--python", str(tmp_path / "python")]
    given += ["--tokenizer", str(tmp_path / "tokenizer.json"), "--json", str(tmp_path / "all.json")]
    small = "--depth 1 --sequence-len 512 --questions 4 --samples 4 --max-new-tokens 8 --steps 4".split()
    small += ["--peer-rows", "2", "4"]
    main = load("against_nanochat").main
    assert main([*given, *small, "--peer-rows", "3"]) == 2
    assert "--peer-rows is 3; it must divide the 4 --samples" in capsys.readouterr().err
    assert main([*given, *small]) == 0, capsys.readouterr()
    found = json.loads((tmp_path / "all.json").read_text())
    ours, theirs = found["jaxchat"], found["nanochat"]
    assert theirs["prompts"] > 500 and theirs["texts"] == golden.tokenizer().vocab_size
    assert [variant["rows"] for variant in theirs["variants"]] == [2, 4]
    assert theirs["variants"][0]["step_seconds"] == 2 * 8 + 2
    assert len(ours["steps"]) == 4 and ours["step_seconds"] > ours["sampling_seconds"] > 0
    assert any(0 < line["reward"] < 1 for line in ours["steps"]), "there is something to train on"
    ratio = f"{ours['tokens_per_second'] / 100:.1f} | {18 / ours['step_seconds']:.1f}"
    assert f"| nanochat, 2 rows at once | 100 | 18.00 | 12.00 | {ratio} |" in capsys.readouterr().out


def test_no_checkout_and_no_questions(tmp_path, capsys):
    main = load("against_nanochat").main
    given = ["rl", "--tokenizer", "nowhere", "--checkout"]
    assert main([*given, str(tmp_path)]) == 2
    assert "is not a nanochat checkout (no scripts/chat_rl.py)" in capsys.readouterr().err
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "chat_rl.py").touch()
    assert main([*given, str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "train.jsonl does not exist" in capsys.readouterr().err


SCRIPT = """
import sys
from nanochat.checkpoint_manager import load_model
from nanochat.engine import Engine
model, tokenizer, meta = load_model("sft", "cpu")
options = dict(option.removeprefix("--").split("=") for option in sys.argv[1:])
optimizer = model.setup_optimizer()
while True:
    for question in range(int(options["examples-per-step"])):
        for part in range(int(options["num-samples"]) // int(options["device-batch-size"])):
            Engine(model).generate_batch([1, 2], num_samples=int(options["device-batch-size"]))
    optimizer.step()
"""


def test_steps_of_the_script_are_counted_and_left(tmp_path, monkeypatch):
    class Engine:
        def __init__(self, model):
            self.model = model

        def generate_batch(self, tokens, num_samples):
            return [[*tokens, 3, 4, 5]] * num_samples, [[0, 0, 1, 1, 1]] * num_samples

    peer, done = load("nanochat_rl"), []
    model = types.SimpleNamespace(
        setup_optimizer=lambda: types.SimpleNamespace(step=lambda: done.append(1)), zero_grad=lambda set_to_none: None
    )
    checkpoints = types.SimpleNamespace(load_model=lambda *arguments: (model, None, {}))
    for name, module in (("", None), (".engine", types.SimpleNamespace(Engine=Engine)),
                         (".checkpoint_manager", checkpoints)):  # fmt: skip
        monkeypatch.setitem(sys.modules, f"nanochat{name}", module or types.ModuleType("nanochat"))
    monkeypatch.setattr(sys, "argv", [])
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "chat_rl.py").write_text(SCRIPT)
    options = types.SimpleNamespace(checkout=tmp_path, steps=2, questions=3, samples=4, max_new_tokens=9)
    found = peer._steps(options, model, 2, types.SimpleNamespace(type="cpu"))
    assert found["rows"] == 2 and len(found["steps"]) == 2 and len(done) == 3
    for step in found["steps"]:
        assert step["tokens"] == 3 * 4 * 3 and step["seconds"] >= step["sampling_seconds"] + step["optimizer_seconds"]
    assert Engine(model).generate_batch([1], 1)[0] == [[1, 3, 4, 5]], "the engine is as it was"


def test_the_tokenizer_that_nanochat_is_given(tmp_path):
    golden.tokenizer().save(tmp_path)
    against, peer = load("rl_against_nanochat"), load("nanochat_rl")
    items = against._items(None)
    against._write_questions(tmp_path / "data", tmp_path / "base", items)
    known = against._known(str(tmp_path / "tokenizer.json"), tmp_path / "data", items)
    (tmp_path / "known.json").write_text(json.dumps(known))
    own, given = load_tokenizer(tmp_path / "tokenizer.json"), peer.KnownTokenizer(tmp_path / "known.json")
    question = {"messages": [{"role": "user", "content": items[0]["question"]}, {"role": "assistant", "content": "0"}]}
    prompt = given.render_for_completion(question)
    assert prompt == own.render_for_completion(question) and given.decode(prompt) == own.decode(prompt)
    assert given.get_bos_token_id() == own.bos_token_id and own.decode(given.encode("-12.5")) == "-12.5"
