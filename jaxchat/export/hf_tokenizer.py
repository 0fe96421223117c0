"""The tokenizer as transformers reads it: tokenizer.json, tokenizer_config.json, and the template of conversations."""

from __future__ import annotations

from typing import Any

from jaxchat.tokenizer import BaseTokenizer
from jaxchat.tokenizer.foreign.tokenizer_json import parse, with_checksum

BOS, END = "<|bos|>", "<|assistant_end|>"

# Renders what `BaseTokenizer.render_conversation` does. A content may also be a list of parts, as there: those of the
# assistant are text, python and python_output. All white space of the template itself is left out, whatever the
# settings of the Jinja that renders it.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}{%- for part in content -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = text(messages[0]['content']) + '\\n\\n' -%}
  {%- set turns = messages[1:] -%}
  {%- if not turns -%}{{- raise_exception('A system message must be followed by a user message.') -}}{%- endif -%}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in turns -%}
  {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{- raise_exception('Roles must alternate, beginning with the user.') -}}
  {%- elif message['role'] == 'user' -%}
    {{- '<|user_start|>' + (system if loop.first else '') + text(message['content']) + '<|user_end|>' -}}
  {%- else -%}
    {{- '<|assistant_start|>' -}}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
      {%- for part in message['content'] -%}
        {%- if part['type'] == 'text' -%}{{- part['text'] -}}
        {%- elif part['type'] == 'python' -%}{{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}
        {%- elif part['type'] == 'python_output' -%}{{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
        {%- else -%}{{- raise_exception('The type of a part must be text, python or python_output.') -}}{%- endif -%}
      {%- endfor -%}
    {%- endif -%}
    {{- '<|assistant_end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""


def tokenizer_json(tokenizer: BaseTokenizer) -> str:
    """The text of a tokenizer.json which puts <|bos|> before a text wherever special tokens are asked for.

    Ids are those of `tokenizer`, but for text that spells special tokens, which Hugging Face's `tokenizers` reads as
    such. jaxchat reads the file back as the same tokenizer.
    """
    data = parse(tokenizer.to_json())
    facts = data["model"].pop("jaxchat")
    del facts["sha256"]
    data["post_processor"] = _bos_in_front(tokenizer.bos_token_id)
    return with_checksum(data, **facts)


def _bos_in_front(bos: int) -> dict[str, Any]:
    def of(sequence: str, type_id: int) -> list[dict[str, Any]]:
        parts = {"SpecialToken": BOS, "Sequence": sequence}
        return [{kind: {"id": name, "type_id": type_id}} for kind, name in parts.items()]

    return {
        "type": "TemplateProcessing",
        "single": of("A", 0),
        "pair": [*of("A", 0), *of("B", 1)],
        "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}},
    }


def tokenizer_config(sequence_len: int, *, base: bool) -> dict[str, Any]:
    """The contents of tokenizer_config.json.

    Args:
      base: the model continues documents, so that <|bos|>, where the next one begins, is their end.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS if base else END,
        "pad_token": BOS,
        "model_max_length": sequence_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
