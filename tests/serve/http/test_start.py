"""`jaxchat serve` as a user starts and stops it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from jaxchat.cli.main import main
from jaxchat.serve.http import start
from jaxchat.serve.http.start import listen
from tests.serve.http.conftest import frames_of
from tests.tiny import refusal

ROOT = Path(__file__).parents[3]


class Process:
    """A server in a process of its own."""

    def __init__(self, run_dir, *arguments, **variables):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxchat", "serve", "--run", str(run_dir), "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": f"{run_dir}/compiled", **variables},
        )

    def __enter__(self):
        self.line = self.process.stdout.readline()
        self.url = re.search(r"http://\S+", self.line)[0]
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def end(self, *signals, pause=0.5):
        """Sends signals; returns the exit code and stderr."""
        for number in signals:
            self.process.send_signal(number)
            time.sleep(pause)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


def test_sigterm_lets_answers_end_and_takes_no_more(run_dir):
    with Process(run_dir, "--rows=2") as server:
        assert re.fullmatch(rf"{run_dir.name} \(sft\) answers at http://127.0.0.1:\d+/\n", server.line)
        assert httpx.get(f"{server.url}health").json() == {"status": "ready"}
        fields = {"prompt": "Es war", "n": 100, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{server.url}v1/completions", json=fields, timeout=60) as response:
            chunks = response.iter_text()
            text = next(chunks)
            ended = []
            thread = threading.Thread(target=lambda: ended.append(server.end(signal.SIGTERM)))
            thread.start()
            time.sleep(0.5)
            for path in ("health", "v1/models"):
                refused = httpx.get(f"{server.url}{path}")
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
            text += "".join(chunks)
        thread.join()
    assert sum(frame["choices"][0]["finish_reason"] == "length" for frame in frames_of(text)) == 100
    ((code, err),) = ended
    assert code == 75 and "stopped by SIGTERM" in err and "finishing the answers under way" in err
    assert "Traceback" not in err


def test_ctrl_c_twice_ends_at_once(run_dir):
    with Process(run_dir, "--rows=2") as server:
        fields = {"prompt": "Es war", "n": 128, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}v1/completions", json=fields, timeout=60) as response:
            chunks = response.iter_text()
            next(chunks)
            code, err = server.end(signal.SIGINT, signal.SIGINT)
    assert code == 130 and err.endswith("stopped\n") and "Traceback" not in err


def test_a_run_is_watched_without_a_model(tmp_path):
    with Process(tmp_path, "--watch", JAXCHAT_API_KEY="") as server:
        assert httpx.get(f"{server.url}api/info").json()["model"] is None
        assert httpx.get(f"{server.url}api/run/stages").status_code == 200
        code, err = server.end(signal.SIGINT)
    assert code == 130 and err.endswith("stopped\n")


@pytest.mark.parametrize(
    "arguments, variables, expected",
    [
        ("--run=x --host=0.0.0.0", {}, "set a key with --api-key KEY or in JAXCHAT_API_KEY, or write --no-api-key"),
        ("--run=x --api-key=a --no-api-key", {}, "contradict each other"),
        ("--run=x --api-key=", {}, "--api-key must be printable ASCII"),
        ("--run=x", {"JAXCHAT_API_KEY": "schlüssel"}, "JAXCHAT_API_KEY must be printable ASCII"),
        ("--run=x", {}, "there is no run directory x"),
        ("--run=x --host=nowhere.invalid", {}, "--host nowhere.invalid is not known here; write --host 127.0.0.1"),
        ("--run=x --allow-origin=a.example", {}, "--allow-origin is 'a.example'; give scheme://host[:port]"),
        ("--run=x --allow-origin=https://a.example/chat", {}, "--allow-origin is 'https://a.example/chat'; give"),
        ("--run=x --port=70000", {}, "--port is 70000; it must be at least 0 and at most 65,535"),
        ("--run=x --rows=0", {}, "--rows is 0; it must be at least 1"),
        ("", {}, "--run"),
    ],
)
def test_starts_that_are_refused(arguments, variables, expected, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    port = [] if "--port" in arguments else ["--port=0"]
    code = main(["serve", *arguments.split(), *port])
    out, err = capsys.readouterr()
    assert out == "" and expected in refusal((code, out, err))


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("*", "*"),
        ("null", "null"),
        ("https://Chat.example.com/", "https://chat.example.com"),
        ("http://127.0.0.1:3000", "http://127.0.0.1:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
    ],
)
def test_origins_become_what_browsers_send(given, sent):
    assert start._origin(given) == sent


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(capsys):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code = main(["serve", "--run=x", f"--port={port}"])
        out, err = capsys.readouterr()
    assert f"port {port} of 127.0.0.1 is taken; choose another, such as --port {port % 65535 + 1}" in refusal(
        (code, out, err)
    )


def test_other_networks_with_a_key_or_without_one_on_purpose(monkeypatch, capsys):
    monkeypatch.setenv("JAXCHAT_API_KEY", "secret")
    for arguments in (["--host=0.0.0.0"], ["--host=0.0.0.0", "--no-api-key"]):
        code = main(["serve", "--run=x", "--port=0", *arguments])
        assert code == 2 and "there is no run directory x" in capsys.readouterr().err


def test_watching_loads_no_model_that_one_could_choose(capsys):
    assert main(["serve", "--run=x", "--watch", "--stage=sft"]) == 2
    assert "--watch loads no model, which --stage would choose" in capsys.readouterr().err


def test_a_run_that_still_trains_can_be_watched(run_dir, tmp_path, capsys):
    shutil.copy(run_dir / "config.json", tmp_path)
    code = main(["serve", f"--run={tmp_path}", "--port=0"])
    out, err = capsys.readouterr()
    assert refusal((code, out, err)).endswith("no stage that trains is finished yet; add --watch to see how it trains")
