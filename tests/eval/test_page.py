"""The page of answers: what it contains, whatever models write, and how one reads it in a browser."""

import json
import shutil

import pytest

from jaxchat.eval import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = (
    "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"> \u2028 <|bos|>"
)
ANSWERS = [
    {"question": f"question {i}?", "answer": HOSTILE if i == 1 else f"answer {i}", "right": str(i), "score": i % 3 == 0,
     "cut": i == 4, "index": i, "id": f"id{i}", "subject": "law" if i == 2 else ""}
    for i in range(90)
]  # fmt: skip
SAMPLES = [{"answer": "one", "score": 1.0, "cut": False}, {"answer": "two", "score": 0.0, "cut": True}]
CHOICES = {"index": 0, "line": 7, "right": False, "question": "Query", "choices": ["a", "b", "c"], "gold": 2,
           "chosen": 1, "scores": [1.25, 0.5, None]}  # fmt: skip
WRITTEN = {"index": 1, "line": 8, "right": True, "question": "the old", "expected": "fox", "predicted": "fox",
           "scores": [0.1]}  # fmt: skip


def make():
    items = [page.answer_item({**answer, "score": float(answer["score"])}) for answer in ANSWERS]
    sampled = page.answer_item({**ANSWERS[0], "score": 0.5, "samples": SAMPLES})
    letters = page.answer_item({**ANSWERS[0], "score": 1.0, "answer": "A", "logprobs": {"A": -0.5, "B": -1.0}})
    groups = [
        page.group("gsm8k", "33.3%", "95 % interval 24.5 to 43.6", items, "answers/gsm8k.jsonl"),
        page.group("others", "50.0%", "few", [sampled, letters], "answers/others.jsonl"),
        page.group("CORE: copa", "0.0%", "two", [page.core_item(CHOICES), page.core_item(WRITTEN)], "core/copa.jsonl"),
    ]
    return page.page("Answers of d12", "a model", groups)


def test_items():
    text = make()
    data = json.loads(text[text.index('id="data">') + len('id="data">') :].partition("</script>")[0])
    first, others, core = data["groups"]
    assert first["about"] == "95 % interval 24.5 to 43.6; 90 in all, 60 wrong. All of them: answers/gsm8k.jsonl"
    assert [item["score"] for item in first["items"]] == [0.0] * 60 + [1.0] * 30, "failures first"
    assert first["items"][0]["answers"] == [{"text": HOSTILE}]
    assert first["items"][1]["marks"] == ["question 2", "id2", "law"] and first["items"][2]["cut"]
    assert others["items"][0]["answers"][1] == {"label": "sample 2, score 0, cut", "text": "two"}
    assert others["items"][1]["answers"][0]["label"] == "log-probabilities: A -0.50, B -1.00"
    assert core["items"][0]["choices"] == [
        {"mark": "", "value": "1.2500", "text": "a", "right": False},
        {"mark": "chosen", "value": "0.5000", "text": "b", "right": False},
        {"mark": "right", "value": "", "text": "c", "right": True},
    ]
    assert core["items"][1]["answers"] == [{"text": "fox"}] and core["items"][1]["right"] == "fox"


def test_long_texts_and_many_items_are_cut():
    answer = {**ANSWERS[0], "question": "x" * 9000, "score": 0.0}
    group = page.group("many", "0.0%", "", [page.answer_item(answer)] * 700, "all.jsonl")
    assert len(group["items"]) == page.MOST and "here are 500 of them" in group["about"]
    assert group["items"][0]["question"] == "x" * page.LONGEST + "…"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    (tmp_path / "answers.html").write_text(make(), encoding="utf-8")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page()
        wrong: list[str] = []
        shown.on("pageerror", lambda error: wrong.append(str(error)))
        shown.on("request", lambda request: request.url.startswith("file:") or wrong.append(request.url))
        shown.goto((tmp_path / "answers.html").as_uri())
        cards, place = shown.locator("article"), shown.locator("#place")
        assert shown.title() == "Answers of d12" and cards.count() == 25 and place.inner_text() == "1 to 25 of 60"
        assert HOSTILE in cards.nth(0).inner_text().replace("\n", " ")
        shown.click("text=Next")
        assert place.inner_text() == "26 to 50 of 60" and "question 38?" in cards.nth(0).inner_text()
        shown.click("[data-show=cut]")
        assert cards.count() == 1 and "answer 4" in cards.nth(0).inner_text()
        shown.click("[data-show=all]")
        shown.fill("#find", "QUESTION 88?")
        assert place.inner_text() == "1 to 1 of 1"
        shown.fill("#find", "nowhere")
        assert place.inner_text() == "none" and cards.count() == 0
        shown.fill("#find", "")
        shown.click("text=CORE: copa")
        assert cards.count() == 2 and "chosen\t0.5000\tb" in cards.nth(0).inner_text()
        browser.close()
    assert wrong == []
