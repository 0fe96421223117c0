"""The tokens of conversations."""

import pytest

from jaxchat.tokenizer import SPECIAL_TOKENS, BaseTokenizer


def spelled(tokenizer: BaseTokenizer, conversation: dict, **settings) -> str:
    """The rendered text, what is trained on in brackets."""
    ids, mask = tokenizer.render_conversation(conversation, **settings)
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    out, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            run = tokenizer.decode(ids[start:end])
            out += f"[{run}]" if mask[start] else run
            start = end
    return out


CHAT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello <|bos|>"},
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see: "},
                {"type": "python", "text": "2+2"},
                {"type": "python_output", "text": "4"},
                {"type": "text", "text": "It is 4."},
            ],
        },
    ]
}


def test_render_conversation(tokenizer):
    assert spelled(tokenizer, CHAT) == (
        "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>[Hello <|bos|><|assistant_end|>]"
        "<|user_start|>2+2?<|user_end|><|assistant_start|>[Let me see: <|python_start|>2+2<|python_end|>]"
        "<|output_start|>4<|output_end|>[It is 4.<|assistant_end|>]"
    )
    ids, _ = tokenizer.render_conversation(CHAT)
    specials = [SPECIAL_TOKENS[token - 891] for token in ids if token >= 891]
    assert specials.count("<|bos|>") == 1, "text that spells a special token is plain text"
    assert specials.count("<|assistant_end|>") == 2


def test_render_system_message(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *CHAT["messages"][:2]]
    assert spelled(tokenizer, {"messages": messages}) == (
        "<|bos|><|user_start|>Be brief.\n\nHi<|user_end|><|assistant_start|>[Hello <|bos|><|assistant_end|>]"
    )
    assert messages[0] is system and messages[1] == {"role": "user", "content": "Hi"}, "the input stays as it was"


def test_render_is_cut(tokenizer):
    ids, mask = tokenizer.render_conversation(CHAT)
    for size in (0, 1, 7, len(ids), 2048):
        assert tokenizer.render_conversation(CHAT, max_tokens=size) == (ids[:size], mask[:size])


def test_render_for_completion(tokenizer):
    text = "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>"
    for messages in (CHAT["messages"][:1], CHAT["messages"][:2]):
        assert tokenizer.decode(tokenizer.render_for_completion({"messages": messages})) == text
    ids, _ = tokenizer.render_conversation(CHAT)
    prompt = tokenizer.render_for_completion(CHAT)
    assert ids[: len(prompt)] == prompt, "a completion continues what was trained on"


BAD = [
    ([], "at least one message"),
    ("hi", "at least one message"),
    ([{"role": "user"}], "message 0 .* lacks a 'role' or a 'content'"),
    ([{"role": "assistant", "content": "a"}], "message 0 .* from 'assistant', expected 'user'"),
    ([{"role": "user", "content": "a"}] * 2, "message 1 .* from 'user', expected 'assistant'"),
    ([{"role": "system", "content": "a"}], "must be followed by a user message"),
    ([{"role": "system", "content": 1}, {"role": "user", "content": "a"}], "message 0, from 'system', is not a string"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "message 0, from 'user', is not a string"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "message 1 is neither"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "'image'"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text"}]}], "message 1 .* part"),
]


@pytest.mark.parametrize("messages, message", BAD)
def test_bad_conversations(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.render_conversation({"messages": messages})
    with pytest.raises(ValueError, match=message):
        tokenizer.render_for_completion({"messages": messages})
