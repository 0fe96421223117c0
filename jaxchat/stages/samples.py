"""What a training lets its model write as it goes: continuations, answers, and texts of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxchat.errors import UserError
from jaxchat.infer.engine import Engine
from jaxchat.infer.request import Request, Sampling
from jaxchat.ops.pages import PAGE
from jaxchat.stopping import raise_if_asked
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.tokenizer.conversation import checked_messages
from jaxchat.tools.calculator import calculate

PROMPT_TOKENS = 12  # of a document's beginning
SAMPLE_TOKENS = 96
FACT_TOKENS = 16  # after a fixed prompt: enough for a fact
UNPROMPTED = 2  # texts of the model's own

# A fact, a symbol, the calendar, a word, a list, an opinion and an equation: the kinds of nanochat's `base_train.py`.
FACTS = (
    "The capital of France is",
    "In chemistry, the symbol of gold is",
    "If today is Monday, then tomorrow is",
    "The opposite of cold is",
    "The eight planets that go around the sun are",
    "What I like best to eat is",
    "If 2*x + 1 = 9, then x is",
)
# The generated text knows its own world alone.
FACTS_OF_THE_GENERATED_WORLD = ("Mira lives in", "Tom works as a", "Zoe's best friend is")


@dataclass(frozen=True)
class Prompt:
    """Something to continue.

    Attributes:
      text: what the user sees before the continuation; empty for a text of the model's own.
      ids: what the model is given.
      tokens: of the continuation, at most.
      seed: of the draws, at temperature 1; None for the most likely token at each place.
    """

    text: str
    ids: list[int]
    tokens: int = SAMPLE_TOKENS
    seed: int | None = None


def prompts_of_texts(tokenizer: BaseTokenizer, texts: Sequence[str]) -> list[Prompt]:
    """The beginnings of a few documents, as prompts for a base model; each ends with a whole character."""
    prompts = []
    for text in texts:
        ids = tokenizer.encode(text)[:PROMPT_TOKENS]
        while tokenizer.decode(ids).endswith("\ufffd"):  # some bytes of a character, as of Chinese or Hindi
            ids.pop()
        prompts.append(Prompt(tokenizer.decode(ids), [tokenizer.bos_token_id, *ids]))
    return prompts


def is_english(texts: Sequence[str]) -> bool:
    """Whether `the` is at least every 50th word: in English prose it is about every 20th."""
    words = " ".join(texts).lower().split()
    return words.count("the") * 50 >= len(words)


def fixed_prompts(tokenizer: BaseTokenizer, *, generated: bool, english: bool = True) -> list[Prompt]:
    """The same prompts for every run: beginnings of sentences that end with a fact, and nothing but a text's beginning.

    Args:
      generated: whether the model reads the generated text, which has facts of its own.
      english: whether it reads English, in which the other facts are; without, it is given no such beginnings.
    """
    facts = FACTS_OF_THE_GENERATED_WORLD if generated else FACTS if english else ()
    bos = tokenizer.bos_token_id
    return [
        *(Prompt(text, [bos, *tokenizer.encode(text)], FACT_TOKENS) for text in facts),
        *(Prompt("", [bos], seed=seed) for seed in range(UNPROMPTED)),
    ]


def prompts_of_chats(tokenizer: BaseTokenizer, conversations: Sequence[dict]) -> list[Prompt]:
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
        prompts.append(Prompt(messages[first]["content"], tokenizer.render_for_completion(opening)))
    return prompts


def continuations(engine: Engine, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, str]]:
    """Each prompt with what the model writes after it, special tokens spelled out; all of it in one batch.

    A prompt that fills the context is left out, since it leaves no room for an answer. All processes call it together.

    Args:
      engine: without requests in flight. Its cache is freed at the end.
    """
    context = engine.model_config.sequence_len
    prompts = [prompt for prompt in prompts if len(prompt.ids) < context]
    if not prompts:
        return
    # Room for all of them at once, and no more: the rest of the memory holds the state of the training.
    longest = max(min(len(prompt.ids) + prompt.tokens, context) for prompt in prompts)
    engine.rows = len(prompts)
    engine.cache_tokens = engine.batch_size(len(prompts)) * -(-longest // PAGE) * PAGE
    written = {engine.submit(_request(prompt)): "" for prompt in prompts}
    while engine.busy:
        raise_if_asked()
        for output in engine.step():
            written[output.request] += output.text
    engine.release()
    yield from zip(prompts, written.values(), strict=True)


def _request(prompt: Prompt) -> Request:
    sampling = Sampling(temperature=0.0) if prompt.seed is None else Sampling(temperature=1.0, seed=prompt.seed)
    return Request(prompt.ids, prompt.tokens, sampling, tool=calculate)
