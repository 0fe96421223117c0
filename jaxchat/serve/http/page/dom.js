// Elements, icons and a few things that every view needs.

/** Makes an element. `on…` attributes are listeners; undefined, null and false are left out; true is an empty value. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const PATHS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8zM9.5 9.5h5v5h-5zM11 11h2v2h-2z",
  down: "M12 5v14M6 13l6 6 6-6",
  left: "M15 6l-6 6 6 6",
  right: "M9 6l6 6-6 6",
  copy: "M9 9h10v10H9zM5 15V5h10",
  check: "M5 13l4 4L19 7",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  retry: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  more: "M5 11.5h.01v1H5zM12 11.5h.01v1H12zM19 11.5h.01v1H19z",
  search: "M11 18a7 7 0 1 0 0-14 7 7 0 0 0 0 14zM16 16l4 4",
  inside: "M2.5 12S6 5.5 12 5.5 21.5 12 21.5 12 18 18.5 12 18.5 2.5 12 2.5 12zM12 15a3 3 0 1 0 0-6 3 3 0 0 0 0 6z",
  settings:
    "M4 7h9M17 7h3M4 17h3M11 17h9M15 9.5a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5zM9 19.5a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5z",
  tool: "M6 3h12v18H6zM9 7h6M9 12h.01M12 12h.01M15 12h.01M9 16h.01M12 16h.01M15 16h.01",
  moon: "M20 14.5A8 8 0 0 1 9.5 4 8 8 0 1 0 20 14.5z",
  sun: "M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6L7 7M17 17l1.4 1.4M18.4 5.6L17 7M7 17l-1.4 1.4",
  system: "M4 5h16v11H4zM9 20h6M12 16v4",
  keyboard: "M3 7h18v10H3zM7 11h.01M11 11h.01M15 11h.01M8 14h8",
  import: "M12 4v11M7 10l5 5 5-5M5 20h14",
  export: "M12 15V4M7 9l5-5 5 5M5 20h14",
  warning: "M12 4l9 16H3zM12 10v4M12 17h.01",
};
const SVG = "http://www.w3.org/2000/svg";

/** An icon of 20 px that screen readers skip. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" })) {
    svg.setAttribute(key, value);
  }
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows an icon only; `label` is its name and tooltip. */
export function iconButton(name, label, onclick, attributes = {}) {
  const { class: extra = "", ...others } = attributes;
  return element(
    "button",
    { type: "button", class: `quiet ${extra}`.trim(), "aria-label": label, title: label, onclick, ...others },
    icon(name),
  );
}

/** Puts `text` on the clipboard and says so on `button` for a moment. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Clipboards need a secure page: over plain HTTP from another machine there is only the old way.
    const area = element("textarea", { class: "hidden-visually", readonly: true });
    area.value = text;
    button.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const before = [...button.childNodes];
  button.replaceChildren(icon("check"), ...before.filter((node) => node.nodeType === Node.TEXT_NODE));
  announce("Copied");
  setTimeout(() => button.replaceChildren(...before), 1500);
}

/** Lets screen readers say `text` when they are done with what they are saying. */
export function announce(text) {
  const region = document.getElementById("announcements");
  region.append(element("p", {}, text));
  while (region.childElementCount > 20) region.firstElementChild.remove();
}

/** Shows a remark for some seconds at the bottom of the page, with an action to take if one is given. */
export function toast(text, action = null) {
  const place = document.getElementById("toasts");
  const note = element("div", { class: "toast" }, element("span", {}, text));
  if (action) {
    note.append(element("button", { type: "button", onclick: () => (note.remove(), action.run()) }, action.label));
  }
  place.replaceChildren(note);
  setTimeout(() => note.remove(), action ? 10_000 : 5_000);
}

/** Saves `text` as a file of the person who reads the page. */
export function download(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Lets a field grow with its text, also in browsers without CSS's field-sizing. */
export function growing(field) {
  if (CSS.supports("field-sizing", "content")) return;
  const fit = () => {
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight}px`;
  };
  field.addEventListener("input", fit);
  requestAnimationFrame(fit);
}

/** Whether a key event is plain typing, in a field that wants the key for itself. */
export function typing(event) {
  return event.target.closest?.("input, textarea, select, [contenteditable]") !== null;
}
