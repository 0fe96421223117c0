"""What goes for all routes: errors, keys, hosts, limits, metrics, clients that leave or do not read, and the page."""

import contextlib
import json
import re
import socket
import threading
import time

import pytest

from jaxchat import __version__
from jaxchat.errors import UserError
from jaxchat.serve.http import fields, generation
from jaxchat.serve.http.service import Service
from jaxchat.serve.http.serving import Server
from jaxchat.serve.http.start import LOCAL, listen
from tests.serve.http.conftest import HELLO, frames_of, served, wait_until, web


@pytest.fixture(scope="module")
def locked(service):
    """A client of a server that wants a key."""
    with web(Server(service, served(service.engine), key="sk-secret", origins=("https://chat.example.com",))) as client:
        yield client


# --- the small routes -------------------------------------------------------------------------------------------------


def test_models(client):
    answer = client.get("/v1/models").json()
    (model,) = answer["data"]
    assert answer == {"object": "list", "data": [model]} and isinstance(model.pop("created"), int)
    assert model == {"id": "tiny", "object": "model", "owned_by": "jaxchat", "root": "tiny", "max_model_len": 128}
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"


@pytest.mark.parametrize("path", ["/v1/models/gpt-4", "/v1/models/a/b"])
def test_an_unknown_model(client, path):
    for response in (client.get(path), client.chat(model=path.removeprefix("/v1/models/"))):
        error = response.json()["error"]
        assert response.status_code == 404 and error["code"] == "model_not_found"
        assert error["message"].endswith('this server has "tiny"')


def test_health_version_and_info(client, base_client, run_dir):
    assert client.get("/health").json() == {"status": "ready"}
    assert client.get("/version").json() == {"version": __version__}
    info = client.get("/api/info").json()
    assert (info["model"], info["stage"], info["base"], info["tools"]) == ("tiny", "sft", False, "calculator")
    assert info["run"] == run_dir.name and info["context"] == 128 and info["version"] == __version__
    info = base_client.get("/api/info").json()
    assert (info["stage"], info["base"], info["tools"]) == ("pretrain", True, "none")


def test_tokens_and_back(client, engine):
    tokenizer = engine.tokenizer
    text = "Grüße <|user_end|>🙂"
    ids = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    end = tokenizer.encode_special("<|user_end|>")
    assert ids["tokens"] == [*tokenizer.encode("Grüße "), end, *tokenizer.encode("🙂")]
    assert ids == {"tokens": ids["tokens"], "count": len(ids["tokens"]), "max_model_len": 128}
    assert client.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": text}
    with_bos = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert with_bos == [tokenizer.bos_token_id, *ids["tokens"]]
    assert client.post("/tokenize", json={"prompt": "x y " * 10_000}).json()["count"] > 128
    info = client.get("/tokenizer_info").json()
    (eos,) = client.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()["tokens"]
    assert eos == tokenizer.encode_special("<|assistant_end|>")


@pytest.mark.parametrize(
    "path, body",
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 3}),
        ("/tokenize", {"messages": 3}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": ["x"]}),
        ("/detokenize", {"tokens": [True]}),
    ],
)
def test_tokens_that_are_none(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, expected",
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[]", "the body is an array; it must be an object"),
        (b"null", "the body is null"),
        (b'{"temperature": NaN}', "NaN is not a number"),
        (b'{"x": -Infinity}', "-Infinity is not a number"),
        (b"[" * 100_000, "the body is not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        (b'{"temperature": 1e999}', "temperature"),
        (b'{"model": "\\ud800"}', "there is no model"),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bodies_that_are_no_request(client, path, body, expected):
    response = client.post(path, content=body)
    error = response.json()["error"]
    assert response.status_code in (400, 404) and expected in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_body_without_a_content_type(client):
    """As curl sends it."""
    body = json.dumps({"messages": HELLO, "temperature": 0})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/v1/chat/completions", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize("length", [True, False])
def test_a_body_that_is_too_large(client, length, monkeypatch):
    monkeypatch.setattr(fields, "MAX_BODY", 1000)
    body = json.dumps({"prompt": "x" * 2000}).encode()
    response = client.post("/v1/completions", content=body if length else iter([body[:900], body[900:]]))
    assert response.status_code == 413 and "1,000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "method, path, status, message",
    [
        ("GET", "/v1/nothing", 404, "there is nothing at /v1/nothing"),
        ("POST", "/v1/nothing", 404, "there is nothing at /v1/nothing"),
        ("GET", "/v1/chat/completions", 405, "/v1/chat/completions does not take GET, only POST"),
        ("DELETE", "/v1/models", 405, "/v1/models does not take DELETE"),
        ("GET", "/../../etc/passwd", 404, "there is nothing"),
        ("GET", "/%2e%2e/app.py", 404, "there is nothing"),
        ("GET", "/nothing%00.js", 404, "there is nothing"),
    ],
)
def test_paths_and_methods_that_there_are_not(client, method, path, status, message):
    response = client.request(method, path)
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"] and error["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]


