// What the server says about the model and the run.

import { advice, json } from "./api.js";

const WAIT = 1500; // milliseconds between two questions whether the server is ready

/** Asks for /api/info until the server is there and the model is loaded, and says in `status` what it waits for. */
export async function loadInfo(status) {
  for (;;) {
    try {
      const info = normal(await json("api/info"));
      status.hidden = true;
      return info;
    } catch (error) {
      const { title, text } = advice(error);
      status.hidden = false;
      status.textContent = error.status === 503 ? `${title} This page goes on by itself.` : `${title} ${text}`;
      await new Promise((resume) => setTimeout(resume, WAIT));
    }
  }
}

function normal(info) {
  return { ...info, name: info.run ?? info.model ?? "jaxchat" };
}

/** 1.72M, 561M, 1.9B */
export function rounded(count) {
  for (const [size, letter] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (count >= size) return `${(count / size).toPrecision(3).replace(/\.?0+$/, "")}${letter}`;
  }
  return String(count);
}

/** The model in a few words. */
export function summary(info) {
  return [info.name, info.stage].filter(Boolean).join(" · ");
}
