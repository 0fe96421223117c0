// For base models, which know no conversation: a text that the model continues.

import { ApiError, advice, stream } from "./api.js";
import { announce, copy, element, icon, iconButton } from "./dom.js";
import { rounded } from "./info.js";
import { fitText } from "./prompt.js";
import { areChanged, lastSettings, samplingFields, settingsDialog } from "./settings.js";
import { conversation as newText } from "./tree.js";

const SAVE_EVERY = 1000; // milliseconds, while the model writes
const LENGTH = 128; // tokens that are written at a time, unless the settings say otherwise

/**
 * Fills the view. Returns `{open(id), focus(), stop(), settings()}`.
 *
 * A kept text has, besides what every conversation has: `text`, all of it; `written`, the length of what was there when
 * the model last began to write; `versions`, its continuations from there, and `version`, which of them is shown.
 */
export function mountText(view, app) {
  const { info, store } = app;
  let kept = null;
  let running = null;
  let writing = null; // the text that the model continues

  const shown = element("div", { class: "paper-shown", "aria-hidden": "true" });
  const field = element("textarea", {
    id: "text",
    "aria-label": "Text",
    placeholder: "Begin a text here, and let the model go on.",
    spellcheck: "false",
    dir: "auto",
  });
  const examples = element("div", { class: "examples", role: "group", "aria-label": "Beginnings" });
  const problem = element("div", {});
  const scroller = element(
    "div",
    { class: "scroller" },
    element("div", { class: "thread" }, head(), element("div", { class: "paper" }, shown, field), problem, examples),
  );
  const go = element("button", { type: "button", class: "primary", onclick: () => (running ? stop() : write(false)) });
  const tools = element("div", { class: "text-tools" });
  const note = element(
    "p",
    { class: "note hint" },
    "This is a base model: it continues a text, and does not answer questions. Ctrl + Enter continues.",
  );
  view.append(scroller, element("div", { class: "foot" }, element("div", { class: "text-bar" }, tools, go), note));
  for (const text of info.examples) {
    examples.append(element("button", { type: "button", onclick: () => (setText(text), write(false)) }, text));
  }

  function head() {
    const facts = [
      info.parameters && `${rounded(info.parameters)} parameters`,
      info.context && `reads ${info.context.toLocaleString("en")} tokens at a time`,
    ];
    return element(
      "header",
      { class: "text-head" },
      element("h1", {}, info.name),
      element("p", { class: "note" }, facts.filter(Boolean).join(" · ")),
    );
  }

  function setText(text) {
    Object.assign(kept, { text, written: null, versions: [], version: 0 });
    show();
  }

  function open(id) {
    const found = id && store.get(id)?.kind === "text" ? store.get(id) : null;
    if (found !== kept || !kept) stop();
    kept = found ?? newText("text", lastSettings(), { text: "", written: null, versions: [], version: 0 });
    if (id && !found) history.replaceState(null, "", "#chat");
    problem.replaceChildren();
    show();
    if (matchMedia("(hover: hover)").matches) field.focus();
  }

  function show() {
    if (field.value !== kept.text) field.value = kept.text;
    const from = kept.written ?? kept.text.length;
    // The field is transparent: what the model wrote is marked behind it, in the same place.
    shown.replaceChildren(kept.text.slice(0, from), element("mark", {}, kept.text.slice(from)), "\n");
    examples.hidden = kept.text !== "";
    go.replaceChildren(icon(running ? "stop" : "send"), running ? "Stop" : "Continue");
    go.disabled = !running && !kept.text;
    const quiet = (name, label, run) =>
      element("button", { type: "button", class: "quiet wide", onclick: run }, icon(name), label);
    tools.replaceChildren();
    if (!running && kept.written !== null) {
      if (kept.versions.length > 1) tools.append(versions());
      tools.append(
        iconButton("retry", "Write it again", () => write(true)),
        iconButton("close", "Take it back", takeBack),
      );
    }
    if (!running && kept.text) {
      const copyButton = iconButton("copy", "Copy", () => copy(kept.text, copyButton));
      tools.append(
        copyButton,
        quiet("inside", "Look inside", () => app.openInside({ text: kept.text })),
      );
    }
    document.getElementById("settings-button").classList.toggle("changed", areChanged(kept.settings));
  }

  function versions() {
    const step = (name, label, by) =>
      iconButton(name, label, () => pick(kept.version + by), {
        disabled: !kept.versions[kept.version + by] && kept.versions[kept.version + by] !== "",
      });
    return element(
      "span",
      { class: "branches", role: "group", "aria-label": "Versions" },
      step("left", "Earlier version", -1),
      element(
        "span",
        { "aria-label": `Version ${kept.version + 1} of ${kept.versions.length}` },
        `${kept.version + 1}/${kept.versions.length}`,
      ),
      step("right", "Later version", 1),
    );
  }

  function pick(version) {
    Object.assign(kept, { version, text: kept.text.slice(0, kept.written) + kept.versions[version] });
    store.save(kept);
    show();
  }

  function takeBack() {
    setText(kept.text.slice(0, kept.written));
    store.save(kept);
    field.focus();
  }

  /** Lets the model continue the text, or write its last continuation again. */
  async function write(again) {
    if (running || !kept.text) return;
    const own = kept;
    running = new AbortController();
    writing = own;
    const { signal } = running;
    if (again) own.text = own.text.slice(0, own.written);
    else Object.assign(own, { written: own.text.length, versions: [] });
    own.versions.push("");
    own.version = own.versions.length - 1;
    own.title ||= own.text.trim().split("\n")[0].slice(0, 80);
    own.updated = Date.now();
    history.replaceState(null, "", `#chat/${own.id}`);
    store.save(own);
    problem.replaceChildren();
    field.readOnly = true;
    show();
    const { seed } = own.settings;
    const drawn = seed === null ? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 : seed + own.version;
    const max_tokens = own.settings.max_tokens ?? LENGTH;
    const fields = { ...samplingFields(own.settings), max_tokens, model: info.model, stream: true, seed: drawn };
    let saved = performance.now();
    try {
      const body = { ...fields, prompt: await fitText(own.text, max_tokens, info.context) };
      if (typeof body.prompt !== "string" && own === kept) {
        const read = body.prompt.length.toLocaleString("en");
        problem.replaceChildren(
          element("p", { class: "note" }, `The model reads only the last ${read} tokens of this text.`),
        );
      }
      for await (const { choices } of stream("v1/completions", { body, signal })) {
        const text = choices?.[0]?.text ?? "";
        own.text += text;
        own.versions[own.version] += text;
        if (performance.now() - saved > SAVE_EVERY) {
          saved = performance.now();
          keep(own);
        }
        const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
        if (own === kept) show();
        if (atEnd) scroller.scrollTop = scroller.scrollHeight;
      }
    } catch (error) {
      if (error.name !== "AbortError") refuse(error);
    }
    running = writing = null;
    field.readOnly = false;
    keep(own);
    if (own !== kept) return show(); // another text, which can be continued now
    if (!own.versions[own.version] && !signal.aborted && !problem.querySelector("[role=alert]")) {
      problem.replaceChildren(element("p", { class: "note" }, "The model ends the text here."));
    }
    show();
    announce(signal.aborted ? "Stopped" : own.versions[own.version]);
  }

  /** Saves a text, unless it was deleted meanwhile. */
  function keep(text) {
    if (store.get(text.id)) store.save(text);
  }

  function refuse(error) {
    if (!(error instanceof ApiError)) console.error(error);
    const { title, text } = advice(error, info);
    problem.replaceChildren(
      element(
        "div",
        { class: "problem", role: "alert" },
        icon("warning"),
        element("p", {}, element("b", {}, title), ` ${text}`),
      ),
    );
  }

  function stop() {
    running?.abort();
  }

  addEventListener("pagehide", () => writing && keep(writing));
  field.addEventListener("input", () => {
    setText(field.value);
    if (store.get(kept.id)) store.save(Object.assign(kept, { updated: Date.now() }));
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    write(false);
  });

  function settings() {
    settingsDialog(kept.settings, true, () => {
      if (store.get(kept.id)) store.save(kept);
      show();
    });
  }

  return { open, focus: () => field.focus(), stop, settings };
}
