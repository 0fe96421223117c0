// What may come next: the likeliest tokens, and what the settings of sampling make of their probabilities.

import { element } from "./dom.js";
import { percent, visible } from "./tokens.js";

const WAIT = 120; // milliseconds after the last change of a setting
const DEFAULTS = { temperature: 0.6, top_k: 50, top_p: 1 };

/** The next token's distribution. `onappend(id)` is called for a token that a reader goes on with. */
export class NextView {
  constructor(api, onappend) {
    this.api = api;
    this.onappend = onappend;
    this.settings = { ...DEFAULTS, ...JSON.parse(localStorage.getItem("jaxchat.settings") ?? "{}") };
    this.where = element("p", { class: "where" });
    this.facts = element("p", { class: "note facts", role: "status" });
    this.bars = element("ol", { class: "bars" });
    this.element = element(
      "section",
      { class: "panel next" },
      element("h2", {}, "Next token"),
      this.where,
      element(
        "div",
        { class: "settings" },
        this.#slider("temperature", "Temperature", 0, 2, 0.05),
        this.#slider("top_p", "Top-p", 0.05, 1, 0.05),
        this.#topK(),
      ),
      this.facts,
      element(
        "div",
        { class: "legend" },
        element(
          "ul",
          {},
          element("li", {}, element("i", { class: "swatch before" }), "the model’s probability"),
          element("li", {}, element("i", { class: "swatch after" }), "with the settings"),
        ),
      ),
      this.bars,
    );
  }

  #slider(name, label, min, max, step) {
    // No output element: the label would name it instead of the slider.
    const shown = element("b", {}, this.settings[name].toFixed(2));
    const input = element("input", {
      type: "range",
      min,
      max,
      step,
      value: this.settings[name],
      oninput: () => ((shown.textContent = input.valueAsNumber.toFixed(2)), this.#set(name, input.valueAsNumber)),
    });
    return element("label", {}, element("span", {}, label, shown), input);
  }

  #topK() {
    const input = element("input", {
      type: "number",
      min: 1,
      step: 1,
      placeholder: "all",
      inputmode: "numeric",
      value: this.settings.top_k,
      oninput: () =>
        input.validity.valid && this.#set("top_k", Number.isNaN(input.valueAsNumber) ? null : input.valueAsNumber),
    });
    return element("label", {}, element("span", {}, "Top-k"), input);
  }

  #set(name, value) {
    this.settings[name] = value;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#fetch(), WAIT);
  }

  /** Shows what may follow `tokens`; `actual` is what does. */
  show(tokens, actual) {
    this.tokens = tokens;
    this.actual = actual;
    const end = tokens
      .slice(-8)
      .map((token) => (token.text.startsWith("bytes:") ? visible(token) : token.text.replaceAll("\n", "⏎")))
      .join("");
    this.where.replaceChildren("after ", element("b", {}, tokens.length > 8 ? "…" : "", end));
    this.#fetch();
  }

  async #fetch() {
    this.fetching?.abort();
    const { signal } = (this.fetching = new AbortController());
    this.api.signal.addEventListener("abort", () => this.fetching.abort(), { once: true });
    const { temperature, top_k, top_p } = this.settings;
    try {
      const reply = await this.api.json("api/inside/next", {
        body: { tokens: this.tokens.map(({ id }) => id), temperature, top_k, top_p },
        signal,
      });
      this.#draw(reply);
    } catch (error) {
      if (signal.aborted) return;
      const { title, text } = this.api.advice(error);
      this.facts.textContent = `${title} ${text}`;
    }
  }

  #draw({ entropy, entropy_after, can_be_drawn, vocabulary, top }) {
    const many =
      can_be_drawn === vocabulary
        ? "every token"
        : `${can_be_drawn.toLocaleString("en")} of ${vocabulary.toLocaleString("en")} tokens`;
    this.facts.textContent = `${entropy.toFixed(2)} bits of choice; ${entropy_after.toFixed(2)} with the settings, which leave ${many}.`;
    const most = Math.max(...top.map(({ probability, after }) => Math.max(probability, after)));
    this.bars.replaceChildren(...top.map((token) => this.#row(token, most)));
  }

  #row(token, most) {
    const bar = (kind, share) => {
      const made = element("span", { class: `bar ${kind}` });
      made.style.width = `${(100 * share) / most}%`;
      return made;
    };
    const { probability, after } = token;
    const own = token.id === this.actual?.id;
    const words = `${visible(token)}: ${percent(probability)}, ${after === 0 ? "never drawn" : percent(after)} with the settings${own ? "; it follows here" : ""}`;
    const go = element(
      "button",
      {
        type: "button",
        class: `${own ? "own" : ""}${after === 0 ? " never" : ""}`,
        "aria-label": `${words}. Go on with it`,
        title: "Go on with this token",
        onclick: () => this.onappend(token.id),
      },
      element("span", { class: "name" }, visible(token)),
      element("span", { class: "track" }, bar("before", probability), bar("after", after)),
      element(
        "span",
        { class: "share" },
        percent(probability),
        element("small", {}, after === 0 ? "never" : percent(after)),
      ),
    );
    return element("li", {}, go);
  }
}
