// Look inside: how likely each token of a text was, what may come after any of them, and which attends to which.

import { element, icon } from "./dom.js";
import { AttentionView } from "./attention.js";
import { NextView } from "./next.js";
import { TokensView, byTheModel } from "./tokens.js";

const LONGEST = 256; // tokens of an answer to look into
const KEPT = "jaxchat.inside"; // the text that was looked into last, until the tab is closed
const EXAMPLE = "Mira lives in Millbrook with a rabbit. Every morning Mira feeds her rabbit.";

/** Shows the inside of the model until `api.signal` is aborted. */
export function mount(place, api) {
  new InsideView(place, api).start();
}

/** How many tokens come before the place to begin with: where the answer was most open, or the end of other text. */
function mostOpen(tokens) {
  if (tokens.at(-1).text !== "<|assistant_end|>") return tokens.length;
  const written = byTheModel(tokens);
  const open = tokens.map(({ entropy }, i) => (written[i] ? (entropy ?? 0) : 0));
  return open.indexOf(Math.max(...open));
}

class InsideView {
  constructor(place, api) {
    this.api = api;
    const { base } = api.info;
    this.field = element("textarea", {
      rows: 3,
      spellcheck: "false",
      "aria-label": "Text to look into",
      onkeydown: (event) => this.#onKey(event),
    });
    this.kind = element(
      "select",
      { "aria-label": "How the model reads it" },
      element("option", { value: "question" }, "a question, with the answer"),
      element("option", { value: "text" }, "plain text"),
    );
    const button = element("button", { class: "primary" }, "Look inside");
    this.form = element(
      "form",
      { class: "source", onsubmit: (event) => (event.preventDefault(), this.#ask()) },
      this.field,
      element("div", { class: "row" }, base ? null : this.kind, button),
    );
    this.problem = element("div", { class: "problem", role: "alert", hidden: true }, icon("warning"), element("p"));
    this.from = element(
      "p",
      { class: "note from", hidden: true },
      "The conversation that you came from. ",
      element(
        "button",
        { type: "button", class: "quiet wide", onclick: () => this.#other() },
        "Look into another text",
      ),
    );
    this.tokens = new TokensView((count) => this.#choose(count));
    this.next = new NextView(api, (id) => this.#append(id));
    this.attention = new AttentionView(api);
    this.found = element(
      "div",
      { class: "found", hidden: true },
      this.tokens.element,
      this.next.element,
      this.attention.element,
    );
    place.append(
      element("h1", { class: "hidden-visually" }, "Look inside"),
      this.form,
      this.from,
      this.problem,
      this.found,
    );
  }

  start() {
    const { messages, text, info } = this.api;
    addEventListener("themechange", () => this.attention.recolor(), { signal: this.api.signal });
    if (messages && !info.base) {
      this.form.hidden = true;
      this.from.hidden = false;
      this.#look({ messages });
      return;
    }
    const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
    this.field.value = text ?? kept?.text ?? (info.base ? EXAMPLE : (info.examples?.[0] ?? "Who are you?"));
    this.kind.value = text || info.base ? "text" : (kept?.kind ?? "question");
    this.#ask();
  }

  #other() {
    this.form.hidden = false;
    this.from.hidden = true;
    this.field.value = "";
    this.field.focus();
  }

  #onKey(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.form.requestSubmit();
  }

  #ask() {
    const text = this.field.value;
    const kind = this.api.info.base ? "text" : this.kind.value;
    if (!text.trim()) return this.field.focus();
    sessionStorage.setItem(KEPT, JSON.stringify({ text, kind }));
    if (kind === "text") this.#look({ text });
    else this.#answer([{ role: "user", content: text }]);
  }

  /** Looks into a question together with the likeliest answer. */
  async #answer(messages) {
    const { signal } = this.#begin();
    try {
      const { choices } = await this.api.json("v1/chat/completions", { body: { messages, temperature: 0, max_tokens: LONGEST }, signal });
      const { content, tool_runs } = choices[0].message;
      messages = [...messages, { role: "assistant", content, tool_runs }];
    } catch (error) {
      if (signal.aborted) return;
      this.found.classList.remove("waiting");
      return this.#fail(error);
    }
    this.#look({ messages });
  }

  /** Ends what was looked at before. */
  #begin() {
    this.looking?.abort();
    this.looking = new AbortController();
    this.api.signal.addEventListener("abort", () => this.looking.abort(), { once: true });
    this.found.classList.add("waiting");
    this.problem.hidden = true;
    return this.looking;
  }

  #fail(error) {
    const { title, text } = this.api.advice(error);
    this.problem.hidden = false;
    this.problem.lastElementChild.replaceChildren(element("b", {}, title), ` ${text}`);
  }

  /** Shows what `source`, a request's `tokens`, `text` or `messages`, is made of, and what comes after it. */
  async #look(source) {
    const { signal } = this.#begin();
    try {
      const reply = await this.api.json("api/inside/tokens", { body: source, signal });
      this.all = reply.tokens;
      this.found.hidden = false;
      this.tokens.show(reply.tokens);
      const ids = reply.tokens.map(({ id }) => id);
      this.#choose(mostOpen(reply.tokens));
      this.attention.show(ids);
    } catch (error) {
      if (!signal.aborted) this.#fail(error);
    } finally {
      if (!signal.aborted) this.found.classList.remove("waiting");
    }
  }

  /** Asks what comes after the first `count` tokens. */
  #choose(count) {
    this.count = count;
    this.tokens.mark(count);
    this.next.show(this.all.slice(0, count), this.all[count] ?? null);
  }

  /** Goes on from the chosen place with another token. */
  #append(id) {
    this.#look({ tokens: [...this.all.slice(0, this.count).map((token) => token.id), id] });
  }
}
