// Dialogs that every view can open.

import { element, iconButton } from "./dom.js";

/** Opens a dialog and returns it; it is gone once it is closed. Escape closes it. */
export function dialog(title, ...content) {
  const id = `dialog-${Math.random().toString(36).slice(2)}`;
  const box = element("dialog", { "aria-labelledby": id });
  const close = iconButton("close", "Close", () => box.close());
  box.append(element("header", {}, element("h2", { id }, title), close), ...content);
  box.addEventListener("close", () => box.remove());
  document.getElementById("dialogs").append(box);
  box.showModal();
  return box;
}

/** Asks for the API key; null if the person gives none. */
export function keyDialog(refused) {
  return new Promise((resolve) => {
    const input = element("input", {
      type: "password",
      id: "key",
      autocomplete: "off",
      required: true,
      "aria-describedby": "key-note",
    });
    const what = refused
      ? "The server refused this key. Type the one that jaxchat serve was started with."
      : "The server wants the API key that jaxchat serve was started with. It is kept until this tab is closed.";
    const note = element(
      "p",
      { id: "key-note", class: refused ? "note danger" : "note", role: refused ? "alert" : null },
      what,
    );
    const field = element("div", { class: "field" }, element("label", { for: "key" }, "Key"), input);
    const footer = element("footer", {}, element("button", { type: "submit", class: "primary" }, "Continue"));
    const form = element("form", { method: "dialog" }, note, field, footer);
    let typed = null;
    form.addEventListener("submit", () => (typed = input.value.trim() || null));
    dialog("API key", form).addEventListener("close", () => resolve(typed));
    input.focus();
  });
}

const KEYS = [
  ["Enter", "send the message"],
  ["Shift + Enter", "new line"],
  ["Escape", "stop the answer; leave an edit"],
  ["↑", "in an empty message field: edit the last message"],
  ["/", "go to the message field"],
  ["Ctrl + Shift + O", "new chat"],
  ["Ctrl + Shift + S", "show or hide the conversations"],
  ["?", "this list"],
];

const WRITING = [
  ["Ctrl + Enter", "continue the text"],
  ["Escape", "stop"],
  ["/", "go to the text"],
  ["Ctrl + Shift + O", "new text"],
  ["Ctrl + Shift + S", "show or hide the texts"],
  ["?", "this list"],
];

/** Lists the keys that do something. */
export function shortcutsDialog(info) {
  const list = element("dl", { class: "keys" });
  const apple = /Mac|iPhone|iPad/.test(navigator.platform);
  for (const [keys, does] of info.base ? WRITING : KEYS) {
    const named = element("dt", {});
    (apple ? keys.replace("Ctrl", "⌘") : keys)
      .split(" + ")
      .forEach((key, index) => named.append(...(index ? [" "] : []), element("kbd", {}, key)));
    list.append(named, element("dd", {}, does));
  }
  dialog("Keyboard", list);
}
