"""Requests to every route of the server, as hypothesis strategies: mostly right, often nearly right, sometimes junk."""

from __future__ import annotations

import json
from typing import Any, NamedTuple
from urllib.parse import quote

from hypothesis import strategies as st

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
POSTED = (CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/api/inside/next", "/api/inside/attention")
GOT = (
    "/", "/health", "/version", "/metrics", "/v1/models", "/tokenizer_info", "/api/info", "/api/run/metrics",
    "/api/run/report", "/api/run/samples",
)  # fmt: skip
ROUTES = {*POSTED, *GOT}
MOST = 6  # tokens that most requests ask for, so that many requests fit into the time


class Call(NamedTuple):
    """A request. `sent` is the body's JSON before it was damaged; None if there is none."""

    method: str
    path: str
    body: bytes | None
    headers: tuple[tuple[str, str], ...]
    sent: Any = None


# --- values -----------------------------------------------------------------------------------------------------------

_text = st.text(max_size=20) | st.sampled_from(
    [
        "",
        " ",
        "\0",
        "\ud800",
        "\u202e",
        "🙂" * 50,
        "e\u0301",
        "a" * 500,
        "<|bos|>",
        "<|assistant_end|>",
        "<|python_start|>",
        "\r\n",
    ]  # noqa: E501
)
_whole = st.integers(-3, 40) | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30, 10**400])
_real = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([1e308, -1e308, 5e-324, 1e-38, -0.0])
_scalar = st.none() | st.booleans() | _whole | _real | _text
_any = st.recursive(
    _scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4), max_leaves=8
)


def _deep(opening: str, closing: str) -> st.SearchStrategy[bytes]:
    """JSON nested so deep that a recursive parser gives up."""
    return st.sampled_from([50, 900, 20_000]).map(lambda depth: (opening * depth + closing * depth).encode())


_content = _text | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": _text}), max_size=3)
_message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", ""]),
        "content": _content,
    },
    optional={"name": _text, "tool_calls": _any, "refusal": st.none(), "tool_call_id": _text},
)
_right = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": _text})
_ids = st.lists(st.integers(0, 1100), max_size=12)
_prompt = _text | st.lists(_text, max_size=4) | _ids | st.lists(_ids, max_size=4)
_sampling = {
    "max_tokens": st.integers(0, MOST) | st.just(100_000),
    "n": st.integers(1, 3) | st.sampled_from([0, 128, 1000]),
    "temperature": st.floats(0, 2, allow_subnormal=False),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 60),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.5, 2),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(-1, 1100).map(str), st.floats(-100, 100), max_size=5),
    "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
    "stop": st.none() | _text | st.lists(_text, max_size=5),
    "stream": st.booleans(),
    "stream_options": st.none() | st.fixed_dictionaries({"include_usage": st.booleans()}),
    "user": _text,
    "metadata": _any,
    "ignore_eos": st.booleans(),
}
_chat = {
    **_sampling,
    "max_completion_tokens": st.integers(1, MOST),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "tools": st.none() | st.just([]) | _any,
    "tool_choice": st.none() | st.sampled_from(["none", "auto", "required"]),
    "response_format": st.none() | st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object"])}),
}
_completion = {
    **_sampling, "logprobs": st.none() | st.integers(0, 20), "echo": st.booleans(), "best_of": st.integers(1, 3),
    "suffix": st.none() | _text,
}  # fmt: skip


def _damaged(fields: dict[str, st.SearchStrategy[Any]]) -> dict[str, st.SearchStrategy[Any]]:
    """Fields whose value is now and then of any type."""
    return {name: st.one_of(*[values] * 6, _any) for name, values in fields.items()}


