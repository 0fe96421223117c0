// Attention maps: of a layer all heads in small, and one of them large.

import { element, iconButton } from "./dom.js";
import { percent, visible } from "./tokens.js";

const SMALL = 112; // pixels of a small map at most
const LABELS = 88; // pixels beside a large map, for the tokens' texts
const LEAST_LABEL = 8; // pixels of a row with a text

/** The maps of a layer. A row is a token that looks, a column one that is looked at. */
export class AttentionView {
  constructor(api) {
    this.api = api;
    this.layer = 0;
    this.head = 0;
    this.start = null;
    this.layers = element("select", { "aria-label": "Layer", onchange: () => this.#choose(Number(this.layers.value)) });
    this.before = iconButton("left", "The layer before", () => this.#choose(this.layer - 1));
    this.after = iconButton("right", "The layer after", () => this.#choose(this.layer + 1));
    this.part = element("input", {
      type: "range",
      min: 0,
      "aria-label": "First token that is shown",
      onchange: () => ((this.start = this.part.valueAsNumber), this.#fetch()),
    });
    this.partLabel = element("label", { class: "part", hidden: true }, element("span"), this.part);
    this.heads = element("div", { class: "heads", role: "group", "aria-label": "Heads" });
    this.canvas = element("canvas", {
      tabindex: "0",
      role: "img",
      onkeydown: (event) => this.#onKey(event),
      onpointermove: (event) => this.#onPoint(event),
      onpointerdown: (event) => this.#onPoint(event),
      onpointerleave: () => this.#point(null),
    });
    this.cross = element("div", { class: "cross", hidden: true });
    this.readout = element("p", { class: "readout", role: "status" });
    this.text = element("p", { class: "looks", "aria-hidden": "true" });
    this.note = element("p", { class: "note" });
    this.frame = element("div", { class: "frame" }, this.canvas, this.cross);
    this.element = element(
      "section",
      { class: "panel attention" },
      element("h2", {}, "Attention"),
      element("div", { class: "choice" }, this.before, this.layers, this.after, this.partLabel),
      this.note,
      element(
        "div",
        { class: "maps" },
        this.heads,
        element("div", { class: "large" }, this.readout, this.frame, this.text),
      ),
    );
  }

  /** Shows the maps of `ids`. */
  show(ids) {
    this.ids = ids;
    this.start = null;
    this.#fetch();
  }

  #choose(layer) {
    this.layer = layer;
    this.#fetch();
  }

  async #fetch() {
    this.fetching?.abort();
    const { signal } = (this.fetching = new AbortController());
    this.api.signal.addEventListener("abort", () => this.fetching.abort(), { once: true });
    const start = this.start === null ? {} : { start: this.start };
    try {
      const reply = await this.api.json("api/inside/attention", {
        body: { tokens: this.ids, layer: this.layer, ...start },
        signal,
      });
      this.reply = {
        ...reply,
        maps: reply.maps.map((text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0))),
      };
      this.head = Math.min(this.head, reply.maps.length - 1);
      this.#build();
    } catch (error) {
      if (signal.aborted) return;
      const { title, text } = this.api.advice(error);
      this.note.textContent = `${title} ${text}`;
    }
  }

  #build() {
    const { layer, windows, start, length, side, most, maps } = this.reply;
    const name = (i) =>
      `Layer ${i + 1} of ${windows.length}${windows[i] === null ? "" : `, sees ${windows[i].toLocaleString("en")} tokens back`}`;
    this.layers.replaceChildren(
      ...windows.map((_, i) => element("option", { value: i, selected: i === layer }, name(i))),
    );
    this.before.disabled = layer === 0;
    this.after.disabled = layer === windows.length - 1;
    this.partLabel.hidden = length <= most;
    Object.assign(this.part, { max: length - 1, value: start });
    this.partLabel.firstElementChild.textContent = `Tokens ${(start + 1).toLocaleString("en")} to ${(start + side).toLocaleString("en")} of ${length.toLocaleString("en")}`;
    this.note.textContent =
      `A row is a token that looks, a column one that is looked at; strong is much. A row adds up to 100 %${start > 0 ? " together with the tokens before those that are shown" : ""}.` +
      (windows[layer] === null ? "" : " The dashed line is how far back this layer sees.");
    const focused = this.heads.contains(document.activeElement);
    this.heads.replaceChildren(...maps.map((_, i) => this.#small(i)));
    if (focused) this.heads.children[this.head].focus();
    this.#large();
  }

  #small(i) {
    const canvas = element("canvas", {});
    canvas.width = canvas.height = SMALL * devicePixelRatio;
    this.#paint(canvas, i, canvas.width / this.reply.side);
    return element(
      "button",
      { type: "button", "aria-pressed": String(i === this.head), onclick: () => this.#pick(i) },
      canvas,
      element("span", {}, `head ${i + 1}`),
    );
  }

  #pick(head) {
    this.head = head;
    [...this.heads.children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === head)));
    this.#large();
  }

