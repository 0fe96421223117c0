"""nanochat's checkpoints and tokenizers as runs of jaxchat, from files as PyTorch and pickle write them."""

import json
import pickle
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.cli.main import main
from jaxchat.errors import UserError
from jaxchat.export.nanochat_import import read_nanochat, read_tokenizer
from jaxchat.export.torch_file import TorchFile
from jaxchat.infer.trained import load_model
from tests.export import golden
from tests.export.nanochat_files import (
    SIZES,
    named,
    number,
    parameters,
    text,
    weights,
    write_archive,
    write_nanochat,
    write_tokenizer,
    write_torch,
)
from tests.tiny import refusal, start_process


def imported(source, run, *options):
    return main(["import", "--from=nanochat", str(source), f"--run={run}", *map(str, options)])


def same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_checkpoint_becomes_a_run(tmp_path, capsys):
    arrays = weights()
    source = write_nanochat(tmp_path / "source", arrays)
    assert imported(source, tmp_path / "run") == 0
    assert f"jaxchat chat --run {tmp_path / 'run'}" in capsys.readouterr().out
    model = load_model(tmp_path / "run")
    same(model.params, parameters(arrays))
    assert (model.stage, model.model.depth, model.model.sequence_len) == ("sft", 2, 64)
    ours, question = golden.tokenizer(), "the quick brown <|bos|>\n\nfox, 34 + 58 日本"
    assert model.tokenizer.encode(question) == ours.encode(question)
    assert model.tokenizer.special_tokens == ours.special_tokens
    record = json.loads((tmp_path / "run" / "sft" / "stage.json").read_text())
    assert record["steps"] == 650 and record["imported"]["file"] == str(source / "model_000650.pt")
    model.engine().generate([[model.tokenizer.bos_token_id]], max_new_tokens=2)


def test_what_checkpoints_may_look_like(tmp_path):
    """Names that torch.compile has changed, rows that pad the vocabulary, bf16, and transposed memory."""
    arrays = weights(padding=30)
    arrays["transformer.wte.weight"] = arrays["transformer.wte.weight"].astype(ml_dtypes.bfloat16)
    arrays["lm_head.weight"] = np.asfortranarray(arrays["lm_head.weight"])
    arrays["transformer.h.0.mlp.c_fc.weight"] = arrays["transformer.h.0.mlp.c_fc.weight"].astype(np.float16)
    source = write_nanochat(tmp_path / "source", {f"_orig_mod.{name}": array for name, array in arrays.items()})
    assert imported(source, tmp_path / "run") == 0
    same(load_model(tmp_path / "run").params, parameters(arrays))


def test_the_base_directory(tmp_path, capsys):
    """Each stage in a folder, with the newest checkpoint of each; the tokenizer beside them."""
    write_tokenizer(tmp_path / "tokenizer")
    for folder, step in (("base_checkpoints", 9), ("chatsft_checkpoints", 3), ("chatsft_checkpoints", 12)):
        write_nanochat(tmp_path / folder / "d2", step=step, tokenizer=False)
    newest, base, older = (
        read_nanochat(tmp_path),
        read_nanochat(tmp_path, stage="pretrain"),
        read_nanochat(tmp_path, step=3),
    )
    found = [(model.stage, model.step) for model in (newest, base, older)]
    assert found == [("sft", 12), ("pretrain", 9), ("sft", 3)]
    assert read_nanochat(tmp_path / "base_checkpoints" / "d2").stage == "pretrain"
    assert read_nanochat(tmp_path / "base_checkpoints").stage == "pretrain"
    write_nanochat(tmp_path / "chatsft_checkpoints" / "d4", tokenizer=False)
    with pytest.raises(UserError, match="several models; name one of .*d2, .*d4"):
        read_nanochat(tmp_path)
    with pytest.raises(UserError, match="no model of rl, only of pretrain, sft"):
        read_nanochat(tmp_path, stage="rl")
    with pytest.raises(UserError, match="no checkpoint of step 4, only of 3, 12"):
        read_nanochat(tmp_path / "chatsft_checkpoints" / "d2", step=4)


