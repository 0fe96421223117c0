"""The benchmarks of evaluation: what counts as equal, what nanochat is given, and the way from a run to a table."""

import importlib
import json
import math
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import Experiment, ModelConfig
from jaxchat.errors import UserError
from jaxchat.export.hf import export_hf
from jaxchat.model.gpt import hidden_states, logits
from jaxchat.runs.directory import RunDirectory
from tests.eval.core.conftest import MULTIPLE_CHOICE, SCHEMA, entry, write_bundle
from tests.export import golden

ROOT = Path(__file__).parents[2]
CONFIG = golden.MODELS["two heads that share keys"]
# Decides as jaxchat has before it, but for item 1 of the task `schema`, which it finds close to the other choice.
PEER = f"""#!{sys.executable}
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import nanochat_evaluation as peer
del sys.argv[0]

def core(options):
    assert (options.folder / "model.safetensors").exists() and (options.data / "core.yaml").exists()
    tasks = {{}}
    for file in (options.json.parent / "kept").glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()][options.rank :: options.processes]
        decisions = [dict(index=l["index"], right=l["right"], choice=l["chosen"], margin=1e-6, scores=[
            float("nan") if score is None else score + 1e-5 for score in l["scores"]]) for l in lines]
        for decision in decisions:
            if file.stem == "schema" and decision["index"] == 1:
                decision.update(choice=1 - decision["choice"], right=not decision["right"])
        tasks[file.stem] = dict(seconds=2.0 + options.rank, asked=len(lines), decisions=decisions)
    return dict(tasks=tasks)

peer.core, peer.machine = core, lambda: dict(torch="2", device="none")
peer.main()
"""


def load(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an untrained base model."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    settings = Experiment(name="tiny", model=ModelConfig(depth=3, num_kv_heads=1))
    run.open(settings)
    golden.tokenizer().save(run.tokenizer)
    run.write_record("tokenizer", {"stage": "tokenizer", "id": run.new_id("tokenizer")})
    checkpoints = Checkpoints(run.checkpoints("pretrain"))
    params = jax.tree.map(jnp.asarray, golden.parameters(CONFIG))
    checkpoints.save(7, {"params": params, "step": jnp.asarray(7)}, data={}, meta={})
    checkpoints.close()
    run.begin("pretrain", settings, ["tokenizer"])
    run.write_record("pretrain", {"stage": "pretrain", "steps": 7, "tokens": 100, "parent": None})
    return run.path


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "checkout" / "nanochat").mkdir(parents=True)
    (tmp_path / "checkout" / "nanochat" / "gpt.py").touch()
    python = tmp_path / "python"
    python.write_text(PEER)
    python.chmod(0o755)
    return ["--checkout", str(tmp_path / "checkout"), "--python", str(python)]


def test_core_from_a_run_to_the_table(run, checkout, tmp_path, capsys):
    tasks = [("multiple_choice", MULTIPLE_CHOICE[:4], 0), ("schema", SCHEMA[:3], 1)]
    bundle = write_bundle(tmp_path / "bundle", [(entry(kind, kind, shots), items) for kind, items, shots in tasks])
    file = tmp_path / "all.json"
    options = ["--run", str(run), "--data", str(bundle), "--processes", "2", "--json", str(file)]
    assert load("against_nanochat").main(["core", *checkout, *options]) == 1, "one of seven differs"
    found = json.loads(file.read_text())
    assert (found["items"], found["equal"], found["agree"]) == (7, 6, False)
    schema = found["tasks"]["schema"]
    assert [difference["index"] for difference in schema["differences"]] == [1] and schema["seconds"] == 3.0
    assert abs(schema["accuracy"]["jaxchat"] - schema["accuracy"]["nanochat"]) == pytest.approx(1 / 3)
    assert schema["largest_score_difference"] == pytest.approx(1e-5, rel=1e-3)
    out = capsys.readouterr().out
    assert "6 of 7 decisions are equal (85.714%)." in out and "schema, item 1: near-tie, 1.0e-06 apart" in out


