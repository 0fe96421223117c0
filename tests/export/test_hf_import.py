"""Models of transformers' form as runs of jaxchat."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from jaxchat.cli.main import main
from jaxchat.export import hf
from jaxchat.export.hf import export_hf
from jaxchat.export.hf_import import read_hf
from jaxchat.infer.trained import load_model
from jaxchat.tokenizer import Tokenizer
from tests.export import golden
from tests.tiny import refusal

CONFIG = golden.MODELS["two heads that share keys"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    return export_hf(CONFIG, golden.parameters(CONFIG), golden.tokenizer(), folder)


@pytest.fixture
def source(exported, tmp_path):
    """A copy to change."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def imported(source, run, *options):
    return main(["import", "--from=hf", str(source), f"--run={run}", *map(str, options)])


@pytest.mark.parametrize(("dtype", "files"), [("float32", 1), ("float32", 3), ("bfloat16", 1)])
def test_what_was_exported_comes_back(dtype, files, tmp_path, monkeypatch):
    if files > 1:
        monkeypatch.setattr(hf, "SHARD_BYTES", 2_000_000)
    params = golden.parameters(CONFIG)
    source = export_hf(CONFIG, params, golden.tokenizer(), tmp_path / "source", dtype=dtype)
    assert len([*source.glob("*.safetensors")]) == files
    assert imported(source, tmp_path / "run") == 0
    model = load_model(tmp_path / "run")
    assert model.model == CONFIG and model.stage == "sft"
    assert model.tokenizer.to_json() == golden.tokenizer().to_json()
    params["embed"]["embedding"][CONFIG.vocab_size :] = 0
    params["head"]["kernel"][:, CONFIG.vocab_size :] = 0
    tolerance = 2**-8 if dtype == "bfloat16" else 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance), model.params, params)
    assert (
        main(["export", "--run", str(tmp_path / "run"), "--to", "hf", "--dtype", dtype, str(tmp_path / "again")]) == 0
    )
    first, second = ({f.name: f.read_bytes() for f in d.iterdir()} for d in (source, tmp_path / "again"))
    if files == 1:
        assert all(second[name] == content for name, content in first.items()), "and leaves as it came"


def test_an_empty_folder_is_filled(exported, tmp_path):
    (tmp_path / "run").mkdir()
    assert imported(exported, tmp_path / "run", "--stage=rl") == 0
    assert load_model(tmp_path / "run").stage == "rl"
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_what_a_stopped_import_has_left_is_removed(exported, tmp_path):
    """Beside a run directory that was not there, and in one that was empty."""
    (tmp_path / ".new.unfinished" / "sft").mkdir(parents=True)
    (tmp_path / "empty" / ".unfinished" / "sft").mkdir(parents=True)
    for name in ("new", "empty"):
        assert imported(exported, tmp_path / name) == 0
        assert load_model(tmp_path / name).stage == "sft"
    assert not [*tmp_path.rglob("*.unfinished")]


def test_a_base_model_is_one_of_pretraining(tmp_path):
    source = export_hf(CONFIG, golden.parameters(CONFIG), golden.tokenizer(), tmp_path / "source", base=True)
    assert read_hf(source).stage == "pretrain"
    assert read_hf(source, stage="midtrain").stage == "midtrain"


def with_config(**fields):
    def change(source):
        file = source / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


def with_weights(change):
    def write(source):
        file = source / "model.safetensors"
        save_file(change(load_file(file)), file)

    return write


def with_file(name, content):
    def write(source):
        (source / name).unlink(missing_ok=True)
        if content is not None:
            (source / name).write_bytes(content)

    return write


def with_tokenizer(size):
    def write(source):
        Tokenizer.train_from_iterator([golden.PROMPT * 3], size).save(source)

    return write


def test_older_files_say_some_things_otherwise(source):
    """The rotary base as a field of its own, and what is the default left out."""
    settings = json.loads((source / "config.json").read_text())
    for name in ("rope_parameters", "hidden_act", "attention_bias", "tie_word_embeddings", "rms_norm_eps"):
        del settings[name]
    (source / "config.json").write_text(json.dumps({**settings, "rope_theta": 5000, "use_cache": True}))
    assert read_hf(source).config.rope_base == 5000


