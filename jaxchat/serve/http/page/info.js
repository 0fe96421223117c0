// What the server says about the model and the run.

import { advice, json } from "./api.js";

const WAIT = 1500; // milliseconds between two questions whether the server is ready
const EXAMPLES = 4;

/** Asks for /api/info until the server is there and the model is loaded, and says in `status` what it waits for. */
export async function loadInfo(status) {
  for (;;) {
    try {
      const info = await json("api/info");
      info.name = info.run ?? info.model ?? "jaxchat";
      if (info.model) info.examples = (await fitting(info)) ?? info.examples ?? [];
      status.hidden = true;
      return info;
    } catch (error) {
      const { title, text } = advice(error);
      status.hidden = false;
      status.textContent = error.code === "loading" ? `${title} This page goes on by itself.` : `${title} ${text}`;
      await new Promise((resume) => setTimeout(resume, WAIT));
    }
  }
}

/** What this model has shown that it can answer, or go on from: of the run's evaluation and samples. Null if it has none. */
async function fitting(info) {
  try {
    const { samples, answers } = await json("api/run/samples", { signal: AbortSignal.timeout(1000) });
    const begun = samples.filter((sample) => sample.stage === info.stage).map((sample) => sample.prompt);
    const asked = Object.values(answers[info.stage] ?? {}).flatMap((task) => task.find(isGood)?.question ?? []);
    const found = [...new Set(info.base ? begun : asked)].slice(0, EXAMPLES);
    return found.length ? found : null;
  } catch {
    return null; // a server without a run, or a slow disk
  }
}

function isGood({ question, score }) {
  return score === 1 && question.length < 100 && !question.includes("\n");
}

/** 1.72M, 561M, 1.9B */
export function rounded(count) {
  for (const [size, letter] of [
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (count >= size) return `${(count / size).toPrecision(3).replace(/\.?0+$/, "")}${letter}`;
  }
  return String(count);
}

/** The model in a few words. */
export function summary(info) {
  return [info.name, info.stage].filter(Boolean).join(" · ");
}
