"""What a model writes is shown, and never run; and the reader is left where they are."""

import pytest

from tests.serve.http.conftest import wait_until
from tests.serve.page.conftest import ask

expect = pytest.importorskip("playwright.sync_api").expect

HOSTILE = {
    "<img src=x onerror=\"window.hit = 1\">": "<img src=x onerror",
    "<svg onload='window.hit = 1'><script>window.hit = 1</script></svg>": "<svg onload",
    "text <b onmouseover=window.hit=1>bold</b>": "<b onmouseover",
    "[a link](javascript:window.hit=1)": "a link",
    "[another](JaVaScRiPt:window.hit=1)": "another",
    "[one](&#106;avascript:window.hit=1) [two](data:text/html,<script>window.hit=1</script>)": "one",
    "<javascript:window.hit=1>": "javascript:",
    "![picture](https://example.org/x.png \"title\")": "picture (https://example.org/x.png)",
    "![picture](x\" onerror=\"window.hit=1)": "picture",
    "```html\n<img src=x onerror=window.hit=1>\n": "<img src=x onerror=window.hit=1>",
    "```\"><img src=x onerror=window.hit=1>\ncode\n```": "code",
    "| a |\n| --- |\n| <iframe srcdoc='<script>parent.hit=1</script>'></iframe> |": "<iframe",
    "<style>body { display: none }</style>": "<style>",
    "<form action=/><input name=parentNode></form>": "<form action",
    "<details open ontoggle=window.hit=1>": "<details open",
    "<!-- a comment --><math><mtext><table><mglyph><style><img src=x onerror=window.hit=1>": "<math>",
    "[reference]\n\n[reference]: javascript:window.hit=1": "reference",
    "<a href=\"https://example.org\" onclick=window.hit=1>click</a>": "<a href",
}  # fmt: skip
ALLOWED = "a blockquote br button code del div em h1 h2 h3 h4 h5 h6 hr input li ol p path pre span strong svg.icon \
table tbody td th thead tr ul".split()


def check_harmless(page, place):
    """Nothing but the elements of Markdown, and nothing of a model's in them that runs or loads."""
    elements = "[...all.querySelectorAll('*')]"
    allowed = ",".join(ALLOWED)
    strange = place.evaluate(
        f"(all) => {elements}.filter((one) => !one.matches({allowed!r})).map((one) => one.outerHTML)"
    )
    assert strange == []
    attributes = place.evaluate(
        f"(all) => {elements}.flatMap((one) => [...one.attributes].map((a) => [a.name, a.value]))"
    )
    for name, value in attributes:
        assert not name.startswith("on") and name not in ("style", "src", "srcset", "srcdoc", "id", "name"), (
            name,
            value,
        )
        if name == "href":
            assert value.startswith(("http://", "https://", "mailto:")), value
    assert page.evaluate("window.hit") is None


def test_hostile_markdown_is_shown_as_text(scripted):
    for text, shown in HOSTILE.items():
        result = scripted.evaluate_handle(
            """async (text) => {
                const { renderMarkdown } = await import("./markdown.js");
                const place = document.createElement("div");
                place.append(renderMarkdown(text));
                document.body.append(place);
                return place;
            }""",
            text,
        ).as_element()
        scripted.wait_for_timeout(20)  # an image would have failed to load by now
        check_harmless(scripted, result)
        assert shown in result.text_content()


def test_hostile_answers_are_shown_as_text(scripted):
    begin(scripted)
    for text in HOSTILE:
        for piece in (text[:7], text[7:], "\n\n```\n```\n\n"):
            scripted.evaluate("feed", piece)
        scripted.wait_for_timeout(20)
    scripted.wait_for_timeout(150)
    body = scripted.locator(".assistant .body")
    check_harmless(scripted, body)
    scripted.evaluate("end()")
    expect(scripted.get_by_label("Send", exact=True)).to_be_visible()
    check_harmless(scripted, body)


def begin(page, question="Tell me"):
    page.evaluate("window.feed = null")
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    wait_until(lambda: page.evaluate("window.feed !== null"))


def test_markdown_becomes_elements(scripted):
    begin(scripted)
    text = "# Title\n\n**bold** `code` [link](https://example.org)\n\n1. one\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |"
    scripted.evaluate("feed", f"{text}\n\n```python\ndef f(): pass\n")
    body = scripted.locator(".assistant .body")
    expect(body.locator("pre")).to_contain_text("def f(): pass")  # although the fence is open
    assert body.locator(".hljs-keyword").count() == 0  # colours come once the block is finished
    scripted.evaluate("feed", "```\n\nEnd")
    expect(body.locator(".hljs-keyword").first).to_have_text("def")
    scripted.evaluate("end()")
    link = body.get_by_role("link", name="link")
    expect(link).to_have_attribute("rel", "noopener nofollow")
    expect(link).to_have_attribute("target", "_blank")
    for selector in ("h1", "strong", "p code", "ol li", "table td[align=right]"):
        expect(body.locator(selector).first).to_be_visible()
    expect(body.locator(".code")).to_contain_text("python")
    scripted.context.grant_permissions(["clipboard-read", "clipboard-write"])
    body.get_by_role("button", name="Copy").click()
    assert scripted.evaluate("navigator.clipboard.readText()") == "def f(): pass"


