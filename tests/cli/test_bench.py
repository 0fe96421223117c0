"""`jaxchat bench infer`: what it writes, and what it refuses."""

import contextlib
import io
import json

import pytest

from jaxchat.cli.main import main
from tests.tiny import refusal, start

SMALL = ["--rows=1,2", "--new=12", "--repeats=1", "--queue-seconds=0"]
RANDOM = ["--experiment=quickstart", "--model.depth=1", "--model.sequence-len=64", "--tokenizer.vocab-size=300"]


def bench(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["bench", "infer", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def test_random_weights(tmp_path):
    code, out, err = bench(*RANDOM, *SMALL, "--context=8,3", f"--json={tmp_path / 'all.json'}")
    assert code == 0, err
    result = json.loads((tmp_path / "all.json").read_text())
    assert result["model"] == {
        "depth": 1, "parameters": 64 * 384 * 2 + 12 * 64 * 64, "vocab_size": 300, "sequence_len": 64,
        "experiment": "quickstart", "run": None,
    }  # fmt: skip
    assert (result["dtype"], result["weights"], result["kv_cache"]) == ("float32",) * 3
    assert result["repeats"] == 1 and result["mixed_queue"] == {} and result["bits_per_byte"] is None
    assert result["machine"]["device_kind"] == "cpu" and result["copy_bytes_per_second"] > 0
    measured = result["measured"]
    assert [(one["context"], one["rows"]) for one in measured] == [(3, 1), (3, 2), (8, 1), (8, 2)]
    for one in measured:
        assert one["new"] == 12 and one["first_token_seconds"] > 0
        share = one["tokens_per_second"] * one["step_bytes"] / one["rows"] / result["copy_bytes_per_second"]
        assert one["bandwidth_share"] == pytest.approx(share)
        assert one["samples_of_one_prompt"]["tokens_per_second"] > 0
        assert f"| {one['rows']} | {one['context']} | 12 | {1000 * one['first_token_seconds']:,.1f} |" in out
    assert "1 row, prompts of 3 tokens, 12 new: run 1 of 1" in err, "progress"


def test_a_run_with_8_bits(tmp_path):
    run = tmp_path / "run"
    assert start(run, "--stages=tokenizer,pretrain")[0] == 0
    options = ["--rows=2", "--context=6", "--new=6", "--repeats=1", "--queue-seconds=0"]
    code, out, err = bench(
        f"--run={run}", *options, "--weights=int8", "--kv-cache=fp8", f"--json={tmp_path / 'a.json'}"
    )
    assert code == 0, err
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["dtype"], result["weights"], result["kv_cache"]) == ("float32", "int8", "float8_e4m3fn")
    assert result["model"]["run"] == str(run)
    cost = result["bits_per_byte"]
    assert list(cost) == ["tokens", "in_float32", "with_int8_weights", "with_fp8_cache", "with_both"]
    for value in list(cost.values())[2:]:
        assert value == pytest.approx(cost["in_float32"], rel=0.05)
    assert f"{cost['with_both']:.4f} with both" in out


@pytest.mark.slow  # compiles every program
def test_a_queue():
    code, out, err = bench(*RANDOM, "--rows=1", "--context=6", "--new=6", "--repeats=1", "--queue-seconds=0.1")
    assert code == 0, err
    assert "compile " in err
    for name in ("lengths", "lengths and settings"):
        assert f"\n| {name} | " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --run=DIR, for its model, or --experiment=NAME, for random weights"),
        (["--run=x", "--experiment=d12"], "give either --run"),
        (["--run=x", "--model.depth=2"], "unknown option --model.depth=2; fields go with --experiment, not with --run"),
        (["--experiment=d12", "--stage=sft"], "--stage goes with --run"),
        (["--experiment=d12", "--rows=1,0"], "--rows is 0; it must be at least 1"),
        (["--experiment=d12", "--rows=one"], "--rows takes a whole number"),
        (["--experiment=d12", "--weights=int4"], "--weights: unknown value 'int4', did you mean 'int8'?"),
        (["--experiment=d12", "--json=/no/such/folder/a.json"], "/no/such/folder/a.json cannot be written"),
        ([*RANDOM, "--context=60", "--new=8"], "prompts of 60 and 8 new tokens do not fit the model's context of 64"),
        (["--run=/no/such/run"], "there is no run directory /no/such/run"),
    ],
)
def test_refusals(arguments, message):
    assert message in refusal(bench(*arguments))
