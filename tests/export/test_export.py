"""Exported models: what transformers' own NanoChat made of them, kept as numbers, and the files, name by name."""

import json
import os
import stat
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxchat.errors import UserError
from jaxchat.export import hf, names
from jaxchat.export.hf import export_hf
from jaxchat.infer.engine import Engine
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, logits
from jaxchat.model.parameters import TABLE, named_parameters
from jaxchat.serve.settings import Settings
from tests.export import golden
from tests.export.numpy_nanochat import nanochat_logits


@pytest.fixture(scope="module")
def tokenizer():
    return golden.tokenizer()


@pytest.fixture(scope="module", params=golden.MODELS)
def exported(request, tokenizer, tmp_path_factory):
    """The name, configuration, parameters and folder of a golden model."""
    config = golden.MODELS[request.param]
    params = golden.parameters(config)
    folder = export_hf(config, params, tokenizer, tmp_path_factory.mktemp("golden") / "out")
    return request.param, config, params, folder


def same_as_kept(name, found):
    """Compares logits [T, V] with those of transformers."""
    kept = np.load(golden.FILE)
    np.testing.assert_allclose(found[list(golden.WHOLE)], kept[f"{name}/whole"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found[:, list(golden.SOME)], kept[f"{name}/some"], atol=1e-4, rtol=0)


def test_the_files_have_the_logits_of_transformers(exported):
    name, _, _, folder = exported
    same_as_kept(name, nanochat_logits(folder, golden.row()))


def test_jaxchat_has_the_logits_of_transformers(exported):
    name, config, params, _ = exported
    params = jax.tree.map(jnp.asarray, params)
    hidden = hidden_states(config, params, jnp.asarray(golden.row(), jnp.int32)[None])
    found = np.asarray(logits(config, params, hidden)[0])
    same_as_kept(name, found[:, : config.vocab_size])


def test_the_files_have_the_greedy_answer_of_transformers(exported):
    name, _, _, folder = exported
    kept = np.load(golden.FILE)[f"{name}/greedy"]
    assert nanochat_logits(folder, kept)[-golden.NEW - 1 : -1].argmax(-1).tolist() == kept[-golden.NEW :].tolist()


def test_jaxchat_has_the_greedy_answer_of_transformers(tokenizer):
    name, config = next(iter(golden.MODELS.items()))
    prompt = tokenizer.encode(golden.PROMPT, prepend="<|bos|>")
    engine = Engine(config, jax.tree.map(jnp.asarray, golden.parameters(config)), tokenizer, dtype=jnp.float32)
    (answer,) = engine.generate([prompt], max_new_tokens=golden.NEW, temperature=0)
    assert [*prompt, *answer.tokens] == np.load(golden.FILE)[f"{name}/greedy"].tolist()
    assert hf.generation_config(tokenizer)["eos_token_id"] == list(engine.stops)


def test_names_shapes_and_types(exported):
    _, config, _, folder = exported
    width, keys, depth = 64 * config.depth, config.kv_heads * config.head_dim, config.depth
    block = {
        "self_attn.q_proj": [width, width],
        "self_attn.k_proj": [keys, width],
        "self_attn.v_proj": [keys, width],
        "self_attn.o_proj": [width, width],
        "mlp.fc1": [4 * width, width],
        "mlp.fc2": [width, 4 * width],
    }
    expected = {f"model.layers.{i}.{name}.weight": shape for i in range(depth) for name, shape in block.items()}
    expected |= {"model.embed_tokens.weight": [290, width], "lm_head.weight": [290, width]}
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}, "transformers refuses others"
        found = {name: file.get_slice(name) for name in file.keys()}
        assert {name: part.get_shape() for name, part in found.items()} == expected
        assert {part.get_dtype() for part in found.values()} == {"F32"}


def test_settings(tokenizer):
    """Every field that the class has a default for which is not this model's: 8,192, 10,000, ids 0 and 1."""
    config = GPTConfig(depth=4, num_kv_heads=1, sequence_len=96, rope_base=5000.0, logit_cap=9.0, vocab_size=290)
    assert hf.config_json(config, tokenizer, dtype="bfloat16") == {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": 290,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 96,
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "final_logit_softcapping": 9.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 281,
        "eos_token_id": 285,
        "pad_token_id": 281,
        "dtype": "bfloat16",
    }
    assert hf.config_json(config, tokenizer, dtype="float32", base=True)["eos_token_id"] == 281


