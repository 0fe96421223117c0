"""The exported tokenizer in Hugging Face's `tokenizers` and back, and the chat template in plain Jinja."""

import json

import jinja2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.export.hf_tokenizer import CHAT_TEMPLATE, tokenizer_config, tokenizer_json
from jaxchat.tokenizer import SPECIAL_TOKENS, HuggingFaceTokenizer, Tokenizer, load_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, thirty-four and fifty-eight make ninety-two. 日本 🙂 Grüße " * 3
OURS = Tokenizer.train_from_iterator([TEXT], 300)
THEIRS = tokenizers.Tokenizer.from_str(tokenizer_json(OURS))


def spells_no_special_token(text):
    return not any(name in text for name in SPECIAL_TOKENS)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])).filter(spells_no_special_token))
def test_ids_are_equal_and_bos_comes_first(text):
    ids = OURS.encode(text)
    assert THEIRS.encode(text, add_special_tokens=False).ids == ids
    assert THEIRS.encode(text).ids == [OURS.bos_token_id, *ids]
    assert THEIRS.decode(ids, skip_special_tokens=False) == OURS.decode(ids)


def test_each_of_a_pair_begins_with_bos():
    bos, (a,), (b,) = OURS.bos_token_id, OURS.encode("a"), OURS.encode("b")
    pair = THEIRS.encode("a", "b")
    assert (pair.ids, pair.type_ids) == ([bos, a, bos, b], [0, 0, 1, 1])


@pytest.mark.parametrize("backend", ["rust", "huggingface"])
def test_it_comes_back_as_the_same(tmp_path, backend):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(OURS))
    back = load_tokenizer(tmp_path, backend)
    assert back.encode(TEXT) == OURS.encode(TEXT)
    assert back.special_tokens == OURS.special_tokens
    if backend == "rust":
        assert back.to_json() == OURS.to_json()


def test_it_comes_back_from_the_library_that_has_read_and_written_it(tmp_path):
    THEIRS.save(str(tmp_path / "tokenizer.json"))
    back = load_tokenizer(tmp_path, "rust")
    assert back.encode(TEXT) == OURS.encode(TEXT) and back.special_tokens == OURS.special_tokens


def test_a_foreign_tokenizer_leaves_too():
    foreign = HuggingFaceTokenizer.train_from_iterator([TEXT], 300)
    there = tokenizers.Tokenizer.from_str(tokenizer_json(foreign))
    assert there.encode(TEXT).ids == foreign.encode(TEXT, prepend="<|bos|>")


# --- conversations --------------------------------------------------------------------------------------------------


class Refused(Exception):
    pass


def render(messages, add_generation_prompt=False, **environment):
    """As transformers does, which also trims blocks; others do not."""

    def raise_exception(message):
        raise Refused(message)

    env = jinja2.Environment(**environment)
    env.globals["raise_exception"] = raise_exception
    template = env.from_string(tokenizer_config(64, base=False)["chat_template"])
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt, bos_token="<|bos|>")


def say(role, content):
    return {"role": role, "content": content}


PARTS = [
    {"type": "text", "text": " Let me see:\n"},
    {"type": "python", "text": "34 + 58"},
    {"type": "python_output", "text": "92"},
    {"type": "text", "text": "It is 92.\n\n"},
]
CONVERSATIONS = [
    [say("user", "Hello")],
    [say("user", "  Hello\n"), say("assistant", "\n Hi! ")],
    [
        say("system", "Be brief.\n"),
        say("user", " What is 34 + 58? "),
        say("assistant", PARTS),
        say("user", "And 日本?"),
    ],
    [say("user", "{{ bos_token }} <b>&amp;</b>"), say("assistant", PARTS), say("user", ""), say("assistant", "")],
]


@pytest.mark.parametrize("environment", [{}, {"trim_blocks": True, "lstrip_blocks": True}], ids=["plain", "trimmed"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_the_template_renders_what_jaxchat_trains_on(messages, environment):
    ids, _ = OURS.render_conversation({"messages": messages})
    text = render(messages, **environment)
    assert text == OURS.decode(ids)
    assert THEIRS.encode(text, add_special_tokens=False).ids == ids
    if messages[-1]["role"] == "user":
        prompt = render(messages, add_generation_prompt=True, **environment)
        completion = OURS.render_for_completion({"messages": messages})
        assert THEIRS.encode(prompt, add_special_tokens=False).ids == completion


def test_text_in_parts_is_text():
    """Servers that speak OpenAI's API may hand every content over in parts."""
    parts = [say("system", [{"type": "text", "text": "A"}]), say("user", [{"type": "text", "text": "B"}])]
    assert render(parts) == render([say("system", "A"), say("user", "B")])


@pytest.mark.parametrize(
    "messages, why",
    [
        ([say("assistant", "Hi")], "alternate"),
        ([say("user", "a"), say("user", "b")], "alternate"),
        ([say("user", "a"), say("system", "b")], "alternate"),
        ([say("system", "a")], "followed by a user"),
        ([say("system", "a"), say("assistant", "b")], "alternate"),
        ([say("user", "a"), say("assistant", [{"type": "image", "text": "b"}])], "type of a part"),
    ],
)
def test_what_jaxchat_refuses_the_template_refuses(messages, why):
    with pytest.raises(ValueError):
        OURS.render_conversation({"messages": messages})
    with pytest.raises(Refused, match=why):
        render(messages)


def test_settings_of_the_tokenizer():
    chat, base = (tokenizer_config(64, base=base) for base in (False, True))
    assert (chat["bos_token"], chat["eos_token"], chat["pad_token"]) == ("<|bos|>", "<|assistant_end|>", "<|bos|>")
    assert base == {**chat, "eos_token": "<|bos|>"}
    assert (chat["tokenizer_class"], chat["model_max_length"]) == ("PreTrainedTokenizerFast", 64)
    assert chat["chat_template"] == CHAT_TEMPLATE
    assert not chat["clean_up_tokenization_spaces"]
    special = {token["content"] for token in json.loads(tokenizer_json(OURS))["added_tokens"] if token["special"]}
    assert special == set(SPECIAL_TOKENS), "so that skip_special_tokens leaves out all of them"
