// The run: its stages, its curves while it trains and afterwards, its scores, samples and report.

import { CHARTS, STAGE_COLORS } from "./charts.js";
import { Chart } from "./curves.js";
import { element, icon } from "./dom.js";
import { Records, count, duration } from "./records.js";
import { report, samples, scores } from "./results.js";

const EVERY = 2000; // milliseconds between two looks for new lines
const REDRAW = 400; // between two drawings while a long file is read
const STAGES_EVERY = 10_000;
const QUIET = 120; // seconds without a line, after which a stage that is not finished counts as stopped
const TRAIN = new Set(Object.keys(STAGE_COLORS));

/** Shows the run in an element until `api.signal` is aborted. */
export function mount(place, api) {
  new RunView(place, api).start();
}

class RunView {
  constructor(place, api) {
    this.api = api;
    this.place = place;
    this.records = new Records();
    this.offset = { next: 0, mark: "" };
    this.info = null;
    this.chosen = null; // the stage that is shown alone
    this.view = {
      records: this.records,
      stages: [],
      smoothing: 36,
      log: false,
      zoom: null,
      color: api.color,
      onzoom: (zoom) => this.#zoom(zoom),
      onpoint: (point) => this.charts.forEach((chart) => chart.point(point)),
    };
    this.charts = CHARTS.map((spec) => new Chart(spec, this.view));
    this.#build();
  }

  #build() {
    this.title = element("h1", {}, "Run");
    this.state = element("p", { class: "state", role: "status" });
    this.stages = element("ol", { class: "stages", "aria-label": "Stages" });
    this.problem = element("div", { class: "problem", role: "alert", hidden: true }, icon("warning"), element("p"));
    this.loading = element("progress", {
      class: "loading",
      max: 1,
      value: 0,
      "aria-label": "Reading the run’s records",
      hidden: true,
    });
    this.filter = element("div", { class: "filter", role: "group", "aria-label": "Stage to show" });
    this.reset = element("button", { type: "button", hidden: true, onclick: () => this.#zoom(null) }, "Show all steps");
    const smoothing = element("input", {
      type: "range",
      min: 0,
      max: 100,
      value: this.view.smoothing,
      oninput: () => this.#smooth(smoothing.valueAsNumber),
    });
    const log = element("input", { type: "checkbox", onchange: () => this.#log(log.checked) });
    this.controls = element(
      "div",
      { class: "controls" },
      this.filter,
      element("label", { class: "smoothing" }, "Smoothing ", smoothing),
      element("label", { class: "log" }, log, " Logarithmic"),
      this.reset,
    );
    this.empty = element(
      "p",
      { class: "note", hidden: true },
      "No curves yet: they begin with the first step of a stage that trains. This page shows them as they come.",
    );
    const hint = element(
      "p",
      { class: "note hint" },
      "Drag across a chart to zoom, double-click to zoom out; the arrow keys read values.",
    );
    const curves = element(
      "div",
      {},
      this.controls,
      this.empty,
      element("div", { class: "charts" }, ...this.charts.map((chart) => chart.element)),
      hint,
    );
    this.panels = { Curves: curves, Scores: element("div"), Samples: element("div"), Report: element("div") };
    this.place.append(
      element("header", { class: "run-header" }, this.title, this.state),
      this.problem,
      this.stages,
      this.loading,
      this.#tabs(),
      ...Object.values(this.panels),
    );
  }

  /** Tabs by the pattern of the ARIA practices: one of them is in the order of the Tab key, arrows move. */
  #tabs() {
    const names = Object.keys(this.panels);
    const tabs = names.map((name) =>
      element(
        "button",
        {
          type: "button",
          role: "tab",
          id: `run-tab-${name}`,
          "aria-controls": `run-panel-${name}`,
          onclick: () => show(name),
        },
        name,
      ),
    );
    const show = (shown, focus = false) => {
      names.forEach((name, i) => {
        tabs[i].setAttribute("aria-selected", String(name === shown));
        tabs[i].tabIndex = name === shown ? 0 : -1;
        this.panels[name].hidden = name !== shown;
        if (name === shown && focus) tabs[i].focus();
      });
    };
    names.forEach((name, i) => {
      const panel = this.panels[name];
      Object.entries({ role: "tabpanel", id: `run-panel-${name}`, "aria-labelledby": `run-tab-${name}` }).forEach(
        ([key, value]) => panel.setAttribute(key, value),
      );
      tabs[i].addEventListener("keydown", (event) => {
        const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (move) show(names[(i + move + names.length) % names.length], true);
      });
    });
    show(names[0]);
    return element("div", { class: "tabs", role: "tablist", "aria-label": "What to show" }, ...tabs);
  }

  start() {
    const { signal } = this.api;
    const redraw = () => this.#draw(true);
    addEventListener("themechange", redraw, { signal });
    document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && this.#look(), {
      signal,
    });
    const timer = setInterval(() => this.#look(), EVERY);
    signal.addEventListener("abort", () => {
      clearInterval(timer);
      this.charts.forEach((chart) => chart.close());
    });
    this.#look();
  }

  /** Fetches what is new; not while the page is hidden, or while it is still fetching. */
  async #look() {
    if (this.looking || document.visibilityState !== "visible") return;
    this.looking = true;
    try {
      if (!this.info || performance.now() - this.info.at > STAGES_EVERY) await this.#fetchStages();
      await this.#fetchRecords();
      await this.#fetchResults();
      this.problem.hidden = !this.info.problem;
      if (this.info.problem) this.problem.lastElementChild.textContent = this.info.problem;
    } catch (error) {
      if (this.api.signal.aborted) return;
      const { title, text } = this.api.advice(error);
      this.problem.hidden = false;
      this.problem.lastElementChild.textContent = `${title} ${text} Until then this page shows what it has, and goes on trying.`;
    } finally {
      this.looking = false;
    }
  }

