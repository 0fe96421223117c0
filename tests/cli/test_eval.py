"""`jaxchat eval` on a small run: what it prints, keeps, keeps from before, and refuses."""

import contextlib
import io
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.cli.main import main
from jaxchat.config import DataConfig, EvaluateConfig, Experiment, ModelConfig
from jaxchat.eval.statistics import wilson_interval
from jaxchat.eval.text_bpb import text_bpb
from jaxchat.infer.trained import load_model
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import init_params
from jaxchat.runs.config_json import to_json
from jaxchat.stages.generated import write_generated
from jaxchat.tokenizer import Tokenizer
from tests.devices.test_processes import start_several
from tests.eval.core.conftest import MULTIPLE_CHOICE, entry, write_bundle
from tests.tiny import refusal

STEPS = 150
# `jaxchat eval` that sends itself SIGTERM when it asks a task, in process 1 alone.
PROGRAM = """
import os, signal, sys
from jaxchat import stopping
stopping.begin()
import jax
from jaxchat.analysis import evaluation
from jaxchat.cli.main import main

real = evaluation.evaluate_task

def evaluate_task(engine, task, **options):
    if (task.name, jax.process_index()) == (sys.argv[1], 1):
        os.kill(os.getpid(), signal.SIGTERM)
    return real(engine, task, **options)

evaluation.evaluate_task = evaluate_task
sys.exit(main(["eval", *sys.argv[2:]]))
"""
STORY = "The old fox slept under the tree.\n\nThe rain fell on the leaves all night long."


