"""`jaxchat rollouts`: what it counts, which steps and answers the page shows, and how one reads them in a browser."""

import contextlib
import io
import json
import shutil

import pytest

from jaxchat.analysis.rollouts import SHOWN_STEPS, SHOWN_TIMES, chosen_steps, opened, read_index
from jaxchat.cli.main import main
from jaxchat.eval import page
from tests.tiny import refusal

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><script>document.title = 'taken'</script> <|python_start|>1+1<|python_end|>"


def sample(answer, reward, *, advantage: float | None = 0.0, cut=False):
    return {"answer": answer, "reward": reward, "advantage": advantage, "tokens": len(answer), "cut": cut}


def line(step, question, *samples, used=True):
    return {"step": step, "task": "sums", "question": question, "right": "4", "used": used, "samples": samples}


LINES = [
    line(
        0, "2 + 2?", sample("five", 0.0, advantage=-0.5), sample("four", 1.0, advantage=0.5), sample("", None, cut=True)
    ),
    line(0, "3 + 1?", sample("one", 0.0), sample(HOSTILE, 0.0), sample("two", 0.0), used=False),
    line(4, "2 + 2?", sample("4", 1.0), sample("4.", 1.0), sample("four", 1.0), used=False),
    line(4, "1 + 3?", sample("lost", None, advantage=None), sample("", None), sample("", None), used=False),
    line(8, "3 + 1?", sample("3", -1.0), sample("3", -1.0), sample("worst", -2.0), sample("4", 0.5)),
]


def run_of(folder, lines=LINES, tail=b""):
    file = folder / "run" / "rl" / "rollouts.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines).encode() + tail)
    return folder / "run"


