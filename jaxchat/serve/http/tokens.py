"""Text to token ids and back, as the model sees it: /tokenize, /detokenize and /tokenizer_info, as in vLLM."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from jaxchat.serve.http.errors import JsonResponse
from jaxchat.serve.http.fields import is_whole, read_json
from jaxchat.serve.http.messages import LONG, prompt_of
from jaxchat.serve.http.serving import ready


async def tokenize(request: Request) -> Response:
    """POST /tokenize: the ids of raw text (`prompt`), or of a conversation (`messages`).

    In raw text the names of special tokens stand for these tokens, and <|bos|> comes before it unless
    `add_special_tokens` is false.
    """
    _, served = ready(request)
    fields = await read_json(request)
    served.check_name(fields.text("model"))
    if fields.has("messages"):
        ids = await prompt_of(fields, served)
    else:
        text = fields.text("prompt")
        if text is None:
            fields.refuse("prompt", "a string")
        bos = fields.get("add_special_tokens") is None or fields.flag("add_special_tokens")
        if len(text) < LONG:
            ids = served.spelling.encode(text, bos=bos)
        else:
            ids = await asyncio.to_thread(served.spelling.encode, text, bos=bos)
    return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": served.context})


async def detokenize(request: Request) -> Response:
    """POST /detokenize: the text of ids, special tokens spelled out."""
    _, served = ready(request)
    fields = await read_json(request)
    served.check_name(fields.text("model"))
    ids = fields.array("tokens")
    if ids is None or not all(is_whole(each) and 0 <= each < served.vocabulary for each in ids):
        fields.refuse("tokens", f"an array of ids below {served.vocabulary:,}")
    return JsonResponse({"prompt": served.spelling.tokenizer.decode(ids)})


async def tokenizer_info(request: Request) -> Response:
    """GET /tokenizer_info: the special tokens with a meaning for clients."""
    _, served = ready(request)
    end = "<|bos|>" if served.base else "<|assistant_end|>"
    return JsonResponse(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": end,
            "pad_token": "<|bos|>",
            "unk_token": None,
            "chat_template": None,
            "model_max_length": served.context,
            "vocab_size": served.vocabulary,
        }
    )
