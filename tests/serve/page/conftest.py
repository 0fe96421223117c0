"""The page in headless Chromium, with a small model behind the real server."""

import shutil
import time

import pytest

from jaxchat.infer.trained import load_model
from jaxchat.serve.http.service import Service
from jaxchat.serve.http.serving import Server
from tests.serve.http.conftest import served, web

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "a key"
# A server whose answers a test writes itself, piece by piece: for what no small model says.
SCRIPTED = """
window.feed = null;
const real = window.fetch;
window.fetch = (address, options) => {
  if (!String(address).endsWith("/v1/chat/completions")) return real(address, options);
  const bytes = new TextEncoder();
  const body = new ReadableStream({
    start(stream) {
      const send = (frame) => stream.enqueue(bytes.encode(`data: ${frame}\\n\\n`));
      const choice = (delta, finish_reason = null) =>
        send(JSON.stringify({ choices: [{ index: 0, delta, finish_reason }] }));
      window.feed = (content) => choice({ content });
      window.frame = (frame) => send(JSON.stringify(frame));
      window.end = () => (choice({}, "stop"), send("[DONE]"), stream.close());
      window.breakOff = () => stream.close();
      options.signal.addEventListener("abort", () => stream.error(new DOMException("", "AbortError")));
    },
  });
  return Promise.resolve(new Response(body, { headers: { "content-type": "text/event-stream" } }));
};
"""


@pytest.fixture(scope="session")
def engine(run_dir):
    """An engine of the service's own: no other thread may use it, and tests of other files have one too."""
    return load_model(run_dir, "sft").engine(rows=4)


@pytest.fixture(scope="session")
def service(engine):
    with Service(engine) as service:
        yield service


@pytest.fixture(scope="session")
def address(service, run_dir):
    """The address of a server of a chat model."""
    with web(Server(service, served(service.engine), run_dir=str(run_dir))) as client:
        yield str(client.base_url)


@pytest.fixture(scope="session")
def base_address(service, run_dir):
    with web(Server(service, served(service.engine, "pretrain"), run_dir=str(run_dir))) as client:
        yield str(client.base_url)


@pytest.fixture(scope="session")
def guarded_address(service, run_dir):
    """The address of a server that wants an API key."""
    with web(Server(service, served(service.engine), run_dir=str(run_dir), key=KEY)) as client:
        yield str(client.base_url)


@pytest.fixture(scope="session")
def watching_address(run_dir):
    """The address of a server without a model."""
    with web(Server(None, run_dir=str(run_dir))) as client:
        yield str(client.base_url)


@pytest.fixture(scope="module")
def browser():
    """A browser for the tests of a file. While it is open this thread has an event loop, as other tests want one."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    api.expect.set_options(timeout=20_000)  # a machine may have much else to do
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens an address in a browser without memory; no page may have faults, or do what its policy forbids."""
    contexts, faults = [], []

    def open_page(address, *, script=None, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        context.set_default_timeout(20_000)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: "Security Policy" in message.text and faults.append(message.text))
        own = (address.split("#")[0], "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or faults.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def chat(visit, address):
    """The page of a chat model, ready for a message."""
    page = visit(address)
    page.get_by_label("Message", exact=True).wait_for()
    return page


@pytest.fixture
def scripted(visit, address):
    page = visit(address, script=SCRIPTED)
    page.get_by_label("Message", exact=True).wait_for()
    return page


@pytest.fixture
def slow(service, monkeypatch):
    """Makes each step of the engine take a while, so that an answer can be stopped."""
    step = service.engine.step

    def slow_step():
        time.sleep(0.3)
        return step()

    monkeypatch.setattr(service.engine, "step", slow_step)


def ask(page, text):
    """Sends a message, and waits for the end of the answer."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.get_by_label("Send", exact=True).wait_for()
    return page.get_by_label("Answer").last