def test_refusals(checkout, tmp_path, capsys):
    against, evaluation = load("against_nanochat"), load("evaluation")
    given = ["--run", "nowhere", "--data", str(tmp_path)]
    speed = ["core", "--data", str(tmp_path)]
    for main, arguments, message in (
        (against.main, ["core", "--checkout", str(tmp_path), *given], "is not a nanochat checkout"),
        (against.main, ["bpb", *checkout, "--run", "nowhere", "--data", "no/data"], "no/data does not exist"),
        (against.main, ["chat", *checkout, *given], "jaxchat export failed: error: there is no run directory nowhere"),
        (evaluation.main, speed, "needs --tokenizer"),
        (load("against_lm_eval").main, given, f"{tmp_path} does not exist; name a file of questions"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_equal_decisions():
    compare = load("evaluation_against_nanochat").compare_decisions
    ours = [
        {"index": 0, "right": True, "chosen": 0, "scores": [None, 2.0]},
        {"index": 1, "right": False, "chosen": 1, "scores": [2.0, 1.0]},
        {"index": 2, "right": True, "scores": [0.5]},
        {"index": 3, "right": True, "scores": [0.5]},
    ]
    theirs = {
        0: {"right": True, "choice": 0, "scores": [math.nan, 2.25]},
        1: {"right": False, "choice": 2, "scores": [2.0, 1.0]},  # another choice, wrong as well
        2: {"right": False, "scores": [0.5]},
        3: {"error": "prompt without is supposed to be a prefix of prompt with"},
    }
    found = compare(ours, theirs)
    assert [difference["index"] for difference in found["differences"]] == [1, 2]
    assert (found["items"], found["refused_by_nanochat"], found["largest_score_difference"]) == (3, 1, 0.25)
    assert found["accuracy"] == {"jaxchat": 0.75, "nanochat": 0.25}
    with pytest.raises(UserError, match="decided 4 items and nanochat 3, not the same ones"):
        compare(ours, {index: theirs[index] for index in (0, 1, 2)})


@pytest.mark.parametrize(("items", "different", "agree"), [(1000, 1, True), (1000, 2, False), (0, 0, False)])
def test_a_thousandth_may_differ(items, different, agree):
    totals = load("evaluation_against_nanochat").totals
    tasks = {"a": {"items": items, "differences": [{}] * different}, "b": {"items": 0, "differences": []}}
    assert totals(tasks) == {"items": items, "equal": items - different, "agree": agree}


def test_equal_answers():
    compare = load("evaluation_against_nanochat").compare_answers
    ours = [{"question": q, "answer": f"It is {q}", "right": True} for q in "abc"]
    theirs = [
        {**ours[0]},
        {**ours[1], "answer": "It was b"},  # another way to say it
        {**ours[2], "answer": "It is d", "right": False},
    ]
    found = compare(ours, theirs)
    assert (found["items"], found["equal_answers"]) == (3, 1)
    assert [(d["index"], d["same_until"]) for d in found["differences"]] == [(2, 6)]
    with pytest.raises(UserError, match="not the same ones in the same order"):
        compare(ours, theirs[::-1])


def test_the_time_of_all_items():
    tasks = {"a": {"seconds": 2.0, "asked": 4}, "b": {"seconds": 1.0, "asked": 10}}
    assert load("evaluation").whole_time(tasks, {"a": 8, "b": 10}) == 5.0


def test_log_likelihoods_of_the_harness():
    differences = load("against_lm_eval").differences
    hf = [{"acc": 1.0, "answers": [(-3.0, True), (-200.0, False)]}, {"acc": 0.0, "answers": [(-4.0, False)]}]
    api = [{"acc": 1.0, "answers": [(-3.0, True), (-200.00005, False)]}, {"acc": 0.0, "answers": [(-4.0, False)]}]
    found = differences({"hf": hf, "local-completions": api})
    assert found["agree"] and found["difference"] == pytest.approx(5e-5) and found["count"] == 3
    api[1]["answers"] = [(-4.0, True)]
    assert not differences({"hf": hf, "local-completions": api})["agree"]


def test_what_nanochat_is_given(tmp_path):
    """Questions in the hub's form, where a text may have line separators that are not ends of lines."""
    import pyarrow.parquet as pq

    peer, data = load("nanochat_evaluation"), tmp_path / "eval"
    (data / "gsm8k").mkdir(parents=True)
    arc = {"query": "Question: Which\u2028one?", "choices": ["red", "blue"], "gold": 1}
    (data / "arc_easy.jsonl").write_text(json.dumps(arc, ensure_ascii=False) + "\n")
    sums = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)]
    (data / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, sums)) + "\n")
    peer.write_questions(data, tmp_path)
    hub = tmp_path / "task_data"
    row = {"question": "Which\u2028one?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "B"}
    assert pq.read_table(hub / "allenai--ai2_arc/ARC-Easy/test/00000.parquet").to_pylist() == [row]
    assert pq.read_table(hub / "openai--gsm8k/main/test/00000.parquet").to_pylist() == sums
    assert json.loads((hub / "openai--gsm8k/main/test/manifest.json").read_text()) == ["00000.parquet"]
    assert not (hub / "cais--mmlu").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_hf(CONFIG, golden.parameters(CONFIG), golden.tokenizer(), tmp_path_factory.mktemp("out") / "model")


def test_the_tokenizer_that_nanochat_gets(exported, monkeypatch):
    module = types.ModuleType("nanochat.tokenizer")
    module.RustBPETokenizer = lambda encoding, bos: (encoding, bos)
    monkeypatch.setitem(sys.modules, "nanochat", types.ModuleType("nanochat"))
    monkeypatch.setitem(sys.modules, "nanochat.tokenizer", module)
    encoding, bos = load("nanochat_evaluation").nanochat_tokenizer(exported / "tokenizer.json")
    own = golden.tokenizer()
    for text in ("the quick brown foxes' 1234 dogs\n\n  jump", "日本 naïve 🙂\t\x00", "<|bos|> is text"):
        assert encoding.encode_ordinary(text) == own.encode(text)
    assert encoding.encode_single_token(bos) == own.bos_token_id and encoding.n_vocab == own.vocab_size


def test_the_model_in_torch(exported):
    """Where torch is installed: its logits, at once and step by step with nanochat's kind of cache."""
    torch = pytest.importorskip("torch")
    tokens = golden.row()[None, :64]
    params = jax.tree.map(jnp.asarray, golden.parameters(CONFIG))
    expected = np.asarray(logits(CONFIG, params, hidden_states(CONFIG, params, jnp.asarray(tokens, jnp.int32))))
    expected = expected[..., : CONFIG.vocab_size]
    model = load("torch_model").TorchGPT(exported, torch.device("cpu"), torch.float32)
    ids = torch.from_numpy(tokens)
    np.testing.assert_allclose(model(ids).numpy(), expected, atol=2e-5)
    cache = Cache(torch, model.config, 64)
    steps = [model(ids[:, :40], kv_cache=cache), *(model(ids[:, i : i + 1], kv_cache=cache) for i in range(40, 64))]
    np.testing.assert_allclose(torch.cat(steps, dim=1).numpy(), expected, atol=2e-5)


class Cache:
    """What nanochat's `KVCache` offers a model."""

    def __init__(self, torch, config, length):
        shape = (config.n_layer, 2, 1, length, config.n_kv_head, config.n_embd // config.n_head)
        self.layers, self.at = torch.zeros(shape), 0

    def get_pos(self):
        return self.at

    def get_layer_cache(self, layer):
        return self.layers[layer, 0], self.layers[layer, 1]

    def advance(self, count):
        self.at += count
