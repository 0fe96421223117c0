"""The page at 360 px, in the dark, and for fingers and screen readers."""

import pytest

from tests.serve.page.conftest import ask

expect = pytest.importorskip("playwright.sync_api").expect

WIDE = "document.scrollingElement.scrollWidth > innerWidth || \
[...document.querySelectorAll('.view:not([hidden]), .scroller')].some((one) => one.scrollWidth > one.clientWidth)"
# The visible controls that are smaller than 44 px, or have no name.
SMALL = """() => [...document.querySelectorAll("button, a[href], input:not([type=file]), textarea, summary")]
  .filter((one) => one.checkVisibility({ visibilityProperty: true, opacityProperty: false }) && one.id !== "skip")
  .filter((one) => one.getBoundingClientRect().height < 44 || one.getBoundingClientRect().width < 44)
  .map((one) => one.outerHTML.slice(0, 120))"""
NAMELESS = """() => [...document.querySelectorAll("button, a[href], input:not([type=file]), textarea, select")]
  .filter((one) => one.checkVisibility() && !one.textContent.trim())
  .filter((one) => !one.getAttribute("aria-label") && !one.labels?.length)
  .map((one) => one.outerHTML.slice(0, 120))"""


@pytest.fixture
def small(visit, address):
    page = visit(address, viewport={"width": 360, "height": 640}, has_touch=True)
    page.locator(".welcome").wait_for()
    return page


def check_fits(page):
    assert not page.evaluate(WIDE)
    assert page.evaluate(SMALL) == []
    assert page.evaluate(NAMELESS) == []


def test_nothing_is_too_wide_or_too_small_at_360_px(small):
    check_fits(small)
    ask(small, "What is 34 + 58?")
    small.locator("summary").click()
    small.get_by_label("Answer").get_by_label("Try again").click()
    small.get_by_role("group", name="Versions").wait_for()
    check_fits(small)
    ask(small, "a-word-without-an-end" * 4)
    check_fits(small)
    small.get_by_label("You").first.get_by_label("Edit").click()
    check_fits(small)
    small.keyboard.press("Escape")
    small.get_by_label("Settings", exact=True).click()
    check_fits(small)
    dialog = small.get_by_role("dialog")
    assert dialog.evaluate("(one) => one.scrollWidth <= one.clientWidth")
    small.get_by_label("Close").click()
    small.get_by_label("Show the conversations").click()
    expect(small.get_by_role("button", name="New chat")).to_be_in_viewport()
    check_fits(small)
    small.keyboard.press("Escape")
    expect(small.get_by_role("button", name="New chat")).to_be_hidden()


def test_wide_code_and_tables_scroll_by_themselves(visit, address):
    page = visit(address, viewport={"width": 360, "height": 640})
    page.locator(".welcome").wait_for()
    page.evaluate(
        """async () => {
            const { renderMarkdown } = await import("./markdown.js");
            const place = document.createElement("div");
            place.className = "markdown";
            const table = "|" + " abcdefgh |".repeat(20) + "\\n|" + " --- |".repeat(20);
            place.append(renderMarkdown("```\\n" + "x".repeat(300) + "\\n```\\n\\n" + table));
            document.querySelector(".thread").replaceChildren(place);
        }"""
    )
    assert not page.evaluate(WIDE)
    for selector in (".code pre", ".markdown .table"):
        assert page.locator(selector).evaluate("(one) => one.scrollWidth > one.clientWidth")


def test_a_base_model_at_360_px(visit, base_address):
    page = visit(base_address, viewport={"width": 360, "height": 640})
    page.get_by_label("Text", exact=True).fill("Es war einmal ein")
    check_fits(page)


@pytest.mark.parametrize("system", ["light", "dark"])
def test_colours_follow_the_system_until_they_are_chosen(visit, address, system):
    page = visit(address, color_scheme=system)
    page.locator(".welcome").wait_for()
    brightness = "parseInt(/\\d+/.exec(getComputedStyle(document.body).backgroundColor)[0])"
    is_dark = lambda: page.evaluate(brightness) < 128  # noqa: E731
    assert is_dark() == (system == "dark")
    page.get_by_label("Colours: as the system").click()
    page.get_by_label("Colours: light").wait_for()
    assert not is_dark()
    page.get_by_label("Colours: light").click()
    page.get_by_label("Colours: dark").wait_for()
    assert is_dark()
    page.reload()
    assert is_dark()


@pytest.mark.parametrize("system", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(visit, address, system):
    """WCAG 2's contrast of at least 4.5, for the colours that text has."""
    page = visit(address, color_scheme=system)
    page.locator(".welcome").wait_for()
    too_low = page.evaluate(
        """() => {
            const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
            const probe = document.body.appendChild(document.createElement("span"));
            const luminance = (name) => {
                probe.style.color = `var(--${name})`;
                canvas.fillStyle = getComputedStyle(probe).color;
                canvas.fillRect(0, 0, 1, 1);
                const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
                    .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const contrast = (a, b) => {
                const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
                return (light + 0.05) / (dark + 0.05);
            };
            const pairs = [["on-accent", "accent"], ["danger", "danger-soft"], ["text", "accent-soft"]];
            const series = [1, 2, 3, 4, 5, 6].map((number) => `series-${number}`);
            for (const text of ["text", "muted", "accent", "danger", "warning", ...series]) {
                for (const behind of ["background", "surface", "raised"]) pairs.push([text, behind]);
            }
            return pairs.map(([a, b]) => [a, b, contrast(a, b)]).filter(([, , value]) => value < 4.5);
        }"""
    )
    assert too_low == []