def test_how_an_answer_is_drawn(tokenizer):
    found, settings = hf.generation_config(tokenizer), Settings()
    assert found == {
        "bos_token_id": 281,
        "eos_token_id": [285, 281],
        "pad_token_id": 281,
        "do_sample": True,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
    }, "without max_new_tokens, which would outweigh a caller's max_length"


def test_bfloat16_is_the_nearest(tokenizer, tmp_path):
    config = golden.MODELS["two heads that share keys"]
    params = golden.parameters(config)
    folder = export_hf(config, params, tokenizer, tmp_path / "out", dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    found = load_file(folder / "model.safetensors")["lm_head.weight"]
    exact = params["head"]["kernel"].T[:290]
    bits = np.ascontiguousarray(exact).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    np.testing.assert_array_equal(found.view(np.uint16), rounded)


def test_large_models_are_several_files(tokenizer, tmp_path, monkeypatch):
    config = golden.MODELS["two heads that share keys"]
    params = golden.parameters(config)
    whole = load_file(export_hf(config, params, tokenizer, tmp_path / "one") / "model.safetensors")
    monkeypatch.setattr(hf, "SHARD_BYTES", 1_000_000)
    told = []
    folder = export_hf(config, params, tokenizer, tmp_path / "out", progress=lambda *done: told.append(done))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(files)
    assert count > 2 and files[0] == f"model-00001-of-{count:05}.safetensors"
    assert told == [(done, len(whole)) for done in range(len(whole) + 1)]
    assert max((folder / file).stat().st_size for file in files) < 1_100_000
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    assert set(index["weight_map"]) == set(whole) and set(index["weight_map"].values()) == set(files)
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(folder / file)[name], whole[name])


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(config, tokenizer, folder):
    with pytest.raises(UserError) as refused:
        export_hf(config, {}, tokenizer, folder)
    assert not folder.exists() and not list(folder.parent.iterdir()), "nothing is written"
    return str(refused.value)


@dataclass(frozen=True)
class Wide(GPTConfig):
    @property
    def head_dim(self):
        return 128


@dataclass(frozen=True)
class Later(GPTConfig):
    value_embeds: bool = False


def test_what_nanochat_cannot_express_is_refused_by_name(tokenizer, tmp_path, monkeypatch):
    windows = refusal(GPTConfig(depth=3, window_pattern="SSL", vocab_size=290), tokenizer, tmp_path / "out")
    assert "window-pattern SSL" in windows and "--model.window-pattern=L" in windows
    assert "2 heads of 128" in refusal(Wide(depth=3, vocab_size=290), tokenizer, tmp_path / "out")
    later = refusal(Later(depth=3, vocab_size=290, value_embeds=True), tokenizer, tmp_path / "out")
    assert "value-embeds True" in later
    for part in ("residual_scales", "value_embeddings", "smear", "bigrams", "backout"):
        message = refusal(GPTConfig(depth=3, vocab_size=290, **{part: True}), tokenizer, tmp_path / "out")
        assert f"{part.replace('_', '-')} True" in message
    scaled = refusal(GPTConfig(depth=3, vocab_size=290, attention_scale=1.44), tokenizer, tmp_path / "out")
    assert "attention-scale 1.44" in scaled
    other = refusal(GPTConfig(depth=3, vocab_size=291), tokenizer, tmp_path / "out")
    assert "290" in other and "291" in other and "another run" in other
    monkeypatch.delitem(names.NANOCHAT, "blocks/{i}/mlp/up/kernel")
    parameter = refusal(GPTConfig(depth=3, vocab_size=290), tokenizer, tmp_path / "out")
    assert "blocks/0/mlp/up/kernel" in parameter