# --- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "sk-secret", "Basic sk-secret", "Bearer sk-sécret"])
@pytest.mark.parametrize("path", ["/v1/models", "/api/info", "/v1/nothing"])
def test_without_the_key(locked, header, path):
    response = locked.get(path, headers={} if header is None else {"authorization": header.encode()})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")


def test_with_the_key(locked):
    for header in ("Bearer sk-secret", "bearer sk-secret"):
        assert locked.get("/v1/models", headers={"authorization": header}).status_code == 200
    assert locked.get("/health").status_code == locked.get("/metrics").status_code == 200


def test_other_sites_need_leave(client, locked, service):
    def preflight(client, origin):
        headers = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "x-a"}
        return client.options("/v1/chat/completions", headers=headers)

    allowed = preflight(locked, "https://chat.example.com")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example.com"
    headers = {"origin": "https://chat.example.com"}
    refused = locked.get("/v1/models", headers=headers)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == headers["origin"]
    assert "access-control-allow-origin" not in preflight(locked, "https://evil.example").headers
    assert "access-control-allow-origin" not in preflight(client, "https://chat.example.com").headers
    for origin in ("https://evil.example", "null", "http://[", ""):
        response = client.post("/v1/chat/completions", content="{}", headers={"origin": origin})
        assert response.status_code == 403 and f"--allow-origin {origin}" in response.json()["error"]["message"]
    own = {"origin": str(client.base_url).rstrip("/")}
    assert client.get("/v1/models", headers=own).status_code == 200
    with web(Server(service, served(service.engine), origins=("https://a.example",))) as open_to_one:
        response = open_to_one.get("/v1/models", headers={"origin": "https://a.example"})
        assert response.headers["access-control-allow-origin"] == "https://a.example"


def test_names_that_have_been_made_to_point_here(service):
    with web(Server(service, served(service.engine), hosts=LOCAL)) as client:
        for host in ("localhost", "LOCALHOST:99", "127.0.0.1:8000", "[::1]:8000"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1"):
            for path in ("/v1/models", "/", "/health"):
                assert client.get(path, headers={"host": host}).status_code == (200 if host == "[::1" else 403)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_and_its_headers(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    asset = client.get("/app.css")
    assert asset.status_code == 200 and asset.headers["cache-control"] == "no-cache"
    again = client.get("/app.css", headers={"if-none-match": asset.headers["etag"]})
    assert again.status_code == 304 and not again.content
    assert client.post("/index.html").status_code == 405


# --- requests that come, go, and fail ---------------------------------------------------------------------------------


def test_many_clients_at_once_get_what_each_gets_alone(client):
    prompts = [f"Es war {'ein ' * i}" for i in range(12)]
    fields = {"max_tokens": 20, "temperature": 2.0, "seed": 3, "ignore_eos": True}
    alone = [client.complete(prompt, **fields).json()["choices"][0]["text"] for prompt in prompts]
    found = {}

    def ask(prompt):
        frames = client.frames("/v1/completions", prompt=prompt, **fields)
        found[prompt] = "".join(frame["choices"][0]["text"] for frame in frames)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt] for prompt in prompts] == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(client, service, slow, stream):
    body = {"prompt": "Es", "ignore_eos": True, "stream": stream, "n": 2}
    host, port, aborted = client.base_url.host, client.base_url.port, service.metrics.finished["abort"]
    with socket.create_connection((host, port)) as connection:
        send(connection, body)
        wait_until(lambda: service.engine.running == 2)
    wait_until(lambda: service.engine.running == 0, seconds=0.5)  # an answer takes longer
    wait_until(lambda: service.metrics.finished["abort"] == aborted + 2)


