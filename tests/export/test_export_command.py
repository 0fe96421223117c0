"""`jaxchat export` on a run, and the model card that it writes."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxchat.checkpoint import Checkpoints
from jaxchat.cli.main import main
from jaxchat.config import Experiment, ModelConfig
from jaxchat.errors import UserError
from jaxchat.infer.trained import load_model
from jaxchat.runs.directory import RunDirectory
from jaxchat.tokenizer import Tokenizer, load_tokenizer
from tests.export import golden
from tests.tiny import refusal

CONFIG = golden.MODELS["two heads that share keys"]
SCORES = {"stage": "evaluate", "of": "sft", "step": 0, "score/sums": 0.75, "count/sums": 40}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a base model, an SFT of two checkpoints, and a score."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    settings = Experiment(name="tiny", model=ModelConfig(depth=3, num_kv_heads=1))
    run.open(settings)
    tokenizer, params = golden.tokenizer(), golden.parameters(CONFIG)
    tokenizer.save(run.tokenizer)
    run.write_record("tokenizer", {"stage": "tokenizer", "id": run.new_id("tokenizer")})
    for stage, parent, steps in (("pretrain", None, [7]), ("sft", {"stage": "pretrain", "step": 7}, [2, 5])):
        checkpoints = Checkpoints(run.checkpoints(stage))
        for step in steps:
            here = {**params, "head": {"kernel": params["head"]["kernel"] * step}}
            state = {"params": here, "step": np.asarray(step)}
            checkpoints.save(step, jax.tree.map(jnp.asarray, state), data={}, meta={})
        checkpoints.close()
        run.begin(stage, settings, ["tokenizer"])
        run.write_record(stage, {"stage": stage, "steps": steps[-1], "tokens": 12_345, "parent": parent})
    (run.path / "metrics.jsonl").write_text(json.dumps({**SCORES, "model": run.id_of("sft"), "time": 0}) + "\n")
    return run


def export(run, *arguments):
    return main(["export", "--run", str(run), "--to", "hf", *map(str, arguments)])


def head(folder):
    return load_file(folder / "model.safetensors")["lm_head.weight"].astype(np.float32)


def test_the_last_model_leaves_with_its_scores(run, tmp_path, capsys):
    assert export(run, tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{tmp_path / 'out'} has sft, step 5, of {run}" in out and "float32" in out
    expected = golden.parameters(CONFIG)["head"]["kernel"].T[:290] * 5
    np.testing.assert_array_equal(head(tmp_path / "out"), expected)
    assert load_tokenizer(tmp_path / "out").to_json() == load_tokenizer(run.tokenizer).to_json()
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["rms_norm_eps"], settings["eos_token_id"]) == (1e-6, 285)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# out\n" in card
    assert "| pretrain | 7 | 12.3k |" in card and "| sft | 5 | 12.3k |" in card
    assert "| sums | 75.0% | 59.8% to 85.8% | 40 |" in card, "Wilson's interval of 30 right of 40"
    assert "apply_chat_template" in card and str(tmp_path) not in card
    assert "| parameters | 1.33M |" in card, "3 x (192 x (192 + 96 + 96 + 192) + 8 x 192 x 192) + 2 x 290 x 192"


def test_an_earlier_step_has_no_scores(run, tmp_path):
    assert export(run, "--step", 2, "--dtype", "bfloat16", tmp_path / "out") == 0
    expected = golden.parameters(CONFIG)["head"]["kernel"].T[:290] * 2
    np.testing.assert_allclose(head(tmp_path / "out"), expected, rtol=2**-8)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "after 2 steps" in card and "bfloat16" in card and "Evaluation" not in card


def test_a_base_model_continues_text(run, tmp_path):
    assert export(run, "--stage", "pretrain", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 281
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<|bos|>"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base model" in card and "apply_chat_template" not in card


def test_bad_input_is_one_line(run, tmp_path, capsys):
    def message(*arguments):
        capsys.readouterr()
        code = main(["export", *map(str, arguments)])
        out, err = capsys.readouterr()
        return refusal((code, out, err))

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    own = ["--run", run, "--to", "hf"]
    assert "OUT" in message(*own)
    assert "--to" in message("--run", run, tmp_path / "out")
    assert "Choose from hf" in message("--run", run, "--to", "gguf", tmp_path / "out")
    assert "not empty" in message(*own, tmp_path / "full")
    assert "cloud storage" in message(*own, "gs://bucket/out")
    assert "choose another OUT" in message(*own, tmp_path / "full" / "notes.txt" / "out")
    assert "only of 2, 5" in message(*own, "--step", 3, tmp_path / "out")
    assert "finished: pretrain, sft" in message(*own, "--stage", "rl", tmp_path / "out")
    assert "no run directory" in message("--run", tmp_path / "none", "--to", "hf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_tokenizer_of_another_run_is_refused(run, tmp_path, capsys):
    """Even one whose vocabulary is padded to as many rows, so that the weights fit."""
    shutil.copytree(run.path, tmp_path / "run")
    text = " ".join(map(str, range(500)))
    Tokenizer.train_from_iterator([text], 290).save(tmp_path / "run" / "tokenizer")
    code = export(tmp_path / "run", tmp_path / "out")
    out, err = capsys.readouterr()
    assert "the tokenizer of another run" in refusal((code, out, err)) and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="has the tokenizer of another run, not that of sft; put the right one back"):
        load_model(tmp_path / "run")  # for chat, serve and eval
    for stage in ("pretrain", "sft"):  # of a version that did not record it
        file = tmp_path / "run" / stage / "begun.json"
        begun = json.loads(file.read_text())
        file.write_text(json.dumps(begun | {"made_from": {}}))
    assert load_model(tmp_path / "run").stage == "sft"


def test_weights_from_elsewhere_keep_the_constant_of_their_norms(run, tmp_path, capsys):
    shutil.copytree(run.path, tmp_path / "run")
    record = {"stage": "sft", "steps": 5, "imported": {"from": "nanochat", "rms_norm_eps": 1.1920929e-07}}
    RunDirectory(tmp_path / "run").write_record("sft", record)
    assert export(tmp_path / "run", tmp_path / "out") == 0
    assert "1.2e-07" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 1.1920929e-07
    card = (tmp_path / "out" / "README.md").read_text()
    assert "imported into jaxchat" in card and "trained from nothing" not in card
