"""Takes the pictures of docs/page.md: a server of the run, headless Chromium, PNG files in docs/images.

python -m tests.serve.page.screenshots --run runs/quickstart
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.serve.page.conftest import CHROMIUM, ask

IMAGES = Path(__file__).parents[3] / "docs" / "images"
MOST_BYTES = 200_000
QUESTIONS = ("Which pet lives with Kira?", "Tell me what 3084 + 2716 is.", "Count the letter r in the word strawberry.")
SHOWN = ("What is 34 + 58?", "Where is Emil's home?")
WIDE, NARROW = {"width": 1200, "height": 750}, {"width": 360, "height": 720}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="A finished run; the questions are for the quickstart.")
    run = parser.parse_args().run
    command = [sys.executable, "-m", "jaxchat", "serve", "--run", run, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        print("waiting for the model", file=sys.stderr)
        address = re.search(r"http://\S+", server.stdout.readline()).group()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            take(browser, address)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def take(browser, address):
    """All pictures, of one conversation and the run."""
    context = browser.new_context(viewport=WIDE, color_scheme="light")
    page = context.new_page()
    page.goto(address)
    page.locator(".welcome").wait_for()
    save(page, "welcome")
    for question in QUESTIONS:
        page.get_by_role("button", name="New chat").click()
        ask(page, question)
    page.get_by_role("button", name="New chat").click()
    for question in SHOWN:
        ask(page, question)
    page.get_by_label("Answer").last.get_by_label("Try again").click()
    page.get_by_role("group", name="Versions").wait_for()
    page.get_by_label("Send", exact=True).wait_for()
    page.locator("summary").last.click()
    page.get_by_label("Message", exact=True).focus()
    save(page, "chat-light")
    page.emulate_media(color_scheme="dark")
    save(page, "chat-dark")
    page.set_viewport_size(NARROW)
    save(page, "chat-narrow")
    page.set_viewport_size(WIDE)
    page.emulate_media(color_scheme="light")
    page.get_by_label("Answer").first.get_by_role("button", name="Look inside").click()
    page.locator(".inside .token").first.wait_for()
    page.locator(".inside canvas").first.wait_for()
    page.locator(".inside .token:is(.level-1, .level-2)").last.hover()
    save(page, "inside")
    page.mouse.move(0, 0)
    page.locator(".inside canvas").first.evaluate("(map) => map.closest('.panel').scrollIntoView()")
    save(page, "attention")
    page.get_by_role("link", name="Run", exact=True).click()
    page.locator(".run canvas").first.wait_for()
    save(page, "run")
    context.close()


def save(page, name):
    page.wait_for_timeout(1000)  # transitions, curves and maps
    path = IMAGES / f"{name}.png"
    page.screenshot(path=path)
    size = path.stat().st_size
    print(f"{path} {size:,} bytes", file=sys.stderr)
    assert size <= MOST_BYTES, f"{path} has {size:,} bytes; it must be at most {MOST_BYTES:,}"


if __name__ == "__main__":
    main()