def send(connection, body):
    """Sends a request by hand."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)


def test_a_full_queue(client, service, slow, monkeypatch):
    monkeypatch.setattr(service, "most_waiting", 1 - service.engine.rows)
    with client.stream("POST", "/v1/completions", json={"prompt": "Es", "ignore_eos": True, "stream": True}) as first:
        chunks = first.iter_bytes()  # whose end would close the response
        next(chunks)
        response = client.complete("Es", max_tokens=1)
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
    wait_until(lambda: service._in_flight == 0)
    assert client.complete("Es", max_tokens=1, n=3).status_code == 200  # alone, a large request is let in


def test_a_client_that_does_not_read_holds_up_nobody(client, service, monkeypatch):
    monkeypatch.setattr(generation, "STALLED_SECONDS", 1.0)
    address = client.base_url.host, client.base_url.port
    body = {"prompt": "Es", "stream": True, "n": 4, "logprobs": 20, "ignore_eos": True}
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stalled = stack.enter_context(socket.socket())
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            stalled.connect(address)
            send(stalled, body)
        assert client.complete("Es", max_tokens=4).status_code == 200
        wait_until(lambda: service._in_flight == 0)


def test_a_step_that_fails_ends_all_requests(engine, capfd):
    class Failing:
        """The engine with a fault: its step raises."""

        def __init__(self):
            self.fails = False

        def __getattr__(self, name):
            return getattr(engine, name)

        @property
        def busy(self):
            return self.fails

        def submit(self, request):
            self.fails = True
            return 0

        def step(self):
            raise ZeroDivisionError("the device is on fire")

    with Service(Failing()) as service, web(Server(service, served(engine))) as client:
        response = client.chat()
        assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
        assert response.json()["error"]["code"] == "engine_failed"
        for path in ("/health", "/v1/models"):
            assert client.get(path).status_code == 503
        assert client.chat().status_code == 503
    assert "on fire" in capfd.readouterr().err


def test_a_failure_within_a_stream(engine, service, monkeypatch, capfd):
    with Service(engine_with_fault(engine)) as failing, web(Server(failing, served(engine))) as client:
        body = {"messages": HELLO, "stream": True, "temperature": 0}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            frames = frames_of("".join(response.iter_text()))
    assert frames[0]["choices"][0]["delta"]["role"] == "assistant"
    assert frames[-1]["error"]["code"] == "engine_failed"
    assert "on fire" in capfd.readouterr().err


def engine_with_fault(engine):
    """The engine with a fault: its second step raises."""
    from jaxchat.infer.request import NewToken, Output

    class Failing:
        steps = 0
        busy = False

        def __getattr__(self, name):
            return getattr(engine, name)

        def submit(self, request):
            self.busy = True
            return 0

        def step(self):
            self.steps += 1
            if self.steps == 2:
                raise ZeroDivisionError("the device is on fire")
            time.sleep(0.2)
            return [Output(0, (NewToken(65),), "A")]

    return Failing()


def test_before_the_model_is_loaded():
    with web(Server(Service())) as client:
        for path in ("/health", "/v1/models", "/api/info"):
            response = client.get(path)
            assert response.status_code == 503 and response.json()["error"]["code"] == "loading"
            assert int(response.headers["retry-after"]) >= 1
        assert client.chat().status_code == 503
        assert client.get("/version").status_code == client.get("/metrics").status_code == 200


def test_a_run_without_a_model(run_dir):
    with web(Server(None, run_dir=str(run_dir))) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/api/info").json() == {"version": __version__, "run": run_dir.name, "model": None}
        assert client.chat().status_code == 503 and "--watch" in client.chat().json()["error"]["message"]


# --- metrics and the log ----------------------------------------------------------------------------------------------


def test_metrics(client):
    def values():
        text = client.get("/metrics").text
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r'vllm:\w+\{model_name="tiny",engine="0"(,\w+="[^"]+")?\} [\d.e+-]+', x) for x in lines)
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}, text

    before, _ = values()
    usage = client.complete("Es war", max_tokens=5).json()["usage"]
    after, text = values()
    labels = 'model_name="tiny",engine="0"'

    def gained(name, more=""):
        return after[f"vllm:{name}{{{labels}{more}}}"] - before[f"vllm:{name}{{{labels}{more}}}"]

    assert gained("prompt_tokens_total") == usage["prompt_tokens"] and gained("generation_tokens_total") == 5
    assert gained("request_success_total", ',finished_reason="length"') == 1
    assert gained("e2e_request_latency_seconds_count") == gained("time_to_first_token_seconds_count") == 1
    assert gained("request_generation_tokens_sum") == 5 and gained("request_generation_tokens_bucket", ',le="5.0"') == 1
    assert gained("inter_token_latency_seconds_count") <= 4
    assert after[f"vllm:num_requests_running{{{labels}}}"] == after[f"vllm:num_requests_waiting{{{labels}}}"] == 0
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        assert f"# HELP {name} " in text and (kind == "counter") == name.endswith("_total")


def test_the_log_has_no_contents(client, capfd):
    client.complete("a secret text", max_tokens=2)
    client.chat([{"role": "user", "content": 3}])
    for path in ("/health", "/", "/metrics", "/version"):
        client.get(path)
    client.get("/no%0athing")
    seen = ""

    def has_come():
        nonlocal seen
        seen += capfd.readouterr().err
        return "no\\nthing" in seen

    wait_until(has_come)
    lines = seen.splitlines()
    assert len(lines) == 3 and "secret" not in "".join(lines)
    assert re.fullmatch(r"\d\d:\d\d:\d\d  POST /v1/completions  200  \d+ \+ 2 tokens  \d+\.\d\d s", lines[0])
    assert "POST /v1/chat/completions  400" in lines[1]


# --- addresses --------------------------------------------------------------------------------------------------------


def test_addresses_that_cannot_be_used():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is taken; choose another, such as --port"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="this machine has no address 192.0.2.1; write --host 127.0.0.1"):
        listen("192.0.2.1", 0)
    with pytest.raises(UserError, match="--host no such name is not known here"):
        listen("no such name", 0)


def test_ipv6():
    if not socket.has_ipv6:
        pytest.skip("there is no IPv6 here")
    with contextlib.suppress(UserError), listen("::1", 0) as listener:
        assert listener.getsockname()[0] == "::1"
