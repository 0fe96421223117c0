// A message as elements.

import { advice } from "./api.js";
import { copy, element, growing, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { siblings } from "./tree.js";

/** The text of an answer and its tool calls, in the order in which they were written. */
class Body {
  #parts = [];

  constructor(tool) {
    this.tool = tool;
    this.element = element("div", { class: "body" });
  }

  show(node, finished) {
    const pieces = cut(node.content, node.tools);
    pieces.forEach((piece, index) => {
      let part = this.#parts[index];
      if (!part) {
        part = piece.run ? { element: toolRun(this.tool, piece.run) } : new MarkdownView();
        this.#parts.push(part);
        this.element.append(part.element);
      }
      if (piece.run) return;
      if (finished || index < pieces.length - 1) part.finish(piece.text);
      else part.write(piece.text);
    });
    this.element.classList.toggle("waiting", !finished && pieces.length === 0);
    this.element.classList.toggle("writing", !finished);
  }
}

/** `content` in pieces of text, with the tool calls between them. */
function cut(content, tools = []) {
  const characters = [...content]; // the server counts whole characters, JavaScript halves of some
  const pieces = [];
  let from = 0;
  const text = (to) => {
    const piece = characters.slice(from, to).join("");
    if (piece.trim()) pieces.push({ text: piece });
    from = Math.max(from, to);
  };
  for (const run of tools) {
    text(run.at ?? 0);
    pieces.push({ run });
  }
  text(characters.length);
  return pieces;
}

const TOOLS = { calculator: "Calculator", python: "Python" };

/** A tool call, folded. */
function toolRun(tool, { call, output }) {
  const line = call.trim().split("\n")[0];
  const summary = element(
    "summary",
    {},
    icon("tool"),
    element("span", {}, `${TOOLS[tool] ?? "Tool"} `, element("code", {}, line)),
  );
  const part = (name, text) =>
    element("div", {}, element("span", { class: "note" }, name), element("pre", { tabindex: 0 }, text));
  return element("details", { class: "tool" }, summary, part("Call", call), part("Output", output));
}

/** What cut an answer off, and what to do then. */
function ending(node, info, actions) {
  if (node.error) {
    const { title, text, retry } = advice(node.error, info);
    const box = element(
      "div",
      { class: "problem", role: "alert" },
      icon("warning"),
      element("p", {}, element("b", {}, title), ` ${text}`),
    );
    if (retry) box.append(element("button", { type: "button", onclick: () => actions.retry(node) }, "Try again"));
    return box;
  }
  if (node.finish === "stopped") return element("p", { class: "note" }, "Stopped.");
  if (node.finish === "length" && node.full) {
    return element(
      "p",
      { class: "note" },
      `Cut off: the model’s context of ${info.context.toLocaleString("en")} tokens is full. Start a new chat for a longer answer.`,
    );
  }
  if (node.finish === "length")
    return element("p", { class: "note" }, "Cut off at the longest answer that the settings allow.");
  return null;
}

function branches(conversation, node, actions) {
  const all = siblings(conversation, node);
  if (all.length < 2) return null;
  const at = all.indexOf(node);
  const step = (name, label, to) =>
    iconButton(name, label, () => actions.choose(all[to], label), { disabled: !all[to] });
  return element(
    "span",
    { class: "branches", role: "group", "aria-label": "Versions" },
    step("left", "Earlier version", at - 1),
    element("span", { "aria-label": `Version ${at + 1} of ${all.length}` }, `${at + 1}/${all.length}`),
    step("right", "Later version", at + 1),
  );
}

/** What was asked. */
export function question(conversation, node, actions) {
  const bubble = element("div", { class: "bubble", dir: "auto" }, node.content);
  const copyButton = iconButton("copy", "Copy", () => copy(node.content, copyButton));
  const tools = element(
    "div",
    { class: "tools" },
    branches(conversation, node, actions),
    copyButton,
    iconButton("edit", "Edit", () => actions.edit(node)),
  );
  return element("article", { class: "message user", "aria-label": "You", "data-id": node.id }, bubble, tools);
}

/** What was answered: `{element, update, finish}`. `update` shows what has come since, `finish` that it is all. */
export function answer(conversation, node, info, actions, live) {
  const body = new Body(info.tools);
  const place = element(
    "article",
    { class: "message assistant", "aria-label": "Answer", "data-id": node.id },
    body.element,
  );
  const finish = () => {
    body.show(node, true);
    const copyButton = iconButton("copy", "Copy", () => copy(node.content, copyButton));
    const tools = element(
      "div",
      { class: "tools" },
      branches(conversation, node, actions),
      copyButton,
      iconButton("retry", "Try again", () => actions.retry(node)),
    );
    if (node.content || node.tools.length) {
      tools.append(
        element(
          "button",
          { type: "button", class: "quiet wide", onclick: () => actions.inside(node) },
          icon("inside"),
          "Look inside",
        ),
      );
    }
    const end = ending(node, info, actions);
    place.replaceChildren(body.element, ...(end ? [end] : []), tools);
    if (node.error && !node.content) tools.remove();
  };
  if (live) body.show(node, false);
  else finish();
  return { element: place, update: () => body.show(node, false), finish };
}

/** A question as a field to change it in. `send(text)` or `cancel()` is called once. */
export function editor(node, send, cancel) {
  const field = element("textarea", { rows: 1, "aria-label": "Edit the message", dir: "auto" });
  field.value = node.content;
  growing(field);
  const submit = () => field.value.trim() && send(field.value.trim());
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit();
    else if (event.key === "Escape") cancel();
    else return;
    event.preventDefault();
  });
  const buttons = element(
    "footer",
    {},
    element("button", { type: "button", onclick: cancel }, "Cancel"),
    element("button", { type: "button", class: "primary", onclick: submit }, "Send"),
  );
  const place = element("div", { class: "message user editing" }, field, buttons);
  return {
    element: place,
    focus: () => (field.focus(), field.setSelectionRange(field.value.length, field.value.length)),
  };
}
