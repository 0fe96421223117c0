// How answers are drawn, and the system prompt: kept with each conversation, and taken over by the next.

import { element } from "./dom.js";
import { dialog } from "./dialogs.js";

const LAST = "jaxchat.settings";
const DEFAULTS = { temperature: 0.6, top_k: 50, top_p: 1, max_tokens: null, seed: null, system: "" };
const EMPTY = ["top_k", "max_tokens", "seed"]; // may be null
/** `given` with defaults for what is missing or no setting: what was kept or imported is not trusted. */
export function validSettings(given) {
  const fits = (name, value) => {
    if (name === "system") return typeof value === "string";
    return Number.isFinite(value) || (value === null && EMPTY.includes(name));
  };
  const names = Object.keys(DEFAULTS);
  return Object.fromEntries(names.map((name) => [name, fits(name, given?.[name]) ? given[name] : DEFAULTS[name]]));
}

/** The settings of a new conversation: those used last. */
export function lastSettings() {
  try {
    return validSettings(JSON.parse(localStorage.getItem(LAST)));
  } catch {
    return { ...DEFAULTS };
  }
}

/** Whether anything differs from what a new visitor gets. */
export function areChanged(settings) {
  return Object.keys(DEFAULTS).some((name) => settings[name] !== DEFAULTS[name]);
}

/** The fields of a request. */
export function samplingFields({ temperature, top_k, top_p, max_tokens }) {
  const fields = { temperature, top_p };
  if (top_k !== null) fields.top_k = top_k;
  if (max_tokens !== null) fields.max_tokens = max_tokens;
  return fields;
}

function slider(name, label, hint, settings, [min, max], changed) {
  const shown = element("output", { for: name }, settings[name].toFixed(2));
  const input = element("input", { type: "range", id: name, min, max, step: 0.05, "aria-describedby": `${name}-note` });
  input.value = settings[name];
  input.addEventListener("input", () => {
    shown.textContent = Number(input.value).toFixed(2);
    changed(name, Number(input.value));
  });
  return field(name, label, hint, input, shown);
}

function whole(name, label, hint, settings, min, empty, changed) {
  const input = element("input", {
    type: "number",
    id: name,
    min,
    step: 1,
    inputmode: "numeric",
    placeholder: empty,
    "aria-describedby": `${name}-note`,
  });
  input.value = settings[name] ?? "";
  input.addEventListener("input", () => {
    if (input.reportValidity()) changed(name, input.value === "" ? null : Number(input.value));
  });
  return field(name, label, hint, input);
}

function field(name, label, hint, input, shown = null) {
  return element(
    "div",
    { class: "field" },
    element("label", { for: name }, label, shown),
    input,
    element("p", { class: "note", id: `${name}-note` }, hint),
  );
}

/** Lets a person change `settings`; `changed()` is called after each change. */
export function settingsDialog(settings, base, changed) {
  const set = (name, value) => {
    settings[name] = value;
    localStorage.setItem(LAST, JSON.stringify(settings));
    changed();
  };
  const system = element("textarea", {
    id: "system",
    rows: 3,
    "aria-describedby": "system-note",
    placeholder: "For example: You are a friendly helper.",
  });
  system.value = settings.system;
  system.addEventListener("input", () => set("system", system.value));
  const form = element(
    "form",
    { method: "dialog" },
    !base && field("system", "System prompt", "What the model is told before the first message.", system),
    slider(
      "temperature",
      "Temperature",
      "0 always takes the likeliest token; higher is more varied.",
      settings,
      [0, 2],
      set,
    ),
    element(
      "div",
      { class: "pair" },
      whole("top_k", "Top-k", "Of the likeliest tokens.", settings, 1, "all", set),
      whole("max_tokens", "Longest answer", "In tokens.", settings, 1, "as much as fits", set),
    ),
    slider(
      "top_p",
      "Top-p",
      "Draw from the likeliest tokens that together have this probability.",
      settings,
      [0.05, 1],
      set,
    ),
    whole(
      "seed",
      "Seed",
      "The same seed, the same answer. A retry takes the next.",
      settings,
      0,
      "a new one each time",
      set,
    ),
  );
  const reset = element("button", { type: "button" }, "Back to the defaults");
  const box = dialog("Settings", form);
  reset.addEventListener("click", () => {
    for (const [name, value] of Object.entries(DEFAULTS)) set(name, value);
    box.close();
    settingsDialog(settings, base, changed);
  });
  form.append(element("footer", {}, reset, element("button", { type: "submit", class: "primary" }, "Done")));
}