  #large() {
    const { side } = this.reply;
    const room = this.frame.clientWidth || 480;
    const labelled = (room - LABELS) / side >= LEAST_LABEL;
    this.extent = labelled ? 1 - LABELS / room : 1; // the share of the width that is the map's
    this.canvas.width = room * devicePixelRatio;
    this.canvas.height = this.canvas.width * this.extent;
    const scale = this.canvas.height / side;
    this.#paint(this.canvas, this.head, scale);
    if (labelled) this.#label(scale);
    this.canvas.setAttribute(
      "aria-label",
      `Attention of layer ${this.reply.layer + 1}, head ${this.head + 1}: ${side} by ${side} tokens. Arrow keys move from one to another.`,
    );
    this.text.replaceChildren(
      ...this.reply.tokens.map((token) =>
        element(
          "span",
          {},
          token.special ? visible(token) : token.text.startsWith("bytes:") ? visible(token) : token.text,
        ),
      ),
    );
    this.#point(null);
  }

  /** Writes each token beside the diagonal, where its row ends and its column begins. */
  #label(scale) {
    const context = this.canvas.getContext("2d");
    context.font = `${Math.min(13 * devicePixelRatio, Math.max(9 * devicePixelRatio, scale * 0.82))}px ${getComputedStyle(this.element).fontFamily}`;
    context.fillStyle = this.api.color("--muted");
    context.textBaseline = "middle";
    this.reply.tokens.forEach((token, i) => {
      const text = token.special ? token.text.slice(2, -2).replace("_", " ") : visible(token);
      context.fillText(text, (i + 1) * scale + 5 * devicePixelRatio, (i + 0.55) * scale);
    });
  }

  /** Draws a head's map with squares of `scale` pixels, and the border of the layer's window. */
  #paint(canvas, head, scale) {
    const { side, maps, layer, windows } = this.reply;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    const colors = this.#colors();
    const pixels = context.createImageData(side, side);
    maps[head].forEach((value, i) => {
      // What a token cannot see, because it comes later, stays empty.
      if (i % side <= Math.floor(i / side)) pixels.data.set(colors[value], 4 * i);
    });
    const small = new OffscreenCanvas(side, side);
    small.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, side * scale, side * scale);
    const window = windows[layer];
    if (window === null || window >= side) return;
    context.strokeStyle = this.api.color("--danger");
    context.setLineDash([4, 3]);
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(0, (window + 1) * scale);
    context.lineTo((side - window - 1) * scale, side * scale);
    context.stroke();
  }

  /** From the surface over the accent to the text: one direction of lightness, whatever colours one can tell apart. */
  #colors() {
    const [none, some, much] = ["--surface", "--series-6", "--text"].map((name) =>
      this.api
        .color(name)
        .match(/[\d.]+/g)
        .slice(0, 3)
        .map(Number),
    );
    const mix = (a, b, share) => a.map((value, i) => value + (b[i] - value) * share);
    return Array.from({ length: 256 }, (_, value) => [
      ...(value < 170 ? mix(none, some, value / 170) : mix(some, much, (value - 170) / 85)),
      255,
    ]);
  }

  /** Draws again, in other colours. */
  recolor() {
    if (this.reply) this.#build();
  }

  // --- reading a map ---

  #onPoint(event) {
    if (!this.reply) return;
    const box = this.canvas.getBoundingClientRect();
    const { side } = this.reply;
    const at = (position, size) => Math.min(side - 1, Math.max(0, Math.floor((position / size) * side)));
    this.#point([at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width * this.extent)]);
  }

  #onKey(event) {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") this.#point(null);
    if (!move || !this.reply) return;
    event.preventDefault();
    const last = this.reply.side - 1;
    const from = this.cell ?? [last, last];
    this.#point(this.cell ? from.map((value, i) => Math.min(last, Math.max(0, value + move[i]))) : from);
  }

  /** Says how much the token of a row looks at that of a column, and shows all that it looks at in the text. */
  #point(cell) {
    if (!this.reply) return;
    this.cell = cell;
    this.cross.hidden = cell === null;
    const { side, tokens, maps, layer, windows, start } = this.reply;
    const spans = [...this.text.children];
    if (cell === null) {
      this.readout.textContent = `Layer ${layer + 1}, head ${this.head + 1}. Point at the map, or move with the arrow keys.`;
      spans.forEach((span) => ((span.style.background = ""), (span.className = "")));
      return;
    }
    const [row, column] = cell;
    const weight = (to) => (maps[this.head][row * side + to] / 255) ** 2;
    const window = windows[layer];
    const what =
      column > row
        ? "comes later: it cannot be seen"
        : window !== null && row - column > window
          ? "is too far back for this layer"
          : percent(weight(column));
    const earlier = 1 - tokens.reduce((sum, _, to) => sum + weight(to), 0);
    const rest =
      start > 0 && earlier > 0.02
        ? element("span", {}, `; about ${percent(earlier)} goes to tokens before these`)
        : null;
    this.readout.replaceChildren(
      "from ",
      element("b", {}, visible(tokens[row])),
      " to ",
      element("b", {}, visible(tokens[column])),
      ": ",
      element("b", {}, what),
      rest ?? "",
    );
    const [width, height] = [(100 * this.extent) / side, 100 / side];
    Object.assign(this.cross.style, {
      left: `${column * width}%`,
      top: `${row * height}%`,
      width: `${width}%`,
      height: `${height}%`,
    });
    spans.forEach((span, i) => {
      span.className = i === row ? "looking" : i > row ? "later" : "";
      span.style.background =
        i <= row ? `color-mix(in oklab, var(--series-6) ${Math.round(70 * Math.sqrt(weight(i)))}%, transparent)` : "";
    });
  }
}