@st.composite
def _with_a_few(draw: st.DrawFn, required: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    """All required fields and a few of the optional ones, so that most bodies have no reason to be refused."""
    names = draw(st.lists(st.sampled_from(sorted(optional)), max_size=5, unique=True)) if optional else []
    return {name: draw(values) for name, values in {**required, **{name: optional[name] for name in names}}.items()}


def _body(required: dict[str, st.SearchStrategy[Any]], optional: dict[str, st.SearchStrategy[Any]]) -> Any:
    right = _with_a_few(required, optional)
    near = _with_a_few(_damaged(required), _damaged(optional))
    less = st.fixed_dictionaries({}, optional=_damaged({**required, **optional}) | {"unknown": _any})
    return st.one_of(right, right, near, less, _any)


def bodies(model: str, context: int) -> dict[str, st.SearchStrategy[Any]]:
    """The bodies of each route that takes one, as JSON values."""
    name = {"model": st.just(model)}
    messages = st.lists(_right, min_size=1, max_size=1) | st.lists(_message, max_size=5) | st.lists(_right, max_size=40)
    text = {"add_special_tokens": st.booleans(), "return_token_strs": st.booleans(), **name}
    some = st.lists(st.integers(0, 1100), min_size=1, max_size=min(context, 40))
    return {
        CHAT: _body({**name, "messages": messages}, _chat),
        COMPLETIONS: _body({**name, "prompt": _prompt}, _completion),
        "/tokenize": _body({"prompt": _text}, text) | _body({"messages": messages}, text),
        "/detokenize": _body({"tokens": _ids}, name),
        "/api/inside/next": _body({"tokens": some}, {"messages": messages, "prompt": _prompt, "top": _whole}),
        "/api/inside/attention": _body({"tokens": some}, {"layer": _whole, "head": _whole, "prompt": _prompt}),
    }


# --- requests ---------------------------------------------------------------------------------------------------------


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def _cut(draw: st.DrawFn, texts: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a part replaced by a few others."""
    data = draw(texts)
    start = draw(st.integers(0, len(data)))
    return data[:start] + draw(st.binary(max_size=3)) + data[start + draw(st.integers(0, 8)) :]


_header = st.sampled_from(
    [
        ("Content-Type", "text/plain"), ("Content-Type", "application/json; charset=utf-16"), ("Content-Type", ""),
        ("Content-Type", "multipart/form-data; boundary=x"), ("Content-Encoding", "gzip"), ("Connection", "close"),
        ("Accept", "text/event-stream"), ("Authorization", "Bearer x"), ("Authorization", "Basic \xff"), ("Host", ""),
        ("Origin", "https://example.org"), ("Expect", "100-continue"), ("Range", "bytes=5-2"), ("If-None-Match", '"x"'),
        ("X-Request-Id", "a" * 300), ("Cookie", "a=b"), ("Accept-Encoding", "br;q=x"), ("Upgrade", "websocket"),
        ("If-Modified-Since", "yesterday"), ("Access-Control-Request-Method", "POST"), ("Forwarded", "for=_x;proto=x"),
    ]
)  # fmt: skip
_headers = st.lists(_header, max_size=2, unique_by=lambda pair: pair[0]).map(tuple)
_methods = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "QUERY"])
_segment = st.text(min_size=1, max_size=12).map(lambda text: quote(text.encode("utf-8", "surrogatepass"), safe="%/."))


def calls(model: str, context: int) -> st.SearchStrategy[Call]:
    """Requests to all routes."""
    posted = []
    for path, values in bodies(model, context).items():
        # Chat and completions have the most to go wrong.
        times = 4 if path in (CHAT, COMPLETIONS) else 1
        posted += [st.builds(_post, st.just(path), values, st.just(())) for _ in range(times)]
        posted.append(st.builds(_post, st.just(path), values, _headers))
    path = st.sampled_from(POSTED)
    junk = (
        st.binary(max_size=40)
        | _cut(bodies(model, context)[CHAT].map(_encoded))
        | _cut(bodies(model, context)[COMPLETIONS].map(_encoded))
        | _deep("[", "]")
        | _deep('{"a":', "}")
        | _deep('{"messages":[{"content":', "}]}")
    )
    plain = st.sampled_from([*GOT, "/favicon.ico", "/robots.txt", f"/v1/models/{quote(model)}"])
    prefix = st.sampled_from(["/", "/v1/", "/v1/models/", "/page/", "/api/", "/api/run/", "/static/", "//", "/../"])
    query = st.sampled_from(
        ["", "?", "?from=0", "?from=-1", "?from=1e9", "?from=99999999999999999999", "?from=x", "?%"]
    )
    query |= st.builds("?{}={}".format, st.sampled_from(["from", "stage", "layer", "step"]), _segment)
    got = st.builds(
        lambda method, path, query, headers: Call(method, path + query, None, headers),
        st.one_of(*[st.just("GET")] * 4, _methods), plain | st.builds(str.__add__, prefix, _segment), query, _headers,
    )  # fmt: skip
    return st.one_of(
        *posted,
        st.builds(lambda path, body, headers: Call("POST", path, body, headers), path, junk, _headers),
        st.builds(
            lambda method, path, body: Call(method, path, body, ()), _methods, path | plain, st.binary(max_size=9)
        ),
        got,
        got,
    )


def _post(path: str, value: Any, headers: tuple[tuple[str, str], ...]) -> Call:
    return Call("POST", path, _encoded(value), headers, value)