def test_a_base_model_of_the_hub_is_known_by_its_depth(tmp_path):
    source = write_nanochat(tmp_path, meta={"user_config": {"depth": 2}})
    assert read_nanochat(source).stage == "pretrain"


LATER = ["value_embeds.1.weight", "resid_lambdas", "smear_gate.weight", "transformer.h.0.attn.ve_gate.weight"]


def changed_sizes(**sizes):
    return lambda source: write_nanochat(source, meta={"model_config": {**SIZES, **sizes}})


def extra_weights(*names):
    return lambda source: write_nanochat(source, {**weights(), **{name: np.ones((2, 2), np.float32) for name in names}})


def changed_weight(name, change):
    return lambda source: write_nanochat(source, {**weights(), name: change(weights()[name])})


def edited(name, content):
    def write(source):
        write_nanochat(source)
        (source / name).unlink() if content is None else (source / name).write_bytes(content)

    return write


PICKLED = edited("tokenizer.pkl", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.")
BAD = {
    "later model": (extra_weights(*LATER), "nanochat's model of 2026, with value embeddings (value_embeds.1.weight), "
                    "scalars of the residual stream (resid_lambdas), smear (smear_gate.weight), gates"),
    "unknown weight": (extra_weights("transformer.wpe.weight"), "has transformer.wpe.weight, which jaxchat's model"),
    "missing weight": (lambda s: write_nanochat(s, {k: v for k, v in weights().items() if k != "lm_head.weight"}),
                       "lacks lm_head.weight"),
    "shape": (changed_weight("transformer.h.1.attn.c_k.weight", lambda x: x[:64]), "c_k.weight has the shape [64, 1"),
    "not finite": (changed_weight("lm_head.weight", lambda x: x * np.nan), "lm_head.weight is not finite"),
    "whole numbers": (changed_weight("lm_head.weight", lambda x: x.astype(np.int64)), "whole numbers"),
    "width": (changed_sizes(n_embd=192), "the width is 192 at 2 layers; jaxchat and nanochat have 128"),
    "heads": (changed_sizes(n_head=2), "the number of heads is 2 at 2 layers"),
    "vocabulary": (changed_sizes(vocab_size=300), "wte.weight has the shape [290, 128]"),
    "windows": (changed_sizes(window_pattern="SSSL"), "window_pattern is 'SSSL'"),
    "unknown setting": (changed_sizes(n_experts=8), "model_config has n_experts"),
    "no sizes": (edited("meta_000650.json", b"{}"), "has no 'model_config'"),
    "no meta": (edited("meta_000650.json", None), "is missing, which has the model's sizes"),
    "no tokenizer": (edited("tokenizer.pkl", None), "name the model's tokenizer with --tokenizer"),
    "evil tokenizer": (PICKLED, "it names os.system, which jaxchat neither runs nor needs"),
    "pointer": (edited("model_000650.pt", b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "old form": (edited("model_000650.pt", b"\x80\x02\x8a\nl\xfc\x9cF"), "before version 1.6"),
    "empty": (edited("model_000650.pt", b""), "is empty"),
    "files of transformers": (lambda s: (s.mkdir(), (s / "config.json").write_text("{}")), "--from=hf"),
    "nothing": (lambda source: source.mkdir(), "no checkpoint of nanochat"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "what"), BAD.values(), ids=BAD)
def test_what_cannot_be_imported_is_a_line(write, what, tmp_path, capsys):
    write(tmp_path / "source")
    capsys.readouterr()
    code = imported(tmp_path / "source", tmp_path / "run")
    assert what in refusal((code, *capsys.readouterr()))
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing is left of the run"


def test_a_tokenizer_of_another_model(tmp_path):
    source = write_nanochat(tmp_path / "source")
    other = golden.Tokenizer.train_from_iterator([golden.PROMPT * 3], 270)
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="has 270 ids, .* and the model 290: it is that of another model"):
        read_nanochat(source, tokenizer=tmp_path / "other")
    golden.tokenizer().save(tmp_path / "same")
    assert read_nanochat(source, tokenizer=tmp_path / "same").tokenizer.vocab_size == 290


def test_a_command_line(tmp_path):
    """In a process of its own, where nothing but the command has set up JAX."""
    write_nanochat(tmp_path / "source")
    command = ["-m", "jaxchat", "import", str(tmp_path / "source"), "--from=nanochat"]
    taken = start_process(f"--run={tmp_path}", program=command)
    assert "is not empty; name another --run" in refusal(taken)
    there = start_process("karpathy/nanochat-d32", "--from=nanochat", "--run=x", program=command[:3], cwd=tmp_path)
    assert "hf download karpathy/nanochat-d32 --local-dir nanochat-d32" in refusal(there)


# --- torch.save -------------------------------------------------------------------------------------------------------


def test_tensors_of_a_file(tmp_path):
    arrays = {
        "double": np.arange(6.0).reshape(2, 3),
        "scalar": np.array(3, np.float32),
        "none": np.zeros((0, 4), np.float32),
        "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    }
    write_torch(tmp_path / "x.pt", arrays)
    file = TorchFile(tmp_path / "x.pt")
    assert file.shapes == {name: array.shape for name, array in arrays.items()}
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)


def test_a_tensor_beyond_its_numbers_is_refused(tmp_path):
    tensor = named("torch._utils", "_rebuild_tensor_v2") + b"("
    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + number(4) + b"tQ"
    for place in ([1, 4, 1], [0, 5, 1], [0, 2, 4]):
        offset, shape, stride = map(number, place)
        view = b"(" + shape + b"t(" + stride + b"t"
        data = b"\x80\x02}" + text("w") + tensor + storage + offset + view + b"\x89}tRs."
        write_archive(tmp_path / "x.pt", data, [np.zeros(4, np.float32).tobytes()])
        with pytest.raises(UserError, match="the numbers of w are not all there"):
            TorchFile(tmp_path / "x.pt")


def test_damaged_numbers_are_noticed(tmp_path):
    write_torch(tmp_path / "x.pt", {"w": np.full((8, 8), 1.5, np.float32)})
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data.replace(np.float32(1.5).tobytes() * 8, b"\0" * 32, 1))
    with pytest.raises(UserError, match="is damaged at w"):
        TorchFile(tmp_path / "x.pt").read("w")
    flags = data.rindex(b"PK\x01\x02") + 8  # of the last entry in the archive's directory
    (tmp_path / "x.pt").write_bytes(data[:flags] + bytes([data[flags] | 1]) + data[flags + 1 :])
    with pytest.raises(UserError, match="is damaged at w .*encrypted"):
        TorchFile(tmp_path / "x.pt").read("w")
    (tmp_path / "x.pt").write_bytes(data[:-30])
    with pytest.raises(UserError, match="is damaged or was not written by torch.save"):
        TorchFile(tmp_path / "x.pt")
    write_archive(tmp_path / "y.pt", b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed"):
        TorchFile(tmp_path / "y.pt")


@given(st.data())
def test_a_damaged_index_is_an_error_or_tensors(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    write_torch(path, {"w": np.zeros((2, 3), np.float32), "v": np.zeros((2, 3), np.float32)})
    with zipfile.ZipFile(path) as archive:
        index = bytearray(archive.read("damaged/data.pkl"))
    index[data.draw(st.integers(0, len(index) - 1))] = data.draw(st.integers(0, 255))
    write_archive(path, bytes(index), [np.zeros(6, np.float32).tobytes()] * 2)
    try:
        file = TorchFile(path)
        for name in file.shapes:
            file.read(name)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "state", [{"a": 1}, "gpt2", {"pat_str": "x", "mergeable_ranks": {"a": 1}, "special_tokens": {}}]
)
def test_a_pickle_that_is_no_tokenizer(state, tmp_path):
    part = pickle.dumps(state, 4)[11:-1]  # without the frame
    (tmp_path / "tokenizer.pkl").write_bytes(b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81" + part + b"b.")
    with pytest.raises(UserError, match="tokenizer.pkl"):
        read_tokenizer(tmp_path / "tokenizer.pkl")
