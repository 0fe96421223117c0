"""The view of a run in headless Chromium: finished, while it trains, and long."""

import json

import pytest

from jaxchat.config import Experiment, ModelConfig
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.metrics import Metrics
from jaxchat.serve.http.serving import Server
from tests.serve.http.conftest import web

expect = pytest.importorskip("playwright.sync_api").expect
TOO_WIDE = "[...document.querySelectorAll('.view:not([hidden])')].some((one) => one.scrollWidth > one.clientWidth)"
# Whether a chart has anything drawn in colour.
DRAWN = """(canvas) => { const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200 && Math.abs(data[i] - data[i + 1]) > 40) return true;
  return false; }"""


@pytest.fixture
def directory(tmp_path):
    """A run whose pretraining is finished and whose fine-tuning is under way."""
    directory = RunDirectory(tmp_path / "run")
    experiment = Experiment(name="tiny", model=ModelConfig(depth=1))
    directory.open(experiment)
    for stage in ("pretrain", "sft"):
        directory.begin(stage, experiment)
    directory.write_record("pretrain", {"stage": "pretrain", "steps": 200, "tokens": 204800, "seconds": 65.0})
    with Metrics(directory.path, "pretrain", total_steps=200, live=False) as metrics:
        for step in range(200):
            loss = float("nan") if step in (150, 151) else 6 / (1 + step)
            metrics.log(step, loss=loss, grad_norm=1.0, lr_matrix=0.02, tokens_per_second=1e5, mfu=0.5)
        metrics.sample(200, "Once upon", " a time <img src=x onerror=alert(1)>")
        metrics.log(200, bpb=0.9)
    with Metrics(directory.path, "evaluate", live=False) as metrics:
        metrics.log(200, of="pretrain", **{"score/long_sums": 0.25, "count/long_sums": 200, "cut/long_sums": 3})
    return directory


@pytest.fixture
def watch(directory, visit):
    """Opens the page of a server that watches the run."""
    with web(Server(None, run_dir=str(directory.path))) as client:
        yield lambda **options: visit(str(client.base_url), **options)


def chart(page, name):
    return page.locator("article", has=page.get_by_role("heading", name=name))


def test_curves_are_drawn_and_read(watch):
    page = watch()
    loss = chart(page, "Training loss")
    expect(loss.locator(".readout")).to_contain_text("pretrain 1990.03")
    assert loss.locator("canvas").evaluate(DRAWN)
    expect(loss.locator(".remark")).to_have_text("2 values are not finite: gaps in the line.")
    expect(chart(page, "MFU").locator(".readout")).to_contain_text("50.0 %")
    expect(chart(page, "Reward")).to_be_hidden()
    box = loss.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    expect(loss.locator(".readout")).to_contain_text("pretrain 100")
    expect(chart(page, "Gradient norm").locator(".readout")).to_contain_text("pretrain 100")  # all charts follow
    page.mouse.move(5, 5)
    loss.locator(".plot").focus()
    page.keyboard.press("Home")
    expect(loss.locator(".readout")).to_contain_text("pretrain 06")


def test_scores_on_the_way_have_a_line_for_each_that_there_is(watch, directory):
    with Metrics(directory.path, "sft", total_steps=50, live=False) as metrics:
        for step, score in ((0, 0.25), (10, 0.5)):
            metrics.log(step, **{"sample_score/arc_easy": score, "sample_low/arc_easy": 0.1, "sample_score/gsm8k": 0.0})
    with Metrics(directory.path, "pretrain", total_steps=200, live=False) as metrics:
        metrics.log(200, centered_mean_v1_of_18=-0.0312, centered_mean_v2_of_18=0.0125, **{"core/copa": 0.5})
        metrics.sample(200, "", "A text of its own.", seed=0)
    page = watch()
    tasks, core = chart(page, "Tasks on a sample"), chart(page, "CORE on a sample")
    expect(tasks.locator(".readout")).to_have_text("sft 10arc easy 50.0 %gsm8k 0 %")
    expect(core.locator(".readout")).to_contain_text("18 tasks, baselines v1 −0.0312")
    assert tasks.locator("canvas").evaluate(DRAWN)
    page.get_by_role("tab", name="Samples").click()
    expect(page.get_by_role("tabpanel")).to_contain_text("A text of its own.")