def test_the_constant_of_norms_is_on_record(source, capsys, tmp_path):
    with_config(rms_norm_eps=1.1920929e-07)(source)
    found = read_hf(source)
    assert found.source["rms_norm_eps"] == 1.1920929e-07
    assert "nearly, not exactly" in found.remarks[0]


KEY = "model.layers.0.self_attn.k_proj.weight"
BAD = {
    "another model": (with_config(model_type="llama"), "model_type is 'llama'"),
    "no sizes": (with_config(hidden_size="wide"), 'hidden_size is "wide", not a whole number'),
    "width": (with_config(hidden_size=256, intermediate_size=1024), "the width is 256 at 3 layers"),
    "MLP": (with_config(intermediate_size=512), "intermediate_size is 512; jaxchat's MLP is 4 times the width, 768"),
    "activation": (with_config(hidden_act="silu"), 'hidden_act is "silu"; jaxchat\'s model has "relu2" alone'),
    "bias": (with_config(attention_bias=True), "attention_bias is true"),
    "tied": (with_config(tie_word_embeddings=True), "tie_word_embeddings is true"),
    "rope": (with_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type is 'yarn'"),
    "windows": (with_config(sliding_window=512), "has sliding_window, which jaxchat's model does not have"),
    "norm": (with_config(rms_norm_eps=1e-3), "rms_norm_eps is 0.001"),
    "negative norm": (with_config(rms_norm_eps=-1e-6), "rms_norm_eps is -1e-06"),
    "quantized": (with_config(quantization_config={"bits": 4}), "has quantization_config"),
    "no config": (with_file("config.json", None), "has no config.json"),
    "files of nanochat": (
        lambda source: (with_file("config.json", None)(source), with_file("model_000001.pt", b"")(source)),
        "its files are nanochat's: --from=nanochat",
    ),
    "damaged config": (with_file("config.json", b"{"), "config.json is damaged"),
    "unknown weight": (
        with_weights(lambda w: {**w, "model.layers.0.gate.weight": w[KEY]}),
        "has model.layers.0.gate.w",
    ),
    "missing weight": (with_weights(lambda w: {k: v for k, v in w.items() if k != KEY}), f"lacks {KEY}"),
    "shape": (with_weights(lambda w: {**w, KEY: w[KEY][:, :64]}), f"{KEY} has the shape [96, 64]"),
    "whole numbers": (with_weights(lambda w: {**w, KEY: w[KEY].astype(np.int8)}), f"{KEY} is of I8"),
    "no weights": (with_file("model.safetensors", None), "model.safetensors is missing"),
    "pointer": (with_file("model.safetensors", b"version https://git-lfs.github.com/spec/v1"), "is only a pointer"),
    "cut weights": (with_file("model.safetensors", b"\x08\0\0\0\0\0\0\0{}"), "is damaged"),
    "index": (with_file("model.safetensors.index.json", b'{"weight_map": {"a": "../x"}}'), "../x, which is not a file"),
    "no tokenizer": (with_file("tokenizer.json", None), "tokenizer_config.json, but no tokenizer.json"),
    "tokenizer of another model": (with_tokenizer(270), "has 270 ids"),
}


@pytest.mark.parametrize(("change", "what"), BAD.values(), ids=BAD)
def test_what_cannot_be_imported_is_a_line(change, what, source, tmp_path, capsys):
    change(source)
    code = imported(source, tmp_path / "run")
    assert what in refusal((code, *capsys.readouterr()))
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing is left of the run"


def test_a_tokenizer_of_transformers(source):
    """As its converter of tiktoken's vocabularies writes it: in the library's own words, with other rules for BOS."""
    data = json.loads((source / "tokenizer.json").read_text())
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    data |= {"post_processor": level, "decoder": level}
    tokenizers.Tokenizer.from_str(json.dumps(data)).save(str(source / "tokenizer.json"))
    assert "jaxchat" not in (source / "tokenizer.json").read_text()
    found, ours = read_hf(source).tokenizer, golden.tokenizer()
    question = "the quick brown fox's 34 + 58\n\n Grüße, 日本"
    assert found.encode(question) == ours.encode(question) and found.special_tokens == ours.special_tokens
