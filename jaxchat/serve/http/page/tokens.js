// Tokens coloured by how likely they were, and what else the model might have written there.

import { element } from "./dom.js";

/** From which probability on a token has a colour, and the colour's class; the last one is for the least likely. */
export const LEVELS = [0.9, 0.5, 0.2, 0.05, 0.01, 0];
const BREAKS = new Set(["<|user_start|>", "<|assistant_start|>"]);

/** The class of a probability. */
export function level(probability) {
  return `level-${LEVELS.findIndex((least) => probability >= least)}`;
}

/** A token's text as one can see it: line breaks, blanks at its ends, and bytes of half a character. */
export function visible({ text, bytes }) {
  if (text.startsWith("bytes:"))
    return bytes.map((byte) => `⟨${byte.toString(16).toUpperCase().padStart(2, "0")}⟩`).join("");
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣");
}

export function percent(share) {
  if (share >= 0.9995) return share === 1 ? "100 %" : "> 99.9 %";
  if (share > 0 && share < 0.00005) return "< 0.01 %";
  return `${(100 * share).toFixed(share < 0.001 ? 3 : share < 0.1 ? 2 : 1)} %`;
}

/**
 * Which tokens the model writes: in a conversation those of the assistant without the outputs of tools, in other text, and
 * where the assistant has not said anything yet, all.
 */
export function byTheModel(tokens) {
  let writing = false;
  const written = tokens.map(({ special, text }) => {
    const own = writing && text !== "<|output_start|>";
    if (special && text === "<|assistant_start|>") writing = true;
    if (special && (text === "<|assistant_end|>" || text === "<|output_start|>")) writing = false;
    if (special && text === "<|output_end|>") writing = true;
    return own;
  });
  return written.includes(true) ? written : tokens.map(() => true);
}

/** A list of tokens. `onchoose(count)` is called with how many of them come before the chosen place. */
export class TokensView {
  constructor(onchoose) {
    this.onchoose = onchoose;
    this.facts = element("p", { class: "note facts" });
    this.list = element("div", {
      class: "tokens",
      role: "listbox",
      "aria-label": "Tokens. Arrow keys move, Enter shows what may come next.",
      onkeydown: (event) => this.#onKey(event),
      onclick: (event) => this.#onClick(event),
      onpointerover: (event) => event.pointerType === "mouse" && this.#point(this.#indexOf(event.target)),
      onpointerleave: () => this.#point(null),
      onfocusin: (event) => this.#point(this.#indexOf(event.target)),
      onfocusout: () => this.#point(null),
    });
    this.card = element("div", { class: "card", role: "status", hidden: true });
    const swatches = LEVELS.map((least, i) =>
      element(
        "li",
        {},
        element("i", { class: `swatch level-${i}` }, "Aa"),
        i === LEVELS.length - 1 ? "less" : `${100 * least} %`,
      ),
    );
    this.given = element("li", {}, element("i", { class: "swatch given" }, "Aa"), "given to the model");
    this.element = element(
      "section",
      { class: "panel" },
      element("h2", {}, "Tokens"),
      this.facts,
      element(
        "div",
        { class: "legend" },
        element("span", {}, "Probability at least"),
        element("ul", {}, ...swatches, this.given),
      ),
      element("div", { class: "tokens-place" }, this.list, this.card),
      element(
        "p",
        { class: "note" },
        "Point at a token, tap it, or move with the arrow keys: the card has what the model found likely there. A click, or Enter, also shows what may come after it.",
      ),
    );
  }

  show(tokens) {
    this.tokens = tokens;
    this.card.hidden = true;
    const written = byTheModel(tokens);
    this.spans = tokens.map((token, i) => this.#span(token, i, written[i]));
    const pieces = [];
    tokens.forEach((token, i) => {
      if (i > 1 && token.special && BREAKS.has(token.text)) pieces.push(element("br"));
      pieces.push(this.spans[i]);
      if (token.text.includes("\n")) pieces.push(element("br"));
    });
    this.list.replaceChildren(...pieces);
    const predicted = tokens.filter((token, i) => i > 0 && written[i]);
    this.given.hidden = written.every((one, i) => one || i === 0);
    const bits = predicted.reduce((sum, { probability }) => sum - Math.log2(Math.max(probability, 1e-30)), 0);
    const first = predicted.filter(({ rank }) => rank === 1).length;
    const parts = [`${tokens.length.toLocaleString("en")} ${tokens.length === 1 ? "token" : "tokens"}`];
    if (!this.given.hidden) parts.push(`${predicted.length.toLocaleString("en")} of the assistant`);
    if (predicted.length)
      parts.push(
        `${(bits / predicted.length).toFixed(2)} bits of surprise each`,
        `${Math.round((100 * first) / predicted.length)} % were the likeliest`,
      );
    this.facts.textContent = parts.join(" · ");
  }

  /** Marks the token before the chosen place. */
  mark(count) {
    this.spans.forEach((span, i) => {
      span.setAttribute("aria-selected", String(i === count - 1));
      span.tabIndex = i === count - 1 ? 0 : -1;
    });
  }

  #span(token, i, written) {
    const first = token.probability === undefined;
    const kind = first || !written ? "given" : level(token.probability);
    const name = first
      ? `${visible(token)}, the beginning`
      : `${visible(token)}, ${percent(token.probability)}, rank ${token.rank.toLocaleString("en")}`;
    const bytes = token.text.startsWith("bytes:");
    const shown = token.special
      ? token.text.slice(2, -2).replace("_", " ")
      : bytes || token.text.includes("\n")
        ? visible(token)
        : token.text;
    return element(
      "span",
      {
        class: `token ${kind}${token.special ? " special" : ""}${bytes ? " bytes" : ""}`,
        role: "option",
        "aria-label": name,
        "data-index": i,
        tabindex: "-1",
      },
      shown,
    );
  }

