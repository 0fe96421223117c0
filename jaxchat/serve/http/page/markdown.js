// Markdown of a model to elements. Nothing that a model writes runs, and nothing is loaded for it: HTML is shown as text,
// images as their address, and DOMPurify takes out of the result whatever else could do harm.

import hljs from "./vendor/highlight.min.js";
import { Marked } from "./vendor/marked.esm.js";
import { copy, element, icon } from "./dom.js";

const EVERY = 100; // milliseconds between two full renderings of an answer that is being written

const escaped = (text) =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escaped(text.trimEnd()).replaceAll("\n", "<br>")}</p>` : escaped(text)),
    image: ({ href, text }) => escaped(text ? `${text} (${href})` : href),
  },
});

const SAFE = {
  RETURN_DOM_FRAGMENT: true,
  ALLOWED_TAGS: [
    "a",
    "blockquote",
    "br",
    "code",
    "del",
    "em",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "input",
    "li",
    "ol",
    "p",
    "pre",
    "span",
    "strong",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
  ],
  ALLOWED_ATTR: ["align", "checked", "class", "disabled", "href", "start", "title", "type"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i, // of every attribute but those that can be no address:
  ADD_URI_SAFE_ATTR: ["align", "checked", "disabled", "start", "type"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
};
const purify = window.DOMPurify;
purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A" && node.hasAttribute("href")) {
    node.setAttribute("rel", "noopener nofollow");
    node.setAttribute("target", "_blank");
  }
  if (node.tagName === "INPUT") (node.setAttribute("type", "checkbox"), node.setAttribute("disabled", ""));
  if (node.hasAttribute("class") && !/^(?:language-|hljs-)/.test(node.className)) node.removeAttribute("class");
});

/** Elements for the blocks of `text`, as a DocumentFragment. */
export function renderMarkdown(text) {
  const all = document.createDocumentFragment();
  for (const token of marked.lexer(text)) all.append(block(token, true));
  return all;
}

function block(token, finished) {
  const fragment = purify.sanitize(marked.parser([token]), SAFE);
  for (const code of fragment.querySelectorAll("pre > code")) frameCode(code, finished);
  for (const table of fragment.querySelectorAll("table")) {
    const scroller = element("div", { class: "table", tabindex: 0 });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  return fragment;
}

/** Gives a block of code its language and a button that copies it; colours it once it is finished. */
function frameCode(code, finished) {
  const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
  const text = code.textContent;
  if (finished && hljs.getLanguage(language)) {
    const { value } = hljs.highlight(text, { language, ignoreIllegals: true });
    code.replaceChildren(purify.sanitize(value, SAFE));
  }
  const button = element("button", { type: "button", class: "quiet wide" }, icon("copy"), "Copy");
  button.addEventListener("click", () => copy(text.replace(/\n$/, ""), button));
  const pre = code.parentElement;
  const frame = element(
    "div",
    { class: "code" },
    element("div", { class: "code-bar" }, element("span", {}, language || "text"), button),
  );
  pre.replaceWith(frame);
  pre.tabIndex = 0; // long lines scroll by keyboard
  frame.append(pre);
}

/** Markdown that grows. New text shows at once as text; every so often, and at the end, all of it is rendered. */
export class MarkdownView {
  #blocks = []; // {key, place} of each block that is shown
  #tail = document.createTextNode("");
  #text = "";
  #rendered = -Infinity;
  #timer = null;

  constructor() {
    this.element = element("div", { class: "markdown" });
  }

  /** Shows `text`, which begins with the text before. */
  write(text) {
    this.#tail.appendData(text.slice(this.#text.length));
    this.#text = text;
    const wait = this.#rendered + EVERY - performance.now();
    if (wait <= 0) this.#render(false);
    else this.#timer ??= setTimeout(() => this.#render(false), wait);
  }

  /** Shows `text` as it stays. */
  finish(text) {
    this.#text = text;
    this.#blocks = [];
    this.element.replaceChildren();
    this.#render(true);
  }

  #render(finished) {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#rendered = performance.now();
    this.#tail.remove();
    this.#tail.data = "";
    const tokens = marked.lexer(this.#text).filter((token) => token.type !== "space");
    tokens.forEach((token, index) => {
      const closed = finished || index < tokens.length - 1 || /\n(?:`{3,}|~{3,})\s*$/.test(token.raw);
      const key = `${closed && token.type === "code"} ${token.raw}`;
      if (this.#blocks[index]?.key === key) return;
      const place = element("div", { class: "block" });
      place.append(block(token, closed));
      if (this.#blocks[index]) this.#blocks[index].place.replaceWith(place);
      else this.element.append(place);
      this.#blocks[index] = { key, place };
    });
    for (const { place } of this.#blocks.splice(tokens.length)) place.remove();
    if (!finished) this.#end().append(this.#tail);
  }

  /** Where text goes on: in the last paragraph, item, heading or block of code. */
  #end() {
    let at = this.element;
    const last = () => at.lastElementChild;
    while (last()?.matches(".block, .code, blockquote, code, h1, h2, h3, h4, h5, h6, li, ol, p, pre, ul")) at = last();
    return at;
  }
}
