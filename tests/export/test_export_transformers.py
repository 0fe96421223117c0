"""The exported folder in transformers itself, where torch and transformers are installed; elsewhere it is skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.export.hf import export_hf
from jaxchat.infer.engine import Engine
from jaxchat.model.gpt import hidden_states, logits
from tests.export import golden

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
NAME, CONFIG = next(iter(golden.MODELS.items()))
MESSAGES = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": " What is 34 + 58? "},
    {"role": "assistant", "content": [{"type": "python", "text": "34 + 58"}, {"type": "python_output", "text": "92"}]},
    {"role": "user", "content": "日本?"},
]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / request.param
    return export_hf(CONFIG, golden.parameters(CONFIG), golden.tokenizer(), folder, dtype=request.param)


@pytest.fixture(scope="module")
def model(folder):
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "NanoChatForCausalLM"
    assert not any(found.values()), "keys missing, unexpected or of another shape"
    assert str(model.dtype) == f"torch.{folder.name}"
    return model.float()


@pytest.fixture(scope="module")
def params(folder):
    return jax.tree.map(lambda x: jnp.asarray(x).astype(folder.name).astype(jnp.float32), golden.parameters(CONFIG))


def test_logits(model, params):
    with torch.no_grad():
        theirs = model(torch.from_numpy(golden.row())[None]).logits[0].numpy()
    hidden = hidden_states(CONFIG, params, jnp.asarray(golden.row(), jnp.int32)[None])
    ours = np.asarray(logits(CONFIG, params, hidden)[0, :, : CONFIG.vocab_size])
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_greedy_answers(model, params):
    tokenizer = golden.tokenizer()
    prompt = tokenizer.encode(golden.PROMPT, prepend="<|bos|>")
    engine = Engine(CONFIG, params, tokenizer, dtype=jnp.float32)
    (ours,) = engine.generate([prompt], max_new_tokens=golden.NEW, temperature=0)
    theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=golden.NEW)
    assert theirs[0, len(prompt) :].tolist() == list(ours.tokens)


def test_tokenizer(folder):
    ours, theirs = golden.tokenizer(), transformers.AutoTokenizer.from_pretrained(folder)
    text = "the quick brown 日本 🙂 fox"
    assert theirs(text)["input_ids"] == ours.encode(text, prepend="<|bos|>")
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert ids == ours.render_for_completion({"messages": MESSAGES})
    assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.decode(ids, skip_special_tokens=True) == "Be brief.\n\n\n What is 34 + 58? 34 + 5892日本?"
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|bos|>", "<|assistant_end|>", "<|bos|>")
    assert (len(theirs), theirs.model_max_length) == (ours.vocab_size, CONFIG.sequence_len)
    with pytest.raises(Exception, match="alternate"):
        theirs.apply_chat_template(MESSAGES[2:])


def test_it_comes_back_after_transformers_has_saved_it(folder, tmp_path):
    from jaxchat.tokenizer import load_tokenizer

    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    ours, back = golden.tokenizer(), load_tokenizer(tmp_path)
    assert back.special_tokens == ours.special_tokens
    assert back.encode("the quick brown 日本 🙂 fox") == ours.encode("the quick brown 日本 🙂 fox")