  #indexOf(target) {
    const index = target.closest?.(".token")?.dataset.index;
    return index === undefined ? null : Number(index);
  }

  #onClick(event) {
    const index = this.#indexOf(event.target);
    if (index === null) return;
    this.onchoose(index + 1);
    this.spans[index].focus();
    this.#point(index);
  }

  #onKey(event) {
    const at = this.#indexOf(event.target);
    if (at === null) return;
    let to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: this.spans.length - 1 }[event.key];
    if (event.key === "ArrowUp" || event.key === "ArrowDown") to = this.#beyond(at, event.key === "ArrowUp" ? -1 : 1);
    if (event.key === "Enter" || event.key === " ") this.onchoose(at + 1);
    else if (event.key === "Escape") this.#point(null);
    else if (to === undefined) return;
    else this.#move(at, Math.min(this.spans.length - 1, Math.max(0, to)));
    event.preventDefault();
  }

  #move(from, to) {
    this.spans[from].tabIndex = -1;
    this.spans[to].tabIndex = 0;
    this.spans[to].focus();
  }

  /** The token nearest to the one at `at` in the line above or below. */
  #beyond(at, direction) {
    const place = this.spans[at].getClientRects()[0];
    let best = at;
    let least = Infinity;
    for (let i = at + direction; i >= 0 && i < this.spans.length; i += direction) {
      const other = this.spans[i].getClientRects()[0];
      const lines = ((other.top - place.top) * direction) / place.height;
      if (lines < 0.5) continue;
      if (lines > 2.5 && best !== at) break;
      const distance = Math.abs(other.left - place.left) + 1000 * Math.round(lines);
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }

  /** Shows the card of a token, or none. */
  #point(index) {
    this.spans?.forEach((span, i) => span.classList.toggle("pointed", i === index));
    this.card.hidden = index === null;
    if (index === null) return;
    const token = this.tokens[index];
    const head = element("p", {}, element("b", {}, visible(token)), " ", element("small", {}, `id ${token.id}`));
    if (token.probability === undefined) {
      this.card.replaceChildren(head, element("p", { class: "note" }, "The beginning: nothing predicts it."));
    } else {
      const facts = element(
        "p",
        {},
        `${percent(token.probability)} · rank ${token.rank.toLocaleString("en")} · ${token.entropy.toFixed(2)} bits of choice`,
      );
      this.card.replaceChildren(
        head,
        facts,
        element("ol", {}, ...token.alternatives.map((other) => alternative(other, token))),
      );
    }
    this.#placeCard(this.spans[index]);
  }

  #placeCard(span) {
    const { offsetWidth: room } = this.list;
    const { offsetLeft: left, offsetTop: top, offsetHeight: height } = span;
    this.card.style.left = `${Math.max(0, Math.min(left, room - this.card.offsetWidth))}px`;
    this.card.style.top = `${top + height + 6 - this.list.scrollTop}px`;
  }
}

function alternative({ id, text, probability }, token) {
  const bar = element("span", { class: "bar" });
  bar.style.width = `${100 * probability}%`;
  const name = visible({ text, bytes: bytesOf(text) });
  return element(
    "li",
    { class: id === token.id ? "own" : "" },
    element("span", { class: "name" }, name),
    element("span", { class: "track" }, bar),
    element("span", { class: "share" }, percent(probability)),
  );
}

/** The bytes of a token that is written as `bytes:\xe2\x80`. */
function bytesOf(text) {
  return [...text.matchAll(/\\x([0-9a-f]{2})/g)].map(([, digits]) => Number.parseInt(digits, 16));
}
