"""The inside view in headless Chromium."""

import re

import pytest

from tests.serve.page.conftest import ask

expect = pytest.importorskip("playwright.sync_api").expect
TOO_WIDE = "[...document.querySelectorAll('.view:not([hidden])')].some((one) => one.scrollWidth > one.clientWidth)"
# The least contrast of text on the colours of probabilities, by the formula of WCAG 2.2.
CONTRAST = """() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const numbers = (color, below) => {
    context.fillStyle = below; context.fillRect(0, 0, 1, 1);
    context.fillStyle = color; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const panel = getComputedStyle(document.querySelector(".panel")).backgroundColor;
  const swatches = [...document.querySelectorAll(".swatch[class*=level-]")].map((one) => getComputedStyle(one));
  const backs = swatches.map(({ backgroundColor }) => light(numbers(backgroundColor, panel)));
  const contrasts = swatches.map(({ color, backgroundColor }, i) => {
    const front = light(numbers(color, panel));
    return (Math.max(front, backs[i]) + 0.05) / (Math.min(front, backs[i]) + 0.05);
  });
  return { backs, least: Math.min(...contrasts) };
}"""


def open_view(visit, address, **options):
    page = visit(address, **options)
    page.get_by_role("link", name="Look inside").click()
    return page


@pytest.fixture
def inside(visit, address):
    """The view of a question that the model knows the answer to."""
    page = open_view(visit, address)
    look(page, "What is 34 + 58?")
    return page


def look(page, text, kind="question"):
    page.get_by_label("How the model reads it").select_option(kind)
    page.get_by_label("Text to look into").fill(text)
    page.keyboard.press("Enter")
    page.locator(".found:not(.waiting) .token").first.wait_for()
    expect(page.locator(".heads button")).to_have_count(1)


def token(page, text):
    return page.get_by_role("option").filter(has_text=re.compile(f"^{re.escape(text)}$"))


def test_tokens_of_an_answer(inside):
    expect(inside.locator(".tokens")).to_contain_text("92.")
    expect(inside.locator(".facts").first).to_contain_text("of the assistant")
    assert inside.locator(".token.special").all_inner_texts()[:2] == ["bos", "user start"]
    last = token(inside, ".").last
    last.hover()
    card = inside.locator(".card")
    expect(card).to_contain_text("rank 1")
    expect(card.get_by_role("listitem")).to_have_count(10)
    inside.mouse.move(2, 2)
    expect(card).to_be_hidden()


def test_by_keyboard(inside):
    first = inside.locator(".token").first
    inside.locator('.token[tabindex="0"]').focus()
    inside.keyboard.press("Home")
    expect(first).to_be_focused()
    expect(inside.locator(".card")).to_contain_text("nothing predicts it")
    inside.keyboard.press("ArrowRight")
    expect(inside.locator(".token").nth(1)).to_be_focused()
    expect(inside.locator(".card")).to_contain_text("bits of choice")
    inside.keyboard.press("ArrowDown")
    expect(inside.locator(".token").nth(1)).not_to_be_focused()
    inside.keyboard.press("Enter")
    assert inside.locator('.token[aria-selected="true"]').count() == 1
    inside.keyboard.press("Escape")
    expect(inside.locator(".card")).to_be_hidden()


def test_the_next_token_and_the_settings(inside):
    inside.locator(".token.special", has_text="assistant start").click()
    bars = inside.locator(".bars button")
    expect(bars).to_have_count(20)
    expect(bars.first).to_have_attribute("aria-label", re.compile("python_start.*it follows here"))
    inside.locator(".next").get_by_label("Top-k").fill("3")
    expect(inside.locator(".next .facts")).to_contain_text("leave 3 of")
    expect(bars.nth(3)).to_have_attribute("aria-label", re.compile("never drawn"))
    inside.locator(".next").get_by_label("Temperature").fill("0")
    expect(inside.locator(".next .facts")).to_contain_text("0.00 with the settings, which leave 1 of")
    bars.first.click()  # goes on with that token
    expect(inside.locator(".token").last).to_have_text("python start")


def test_attention(inside):
    count = inside.locator(".token").count()
    canvas = inside.locator(".large canvas")
    expect(canvas).to_have_attribute("aria-label", re.compile(f"layer 1, head 1: {count} by {count} tokens"))
    canvas.focus()
    inside.keyboard.press("ArrowUp")
    readout = inside.locator(".large .readout")
    expect(readout).to_contain_text(re.compile(r"from .*assistant_end.* to .*: .* %"))
    for _ in range(count):
        inside.keyboard.press("ArrowUp")
    expect(readout).to_contain_text("cannot be seen")
    for _ in range(count):
        inside.keyboard.press("ArrowLeft")
    expect(readout).to_contain_text("from <|bos|> to <|bos|>: 100 %")
    inside.get_by_label("The layer after").click()
    expect(canvas).to_have_attribute("aria-label", re.compile("layer 2"))
    expect(inside.get_by_label("The layer after")).to_be_disabled()
    expect(inside.locator(".looks span")).to_have_count(count)


def test_plain_text_with_what_is_no_whole_character(inside):
    look(inside, "A 🐉\n<b>x</b>", "text")
    expect(inside.locator(".tokens")).to_contain_text("<b>x</b>")
    expect(inside.locator(".token.bytes")).to_have_count(4)
    expect(inside.locator(".swatch.given")).to_be_hidden()


def test_a_conversation_is_handed_over(chat):
    ask(chat, "What is 34 + 58?")
    chat.get_by_label("Answer").get_by_role("button", name="Look inside").click()
    expect(chat.locator(".token.special", has_text="python start")).to_be_visible()
    expect(chat.locator(".tokens")).to_contain_text("34")
    chat.get_by_role("button", name="Look into another text").click()
    expect(chat.get_by_label("Text to look into")).to_be_focused()


def test_what_does_not_fit_is_said(inside):
    inside.get_by_label("How the model reads it").select_option("text")
    inside.get_by_label("Text to look into").fill("a b " * 400)
    inside.keyboard.press("Enter")
    expect(inside.get_by_role("alert")).to_contain_text("does not fit")


def test_a_base_model(visit, base_address):
    page = open_view(visit, base_address)
    page.locator(".token").first.wait_for()
    expect(page.get_by_label("How the model reads it")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read_and_told_apart(visit, address, scheme):
    page = open_view(visit, address, color_scheme=scheme)
    page.locator(".token").first.wait_for()
    found = page.evaluate(CONTRAST)
    assert found["least"] >= 4.5
    # One direction of lightness, for whom hues do not differ.
    assert found["backs"] == sorted(found["backs"], reverse=scheme == "light")


def test_it_fits_a_phone_and_fingers(visit, address):
    page = open_view(visit, address, viewport={"width": 360, "height": 640}, has_touch=True)
    look(page, "What is 34 + 58?")
    assert not page.evaluate(TOO_WIDE)
    token(page, ".").last.tap()
    expect(page.locator(".card")).to_be_visible()
    assert not page.evaluate(TOO_WIDE)
    small = page.evaluate(
        "() => [...document.querySelectorAll('.inside :is(button, select, textarea, input)')].filter((one) =>"
        " one.checkVisibility() && one.getBoundingClientRect().height < 44).map((one) => one.outerHTML.slice(0, 100))"
    )
    assert small == []