def test_text_is_there_at_once_and_what_stands_is_left_alone(scripted):
    begin(scripted)
    scripted.evaluate("feed", "first *paragraph*\n\nsecond")
    body = scripted.locator(".assistant .body")
    expect(body.locator("em")).to_be_visible()
    scripted.evaluate("window.kept = document.querySelector('.assistant .body p')")
    scripted.evaluate("feed(' grows'), feed(' on')")
    expect(body).to_contain_text("second grows on")
    scripted.wait_for_timeout(150)
    assert body.locator("p").count() == 2
    assert scripted.evaluate("window.kept.isConnected")
    scripted.evaluate("end()")


def test_a_reader_who_scrolled_up_stays_there(scripted):
    begin(scripted)
    end = "one.scrollHeight - one.scrollTop - one.clientHeight"
    line = "A line of an answer that goes on.\n\n"
    scripted.evaluate("feed", line * 60)
    expect(scripted.locator(".assistant p")).to_have_count(60)
    scroller = scripted.locator(".scroller")
    wait_until(lambda: scroller.evaluate(f"(one) => {end}") < 2)
    scroller.hover()
    scripted.mouse.wheel(0, -400)
    latest = scripted.get_by_role("button", name="Latest")
    expect(latest).to_be_visible()
    before = scroller.evaluate("(one) => one.scrollTop")
    scripted.evaluate("feed", line * 20)
    expect(scripted.locator(".assistant p")).to_have_count(80)
    assert scroller.evaluate("(one) => one.scrollTop") == before
    latest.click()
    expect(latest).to_be_hidden()
    scripted.evaluate("feed", line * 20)
    expect(scripted.locator(".assistant p")).to_have_count(100)
    scripted.wait_for_timeout(100)
    assert scroller.evaluate(f"(one) => {end}") < 2
    scripted.evaluate("end()")


def test_tool_calls_stand_where_they_were_written(scripted):
    begin(scripted)
    run = {"call": "print(1)\nprint(2)", "output": "1\n2", "at": 7}
    scripted.evaluate("feed", "Let 🙂 me")
    scripted.evaluate("frame", {"choices": [{"index": 0, "delta": {"tool_runs": [run]}, "finish_reason": None}]})
    scripted.evaluate("feed", " see.")
    scripted.evaluate("end()")
    expect(scripted.get_by_label("Send", exact=True)).to_be_visible()
    parts = scripted.locator(".assistant .body > *")
    assert [part.split("\n")[0] for part in parts.all_inner_texts()] == ["Let 🙂 m", "Calculator print(1)", "e see."]


@pytest.mark.parametrize("broken", [True, False])
def test_a_stream_that_fails_keeps_what_had_come(scripted, broken):
    begin(scripted)
    scripted.evaluate("feed", "Half of it")
    if broken:
        scripted.evaluate("breakOff()")
    else:
        scripted.evaluate("frame", {"error": {"message": "the device is lost", "code": None}})
    answer = scripted.get_by_label("Answer")
    expect(answer.get_by_role("alert")).to_contain_text("broke off" if broken else "the device is lost")
    expect(answer).to_contain_text("Half of it")


def test_an_answer_goes_on_while_another_conversation_is_shown(scripted):
    begin(scripted, "First")
    scripted.evaluate("feed", "one ")
    scripted.get_by_role("button", name="New chat").click()
    expect(scripted.locator(".welcome")).to_be_visible()
    scripted.evaluate("feed('two'), end()")
    scripted.get_by_role("link", name="First").click()
    expect(scripted.get_by_label("Answer")).to_contain_text("one two")


def test_a_page_that_is_closed_keeps_the_beginning_of_an_answer(scripted):
    begin(scripted)
    scripted.evaluate("feed", "Half of it")
    expect(scripted.get_by_label("Answer")).to_contain_text("Half of it")
    scripted.reload()
    expect(scripted.get_by_label("Answer")).to_contain_text("Half of it")
    expect(scripted.get_by_label("Answer")).to_contain_text("Stopped.")


def test_two_tabs_can_add_to_one_conversation(scripted):
    begin(scripted, "First")
    scripted.evaluate("feed", "one")
    expect(scripted.get_by_label("Answer")).to_contain_text("one")
    address = scripted.evaluate("location.href")
    other = scripted.context.new_page()
    other.goto(address)
    begin(other, "Second")
    other.evaluate("feed('two'), end()")
    expect(other.get_by_label("Answer").last).to_contain_text("two")
    scripted.evaluate("end()")
    scripted.reload()
    expect(scripted.get_by_label("Answer").first).to_contain_text("one")
    expect(scripted.locator("#view-chat")).to_contain_text("two")


def test_a_retry_of_an_empty_answer_keeps_what_followed_it(scripted):
    begin(scripted, "First")
    scripted.keyboard.press("Escape")
    expect(scripted.get_by_label("Answer")).to_contain_text("Stopped.")
    begin(scripted, "Second")
    scripted.evaluate("feed('long'), end()")
    expect(scripted.get_by_label("Answer").last).to_contain_text("long")
    scripted.evaluate("window.feed = null")
    scripted.get_by_label("Answer").first.get_by_label("Try again").click()
    wait_until(lambda: scripted.evaluate("window.feed !== null"))
    scripted.evaluate("feed('new'), end()")
    expect(scripted.get_by_label("Answer")).to_contain_text("new")
    scripted.get_by_label("Answer").get_by_label("Earlier version").click()
    expect(scripted.get_by_label("Answer").last).to_contain_text("long")


def test_the_message_of_a_person_is_plain_text(chat):
    ask(chat, "<img src=x onerror=window.hit=1> **bold**")
    expect(chat.get_by_label("You").locator(".bubble")).to_have_text("<img src=x onerror=window.hit=1> **bold**")
    assert chat.evaluate("window.hit") is None
