"""Identity: who the model is, asked in wordings that no training conversation has. Generated, not loaded."""

from __future__ import annotations

from typing import Any

from jaxchat.data.identity.conversations import (
    VALIDATION,
    Topic,
    conversation,
    held_out_questions,
    topics,
    training_size,
)
from jaxchat.data.identity.description import JAXCHAT, Identity, parse_identity
from jaxchat.data.synthetic.chats import ABOUT_ITS_MAKER, ABOUT_ITSELF
from jaxchat.data.text.reading import Findings
from jaxchat.storage import AnyPath
from jaxchat.tasks.answers import score_value
from jaxchat.tasks.base import Conversation, Split, Task, question_and_answer
from jaxchat.tasks.conversations import Conversations

NAME = "identity"


class IdentityTask(Task):
    """Conversations about who the model is; item i depends on the identity, the split and i alone.

    An answer is right (1, otherwise 0) if it says the name, or the maker, the character or the fact that was asked
    for, as `answers.score_value` reads it. What that cannot find in the task's own answer is not asked.
    """

    name = NAME

    def __init__(self, identity: Identity, split: Split, limit: int | None = None):
        self.split: Split = split
        self.topics: list[Topic] = topics(identity)
        self.questions: list[tuple[str, str, str]] = []
        if split == "test":
            asked = held_out_questions(self.topics)
            self.questions = [item for item in asked if score_value(item[2], (), item[1])]
        sizes = {"train": training_size(identity), "val": VALIDATION, "test": len(self.questions)}
        self.size = sizes[split] if limit is None else min(limit, sizes[split])

    def __len__(self) -> int:
        return self.size

    def item(self, index: int) -> Conversation:
        if self.split != "test":
            messages, key = conversation(self.topics, self.split, index)
            return {"messages": messages, "answer": key, "source": self.name}
        question, answer, key = self.questions[index * len(self.questions) // self.size]
        return question_and_answer(question, answer, answer=key, source=self.name)

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        return score_value(conversation["answer"], (), completion, cut=cut)


def load_identity(text: str | None, split: Split, limit: int | None) -> IdentityTask:
    """The task of the identity that `text` describes, or of jaxchat's own.

    Raises:
      UserError: as `parse_identity`.
    """
    return IdentityTask(parse_identity(JAXCHAT if text is None else text), split, limit)


def load_own_identity(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> IdentityTask:
    """The task of jaxchat's own identity, which needs no data folder."""
    return load_identity(None, split, limit)


class ChatsAs(Conversations):
    """Conversations of the generated corpus, in which the model says who it is: another one than jaxchat."""

    def __init__(self, chats: Conversations, identity: Identity):
        self.name, self.items = chats.name, chats.items
        self.said = dict.fromkeys(ABOUT_ITSELF[1], f"I am {identity.name}, a language model.")
        if identity.maker:
            self.said |= dict.fromkeys(ABOUT_ITS_MAKER[1], f"I was made by {identity.maker}.")

    def item(self, index: int) -> Conversation:
        chat = super().item(index)
        return {
            **chat,
            "messages": [{**message, "content": self._as(message["content"])} for message in chat["messages"]],
        }

    def _as(self, content: Any) -> Any:
        return self.said.get(content, content) if isinstance(content, str) else content