def rollouts(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["rollouts", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def groups(file):
    text = file.read_text("utf-8")
    start = text.index('id="data">') + len('id="data">')
    return {group["name"]: group for group in json.loads(text[start : text.index("</script>", start)])["groups"]}


def test_the_table_and_the_page(tmp_path):
    """While the training writes a line, and with one that a bad disk has damaged."""
    run = run_of(tmp_path, [*LINES, {"step": 9}], b'{"step": 12, "task": "su')
    code, out, err = rollouts("--run", run)
    assert code == 0 and "rollouts.jsonl: 1 damaged line is left out" in err
    assert out.splitlines() == [
        "| step | questions | answers | reward | no signal | not used | cut | no reward | tokens |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| 0 | 2 | 6 | 0.2 | 50% | 50% | 17% | 17% | {(4 + 4 + 3 + len(HOSTILE) + 3) / 6:.1f} |",
        "| 4 | 2 | 6 | 1 | 100% | 100% |  | 50% | 1.8 |",
        "| 8 | 1 | 4 | -0.875 |  |  |  |  | 2.0 |",
    ]
    shown = groups(run / "rl" / "rollouts.html")
    assert list(shown) == ["questions asked again", "step 8", "step 4", "step 0"]
    first, second = shown["step 0"]["items"]
    assert (
        shown["step 0"]["about"]
        == "mean reward 0.2 of 6 answers to these questions; 2 in all. All of them: rollouts.jsonl"
    )
    assert first["marks"] == ["mean reward 0.5", "sums", "cut"] and first["value"] == 0.5
    assert second["marks"] == ["mean reward 0", "sums", "no signal", "not trained on"]
    assert first["answers"][0] == {"value": 0.0, "label": "reward 0, advantage -0.5, 4 tokens", "text": "five"}
    assert first["answers"][2]["label"] == "reward none, advantage 0, 0 tokens, cut"
    assert shown["step 4"]["items"][1]["value"] is None
    labels = [answer["label"] for answer in shown["step 8"]["items"][0]["answers"]]
    assert labels[0] == "reward -1, advantage 0, 1 token, 2 times" and len(labels) == 3
    again = {item["question"]: item for item in shown["questions asked again"]["items"]}
    assert {question: item["value"] for question, item in again.items()} == {"2 + 2?": 0.5, "3 + 1?": -0.875}
    assert [(answer["label"], answer["text"]) for answer in again["3 + 1?"]["answers"]] == [
        ("step 0, mean reward 0 of 3: one of them, reward 0", "one"),
        ("step 8, mean reward -0.875 of 4: the best, reward 0.5", "4"),
        ("the worst, reward -2", "worst"),
    ]
    assert code == 0 and rollouts("--run", run, "--steps", 8, 0, "--out", tmp_path / "out")[0] == 0
    assert list(groups(tmp_path / "out" / "rollouts.html")) == ["questions asked again", "step 8", "step 0"]


def test_a_long_training_is_shown_in_part(tmp_path):
    few = [sample("a", 0.0), sample("b", 1.0)]
    run = run_of(tmp_path, [line(step, f"{step % 7}?", *few) for step in range(100)])
    with opened(run / "rl" / "rollouts.jsonl") as file:
        index = read_index(file)
    steps = chosen_steps(index, None)
    assert len(steps) == SHOWN_STEPS and (steps[0], steps[-1]) == (0, 99)
    assert rollouts("--run", run, "--steps", 99)[0] == 0
    again = groups(run / "rl" / "rollouts.html")["questions asked again"]["items"]
    assert len(again) == 7 and again[0]["marks"] == ["mean reward +0", "sums", "asked 15 times"]
    assert len(again[0]["answers"]) == 2 * SHOWN_TIMES
    index.steps[50].answers = 2000  # answers of a step that leave room for few
    assert chosen_steps(index, None) == [0, 99]


def test_what_cannot_be_shown(tmp_path):
    assert refusal(rollouts("--run", tmp_path / "run")).startswith(f"there is no run directory {tmp_path / 'run'}")
    run = run_of(tmp_path)
    file = run / "rl" / "rollouts.jsonl"
    assert refusal(rollouts("--run", run, "--steps", 0, 5)).endswith(
        "nothing was sampled at step 5; the nearest step is 4"
    )
    assert refusal(rollouts("--run", run, "--out", file)) == f"{file} is a file; choose another --out"
    file.write_bytes(b'{"step": 0, "ta')
    assert refusal(rollouts("--run", run)) == f"{file} has no answers yet; wait for the first step of rl"
    file.write_bytes(b"no JSON\n\xff\n")
    assert refusal(rollouts("--run", run)).startswith(f"{file} is damaged: none of its lines can be read; ")
    file.unlink()
    assert "has no rl/rollouts.jsonl: the stage rl writes it" in refusal(rollouts("--run", run))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    run = run_of(tmp_path)
    assert rollouts("--run", run)[0] == 0
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page()
        wrong: list[str] = []
        shown.on("pageerror", lambda error: wrong.append(str(error)))
        shown.goto((run / "rl" / "rollouts.html").as_uri())
        cards = shown.locator("article")
        assert shown.title() == f"Rollouts of {run}" and "2 + 2?" in cards.nth(0).inner_text()
        shown.click("text=Fallen most first")
        assert "3 + 1?" in cards.nth(0).inner_text()
        shown.click("text=step 0 0.2")
        assert not shown.locator("[data-show=wrong]").is_visible()
        assert HOSTILE in cards.nth(0).inner_text() and "2 + 2?" in cards.nth(1).inner_text()
        assert cards.nth(1).locator(".answer").all_inner_texts() == ["five", "four", "nothing"], "the worst first"
        shown.click("text=Best first")
        assert cards.nth(0).locator(".answer").all_inner_texts() == ["four", "five", "nothing"]
        shown.fill("#find", "no signal")
        assert cards.count() == 1 and "3 + 1?" in cards.nth(0).inner_text()
        browser.close()
    assert wrong == []


def test_long_answers_are_cut_in_the_page():
    item = page.rollout_item(line(0, "q" * 9000, sample("x" * 9000, 0.0)))
    assert item["answers"][0]["text"] == "x" * page.LONGEST + "…" and len(item["question"]) == page.LONGEST + 1
