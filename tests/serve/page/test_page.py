"""A person at the page: asks, stops, edits, retries, looks back."""

import json
import re

import pytest

from tests.serve.http.conftest import wait_until
from tests.serve.page.conftest import KEY, ask

expect = pytest.importorskip("playwright.sync_api").expect

GREETING = "Grüße, 日本 🙂!"


def message_field(page):
    return page.get_by_label("Message", exact=True)


def test_a_new_visitor_sees_what_model_it_is(chat):
    expect(chat.get_by_role("heading", level=1)).to_be_visible()
    expect(chat.locator(".welcome")).to_contain_text("reads 128 tokens at a time")
    expect(chat.locator(".welcome")).to_contain_text("after sft")
    assert chat.locator(".examples button").count() > 0
    expect(message_field(chat)).to_be_focused()
    expect(chat.get_by_label("Send", exact=True)).to_be_disabled()


def test_a_conversation_is_kept(chat):
    answer = ask(chat, "Hello?")
    expect(answer).to_contain_text(GREETING)
    expect(message_field(chat)).to_have_value("")
    expect(chat.locator(".meter")).to_contain_text("of 128 tokens")
    expect(chat.locator("#announcements")).to_contain_text(GREETING)
    chat.reload()
    expect(chat.get_by_label("Answer")).to_contain_text(GREETING)
    chat.get_by_role("button", name="New chat").click()
    expect(chat.locator(".welcome")).to_be_visible()
    chat.get_by_role("link", name="Hello?").click()
    expect(chat.get_by_label("Answer")).to_contain_text(GREETING)


def test_an_example_is_asked_by_a_click(chat):
    chat.locator(".examples button").first.click()
    expect(chat.get_by_label("Answer")).to_be_visible()
    expect(message_field(chat)).to_be_focused()


def test_a_tool_call_is_folded(chat):
    answer = ask(chat, "What is 34 + 58?")
    expect(answer).to_contain_text("It is 92.")
    call = answer.locator("details")
    expect(call.locator("summary")).to_contain_text("34 + 58")
    expect(call.get_by_text("92", exact=True)).to_be_hidden()
    call.locator("summary").click()
    expect(call.get_by_text("92", exact=True)).to_be_visible()


def test_the_model_gets_its_tool_calls_back(chat):
    ask(chat, "What is 34 + 58?")
    with chat.expect_request("**/v1/chat/completions") as sent:
        ask(chat, "Again?")
    messages = sent.value.post_data_json["messages"]
    assert messages[1]["tool_runs"] == [{"call": "34 + 58", "output": "92", "at": 0}]


def test_escape_stops_the_answer(chat, slow, service):
    message_field(chat).fill("Hello?")
    chat.keyboard.press("Enter")
    expect(chat.get_by_label("Answer")).to_contain_text("Gr")
    chat.keyboard.press("Escape")
    expect(chat.get_by_label("Answer")).to_contain_text("Stopped.")
    expect(chat.get_by_label("Answer")).not_to_contain_text(GREETING)
    wait_until(lambda: service.engine.running == 0)
    expect(chat.get_by_label("Send", exact=True)).to_be_visible()


def test_the_button_stops_the_answer(chat, slow):
    message_field(chat).fill("Hello?")
    chat.keyboard.press("Enter")
    chat.get_by_label("Stop", exact=True).click()
    expect(chat.get_by_label("Answer")).to_contain_text("Stopped.")


def test_edits_and_retries_are_branches(chat):
    ask(chat, "Hello?")
    chat.get_by_label("Answer").get_by_label("Try again").click()
    versions = chat.get_by_label("Answer").get_by_role("group", name="Versions")
    expect(versions).to_contain_text("2/2")
    expect(chat.get_by_label("Answer")).to_contain_text(GREETING)
    chat.get_by_label("You").get_by_label("Edit").click()
    chat.get_by_label("Edit the message").fill("What is 34 + 58?")
    chat.keyboard.press("Enter")
    expect(chat.get_by_label("Answer")).to_contain_text("It is 92.")
    question = chat.get_by_label("You").get_by_role("group", name="Versions")
    expect(question).to_contain_text("2/2")
    question.get_by_label("Earlier version").click()
    expect(chat.get_by_label("Answer")).to_contain_text(GREETING)
    expect(versions).to_contain_text("2/2")
    chat.reload()  # the branch that was shown is shown again
    expect(chat.get_by_label("You")).to_contain_text("Hello?")
    chat.get_by_label("You").get_by_label("Later version").click()
    expect(chat.get_by_label("Answer")).to_contain_text("It is 92.")