def evaluate(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["eval", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with untrained models, whose evaluate section asks for 8 sums and letters with answers of 8 tokens."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    experiment = Experiment(
        name="tiny",
        model=ModelConfig(depth=1, sequence_len=64),
        data=DataConfig(synthetic_documents=200, synthetic_conversations=200),
        evaluate=EvaluateConfig(
            tasks=("sums", "letters"), of=("pretrain", "sft"), limit=8, max_new_tokens=8, batch_rows=8
        ),
    )
    write_generated(directory / "data", experiment, lambda line: None)
    (directory / "config.json").write_text(to_json(experiment))
    tokenizer = Tokenizer.train_from_iterator([STORY * 9 + "How many letters are in a word? What is 1 + 2?" * 9], 300)
    tokenizer.save(directory / "tokenizer")
    params = init_params(GPTConfig.of(experiment.model, tokenizer.vocab_size), jax.random.key(0))
    for stage in ("pretrain", "sft"):
        head = jax.random.normal(jax.random.key(len(stage)), params["head"]["kernel"].shape) / 4
        checkpoints = Checkpoints(directory / stage / "checkpoints")
        state = {"params": {**params, "head": {"kernel": head}}, "step": jnp.asarray(STEPS)}
        checkpoints.save(STEPS, state, data={}, meta={})
        checkpoints.close()
        record = {"stage": stage, "steps": STEPS, "text": {"train_files": ["shard_00000.parquet"]}}
        (directory / stage / "stage.json").write_text(json.dumps(record))
    return directory


def report(folder):
    return json.loads((folder / "report.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def groups(folder):
    """What the page shows."""
    page = (folder / "answers.html").read_text()
    start = page.index('id="data">') + len('id="data">')
    data = json.loads(page[start : page.index("</script>", start)])
    assert "http:" not in page and "https:" not in page, "it needs no network"
    return {group["name"]: group for group in data["groups"]}


def test_tasks_and_text(run, tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    (tmp_path / "more.jsonl").write_text('{"text": "One."}\n{"text": "Two </script> <b>"}\n')
    out_folder = tmp_path / "out"
    asked = ["--run", run, "--tasks", "sums:6", "letters:8", "--text", tmp_path / "story.txt", tmp_path / "more.jsonl"]
    code, out, err = evaluate(*asked, "--out", out_folder)
    assert code == 0, err
    found = report(out_folder)
    assert (found["model"]["stage"], found["model"]["step"], found["model"]["vocab_size"]) == ("sft", STEPS, 300)
    assert list(found["tasks"]) == ["sums", "letters"] and found["core"] is None and found["chat_core"] is None
    for name, facts in found["tasks"].items():
        answers = lines(out_folder / "answers" / f"{name}.jsonl")
        assert facts["count"] == len(answers) == (6 if name == "sums" else 8)
        assert facts["score"] == pytest.approx(sum(answer["score"] for answer in answers) / len(answers))
        assert [facts["low"], facts["high"]] == pytest.approx(wilson_interval(facts["score"], facts["count"]))
        shown = f"| {name} | {facts['score']:.1%} | {100 * facts['low']:.1f} to {100 * facts['high']:.1f} | "
        assert shown in out and f"| {facts['count']:,} |" in out
        items = groups(out_folder)[name]["items"]
        assert len(items) == len(answers) and items[0]["question"] in [answer["question"] for answer in answers]
        assert [item["score"] == 1 for item in items] == sorted(item["score"] == 1 for item in items)
    trained = load_model(run)
    names = [str(tmp_path / "story.txt"), str(tmp_path / "more.jsonl")]
    texts = [(names[0], STORY), (names[1], "One."), (names[1], "Two </script> <b>")]
    expected = text_bpb(trained.model, trained.params, trained.tokenizer, texts)
    assert list(found["text"]["sources"]) == names
    for name, bits in expected.sources.items():
        kept = found["text"]["sources"][name]
        assert kept["bits_per_byte"] == pytest.approx(bits.bits_per_byte, rel=1e-5)
        assert (kept["documents"], kept["bytes"], kept["tokens"]) == (bits.documents, bits.bytes, bits.tokens)
        assert f"| {name} | {bits.bits_per_byte:.4f} |" in out
    assert f"| all | {expected.total.bits_per_byte:.4f} |" in out
    assert [one["beginning"] for one in lines(out_folder / "text.jsonl")] == [text[:80] for _, text in texts]
    assert {item["question"] for item in groups(out_folder)["text"]["items"]} == {text[:80] for _, text in texts}
    assert (out_folder / "report.md").read_text() == out

    # The same again, then with other questions; what was measured before stays.
    answers = (out_folder / "answers" / "letters.jsonl").stat().st_mtime_ns
    code, out, err = evaluate("--run", run, "--tasks", "letters:8", "--out", out_folder)
    assert code == 0 and "letters: the same questions were asked before" in err
    assert (out_folder / "answers" / "letters.jsonl").stat().st_mtime_ns == answers
    assert "| sums | " in out and "| all | " in out
    code, out, err = evaluate("--run", run, "--tasks", "letters:3", "--out", out_folder)
    assert code == 0 and "asked before" not in err and report(out_folder)["tasks"]["letters"]["count"] == 3

    # Another model: its results are not mixed with those that are there.
    code, _, err = evaluate("--run", run, "--stage=pretrain", "--text", tmp_path / "story.txt", "--out", out_folder)
    assert code == 0 and f"they are now in {out_folder}.old-1" in err
    assert report(out_folder)["tasks"] == {} and report(out_folder)["model"]["stage"] == "pretrain"
    assert report(tmp_path / "out.old-1")["tasks"]["letters"]["count"] == 3


def test_what_the_runs_evaluate_stage_asks(run):
    code, out, err = evaluate("--run", run, "--samples=2", "--max-new-tokens=4", "--precision=bfloat16")
    assert code == 0, err
    found = report(run / "eval" / f"sft-{STEPS}")
    assert {name: facts["count"] for name, facts in found["tasks"].items()} == {"sums": 8, "letters": 8}
    facts = found["tasks"]["sums"]
    assert (facts["samples"], facts["temperature"], facts["max_new_tokens"]) == (2, 1.0, 4)
    assert facts["dtype"] == "bfloat16" and set(facts["pass_at"]) == {"1", "2"}
    assert facts["pass_at"]["1"] == pytest.approx(facts["score"])
    assert "| task | right | 95 % interval | asked | samples | pass@1 | pass@2 |" in out
    (first, *_) = groups(run / "eval" / f"sft-{STEPS}")["sums"]["items"]
    assert [answer["label"][:8] for answer in first["answers"]] == ["sample 1", "sample 2"]


def test_core_of_a_part_of_its_tasks(run, tmp_path):
    bundle = write_bundle(
        tmp_path / "bundle",
        [
            (entry("copa", "multiple_choice", 0), MULTIPLE_CHOICE),
            (entry("lambada_openai", "language_modeling", 0), [{"context": "the old fox", "continuation": "slept"}]),
        ],
    )
    out_folder = tmp_path / "out"
    code, out, err = evaluate("--run", run, "--stage=pretrain", "--core", bundle, "--out", out_folder)
    assert code == 0, err
    core = report(out_folder)["core"]
    assert list(core["tasks"]) == ["copa", "lambada_openai"] and core["dtype"] == "float32"
    assert "core_v1" not in core and "squad" in core["missing"]
    copa, lambada = core["tasks"]["copa"], core["tasks"]["lambada_openai"]
    mean = ((copa["accuracy"] - 0.5) / 0.5 + lambada["accuracy"]) / 2
    assert core["centered_mean_v1_of_2"] == pytest.approx(mean) == core["centered_mean_v2_of_2"]
    assert f"| mean of 2 |  |  |  | {mean:.4f} | {mean:.4f} |" in out and "the mean is not CORE" in out
    kept = lines(out_folder / core["answers"] / "copa.jsonl")
    assert copa["accuracy"] == pytest.approx(sum(line["right"] for line in kept) / len(MULTIPLE_CHOICE))
    shown = groups(out_folder)
    assert list(shown) == ["CORE: copa", "CORE: lambada_openai"]
    item = next(item for item in shown["CORE: copa"]["items"] if item["question"] == "The cat sat on the")
    assert [choice["text"] for choice in item["choices"]] == MULTIPLE_CHOICE[0]["choices"]
    assert [choice["right"] for choice in item["choices"]] == [True, False, False, False]
    assert sum("chosen" in choice["mark"] for choice in item["choices"]) == 1
    assert shown["CORE: lambada_openai"]["items"][0]["right"] == "slept"


def test_a_bundle_with_too_few_items_is_refused_before_anything_is_measured(run, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", [(entry("copa", "multiple_choice", 10), MULTIPLE_CHOICE)])
    message = refusal(evaluate("--run", run, "--tasks", "sums:2", "--core", bundle, "--out", tmp_path / "out"))
    assert message.startswith("copa puts 10 other items before each") and not (tmp_path / "out").exists()


def test_the_validation_text_of_the_run(run, tmp_path):
    code, out, err = evaluate("--run", run, "--stage=pretrain", "--text", "--out", tmp_path / "out")
    assert code == 0, err
    (name, facts), *others = report(tmp_path / "out")["text"]["sources"].items()
    assert name.endswith(" (validation)") and not others
    assert facts["low"] < facts["bits_per_byte"] < facts["high"] and facts["documents"] > 1
    assert f"| {name} | {facts['bits_per_byte']:.4f} | {facts['low']:.4f} to {facts['high']:.4f} |" in out
    assert "was trained on" not in err
    shard = run / "data" / "pretrain" / "shard_00000.parquet"
    code, _, err = evaluate("--run", run, "--stage=pretrain", "--text", shard, "--out", tmp_path / "out")
    assert code == 0 and f"{shard} was trained on: " in err


def test_text_that_was_trained_on_does_not_take_the_place_of_validation_text(run, tmp_path):
    own = tmp_path / "run"
    shutil.copytree(run, own)
    *rest, last = sorted((own / "data" / "pretrain").glob("*.parquet"))
    record, lost = own / "pretrain" / "stage.json", last.name
    text = {"train_files": [path.name for path in rest], "val_files": [lost]}
    record.write_text(json.dumps({**json.loads(record.read_text()), "text": text}))
    last.unlink()
    message = refusal(evaluate("--run", own, "--stage=pretrain", "--text", "--out", tmp_path / "out"))
    assert f"the run validated on {lost}, and was trained on shard_" in message and f"put {lost} back" in message


def test_one_that_was_stopped_goes_on_in_the_same_folder(run, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "One."}\n{"text"\n')
    command = ("--run", run, "--tasks", "sums:2", "--text", path, "--out", tmp_path / "out")
    assert f"{path}:2: broken JSON" in refusal(evaluate(*command))
    path.write_text('{"text": "One."}\n')
    code, out, err = evaluate(*command)
    assert code == 0 and "asked before" not in err and "| sums | " in out
    shutil.rmtree(tmp_path / "out" / "answers")
    (tmp_path / "out" / "text.jsonl").unlink()
    code, out, err = evaluate("--run", run, "--text", path, "--out", tmp_path / "out")  # its page has no answers
    assert code == 0 and "| sums | " in out
    path.write_text('{"text": "Two."}\n')
    code, out, err = evaluate(*command)
    assert code == 0 and "asked before" not in err
    assert [line["beginning"] for line in lines(tmp_path / "out" / "text.jsonl")] == ["Two."]


def test_a_damaged_report_is_named(run, tmp_path):
    path = tmp_path / "report.json"
    for contents, what in (("{", "not JSON"), ('{"model": {}}', "it has no 'core'"), ("[]", "it is a list")):
        path.write_text(contents)
        message = refusal(evaluate("--run", run, "--tasks", "sums:2", "--out", tmp_path))
        assert message.startswith(f"{path} is damaged ({what}") and message.endswith("or choose another --out")


def test_a_run_without_data(run, tmp_path):
    """As an imported model is."""
    bare = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("data", "eval"))
    assert "the run has no data folder with validation text; name" in refusal(evaluate("--run", bare, "--text"))
    message = refusal(evaluate("--run", bare, "--tasks", "sums:2"))
    assert message == f"sums needs {bare}/data, which does not exist; --data names the folder that has it"
    code, _, err = evaluate("--run", bare)
    assert code == 2 and err.splitlines()[-1].startswith("error: there is nothing to measure of sft; name --tasks, ")
    code, _, err = evaluate("--run", bare, "--tasks", "sums:2", "--data", run / "data")
    assert code == 0, err


def test_bad_data_is_named_without_an_option_of_training(run, tmp_path):
    (tmp_path / "eval" / "gsm8k").mkdir(parents=True)
    (tmp_path / "eval" / "gsm8k" / "test.jsonl").write_text('{"question"\n')
    bad = refusal(evaluate("--run", run, "--tasks", "gsm8k", "--data", tmp_path))
    assert "test.jsonl:1: " in bad and "on-bad" not in bad
    (tmp_path / "pretrain").mkdir()
    for number in range(2):
        (tmp_path / "pretrain" / f"shard_0000{number}.parquet").write_text("no parquet")
    bad = refusal(evaluate("--run", run, "--text", "--data", tmp_path))
    assert ".parquet is not a parquet file" in bad and "on-bad" not in bad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run=/no/such/run", "--tasks", "sums"], "there is no run directory /no/such/run"),
        (["--run=x", "--tasks", "sumz"], "--tasks: unknown task 'sumz', did you mean 'sums'?"),
        (["--run=x", "--tasks", "sums:0"], "--tasks: mixture entry 'sums:0': '0' is not a number of examples"),
        (["--run=x", "--tasks", "sums:3,sums:4"], "--tasks: sums is named more than once"),
        (["--run=x", "--tasks", "chat"], "chat has no answers that can be checked"),
        (["--run=x", "--tasks"], "--tasks needs a value"),
        (["--run=x", "--tasks", "humaneval"], "add --humaneval if they may run here"),
        (["--run=x", "--tasks", "nanochat_humaneval"], "nanochat_humaneval runs programs that the model writes"),
        (["--run=x", "--samples=4", "--temperature=0"], "--samples 4 at temperature 0 are all the same"),
        (["--run=x", "--core-per-task=20"], "--core-per-task goes with --core"),
        (["--run=x", "--core", "--core-per-task=3"], "--core-per-task is 3; it must be at least 11"),
        (["--run=x", "--uncontained"], "--uncontained goes with --humaneval"),
        (["--run=x", "--precision=fp4"], "--precision: unknown value 'fp4'"),
        (["--run=x", "--out=launch.py"], "launch.py is a file; choose another --out"),
        (["--run={run}", "--stage=rl"], "stage 'rl' of {run} is not finished; finished: pretrain, sft"),
        (["--run={run}", "--data=/no/such/data"], "data folder '/no/such/data' does not exist; give --data"),
        (["--run={run}", "--text", "/no/such/text"], "there is no /no/such/text"),
        (["--run={run}", "--text", "{run}"], "is the directory of a run; name a file or folder of text"),
        (["--run={run}", "--core"], "the run has no data folder; 'jaxchat data get core' downloads the bundle"),
        (["--run={run}", "--core", "{run}"], "core.yaml does not exist; give the folder of a CORE bundle"),
        (["--run={run}", "--tasks", "gsm8k"], "'jaxchat data get gsm8k' downloads it, and --data names the folder"),
        (["--run={run}", "--tasks", "sums:2", "--out={run}"], "{run} is not empty and not an evaluation"),
    ],
)
def test_refusals(run, arguments, message):
    message = message.replace("{run}", str(run))
    assert message in refusal(evaluate(*(word.replace("{run}", str(run)) for word in arguments)))


def test_bfloat16_is_not_float32(run, tmp_path):
    """Whether --precision reaches the model."""
    (tmp_path / "story.txt").write_text(STORY)
    nats = {}
    for precision in ("float32", "bfloat16"):
        code, _, err = evaluate(
            "--run", run, "--text", tmp_path / "story.txt", "--out", tmp_path / precision, f"--precision={precision}"
        )
        assert code == 0, err
        nats[precision] = report(tmp_path / precision)["text"]["total"]["bits_per_byte"]
    assert nats["bfloat16"] != nats["float32"] and nats["bfloat16"] == pytest.approx(nats["float32"], rel=0.02)
    assert jnp.dtype(report(tmp_path / "bfloat16")["text"]["dtype"]) == jnp.bfloat16


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_measure_what_one_does_and_go_on_where_they_were_stopped(run, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": STORY[: 9 * i]}) + "\n" for i in range(1, 9)))
    bundle = write_bundle(tmp_path / "bundle", [(entry("copa", "multiple_choice", 0), MULTIPLE_CHOICE)])
    command = ["--run", run, "--tasks", "sums:6", "letters:5", "--samples=2", "--max-new-tokens=4"]
    command = [*map(str, command), "--text", str(tmp_path / "texts.jsonl"), "--core", str(bundle)]
    code, _, err = evaluate(*command, "--out", tmp_path / "one")
    assert code == 0, err

    two = tmp_path / "two"
    ends = start_several((PROGRAM, "letters"), [*command, f"--out={two}"])
    assert [code for code, _ in ends] == [75, 75] and all("stopped by SIGTERM" in said for _, said in ends), ends
    assert list(report(two)["tasks"]) == ["sums"] and report(two)["core"] is None
    ends = start_several((PROGRAM, "none"), [*command, f"--out={two}"])
    assert [code for code, _ in ends] == [0, 0], ends
    for said in ("sums: the same questions were asked before", "letters: ", "eval  CORE", "| letters | ", "is a page"):
        assert [text.count(said) > 0 for _, text in ends] == [True, False], ends

    mine, theirs = report(two), report(tmp_path / "one")
    for name in ("sums", "letters"):
        assert {**mine["tasks"][name], "seconds": 0} == {**theirs["tasks"][name], "seconds": 0}
        assert lines(two / "answers" / f"{name}.jsonl") == lines(tmp_path / "one" / "answers" / f"{name}.jsonl")
    assert mine["text"]["total"] == pytest.approx(theirs["text"]["total"], rel=1e-5)
    assert [one["index"] for one in lines(two / "text.jsonl")] == list(range(8))
    assert mine["core"]["tasks"] == theirs["core"]["tasks"]
    decisions = [[line["right"] for line in lines(folder / mine["core"]["answers"] / "copa.jsonl")]
                 for folder in (two, tmp_path / "one")]  # fmt: skip
    assert decisions[0] == decisions[1]
