// What a run has come to: scores, samples and the report.

import { element } from "./dom.js";

const CALL = /<\|python_start\|>([\s\S]*?)<\|python_end\|>(?:<\|output_start\|>([\s\S]*?)<\|output_end\|>)?/g;
const STAGES = ["pretrain", "midtrain", "sft", "rl"];

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const spoken = (name) => name.replaceAll("_", " ");

/** A table of scores: a row a task, a column a stage, and the best of a row marked. */
export function scores(records) {
  if (records.scores.size === 0)
    return element(
      "p",
      { class: "note" },
      "No scores yet: the stage “evaluate” asks held-out questions when the others are finished.",
    );
  const stages = STAGES.filter((stage) => [...records.scores.values()].some((found) => found.has(stage)));
  const head = element(
    "tr",
    {},
    element("th", { scope: "col" }, "held-out questions"),
    ...stages.map((stage) => element("th", { scope: "col" }, `after ${stage}`)),
    element("th", { scope: "col" }, "asked"),
  );
  const rows = [...records.scores].map(([task, found]) => {
    const best = Math.max(...[...found.values()].map(({ score }) => score));
    const asked = [...new Set([...found.values()].map(({ count }) => count))].filter((count) => count !== undefined);
    const cells = stages.map((stage) => cell(found.get(stage), best));
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, spoken(task)),
      ...cells,
      element("td", {}, asked.map((count) => count.toLocaleString("en")).join(", ")),
    );
  });
  const table = element("table", { class: "scores" }, element("thead", {}, head), element("tbody", {}, ...rows));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Scores" }, table);
}

function cell(found, best) {
  if (!found) return element("td", {}, "");
  const bar = element("meter", { min: 0, max: 1, value: found.score, "aria-hidden": "true" });
  const cut = found.cut
    ? element(
        "small",
        { title: `answers that had no room to end in ${found.longest} tokens` },
        `${found.cut.toLocaleString("en")} cut`,
      )
    : null;
  return element(
    "td",
    {},
    element("span", { class: found.score === best && best > 0 ? "best" : "" }, percent(found.score)),
    bar,
    cut,
  );
}

/** What the model said while it trained, the latest of each stage first, and answers to held-out questions. */
export function samples({ samples: said, answers }) {
  const found = document.createDocumentFragment();
  const stages = STAGES.filter((stage) => said.some((sample) => sample.stage === stage) || answers[stage]).reverse();
  if (!stages.length)
    found.append(element("p", { class: "note" }, "No samples yet: training writes some now and then."));
  stages.forEach((stage, i) => {
    const own = said.filter((sample) => sample.stage === stage);
    const section = element(
      "details",
      { open: i === 0 },
      element(
        "summary",
        {},
        element("i", { class: `key stage-${stage}` }),
        stage,
        element("small", {}, summary(own, answers[stage])),
      ),
    );
    if (own.length) section.append(bySteps(own));
    for (const [task, list] of Object.entries(answers[stage] ?? {})) {
      section.append(
        element("h3", {}, `Held-out ${spoken(task)}`),
        element("div", { class: "said" }, ...list.map(answer)),
      );
    }
    found.append(section);
  });
  return element("div", { class: "samples" }, found);
}

function summary(own, answers) {
  const steps = new Set(own.map(({ step }) => step)).size;
  const parts = [];
  if (own.length) parts.push(`samples at ${steps} ${steps === 1 ? "step" : "steps"}`);
  if (answers) parts.push(`answers to ${Object.keys(answers).length} tasks`);
  return parts.join(", ");
}

/** The samples of a stage at one step, and a slider over the steps at which there are some. */
function bySteps(own) {
  const steps = [...new Set(own.map(({ step }) => step))].sort((a, b) => a - b);
  const list = element("div", { class: "said", "aria-live": "polite" });
  const name = element("output");
  const show = (at) => {
    name.textContent = `step ${steps[at].toLocaleString("en")}`;
    list.replaceChildren(
      ...own
        .filter(({ step }) => step === steps[at])
        .map(({ prompt, completion, stage }) => sample(prompt, completion, stage)),
    );
  };
  const slider = element("input", {
    type: "range",
    min: 0,
    max: steps.length - 1,
    value: steps.length - 1,
    "aria-label": "Step of the samples",
    oninput: () => show(slider.valueAsNumber),
  });
  show(steps.length - 1);
  const choice = element("label", { class: "step" }, name, steps.length > 1 ? slider : null);
  return element("div", {}, choice, list);
}

function sample(prompt, completion, stage) {
  if (stage === "pretrain")
    return element("blockquote", {}, element("p", {}, element("b", {}, prompt), ...text(completion)));
  return element("blockquote", {}, element("p", { class: "question" }, prompt), element("p", {}, ...text(completion)));
}

function answer({ question, answer: given, right, score, cut }) {
  const verdict = score >= 1 ? "right" : score > 0 ? `score ${score}` : "wrong";
  const wanted = score < 1 && right ? ` · right: ${right}` : "";
  const mark = element(
    "p",
    { class: `verdict ${score >= 1 ? "right" : "wrong"}` },
    `${score >= 1 ? "✓" : "✗"} ${verdict}${cut ? " · cut off" : ""}${wanted}`,
  );
  return element(
    "blockquote",
    {},
    element("p", { class: "question" }, question),
    element("p", {}, ...text(given)),
    mark,
  );
}

/** A model's text, with its tool calls as one reads them. */
function text(written) {
  const pieces = [];
  let from = 0;
  for (const match of written.matchAll(CALL)) {
    const [whole, call, output] = match;
    pieces.push(
      written.slice(from, match.index),
      element("code", { class: "call" }, output === undefined ? call : `${call} → ${output}`),
      " ",
    );
    from = match.index + whole.length;
  }
  return [...pieces, written.slice(from)];
}

/** The run's report; its plots are left out, since the curves are here. */
export function report({ markdown }, render) {
  if (markdown === null)
    return element("p", { class: "note" }, "No report yet: it is written when the last stage is finished.");
  const text = markdown.replaceAll(/^!\[[^\]]*\]\(plots\/[^)]*\)\n\n\*.*\*$/gm, "");
  // The page breaks lines where a text does. In the report's paragraphs, which are filled, that means nothing.
  const pieces = text.split(/^(```[\s\S]*?^```+$)/m);
  const joined = pieces.map((piece, i) => (i % 2 ? piece : piece.replaceAll(/([^\n|])\n(?=\w)/g, "$1 ")));
  return element("div", { class: "markdown report" }, render(joined.join("")));
}