def test_what_has_no_effect_is_not_refused(tokenizer):
    hf.check_expressible(GPTConfig(depth=1, window_pattern="SSSL", vocab_size=290), tokenizer)
    hf.check_expressible(Later(depth=3, vocab_size=290, border_token=281), tokenizer)
    hf.check_expressible(
        GPTConfig(depth=3, vocab_size=290, embedding_std=0.8, up_factor=0.4, head_std=0.001), tokenizer
    )


def test_every_parameter_has_a_name_in_both_forms():
    assert set(names.NANOCHAT) <= {row.path for row in TABLE}
    for form, prefix in (("hf", "model.layers.11."), ("nanochat", "transformer.h.11.")):
        table = names.weights(GPTConfig(depth=12), form)
        assert len(table) == 12 * 6 + 2
        assert sum(name.startswith(prefix) for name in table) == 6


def test_a_folder_with_something_in_it_is_left_alone(tokenizer, tmp_path):
    config = golden.MODELS["two heads that share keys"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export_hf(config, golden.parameters(config), tokenizer, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        export_hf(config, golden.parameters(config), tokenizer, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_export_that_fails_or_is_stopped_leaves_nothing(tokenizer, tmp_path):
    config = golden.MODELS["two heads that share keys"]
    params = golden.parameters(config)
    with pytest.raises(KeyError):
        export_hf(config, {**params, "head": {}}, tokenizer, tmp_path / "out")

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_hf(config, params, tokenizer, tmp_path / "out", progress=stop)
    assert not list(tmp_path.iterdir())


def test_who_may_read_the_files_is_as_always(tokenizer, tmp_path):
    config = golden.MODELS["two heads that share keys"]
    (tmp_path / "out").mkdir()  # an empty folder is fine
    (tmp_path / "plain").write_text("")
    folder = export_hf(config, golden.parameters(config), tokenizer, tmp_path / "out")
    assert len(list(folder.iterdir())) == 5 and not list(tmp_path.glob(".*"))
    modes = {stat.S_IMODE(os.stat(path).st_mode) for path in folder.iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


# --- names in both directions ---------------------------------------------------------------------------------------


def foreign(config, params, form):
    leaves = dict(named_parameters(params))
    return {name: weight.of_parameter(leaves[weight.path]) for name, weight in names.weights(config, form).items()}


@pytest.mark.parametrize("form", ["hf", "nanochat"])
def test_parameters_come_back(form):
    config = golden.MODELS["two heads that share keys"]
    params = golden.parameters(config)
    arrays = foreign(config, params, form)
    names.check_weights(config, form, {name: array.shape for name, array in arrays.items()}, "model.pt")
    back = names.params_of(config, form, arrays.__getitem__)
    params["embed"]["embedding"][290:] = 0  # padding, which does not travel
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_padded_rows_of_nanochat_are_cut():
    config = golden.MODELS["two heads that share keys"]
    arrays = foreign(config, golden.parameters(config), "nanochat")
    padded = {**arrays, "transformer.wte.weight": np.pad(arrays["transformer.wte.weight"], ((0, 30), (0, 0)))}
    padded["transformer.wte.weight"][290:] = np.nan
    shapes = {name: array.shape for name, array in padded.items()}
    names.check_weights(config, "nanochat", shapes, "model.pt")
    back = names.params_of(config, "nanochat", padded.__getitem__)
    jax.tree.map(np.testing.assert_array_equal, back, names.params_of(config, "nanochat", arrays.__getitem__))


def test_unknown_missing_and_misshapen_weights_are_named():
    config = golden.MODELS["two heads that share keys"]
    shapes = {name: weight.shape for name, weight in names.weights(config, "hf").items()}
    lacking = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    for wrong, words in (
        ({**shapes, "model.layers.0.gate": (1,)}, ["has model.layers.0.gate", "does not have"]),
        (lacking, ["lacks lm_head.weight"]),
        ({**shapes, "lm_head.weight": (300, 192)}, ["lm_head.weight", "[300, 192]", "[290, 192]"]),
        ({**shapes, "model.layers.2.mlp.fc1.weight": (192, 768)}, ["model.layers.2.mlp.fc1.weight", "[768, 192]"]),
    ):
        with pytest.raises(UserError) as refused:
            names.check_weights(config, "hf", wrong, "folder")
        assert all(word in str(refused.value) for word in ["folder", *words])
