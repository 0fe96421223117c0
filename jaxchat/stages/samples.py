"""The prompts whose completions a training shows as it goes."""

from __future__ import annotations

from jaxchat.errors import UserError
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.tokenizer.conversation import checked_messages

PROMPT_TOKENS = 12
Prompt = tuple[str, list[int]]  # as shown to the user, and as given to the model


def prompts_of_texts(tokenizer: BaseTokenizer, texts: list[str]) -> list[Prompt]:
    """The beginnings of a few documents, as prompts for a base model."""
    beginnings = [tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]
    return [(tokenizer.decode(ids), [tokenizer.bos_token_id, *ids]) for ids in beginnings]


def prompts_of_chats(tokenizer: BaseTokenizer, conversations: list[dict]) -> list[Prompt]:
    """The first questions of a few conversations.

    Raises:
      UserError: a conversation is malformed.
    """
    prompts = []
    for conversation in conversations:
        try:
            checked_messages(conversation)
        except ValueError as error:
            raise UserError(f"a conversation cannot be used: {error}") from None
        messages = conversation["messages"]
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        opening = {"messages": messages[: first + 1]}
        prompts.append((messages[first]["content"], tokenizer.render_for_completion(opening)))
    return prompts
