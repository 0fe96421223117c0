"""Starts the command that the README gives for the page, asks it what a person would, and stops it.

python .ci/page.py .venv/bin/jaxchat serve --run runs/quickstart --open
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

LONGEST = 600  # seconds until it answers: it loads and compiles first


def main() -> None:
    command = [argument for argument in sys.argv[1:] if argument != "--open"]  # no browser to open
    with subprocess.Popen(
        [*command, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            check(server)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
    assert code == 75, f"SIGTERM ended it with {code}"


def check(server: subprocess.Popen) -> None:
    for line in server.stdout:
        print(line, end="")
        found = re.search(r"http://[0-9.a-z]+:[0-9]+", line)
        if found:
            break
    else:
        raise SystemExit("the server has ended")
    url, began = found[0], time.monotonic()
    os.set_blocking(server.stdout.fileno(), False)  # what else it prints may wait
    while not healthy(url):
        assert time.monotonic() - began < LONGEST and server.poll() is None, "it does not become healthy"
        time.sleep(0.5)
    print(f"ready after {time.monotonic() - began:.0f} s")
    with urllib.request.urlopen(url) as page:
        assert "default-src 'self'" in page.headers["content-security-policy"] and b"<title>" in page.read()
    messages = [{"role": "user", "content": "What is 34 + 58?"}]
    body = json.dumps({"model": "quickstart", "messages": messages, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        message = json.load(response)["choices"][0]["message"]
    print(message)
    assert "92" in message["content"] and message["tool_runs"][0]["output"] == "92"


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health") as response:
            return response.status == 200
    except OSError:
        return False


if __name__ == "__main__":
    main()