def test_zoom_scale_and_smoothing(watch):
    page = watch()
    loss = chart(page, "Training loss")
    expect(loss.locator(".readout")).to_contain_text("pretrain 199")
    box = loss.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 20, steps=3)
    page.mouse.up()
    reset = page.get_by_role("button", name="Show all steps")
    expect(reset).to_be_visible()
    page.mouse.move(box["x"] + 2, box["y"] + 20)
    expect(loss.locator(".readout")).to_contain_text("pretrain 100")
    reset.click()
    expect(reset).to_be_hidden()
    page.get_by_label("Logarithmic").check()
    page.get_by_label("Smoothing").fill("90")
    expect(loss.locator("canvas")).to_be_visible()
    assert loss.locator("canvas").evaluate(DRAWN)


def test_lines_appear_while_it_trains(watch, directory):
    page = watch()
    stages = page.get_by_label("Stages").get_by_role("listitem")
    expect(stages.filter(has_text="pretrain")).to_contain_text("200 steps")
    expect(stages.filter(has_text="midtrain")).to_contain_text("to come")
    with Metrics(directory.path, "sft", total_steps=50, live=False) as metrics:
        for step in range(10):
            metrics.log(step, loss=1.0 + step, tokens=1000 * step)
        loss = chart(page, "Training loss")
        expect(loss.locator(".readout")).to_contain_text("sft 910", timeout=10_000)
        expect(stages.filter(has_text="sft")).to_contain_text("10 of 50 steps")
        expect(page.get_by_role("button", name="sft")).to_be_visible()
        expect(page.locator(".state")).to_contain_text("sft is under way")
        metrics.sample(10, "Hello?", "Hi.")
    page.get_by_role("tab", name="Samples").click()
    expect(page.get_by_role("tabpanel")).to_contain_text("Hi.", timeout=10_000)
    with Metrics(directory.path, "sft", total_steps=50, live=False) as metrics:
        metrics.log(5, loss=77.0)  # resumed at an earlier step
    page.get_by_role("tab", name="Curves").click()
    expect(loss.locator(".readout")).to_contain_text("sft 577", timeout=10_000)
    (directory.path / "metrics.jsonl").write_text(json.dumps({"stage": "pretrain", "step": 0, "loss": 3.5}) + "\n")
    expect(loss.locator(".readout")).to_contain_text("pretrain 03.5", timeout=10_000)


def test_scores_samples_and_report(watch, directory):
    (directory.path / "report.md").write_text(
        "# tiny\n\nA chatbot\nfrom nothing.\n\n![loss](plots/loss.png)\n\n*Training loss.*\n\n"
        "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"
    )
    page = watch()
    page.get_by_role("tab", name="Scores").click()
    row = page.get_by_role("row").filter(has_text="long sums")
    expect(row).to_contain_text("25.0 %")
    expect(row).to_contain_text("3 cut")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Samples")).to_be_focused()
    expect(page.get_by_role("tabpanel")).to_contain_text("Once upon a time <img src=x onerror=alert(1)>")
    page.keyboard.press("ArrowRight")
    panel = page.get_by_role("tabpanel")
    expect(panel.get_by_role("heading", name="tiny")).to_be_visible()
    expect(panel.get_by_role("cell", name="2")).to_be_visible()
    assert "plots/" not in panel.inner_text() and "A chatbot from nothing." in panel.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(watch, scheme):
    page = watch(viewport={"width": 360, "height": 640}, color_scheme=scheme, has_touch=True)
    loss = chart(page, "Training loss")
    expect(loss.locator(".readout")).to_contain_text("pretrain 199")
    for name in ("Curves", "Scores", "Samples", "Report"):
        page.get_by_role("tab", name=name).click()
        assert not page.evaluate(TOO_WIDE)


def test_a_hundred_thousand_lines(watch, directory):
    lines = [json.dumps({"stage": "pretrain", "step": step, "loss": 1 + 1 / (1 + step)}) for step in range(100_000)]
    (directory.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = watch()
    loss = chart(page, "Training loss")
    expect(loss.locator(".readout")).to_contain_text("pretrain 99,999", timeout=60_000)
    assert loss.locator("canvas").evaluate(DRAWN)


def test_a_server_that_goes_away_is_a_remark(directory, visit):
    with web(Server(None, run_dir=str(directory.path))) as client:
        page = visit(str(client.base_url))
        expect(chart(page, "Training loss").locator(".readout")).to_contain_text("pretrain 199")
    expect(page.get_by_role("alert")).to_contain_text("does not answer", timeout=10_000)
    expect(chart(page, "Training loss")).to_be_visible()