def test_everything_works_by_keyboard(chat):
    keyboard, field = chat.keyboard, message_field(chat)
    keyboard.type("Say")
    keyboard.press("Shift+Enter")
    keyboard.type("/both!")
    expect(field).to_have_value("Say\n/both!")
    keyboard.press("Enter")
    expect(chat.get_by_label("Answer")).to_contain_text("Both.")
    keyboard.press("ArrowUp")
    expect(chat.get_by_label("Edit the message")).to_be_focused()
    keyboard.press("Escape")
    expect(field).to_be_focused()
    keyboard.press("Shift+Tab")  # the last button of the answer
    expect(chat.get_by_role("button", name="Look inside")).to_be_focused()
    outline = chat.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # focus can be seen
    keyboard.press("?")
    expect(chat.get_by_role("dialog")).to_contain_text("Shift + Enter".replace(" + ", " "))
    keyboard.press("Escape")
    keyboard.press("/")
    expect(field).to_be_focused()
    keyboard.press("Control+Shift+O")
    expect(chat.locator(".welcome")).to_be_visible()


def test_settings_are_sent_and_kept(chat):
    chat.get_by_label("Settings", exact=True).click()
    chat.get_by_label("Temperature").fill("0")
    chat.get_by_label("Top-k").fill("")
    chat.get_by_label("Longest answer").fill("3")
    chat.get_by_label("Seed").fill("7")
    chat.get_by_label("System prompt").fill("Be brief.")
    chat.get_by_role("button", name="Done").click()
    with chat.expect_request("**/v1/chat/completions") as sent:
        answer = ask(chat, "Hello?")
    body = sent.value.post_data_json
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 3, 7)
    assert "top_k" not in body
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(answer).to_contain_text("Cut off at the longest answer")
    chat.reload()
    with chat.expect_request("**/v1/chat/completions") as sent:
        chat.get_by_label("Answer").get_by_label("Try again").click()
    assert sent.value.post_data_json["seed"] == 8  # a retry is another answer


def test_the_oldest_turns_are_left_out(chat):
    for _ in range(5):
        ask(chat, "What is 34 + 58?")
    expect(chat.locator(".forgotten")).to_have_count(1)
    expect(chat.get_by_label("Answer")).to_have_count(5)
    expect(chat.get_by_label("Answer").last).not_to_contain_text("context")


def test_a_message_that_is_too_long_says_so(chat):
    answer = ask(chat, "word " * 300)
    expect(answer.get_by_role("alert")).to_contain_text("does not fit into the model’s context of 128 tokens")
    expect(answer.get_by_role("button", name="Try again")).to_have_count(0)


@pytest.mark.parametrize(
    "status, headers, says",
    [
        (429, {"retry-after": "5"}, "Try again in 5 seconds"),
        (503, {"code": "loading"}, "The model is still loading."),
        (503, {"code": "engine_failed"}, "Start it again."),
        (503, {"code": "stopping"}, "The server is stopping."),
        (503, {}, "It says: out of luck"),
        (500, {}, "It says: out of luck"),
        (None, {}, "Start jaxchat serve again"),
    ],
)
def test_errors_say_what_to_do(chat, status, headers, says):
    code = headers.pop("code", None)
    error = json.dumps({"error": {"message": "out of luck", "type": "", "param": None, "code": code}})

    def refuse(route):
        route.abort() if status is None else route.fulfill(status=status, headers=headers, body=error)

    chat.route("**/v1/chat/completions", refuse)
    alert = ask(chat, "Hello?").get_by_role("alert")
    expect(alert).to_contain_text(says)
    chat.unroute("**/v1/chat/completions")
    alert.get_by_role("button", name="Try again").click()
    expect(chat.get_by_label("Answer")).to_contain_text(GREETING)
    expect(chat.get_by_role("group", name="Versions")).to_have_count(0)  # what failed is no version


@pytest.mark.parametrize("ready, says", [(503, "The model is still loading."), (None, "The server does not answer.")])
def test_the_page_waits_for_the_server(visit, address, ready, says):
    page = visit(address)
    page.route("**/api/info", lambda route: route.fulfill(status=503, body="") if ready else route.abort())
    page.reload()
    expect(page.locator("#status")).to_contain_text(says)
    page.unroute("**/api/info")
    expect(page.locator("#status")).to_be_hidden()
    expect(message_field(page)).to_be_visible()


def test_an_api_key_is_asked_for(visit, guarded_address):
    page = visit(guarded_address)
    page.get_by_label("Key", exact=True).fill("a wrong one")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("refused")
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(ask(page, "Hello?")).to_contain_text(GREETING)
    page.reload()
    expect(page.get_by_label("Answer")).to_contain_text(GREETING)
    assert page.evaluate("Object.values(localStorage).join()").find(KEY) == -1