  #json(path) {
    return this.api.json(path, { signal: this.api.signal });
  }

  async #fetchStages() {
    const info = await this.#json("api/run/stages");
    this.info = { ...info, at: performance.now(), ahead: info.now - Date.now() / 1000 };
    this.title.textContent = info.name
      ? info.name === info.folder
        ? info.name
        : `${info.name} · ${info.folder}`
      : info.folder;
    this.#showState();
  }

  async #fetchRecords() {
    let drawn = performance.now();
    for (;;) {
      const { next, mark } = this.offset;
      const reply = await this.#json(`api/run/metrics?from=${next}${next ? `&mark=${mark}` : ""}`);
      if (this.api.signal.aborted) return;
      if (reply.restart) {
        this.records = this.view.records = new Records();
        this.results = null;
      }
      this.records.add(reply.records);
      if (reply.records.some((record) => record.start)) this.info.at = -Infinity; // a stage has begun
      const moved = reply.next !== next || reply.restart;
      this.offset = { next: reply.next, mark: reply.mark };
      const done = reply.next >= reply.size || !moved;
      this.loading.hidden = done || reply.size < 2e6;
      this.loading.value = reply.size ? reply.next / reply.size : 0;
      if (moved && (done || performance.now() - drawn > REDRAW)) {
        this.#draw();
        drawn = performance.now();
      }
      if (done) break;
    }
    this.empty.hidden = this.records.names().length > 0;
    this.controls.hidden = !this.empty.hidden;
    this.#showState();
  }

  /** Samples, scores and report, if there may be new ones. */
  async #fetchResults() {
    const evaluated = [...this.records.scores.values()].reduce((sum, tasks) => sum + tasks.size, 0);
    const finished = this.info.stages.filter(({ state }) => state === "finished").length;
    const now = `${this.records.samples} ${evaluated} ${finished}`;
    if (this.results === now) return;
    const [said, written] = await Promise.all([this.#json("api/run/samples"), this.#json("api/run/report")]);
    this.panels.Scores.replaceChildren(scores(this.records));
    this.panels.Samples.replaceChildren(samples(said));
    this.panels.Report.replaceChildren(report(written, this.api.markdown));
    this.results = now;
  }

  #draw(anew = false) {
    const names = this.records.names();
    if (this.chosen && !names.includes(this.chosen)) this.chosen = null;
    this.view.stages = this.chosen ? [this.chosen] : names;
    this.#showFilter(names);
    this.reset.hidden = this.view.zoom === null;
    for (const chart of this.charts) chart.update(anew);
  }

  #showFilter(names) {
    const key = `${names} ${this.chosen}`;
    if (this.filterKey === key) return;
    this.filterKey = key;
    const focused = this.filter.contains(document.activeElement) ? document.activeElement.textContent : null;
    const button = (stage, text) =>
      element(
        "button",
        { type: "button", "aria-pressed": String(this.chosen === stage), onclick: () => this.#choose(stage) },
        stage && element("i", { class: `key stage-${stage}` }),
        text,
      );
    this.filter.replaceChildren(
      ...(names.length > 1 ? [button(null, "All stages"), ...names.map((name) => button(name, name))] : []),
    );
    if (focused) [...this.filter.children].find((child) => child.textContent === focused)?.focus();
  }

  #choose(stage) {
    this.chosen = stage;
    this.view.zoom = null;
    this.#draw();
  }

  #zoom(zoom) {
    this.view.zoom = zoom;
    this.#draw();
  }

  #smooth(value) {
    this.view.smoothing = value;
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.#draw());
  }

  #log(on) {
    this.view.log = on;
    this.#draw(true);
  }

  // --- what is finished, under way and to come ---

  #showState() {
    const { stages } = this.info;
    const now = Date.now() / 1000 + this.info.ahead;
    const quiet = this.records.lastTime === null ? Infinity : now - this.records.lastTime;
    const under = stages.find(({ state }) => state === "begun");
    this.stages.replaceChildren(...stages.map((stage) => this.#stage(stage, stage === under && quiet < QUIET)));
    this.state.replaceChildren(...this.#summary(stages, under, quiet));
  }

  #summary(stages, under, quiet) {
    const seconds = stages.reduce((sum, stage) => sum + (stage.state === "finished" ? (stage.seconds ?? 0) : 0), 0);
    const done = stages.filter(({ state }) => state === "finished").length;
    if (!stages.length) return ["Nothing is trained here yet."];
    if (under && quiet < QUIET) {
      const left = this.#left(under.stage);
      return [
        element("i", { class: "live" }),
        `${under.stage} is under way${left === null ? "" : `, ${duration(left)} left`}. Last line ${duration(quiet)} ago.`,
      ];
    }
    if (under)
      return [
        `${under.stage} is not finished${Number.isFinite(quiet) ? `; the last line came ${duration(quiet)} ago` : ""}.`,
      ];
    const rest = stages
      .filter(({ state, stage }) => state !== "finished" && stage !== "report")
      .map(({ stage }) => stage);
    return [
      rest.length
        ? `${done} of ${stages.length} stages are finished; ${rest.join(", ")} to come.`
        : `Finished in ${duration(seconds)}.`,
    ];
  }

  /** Seconds that a stage still needs at the speed so far; null if that is not known. */
  #left(name) {
    const stage = this.records.stages.get(name);
    const total = stage?.totalSteps;
    if (!total || !stage.begun || !stage.last || stage.last.step <= stage.begun.step) return null;
    const each = (stage.last.time - stage.begun.time) / (stage.last.step - stage.begun.step);
    return Math.max(0, total - stage.last.step - 1) * each;
  }

  #stage(info, live) {
    const { stage, state } = info;
    const curves = this.records.stages.get(stage);
    const total = curves?.totalSteps ?? info.total_steps;
    const step = curves?.last ? curves.last.step + 1 : 0;
    const steps = state === "finished" ? info.steps : step;
    const facts = [];
    if (info.problem) facts.push(info.problem);
    else if (state === "waiting") facts.push("to come");
    else if (info.skipped) facts.push("skipped: its data is not there");
    else if (TRAIN.has(stage))
      facts.push(
        state === "finished" || !total
          ? `${(steps ?? 0).toLocaleString("en")} steps`
          : `${steps.toLocaleString("en")} of ${total.toLocaleString("en")} steps`,
      );
    if (info.turned) {
      const { bpb, bpb_at_end: end } = info.turned;
      const step = info.result_step.toLocaleString("en");
      facts.push(`validation turned at step ${step}, the result: ${bpb.toFixed(3)} bits per byte, ${end.toFixed(3)} at the end`);
    }
    if (state === "stale") facts.push("of an earlier start");
    const tokens = state === "finished" ? info.tokens : curves?.last?.tokens;
    if (tokens) facts.push(`${count(tokens)} tokens`);
    if (state === "finished" && info.seconds) facts.push(duration(info.seconds));
    if (state === "begun" && !TRAIN.has(stage)) facts.push("under way");
    const share = state === "finished" ? 1 : total ? Math.min(1, steps / total) : 0;
    const words = {
      finished: "finished",
      begun: live ? "under way" : "not finished",
      waiting: "to come",
      stale: "stale",
    };
    return element(
      "li",
      { class: `${state}${live ? " is-live" : ""} stage-${stage}` },
      element(
        "span",
        { class: "name" },
        element(
          "span",
          { class: "mark", role: "img", "aria-label": words[state] },
          state === "finished" ? icon("check") : null,
        ),
        stage,
      ),
      element("progress", { max: 1, value: share, "aria-label": `${stage}: ${Math.round(100 * share)} %` }),
      element("span", { class: "facts" }, ...facts.map((fact) => element("span", {}, fact))),
    );
  }
}
