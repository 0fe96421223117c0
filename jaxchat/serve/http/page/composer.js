// The field for a message, with the button that sends or stops, and how much of the context is used.

import { element, growing, icon } from "./dom.js";

/** `{element, field, focus, showRunning, showContext}`; calls `on.send(text)`, `on.stop()` and `on.editLast()`. */
export function composer(on) {
  const field = element("textarea", {
    id: "message",
    rows: 1,
    placeholder: "Ask something",
    "aria-label": "Message",
    enterkeyhint: "send",
    dir: "auto",
  });
  const button = element("button", { type: "button", class: "primary round" });
  const used = element("progress", { max: 1, value: 0, "aria-hidden": "true" });
  const words = element("span", {});
  const meter = element("div", { class: "meter", hidden: true }, used, words);
  const place = element("div", { class: "composer" }, field, element("div", { class: "composer-bar" }, meter, button));
  let running = false;

  function showRunning(now) {
    running = now;
    button.replaceChildren(icon(running ? "stop" : "send"));
    const label = running ? "Stop" : "Send";
    button.setAttribute("aria-label", label);
    button.title = running ? "Stop (Escape)" : "Send (Enter)";
    button.disabled = !running && !field.value.trim();
  }

  /** How full the context is; nothing where `tokens` is null. */
  function showContext(tokens, context) {
    meter.hidden = tokens === null;
    if (meter.hidden) return;
    used.value = Math.min(1, tokens / context);
    words.textContent = `${tokens.toLocaleString("en")} of ${context.toLocaleString("en")} tokens`;
    meter.title =
      "How much of the model’s context this conversation takes. When it is full, the oldest messages are left out.";
  }

  function send() {
    const text = field.value.trim();
    if (running || !text) return;
    field.value = "";
    field.dispatchEvent(new Event("input"));
    on.send(text);
  }

  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return; // Enter picks a character in an input method
    if (event.key === "Enter" && !event.shiftKey) send();
    else if (event.key === "ArrowUp" && !field.value && !running) on.editLast();
    else return;
    event.preventDefault();
  });
  field.addEventListener("input", () => showRunning(running));
  button.addEventListener("click", () => (running ? on.stop() : send()));
  place.addEventListener("click", ({ target }) => target.closest("button") || field.focus());
  growing(field);
  showRunning(false);
  return { element: place, field, focus: () => field.focus(), showRunning, showContext };
}