def test_conversations_are_renamed_deleted_and_found(chat):
    for question in ("Hello?", "What is 34 + 58?"):
        chat.get_by_role("button", name="New chat").click()
        ask(chat, question)
    names = chat.locator("#conversations a")
    chat.get_by_label("Search the conversations").fill("grüße")
    expect(names).to_have_text(["Hello?"])
    chat.get_by_label("Search the conversations").fill("")
    chat.get_by_label("More for “Hello?”").click()
    chat.get_by_role("menuitem", name="Rename").click()
    chat.get_by_label("New title").fill("A greeting")
    chat.keyboard.press("Enter")
    expect(names).to_have_text(["What is 34 + 58?", "A greeting"])
    chat.get_by_label("More for “A greeting”").click()
    chat.keyboard.press("ArrowUp")
    chat.keyboard.press("Enter")
    expect(names).to_have_text(["What is 34 + 58?"])
    chat.get_by_role("button", name="Undo").click()
    expect(names).to_have_text(["What is 34 + 58?", "A greeting"])


def test_conversations_leave_and_come_back_as_files(chat, visit, address, tmp_path):
    ask(chat, "What is 34 + 58?")
    with chat.expect_download() as download:
        chat.get_by_label("Export all conversations").click()
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    chat.get_by_label("More for").click()
    with chat.expect_download() as download:
        chat.get_by_role("menuitem", name="Export as Markdown").click()
    assert download.value.suggested_filename == "what-is-34-58.md"
    markdown = download.value.path().read_text()
    assert "**You**\n\nWhat is 34 + 58?" in markdown and "34 + 58\n→ 92" in markdown and "It is 92." in markdown

    other = visit(address)
    for content, says in ((file.read_text(), "Imported 1 conversation."), (file.read_text(), "are here already"),
                          ("[]", "no conversations of jaxchat"), ("{", "not JSON"),
                          (re.sub('"role": "user"', '"role": "root"', file.read_text()), "without role")):  # fmt: skip
        given = {"name": "file.json", "mimeType": "application/json", "buffer": content.encode()}
        other.locator("input[type=file]").set_input_files(given)
        expect(other.locator("#toasts")).to_contain_text(says)
    strange = json.loads(file.read_text())
    strange["conversations"][0] |= {
        "id": "strange",
        "title": "Strange",
        "settings": {"temperature": "hot", "top_k": {}},
    }
    content = json.dumps(strange).encode()
    given = {"name": "file.json", "mimeType": "application/json", "buffer": content}
    other.locator("input[type=file]").set_input_files(given)
    other.get_by_role("link", name="Strange").click()
    other.get_by_label("Settings", exact=True).click()
    expect(other.get_by_label("Temperature")).to_have_value("0.6")
    other.keyboard.press("Escape")
    other.get_by_role("link", name="What is 34 + 58?").click()
    expect(other.get_by_label("Answer")).to_contain_text("It is 92.")


def test_another_tab_shows_the_same(chat):
    other = chat.context.new_page()
    other.goto(chat.url)
    expect(other.locator("#conversations a")).to_have_count(0)
    ask(chat, "Hello?")
    expect(other.locator("#conversations a")).to_have_text(["Hello?"])


def test_an_answer_can_be_looked_into(chat):
    ask(chat, "Hello?")
    chat.get_by_label("Answer").get_by_role("button", name="Look inside").click()
    expect(chat.locator("#view-inside")).to_be_visible()
    expect(chat.locator("#view-chat")).to_be_hidden()
    chat.go_back()
    expect(chat.get_by_label("Answer")).to_contain_text(GREETING)


def test_a_base_model_continues_a_text(visit, base_address):
    page = visit(base_address)
    text = page.get_by_label("Text", exact=True)
    text.fill("Es war einmal ein")
    page.get_by_label("Settings", exact=True).click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest answer").fill("12")
    page.get_by_role("button", name="Done").click()
    text.press("Control+Enter")
    page.get_by_role("button", name="Continue").wait_for()
    expect(page.locator("mark")).not_to_be_empty()
    assert text.input_value().startswith("Es war einmal ein")
    written = text.input_value()
    assert len(written) > len("Es war einmal ein")
    page.get_by_label("Write it again").click()
    expect(page.get_by_role("group", name="Versions")).to_contain_text("2/2")
    page.reload()
    expect(text).to_have_value(written)  # greedy: both versions are the same
    page.get_by_label("Take it back").click()
    expect(text).to_have_value("Es war einmal ein")
    expect(page.locator("mark")).to_be_empty()


def test_a_base_model_reads_the_end_of_a_long_text(visit, base_address):
    page = visit(base_address)
    page.get_by_label("Text", exact=True).fill("Er ging in den Wald. " * 100)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("mark")).not_to_be_empty()
    expect(page.locator("#view-chat")).to_contain_text("The model reads only the last 64 tokens of this text.")


def test_without_a_model_there_is_only_the_run(visit, watching_address):
    page = visit(watching_address)
    expect(page.locator("#view-run")).to_be_visible()
    assert page.locator("#views a:visible").all_inner_texts() == ["Run"]
    expect(page.get_by_role("button", name="New chat")).to_be_hidden()
